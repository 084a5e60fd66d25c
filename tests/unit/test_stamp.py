"""The stamp: its reading against a reference, the least change, rounding, and its forecast."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from bounded_by_hand import bounded_by_hand
from torch import nn

from checkpoints import SHAPES, one_file, tensors
from countermark.checkpoints import Weights, open_weights
from countermark.checkpoints.dtypes import decode_values, encode_values
from countermark.errors import CapacityError, ConfigError, MarkNotTakenError
from countermark.keys.key import Key, KeyMaterial
from countermark.keys.streams import KeyStream
from countermark.schemes import load_scheme
from countermark.schemes.stamp.scheme import CarrierStream, Stamp
from countermark.stamping import advise, stamp
from countermark.stamping.advising import compute_expected_change
from countermark.stamping.forecast import forecast_error_rates
from countermark.stamping.making import StampPaths
from countermark.stamping.solving import shift_values, solve_shifts
from countermark.verification.verify import examine, verify

SECRET = KeyMaterial(bytes(range(32)), bytes(16))
INNER = ("layers.0.up", "layers.0.down", "layers.1.up", "layers.1.down")


def key_for(scheme: Stamp, material: KeyMaterial = SECRET) -> Key:
    return scheme.generate_key(
        {name: SHAPES[name] for name in scheme.layer}, owner="ACME", material=material
    )


@pytest.mark.parametrize("reading", ["plain", "bounded"])
def test_a_reading_is_what_the_format_says(reading: str) -> None:
    """Written anew, value by value, from the page on formats."""
    scheme = Stamp(("a", "b"), 96, values=500, reading=reading)  # type: ignore[arg-type]
    shapes = {"a": (30, 20), "b": (7, 11)}
    key = scheme.generate_key(shapes, owner="ACME", material=SECRET)
    drawn = np.random.default_rng(3)
    weights = {name: drawn.normal(0, 2, shape) for name, shape in shapes.items()}
    starts = KeyStream(SECRET.secret, SECRET.nonce, "places").take_words(2)
    row = []
    for word, values in zip(starts, weights.values(), strict=True):
        count = min(500, values.size)
        start = int(word) % (values.size - count + 1)
        part = values.reshape(-1)[start : start + count]
        if reading == "plain":
            row += list(part / np.sqrt((part**2).mean()))
        else:
            row += list(bounded_by_hand(part, values.shape, start))
    signs, turns = key.make_stream("signs"), key.make_stream("turns")
    y, served = np.zeros(96), np.zeros(96)
    for at, value in enumerate(row):
        if at % 96 == 0:
            turn, run = int(turns.take_words(1)[0]), signs.take_bits(96)
        bit = (at % 96 + turn) % 96
        y[bit] += value if run[at % 96] else -value
        served[bit] += 1
    evidence = scheme.extract({n: v.astype(np.float64) for n, v in weights.items()}, key)
    assert evidence.scores is not None
    assert np.allclose(evidence.scores, y / np.sqrt(served))
    assert np.array_equal(evidence.read, y > 0)


def test_every_value_serves_one_bit_and_every_bit_has_its_share() -> None:
    key = key_for(Stamp(INNER, 100))
    pieces = [
        CarrierStream(key).take_carriers(1000),
        *[CarrierStream(key).take_carriers(n) for n in (3, 5000)],
    ]
    whole, signs = CarrierStream(key).take_carriers(20_050)
    served = np.bincount(whole, minlength=100)
    assert set(served) == {200, 201}
    assert set(signs) == {-1, 1}
    for bits, drawn in pieces:  # however many are asked for at a time
        assert np.array_equal(bits, whole[: len(bits)])
        assert np.array_equal(drawn, signs[: len(bits)])


def test_the_scale_of_a_tensor_changes_nothing(tmp_path: Path) -> None:
    scheme = Stamp(INNER, 256)
    key = key_for(scheme)
    plain = {name: each.numpy() for name, each in tensors().items() if name in INNER}
    scaled = {name: each * (3.0 + at) for at, (name, each) in enumerate(plain.items())}
    first, second = scheme.extract(plain, key).scores, scheme.extract(scaled, key).scores
    assert first is not None
    assert second is not None
    assert np.allclose(first, second, atol=1e-4)


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16", "F64"])
def test_every_bit_gets_its_margin_and_no_more(tmp_path: Path, dtype: str) -> None:
    path = one_file(tmp_path / "m.safetensors", dtype)
    scheme = Stamp(INNER, 96, margin=4.0)
    key = key_for(scheme)
    agree = 2.0 * key.message - 1
    with open_weights(path) as weights:
        bare = scheme.extract(
            scheme.read_suspect_tensors(weights, {n: n for n in INNER}, key), key
        ).scores
        shifts = solve_shifts(weights, scheme, key, key.message)
        pieces = list(shift_values(weights, scheme, key, shifts))
    assert bare is not None
    enough = agree * bare >= 4.0
    assert np.array_equal(shifts == 0, enough), "a bit that has its margin is left alone"
    assert np.all(np.sign(shifts[~enough]) == agree[~enough])
    served = CarrierStream(key).take_carriers(scheme.capacity(key.tensors, None))[0]
    reached = agree * sum(piece.towards for piece in pieces) / np.sqrt(np.bincount(served))
    assert reached[~enough].min() > 3.85
    assert reached[~enough].max() < 4.2
    before = np.concatenate([piece.before for piece in pieces])
    after = np.concatenate([piece.after for piece in pieces])
    change = math.sqrt(((after - before) ** 2).sum() / (before**2).sum())
    assert change == pytest.approx(compute_expected_change(scheme, len(before)), rel=0.2)


def test_no_smaller_change_gives_the_margins(tmp_path: Path) -> None:
    """Of 32-bit values: the change lies in the span of the bits' sign rows, and nowhere else."""
    path = one_file(tmp_path / "m.safetensors")
    scheme = Stamp(INNER, 96, margin=4.0)
    key = key_for(scheme)
    with open_weights(path) as weights:
        pieces = list(
            shift_values(weights, scheme, key, solve_shifts(weights, scheme, key, key.message))
        )
        unit = {
            n: scheme.compute_scales(weights.read(n).reshape(-1), key.tensors[n], 0).expand_scales(
                0, math.prod(key.tensors[n])
            )
            for n in INNER
        }
    moved = np.concatenate([(p.after - p.before) / unit[p.name] for p in pieces])
    bits, signs = CarrierStream(key).take_carriers(len(moved))
    along = np.bincount(bits, weights=signs * moved) / np.bincount(bits)
    assert np.allclose(moved, along[bits] * signs, atol=2e-6)


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16", "F64"])
def test_rounding_is_that_of_torch(dtype: str) -> None:
    kinds = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
    drawn = np.random.default_rng(2).normal(size=10_000)
    drawn[:4] = [1 + 2.0**-8, 1 + 3 * 2.0**-8, -1 - 2.0**-8, 0.0]  # ties of bfloat16
    raw = encode_values(drawn, dtype)
    ours = decode_values(raw.tobytes(), dtype).astype(np.float64)
    theirs = torch.from_numpy(drawn.astype(np.float32 if dtype != "F64" else np.float64))
    assert np.array_equal(ours, theirs.to(kinds.get(dtype, torch.float64)).double().numpy())


