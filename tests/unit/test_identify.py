"""Many keys against one suspect: the right one is found, p is corrected, the others are counted."""

from __future__ import annotations

import hashlib
import math
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from checkpoints import one_file
from countermark.checkpoints import CachedWeights, open_weights
from countermark.errors import ConfigError, SuspectError
from countermark.keys import storage
from countermark.keys.key import Key, KeyMaterial
from countermark.results.verdict import VerificationOptions
from countermark.schemes import load_scheme
from countermark.schemes.drawn_triggers.adi import Adi
from countermark.schemes.stamp.scheme import Stamp
from countermark.schemes.uchida.scheme import Uchida
from countermark.schemes.weights import WeightScheme
from countermark.stamping import stamp
from countermark.stamping.making import StampPaths
from countermark.verification.identify import identify, list_key_folders
from countermark.verification.verify import verify

SHAPE = (64, 27)
TERMS = VerificationOptions()


def material(number: int) -> KeyMaterial:
    """A secret that is the same in every run, of a key that counts as a real one."""
    drawn = hashlib.sha512(f"identify {number}".encode()).digest()
    return KeyMaterial(drawn[:32], drawn[32:48])


def key_of(number: int, scheme: Uchida | None = None) -> Key:
    scheme = scheme or Uchida("conv.weight", 512)
    return scheme.generate_key({"conv.weight": SHAPE}, owner="ACME", material=material(number))


def written(key: Key, folder: Path) -> Path:
    """A key on disk as `save` writes it, without waiting for the disk."""
    content = storage._encode_tensors(key)
    digest = hashlib.sha256(content).hexdigest()
    header = storage._make_header(key, None).model_copy(update={"tensors_sha256": digest})
    folder.mkdir()
    (folder / "key.safetensors").write_bytes(content)
    (folder / "key.json").write_bytes(header.to_bytes())
    return folder


def many(folder: Path, numbers: Sequence[int]) -> list[Path]:
    folder.mkdir()
    for number in numbers:
        written(key_of(number), folder / f"{number:06}.key")
    return list_key_folders(folder)


def bearing(key: Key, path: Path, wrong: int = 0) -> Path:
    """A suspect from which a key reads all of its bits but some: by least squares."""
    scheme = load_scheme(key)
    assert isinstance(scheme, Uchida)
    X = np.concatenate(list(scheme.generate_row_blocks(key))).astype(np.float64)
    target = 2.0 * key.message - 1
    target[:wrong] *= -1
    w = np.linalg.lstsq(X, target, rcond=None)[0].astype(np.float32).reshape(SHAPE)
    save_file({"conv.weight": w, "other": np.zeros(3, np.float32)}, path)
    return path


def test_the_right_one_of_many_is_found_and_judged_as_verify_does(tmp_path: Path) -> None:
    folders = many(tmp_path / "keys", range(40))
    suspect = bearing(key_of(7), tmp_path / "s.safetensors", wrong=40)
    done = identify(suspect, folders, TERMS)
    assert list(done.found) == [str(tmp_path / "keys" / "000007.key")]
    assert (done.tried, done.problems, done.exit_code) == (40, {}, 0)
    (found,) = done.found.values()
    alone = verify(suspect, key_of(7))
    assert found.owned
    assert (found.matched, found.payload) == (alone.matched, alone.payload) == (472, True)
    assert found.test_count == 40
    assert found.log10_p == pytest.approx((alone.log10_p or 0) + math.log10(40))
    assert found.log10_p == pytest.approx(done.best)
    assert found.forgery_bits == pytest.approx(alone.forgery_bits - math.log2(40))
    assert found.subject.sha256 == alone.subject.sha256


