"""Every number of a key is bounded where it is read: a hostile key costs nobody memory or hours."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import pytest
from keys import InMemory, known_key, one_line
from pydantic import TypeAdapter

from countermark.cli import run
from countermark.errors import ConfigError, CountermarkError
from countermark.keys import streams
from countermark.keys.key import Key, KeyMaterial
from countermark.recipients import copies, trace
from countermark.recipients.tardos import score_recipients
from countermark.results.verdict import VerificationOptions
from countermark.schemes import SCHEMES, load_scheme, make_scheme
from countermark.schemes.deepstego.scheme import DeepStego
from countermark.schemes.key_limits import MOST_CODE_PLACES, MOST_RECIPIENTS
from countermark.schemes.stamp.scheme import CarrierStream, Stamp
from countermark.verification.verify import examine

MATERIAL = replace(KeyMaterial.from_test_seed(1), test_key=False)
REQUIRED: Mapping[str, dict[str, Any]] = {
    "uchida": {"layer": "fc.weight"},
    "hash_filter": {"layer": "fc.weight"},
    "independent_network": {"layer": "fc.weight"},
    "stamp": {"layer": "fc.weight"},
    "deepstego": {"classes": 10},
    "deep_watermarking": {},
    "adi": {"classes": 10},
    "zhang": {"classes": 10},
    "guo": {"classes": 10},
}
HUGE = (2**52, -(2**52), 1e300, -1e300)
NOT_FINITE = (float("nan"), float("inf"), -float("inf"), 10**400)
MOST_BYTES = 64 << 20  # of key stream that a refusal, or a small reading, may take


def takes_numbers(schema: Mapping[str, Any]) -> bool:
    """Whether a field's JSON schema is one of numbers, or of lists of them."""
    parts = [schema, *schema.get("anyOf", ()), schema.get("items", {})]
    return any(each.get("type") in ("integer", "number") for each in parts)


def numeric_fields() -> Iterator[tuple[str, str, bool]]:
    """Scheme, field, and whether the field is a list, for all fields that take numbers."""
    for name, cls in SCHEMES.items():
        hints = get_type_hints(cls, include_extras=True)
        for each in fields(cls):
            schema = TypeAdapter(hints[each.name]).json_schema()
            if takes_numbers(schema) and "const" not in schema and "enum" not in schema:
                yield name, each.name, schema.get("type") == "array"


NUMERIC = list(numeric_fields())


@pytest.fixture(autouse=True)
def bounded_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """Count what is expanded of key streams: a test that takes more than `MOST_BYTES` fails."""
    taken, take = [0], streams.KeyStream.take

    def counted(stream: streams.KeyStream, count: int) -> bytes:
        taken[0] += count
        assert taken[0] <= MOST_BYTES, f"{taken[0]:,} bytes of key stream were expanded"
        return take(stream, count)

    monkeypatch.setattr(streams.KeyStream, "take", counted)


def test_every_scheme_is_here() -> None:
    assert REQUIRED.keys() == SCHEMES.keys()
    assert {scheme for scheme, _, _ in NUMERIC} == SCHEMES.keys()


@pytest.mark.parametrize(("scheme", "field", "is_list"), NUMERIC)
def test_a_number_beyond_its_bounds_is_refused(scheme: str, field: str, is_list: bool) -> None:
    usual = SCHEMES[scheme].from_fields(REQUIRED[scheme]).to_fields()
    assert make_scheme(scheme, usual).to_fields() == usual
    for number in (*HUGE, *NOT_FINITE):
        value: Any = [number] if is_list else number
        with pytest.raises(ConfigError) as caught:
            make_scheme(scheme, usual | {field: value})
        said = one_line(caught.value)
        assert f"field {field} is " in said
        if isinstance(number, int) and number in HUGE and not is_list and field != "psnr":
            assert "expected " in said, said


@pytest.mark.parametrize(("scheme", "field", "is_list"), NUMERIC)
def test_a_hostile_key_on_disk_is_refused(
    scheme: str, field: str, is_list: bool, tmp_path: Path
) -> None:
    """Committed to anew, so that nothing but the number is wrong with it."""
    usual = SCHEMES[scheme].from_fields(REQUIRED[scheme]).to_fields()
    for at, number in enumerate(HUGE):
        value: Any = [number] if is_list else number
        key = Key(scheme, usual | {field: value}, {}, "ACME Inc.", MATERIAL)
        key.save(tmp_path / f"{at}.key")
        with pytest.raises(CountermarkError) as caught:
            load_scheme(Key.load(tmp_path / f"{at}.key"))
        assert f"field {field} is " in one_line(caught.value)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e400", "1" * 400])
def test_a_number_that_is_not_finite_is_refused_on_disk(number: str, tmp_path: Path) -> None:
    known_key().save(tmp_path / "a.key")
    path = tmp_path / "a.key" / "key.json"
    text = path.read_text()
    assert '"bits": 256' in text
    path.write_text(text.replace('"bits": 256', f'"bits": {number}'))
    with pytest.raises(CountermarkError) as caught:
        load_scheme(Key.load(tmp_path / "a.key"))
    one_line(caught.value)