def made(folder: Path, dtype: str = "F32", **fields: object) -> tuple[Path, Key]:
    source = one_file(folder / "in.safetensors", dtype)
    places = StampPaths(folder / "out.safetensors", folder / "a.key")
    stamp(source, places, owner="ACME", fields=fields, material=SECRET)
    return places.out, Key.load(places.key)


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
def test_a_stamped_file_is_owned_and_its_source_is_not(tmp_path: Path, dtype: str) -> None:
    out, key = made(tmp_path, dtype)
    verdict = verify(out, key)
    assert verdict.owned, verdict.explain()
    assert verdict.matched == verdict.bits
    assert verdict.payload is True
    assert verify(tmp_path / "in.safetensors", key).outcome == "not_proven"
    stranger = one_file(tmp_path / "other.safetensors", dtype, seed=2)
    assert verify(stranger, key).outcome == "not_proven"


def test_only_the_read_tensors_change_and_nothing_else_does(tmp_path: Path) -> None:
    out, key = made(tmp_path, "BF16", layer=["layers.0.up"], values=20_000)
    start = (tmp_path / "in.safetensors").read_bytes()
    end = out.read_bytes()
    assert len(start) == len(end)
    with open_weights(out) as weights, open_weights(tmp_path / "in.safetensors") as before:
        assert weights.digests == before.digests  # of the header
        for name in weights.tensors:
            same = b"".join(weights.read_pieces(name)) == b"".join(before.read_pieces(name))
            assert same == (name != "layers.0.up"), name
        (place,) = scheme_places(key).values()
        changed = np.flatnonzero(weights.read("layers.0.up") != before.read("layers.0.up"))
        assert place.start <= changed.min()
        assert changed.max() < place.stop
    kept = key.frozen["before.layers.0.up"]
    assert kept.dtype == np.uint16
    with open_weights(tmp_path / "in.safetensors") as before:
        part = before.read_part("layers.0.up", place.start, len(place))
    assert np.array_equal(decode_values(kept.tobytes(), "BF16"), part)