def test_a_reading_that_would_do_alone_does_not_among_many(tmp_path: Path) -> None:
    """p 1e-7 alone; for 40 keys Holm asks for 2.5e-8."""
    suspect = bearing(key_of(0), tmp_path / "s.safetensors", wrong=512 - 315)
    terms = VerificationOptions(assume_dated=True)
    alone = verify(suspect, key_of(0), assume_dated=True)
    assert alone.owned
    assert -7.6 < (alone.log10_p or 0) < -6.1
    one = identify(suspect, many(tmp_path / "one", [0]), terms)
    assert one.exit_code == 0
    crowd = identify(suspect, many(tmp_path / "keys", range(40)), terms)
    assert (crowd.exit_code, dict(crowd.found)) == (1, {})
    assert crowd.best == pytest.approx(min(0.0, (alone.log10_p or 0) + math.log10(40)))


def test_two_marks_in_one_suspect_are_both_found_by_holm(tmp_path: Path) -> None:
    first, second = key_of(1), key_of(2)
    rows = [
        np.concatenate(list(Uchida("conv.weight", 512).generate_row_blocks(key)))
        for key in (first, second)
    ]
    target = np.concatenate([2.0 * first.message - 1, 2.0 * second.message - 1])
    w = np.linalg.lstsq(np.concatenate(rows).astype(float), target, rcond=None)[0]
    save_file({"conv.weight": w.astype(np.float32).reshape(SHAPE)}, tmp_path / "s.safetensors")
    done = identify(tmp_path / "s.safetensors", many(tmp_path / "keys", range(5)), TERMS)
    assert [Path(folder).name for folder in done.found] == ["000001.key", "000002.key"]
    assert [verdict.test_count for verdict in done.found.values()] == [5, 4]


def test_strangers_are_not_found(tmp_path: Path) -> None:
    drawn = np.random.default_rng(1).normal(size=SHAPE).astype(np.float32)
    save_file({"conv.weight": drawn}, tmp_path / "s.safetensors")
    done = identify(tmp_path / "s.safetensors", many(tmp_path / "keys", range(60)), TERMS)
    assert (done.exit_code, dict(done.found), done.tried) == (1, {}, 60)
    assert done.best is not None
    assert done.best > -2


def test_many_keys_are_shared_by_two_processes(tmp_path: Path) -> None:
    folders = many(tmp_path / "keys", range(260))
    done = identify(bearing(key_of(259), tmp_path / "s.safetensors"), folders, TERMS)
    assert [Path(folder).name for folder in done.found] == ["000259.key"]
    assert done.tried == 260


def test_what_cannot_be_tried_is_counted_with_its_reason(tmp_path: Path) -> None:
    many(tmp_path / "keys", range(3))
    broken = tmp_path / "keys" / "000001.key" / "key.safetensors"
    broken.write_bytes(broken.read_bytes()[:-1])
    images = np.zeros((100, 1, 2, 2), np.uint8)
    triggers = Adi(10).generate_key({"triggers": images}, owner="A", material=material(9))
    triggers.save(tmp_path / "keys" / "triggers.key")
    key_of(5).save(tmp_path / "keys" / "locked.key", "correct horse")
    elsewhere = Uchida("fc.weight", 512).generate_key({"fc.weight": (100, 30)}, owner="A")
    written(elsewhere, tmp_path / "keys" / "elsewhere.key")
    (tmp_path / "keys" / "no key").mkdir()
    suspect = bearing(key_of(5), tmp_path / "s.safetensors")
    folders = list_key_folders(tmp_path / "keys")
    assert len(folders) == 6
    done = identify(suspect, folders, TERMS)
    assert (done.tried, done.exit_code, dict(done.found)) == (2, 3, {})
    assert dict(done.problems) == {
        "damaged, or encrypted with another passphrase": 2,
        "a key of adi, which reads by no linear rule": 1,
        "its tensors are not in the suspect, or in too many ways": 1,
    }
    unlocked = identify(suspect, folders, TERMS, passphrase="correct horse")
    assert [Path(folder).name for folder in unlocked.found] == ["locked.key"]
    assert (unlocked.tried, unlocked.exit_code) == (3, 0)


def test_a_key_that_proves_nothing_is_no_answer(tmp_path: Path) -> None:
    key = Uchida("conv.weight", 512).generate_key(
        {"conv.weight": SHAPE}, owner="A", material=KeyMaterial.from_test_seed(1)
    )
    written(key, tmp_path / "a.key")
    done = identify(
        bearing(key, tmp_path / "s.safetensors"), list_key_folders(tmp_path / "a.key"), TERMS
    )
    assert [verdict.outcome for verdict in done.found.values()] == ["no_verdict"]
    assert done.exit_code == 3