def stamp_key(tensors: Mapping[str, tuple[int, ...]], **more: Any) -> Key:
    """A key of a stamp, made without looking whether it can be right."""
    usual = Stamp(layer="all", bits=128).to_fields()
    return Key("stamp", usual | more, dict(tensors), "ACME Inc.", MATERIAL)


@pytest.mark.parametrize("scheme", ["uchida", "hash_filter", "independent_network", "stamp"])
@pytest.mark.parametrize("shape", [(1 << 40, 2), (1 << 40,) * 6, (1 << 20, 1 << 21)])
def test_a_key_that_reads_more_than_there_can_be_is_refused(
    scheme: str, shape: tuple[int, ...]
) -> None:
    usual = SCHEMES[scheme].from_fields(REQUIRED[scheme]).to_fields()
    key = Key(scheme, usual, {"fc.weight": shape}, "ACME Inc.", MATERIAL)
    with pytest.raises(ConfigError, match=r"have [\d,]+ values: expected 1 to "):
        load_scheme(key)


def test_a_filter_over_a_giant_tensor_is_not_expanded() -> None:
    usual = SCHEMES["hash_filter"].from_fields(REQUIRED["hash_filter"]).to_fields()
    key = Key("hash_filter", usual, {"fc.weight": (1 << 30,)}, "ACME Inc.", MATERIAL)
    with pytest.raises(ConfigError, match="expected 1 to 268,435,456"):
        load_scheme(key)


def test_tensors_that_a_suspect_has_not_cost_nothing() -> None:
    weights = np.random.default_rng(1).normal(size=(32, 64)).astype(np.float32)
    tensors = {"a.w": (1 << 39,), "b.w": (32, 64), "c.w": (32, 64)}
    suspect = InMemory({"b.w": weights, "c.w": weights + 1})
    verdict = examine(suspect, stamp_key(tensors), VerificationOptions())
    assert verdict.outcome == "not_proven"
    assert verdict.bits == 128


@pytest.mark.parametrize("skipped", [0, 1, 99, 100, 101, 12345])
@pytest.mark.parametrize("before", [0, 7, 100])
def test_what_is_skipped_is_what_would_have_been_taken(skipped: int, before: int) -> None:
    key = stamp_key({"w": (99999,)}, bits=100)
    skipping, taking = CarrierStream(key), CarrierStream(key)
    for each in (skipping, taking):
        each.take_carriers(before)
    skipping.skip_values(skipped)
    taking.take_carriers(skipped)
    for one, other in zip(skipping.take_carriers(333), taking.take_carriers(333), strict=True):
        assert np.array_equal(one, other)


@pytest.mark.parametrize("count", [10**9, MOST_RECIPIENTS + 1])
def test_a_key_for_too_many_recipients_ends_at_once(
    count: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    key = stamp_key({"w": (4096,)}, recipients=count, coalition=3)
    key.save(tmp_path / "many.key")
    (tmp_path / "x.safetensors").write_bytes(b"")
    with pytest.raises(ConfigError, match=f"field recipients is {count}: .* 0 to 100,000"):
        trace(tmp_path / "x.safetensors", key)
    words = ["recipient", "trace", str(tmp_path / "x.safetensors"), "--key"]
    assert run([*words, str(tmp_path / "many.key")]) == 2
    assert "expected 0 to 100,000" in capsys.readouterr().err


def test_code_words_are_bounded_together() -> None:
    bits = MOST_CODE_PLACES // MOST_RECIPIENTS + 1
    more = {"recipients": MOST_RECIPIENTS, "coalition": 3, "bits": bits}
    with pytest.raises(ConfigError, match="expected at most 4,294,967,296"):
        load_scheme(stamp_key({"w": (1 << 20,)}, **more))


def test_scores_do_not_depend_on_how_many_words_are_expanded_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    key = stamp_key({"w": (4096,)}, recipients=20, coalition=2)
    p, read = copies.derive_code_biases(key), key.make_stream("read").take_bits(128)
    whole = score_recipients(copies.expand_codewords(key, range(20)), read, p)
    monkeypatch.setattr(copies, "_PLACES_AT_ONCE", 3 * 128)
    found = copies._score_readings(key, [read, 1 - read], p)
    assert found.shape == (2, 20)
    assert np.allclose(found[0], whole, rtol=1e-12)


def test_fresh_triggers_of_too_many_classes_are_refused() -> None:
    scheme = DeepStego(1 << 20)
    with pytest.raises(ConfigError, match=r"field classes is 1048576: .* 2 to 4,096"):
        scheme.query_fresh_triggers(lambda images: np.zeros(len(images), dtype=np.int64), None)  # type: ignore[arg-type]


@pytest.mark.parametrize("changed", [{"iterations": 64, "memory_kib": 1 << 20}, {"lanes": 10**9}])
def test_a_cipher_that_takes_hours_is_refused(changed: dict[str, int], tmp_path: Path) -> None:
    known_key().save(tmp_path / "a.key", "passphrase")
    path = tmp_path / "a.key" / "key.json"
    header = json.loads(path.read_text())
    header["encryption"] |= changed
    path.write_text(json.dumps(header))
    with pytest.raises(CountermarkError) as caught:
        Key.load(tmp_path / "a.key", "passphrase")
    assert "encryption" in one_line(caught.value)