def scheme_places(key: Key) -> dict[str, range]:
    scheme = load_scheme(key)
    assert isinstance(scheme, Stamp)
    return scheme.draw_places(key.tensors, key.material)


def test_a_part_is_read_without_the_rest_and_its_place_stays_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, key = made(tmp_path, "BF16", values=2000)
    (start, *_) = (place.start for place in scheme_places(key).values())
    monkeypatch.setattr(Weights, "read", lambda *_: pytest.fail("read a whole tensor"))
    verdict = verify(out, key)
    assert verdict.owned
    assert set(verdict.subject.sha256) == {
        "__metadata__", *(f"{name}, in part" for name in key.tensors)
    }  # fmt: skip
    assert str(start) not in str(verdict.to_json())
    assert verify(out, key).subject.sha256 == verdict.subject.sha256
    with open_weights(out) as weights:
        for name, place in scheme_places(key).items():
            weights.read_part(name, place.start, len(place))
        own = weights.digests
    for name in key.tensors:  # or whoever has the file could find the place by trial
        assert verdict.subject.sha256[f"{name}, in part"] != own[f"{name}, in part"]


def test_a_live_module_is_read_as_its_file_is(tmp_path: Path) -> None:
    out, key = made(tmp_path, values=2000)
    module = nn.Module()
    with open_weights(out) as weights:
        for name in ("layers.0", "layers.1"):
            inner = nn.Module()
            for last in ("up", "down"):
                values = torch.from_numpy(weights.read(f"{name}.{last}").copy())
                inner.register_parameter(last, nn.Parameter(values))
            module.add_module(name.replace(".", "_"), inner)
    verdict = verify(module, key)  # under other names, found by the values from before the mark
    assert verdict.owned
    assert verdict.test_count == 1


def test_fresh_keys_are_a_null_as_well(tmp_path: Path) -> None:
    out, key = made(tmp_path, values=1000)
    verdict = verify(out, key, alpha=1e-2, null="fresh_keys")
    assert verdict.owned
    assert verdict.log10_p == pytest.approx(math.log10(1 / 2000))