def test_stamps_and_renamed_tensors_are_found_as_well(tmp_path: Path) -> None:
    source = one_file(tmp_path / "in.safetensors", "BF16")
    for number in range(3):
        places = StampPaths(tmp_path / f"{number}.safetensors", tmp_path / "keys" / f"{number}.key")
        stamp(source, places, owner="ACME", fields={"values": 5000})
    done = identify(tmp_path / "1.safetensors", list_key_folders(tmp_path / "keys"), TERMS)
    assert [Path(folder).name for folder in done.found] == ["1.key"]
    (found,) = done.found.values()
    assert found.test_count == 3
    with open_weights(bearing(key_of(1), tmp_path / "s.safetensors")) as weights:
        renamed = {"b": weights.read("conv.weight"), "a": np.ones(SHAPE, np.float32)}
    save_file(renamed, tmp_path / "renamed.safetensors")
    done = identify(tmp_path / "renamed.safetensors", many(tmp_path / "more", [1, 2]), TERMS)
    (found,) = done.found.values()
    assert found.test_count == 4, "two tensors of that shape, two keys"


@pytest.mark.parametrize(
    "scheme",
    [
        Uchida("conv.weight", 512),
        Uchida("conv.weight", 200, key_type="random"),
        Uchida("conv.weight", 40, read="filter_mean", over_capacity=True),
        Stamp("conv.weight", 256, values=1000),
    ],
)
@pytest.mark.filterwarnings("ignore:even a perfect reading")
def test_bits_alone_are_those_of_the_evidence(scheme: WeightScheme) -> None:
    key = scheme.generate_key({"conv.weight": SHAPE}, owner="ACME", material=material(3))
    weights = {"conv.weight": np.random.default_rng(2).normal(size=SHAPE).astype(np.float32)}
    assert np.array_equal(scheme.read_bits(weights, key), scheme.extract(weights, key).read)


def test_a_suspect_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    suspect = bearing(key_of(1), tmp_path / "s.safetensors")
    with CachedWeights(open_weights(suspect)) as weights:
        first = weights.read("conv.weight")
        assert weights.read("conv.weight") is first
        assert np.array_equal(weights.read_part("conv.weight", 5, 9), first.reshape(-1)[5:14])
        assert set(weights.digests) == {"__metadata__", "conv.weight"}
    with CachedWeights(open_weights(suspect)) as weights:
        assert weights.read_part("conv.weight", 5, 9).shape == (9,)
        assert "conv.weight" not in weights.digests
    monkeypatch.setattr("countermark.checkpoints.cached._LARGEST", 100)
    with CachedWeights(open_weights(suspect)) as weights:
        assert weights.read("conv.weight") is not weights.read("conv.weight")


def test_what_holds_no_keys_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds 0 keys"):
        list_key_folders(tmp_path)
    with pytest.raises(ConfigError, match="cannot be read"):
        list_key_folders(tmp_path / "absent")
    with pytest.raises(SuspectError, match="cannot be read"):
        identify(tmp_path / "absent", many(tmp_path / "keys", [1]), TERMS)


@pytest.mark.slow
def test_time_grows_with_the_number_of_keys_and_no_faster(tmp_path: Path) -> None:
    """512 bits in 1,728 weights; in one process, so that its CPU time is all there is."""
    from countermark.verification.identify import _try_keys_in_worker

    folders = many(tmp_path / "keys", range(4000))
    suspect = bearing(key_of(3999), tmp_path / "s.safetensors")
    seconds = []
    for count in (400, 4000):
        began = time.process_time()
        assert len(_try_keys_in_worker(suspect, folders[:count], None)) == count
        seconds.append((time.process_time() - began) / count)
    assert seconds[1] < 1.3 * seconds[0]
    assert seconds[1] < 2e-3, "10,000 keys in 10 s of two cores"
    shutil.rmtree(tmp_path / "keys")