def test_a_tensor_of_zeros_carries_nothing_and_stays(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    found = tensors()
    found["layers.0.up"].zero_()
    save_file(found, tmp_path / "in.safetensors")
    places = StampPaths(tmp_path / "out.safetensors", tmp_path / "a.key")
    stamp(tmp_path / "in.safetensors", places, owner="ACME", material=SECRET)
    with open_weights(places.out) as weights:
        assert not weights.read("layers.0.up").any()
    assert verify(places.out, Key.load(places.key)).owned
    save_file({"w": torch.zeros(64, 64)}, tmp_path / "zeros.safetensors")
    again = StampPaths(tmp_path / "never", tmp_path / "b.key")
    with pytest.raises(MarkNotTakenError, match="not all zeros"):
        stamp(tmp_path / "zeros.safetensors", again, owner="ACME", fields={"bits": 128})
    assert not again.out.exists()
    assert not again.key.exists()


def test_huge_and_tiny_suspects_are_read_without_a_warning() -> None:
    scheme = Stamp("w", 128)
    key = scheme.generate_key({"w": (64, 64)}, owner="ACME", material=SECRET)
    drawn = np.random.default_rng(1).normal(size=(64, 64))
    for scale in (1e-320, 1e300, 0.0):
        assert scheme.extract({"w": drawn * scale}, key).bits == 128


def test_keys_that_were_never_made_are_refused() -> None:
    key = key_for(Stamp(INNER, 256, values=100))
    for frozen in ({"before.else": np.zeros(100)}, {"before.layers.0.up": np.zeros(99)}):
        with pytest.raises(ConfigError, match="expected one value for each"):
            load_scheme(replace(key, frozen=frozen))
    with pytest.raises(ConfigError, match="the key reads"):
        Stamp(INNER, 256).extract({name: np.zeros((3, 3)) for name in INNER}, key_for(Stamp(INNER)))
    with pytest.raises(CapacityError, match="at most 200"):
        Stamp("w", 201).generate_key({"w": (10, 20)}, owner="ACME")


# --- forecast and advice


def read_after(change: str, values: np.ndarray, drawn: np.random.Generator) -> np.ndarray:
    """What the forecast speaks of, done to values (rows, width) in units of their spread."""
    if change.startswith("noise"):
        return values + float(change.split()[2]) * drawn.normal(size=values.shape)
    if change.startswith("pruning"):
        least = np.quantile(np.abs(values), float(change.split()[1]) / 100)
        return np.where(np.abs(values) > least, values, 0)
    levels = 2 ** (int(change[3:]) - 1) - 1
    step = np.abs(values).max(axis=1, keepdims=True) / levels
    return np.round(values / step) * step


@pytest.mark.parametrize("shape", ["normal", "heavy"])
def test_the_forecast_is_what_happens(shape: str) -> None:
    """2,048 bits of margin 2, so that there are errors to count."""
    drawn, T, width = np.random.default_rng(5), 2048, 1 << 20
    host = drawn.normal(size=width) if shape == "normal" else drawn.standard_t(4, size=width)
    host /= host.std()
    key = Stamp("w", T).generate_key({"w": (1024, 1024)}, owner="ACME", material=SECRET)
    bits, signs = CarrierStream(key).take_carriers(width)
    n = width / T
    y = np.bincount(bits, weights=signs * host)
    agree = 2.0 * key.message - 1
    shifts = agree * np.maximum(0, 2.0 * math.sqrt(n) - agree * y) / n
    marked = host + shifts[bits] * signs
    rates = forecast_error_rates([marked.reshape(1024, 1024)], margin=2.0, served=n)
    assert len(rates) == 8
    for change, expected in rates.items():
        after = read_after(change, marked.reshape(1024, 1024), drawn).reshape(-1)
        wrong = float((agree * np.bincount(bits, weights=signs * after) <= 0).mean())
        # A bit that coincidence gave more than the margin is safer than the forecast says.
        assert abs(wrong - expected) < 0.012 + 0.15 * expected, (change, wrong, expected)


class Shapes(Weights):
    """A checkpoint of any size that exists by its shapes; every value read is a drawn one."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], dtype: str = "BF16") -> None:
        from countermark.checkpoints import TensorInfo

        super().__init__("made up")
        self.tensors = {name: TensorInfo(shape, dtype) for name, shape in shapes.items()}

    def read_part(self, name: str, start: int, count: int) -> np.ndarray:
        assert start + count <= np.prod(self.tensors[name].shape)
        return np.random.default_rng(count).normal(size=count).astype(np.float32)

    def _load(self, name: str) -> np.ndarray:
        raise AssertionError(f"{name} was read whole")

    read_pieces = compute_file_digest = _load  # type: ignore[assignment]

    def close(self) -> None: ...


def large(layers: int) -> Shapes:
    one = {"q": (4096, 4096), "k": (1024, 4096), "up": (14336, 4096), "norm": (4096,)}
    found = {f"layers.{n}.{part}": shape for n in range(layers) for part, shape in one.items()}
    return Shapes({"model.embed_tokens.weight": (128_256, 4096), **found})


def test_advice_for_a_large_checkpoint_spreads_the_mark_over_all_of_it() -> None:
    advice = advise(large(32))
    assert len(advice.tensors) == 96, "every matrix, no embedding, no norm"
    assert (advice.scheme.bits, advice.scheme.margin) == (256, 5.0)
    assert advice.change == pytest.approx(0.0275, rel=0.01)
    assert advice.read == pytest.approx(256 * 26 / 0.0275**2, rel=0.01)
    assert advice.is_gentle


@pytest.mark.parametrize(
    ("shape", "bits", "margin", "whole", "gentle"),
    [
        ((8192, 8192), 256, 5.0, 0.01, True),
        ((4096, 4096), 256, 2.36, 0.01, True),
        ((2048, 2048), 256, 2.0, 0.0175, True),
        ((1000, 1000), 128, 2.0, 0.0253, True),
        ((700, 400), 128, 2.0, 0.0478, False),
    ],
)
def test_advice_for_smaller_ones_takes_less(
    shape: tuple[int, int], bits: int, margin: float, whole: float, gentle: bool
) -> None:
    advice = advise(Shapes({"w": shape, "b": (5,)}))
    assert (advice.scheme.bits, advice.is_gentle) == (bits, gentle)
    assert advice.scheme.margin == pytest.approx(margin, abs=0.01)
    assert advice.whole == pytest.approx(whole, rel=0.01)
    assert (advice.change < 0.0276) == gentle


def test_advice_takes_what_is_given() -> None:
    weights = large(2)
    advice = advise(weights, {"bits": 128, "margin": 3.5, "values": 9000, "layer": ["layers.1.k"]})
    assert list(advice.tensors) == ["layers.1.k"]
    assert (advice.scheme.bits, advice.scheme.margin, advice.read) == (128, 3.5, 9000)
    assert advise(weights, {"layer": "all"}).scheme.layer == tuple(
        name for name, info in weights.tensors.items() if len(info.shape) > 1
    )
    with pytest.raises(ConfigError, match=r"nearest is 'layers\.1\.k'"):
        advise(weights, {"layer": ["layers.1.kk"]})
    with pytest.raises(ConfigError, match="nearest is 'margin'"):
        advise(weights, {"magrin": 3})
    with pytest.raises(ConfigError, match="no floating tensor"):
        advise(Shapes({"w": (100, 100)}, "I8"))


def test_a_test_key_is_never_owned(tmp_path: Path) -> None:
    source = one_file(tmp_path / "in.safetensors")
    places = StampPaths(tmp_path / "out.safetensors", tmp_path / "a.key")
    stamp(source, places, owner="ACME", material=KeyMaterial.from_test_seed(1))
    assert verify(places.out, Key.load(places.key)).outcome == "no_verdict"
    from countermark.results.verdict import VerificationOptions

    assert examine(places.out, Key.load(places.key), VerificationOptions(allow_test_key=True)).owned
