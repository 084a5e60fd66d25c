"""Torch files that mean harm: code in pickles, bombs, archives that two readers see differently.

What harmless ones hold is tested in `test_torch_contents.py`.
"""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import struct
import tracemalloc
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from keys import one_line

from countermark.checkpoints import load_state, open_weights
from countermark.errors import SuspectError

STATE = {"w": torch.arange(6.0).reshape(2, 3), "b": torch.ones(3)}


def saved(path: Path, state: object = STATE, **options: bool) -> Path:
    torch.save(state, path, **options)
    return path


def refused(path: Path) -> str:
    with pytest.raises(SuspectError) as caught:
        open_weights(path)
    return one_line(caught.value)


def unreadable(path: Path, name: str) -> str:
    with open_weights(path) as weights, pytest.raises(SuspectError) as caught:
        weights.read(name)
    with pytest.raises(SuspectError):
        load_state(path)
    return one_line(caught.value)


# --- code


class Canary:
    """Pickles as a call that makes a folder."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> tuple[object, ...]:
        return (os.mkdir, (str(self.place),))


@pytest.mark.parametrize("wrap", [False, True])
@pytest.mark.parametrize("zipped", [False, True])
def test_code_in_a_pickle_never_runs(tmp_path: Path, wrap: bool, zipped: bool) -> None:
    place = tmp_path / "canary"
    harm = {**STATE, "x": Canary(place)} if wrap else Canary(place)
    path = saved(tmp_path / "m.pt", harm, _use_new_zipfile_serialization=zipped)
    if wrap:
        with open_weights(path) as weights:
            assert weights.tensors.keys() == STATE.keys()
            assert np.array_equal(weights.read("w"), STATE["w"].numpy())
    else:
        assert "it holds a posix.mkdir, without tensors" in refused(path)
    assert not place.exists()
    torch.load(path, weights_only=False)
    assert place.exists()  # the canary sings when it is let out


def test_a_pickle_that_torch_has_not_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "m.pt").write_bytes(pickle.dumps({"w": [1.0, 2.0]}))
    assert "a pickle that torch.save has not written" in refused(tmp_path / "m.pt")


def test_torchscript_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "m.pt")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("m/Constants.pkl", pickle.dumps(()))
    assert "TorchScript" in refused(path)


@pytest.mark.parametrize("what", [[1.0], torch.ones(2), 7, None, "text", {"w": 1.0}])
def test_what_is_no_state_dict_is_refused(tmp_path: Path, what: object) -> None:
    assert "it holds a" in refused(saved(tmp_path / "m.pt", what))


# --- bombs


def test_a_compressed_archive_is_refused_before_it_is_inflated(tmp_path: Path) -> None:
    path = tmp_path / "bomb.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb/data.pkl", bytes(100_000_000))
    assert path.stat().st_size < 200_000
    tracemalloc.start()
    try:
        assert "bomb/data.pkl is compressed" in refused(path)
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()


def test_an_entry_that_claims_more_than_the_file_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "m.pt")
    content = bytearray(path.read_bytes())
    entry = content.index(b"PK\x01\x02")
    content[entry + 24 : entry + 28] = struct.pack("<I", 1 << 30)
    path.write_bytes(content)
    refused(path)


def test_a_giant_pickle_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("m/DATA.PKL", b"")
    content = bytearray(path.read_bytes())
    entry = content.index(b"PK\x01\x02")
    claimed = (32 << 20) + 1
    content[entry + 24 : entry + 28] = struct.pack("<I", claimed)
    path.write_bytes(bytes(content[:entry]) + bytes(claimed) + bytes(content[entry:]))
    with path.open("r+b") as file:
        file.seek(-6, io.SEEK_END)
        file.write(struct.pack("<I", entry + claimed))
    assert f"m/data.pkl has {claimed:,} bytes" in refused(path)


@pytest.mark.parametrize("tensor", [torch.zeros(1).expand(10**10), torch.zeros(2, 1).expand(2, 3)])
def test_an_expanded_tensor_is_refused_and_leaves_the_others_readable(
    tmp_path: Path, tensor: torch.Tensor
) -> None:
    path = saved(tmp_path / "m.pt", {"bomb": tensor, "w": STATE["w"]})
    assert path.stat().st_size < 5000
    assert f"bomb claims {tensor.numel():,} values" in unreadable(path, "bomb")
    with open_weights(path) as weights:
        assert np.array_equal(weights.read("w"), STATE["w"].numpy())


def odd_tensors() -> dict[str, torch.Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # several of these are called beta or deprecated
        return {
            "sparse": torch.eye(3).to_sparse(),
            "sparse_csr": torch.eye(3).to_sparse_csr(),
            "sparse_double": torch.eye(3).double().to_sparse(),
            "meta": torch.ones(3, device="meta"),
            "complex": torch.ones(3, dtype=torch.complex64),
        }


@pytest.mark.parametrize("name", odd_tensors())
def test_a_tensor_of_another_kind_leaves_the_others_readable(tmp_path: Path, name: str) -> None:
    odd = odd_tensors()[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = saved(tmp_path / "m.pt", {"odd": odd, "w": STATE["w"]})
    with open_weights(path) as weights:
        assert np.array_equal(weights.read("w"), STATE["w"].numpy())
        assert ("odd" in weights.tensors) == (name == "complex")
        if name == "complex":
            with pytest.raises(SuspectError, match="expected dense real weights") as caught:
                weights.read("odd")
            one_line(caught.value)


# --- one archive, and only one


def narrow(content: bytes) -> bytes:
    """The archive without the 64-bit end record that torch.save writes as well."""
    assert content[-98:-94] == b"PK\6\6"
    return content[:-98] + content[-22:]


def end_record(content: bytes, **changes: int) -> bytes:
    """The archive with other numbers in its end record."""
    names = ("disk", "disks", "here", "entries", "length", "offset", "comment")
    numbers = dict(zip(names, struct.unpack("<4H2LH", content[-18:]), strict=True)) | changes
    return content[:-18] + struct.pack("<4H2LH", *numbers.values())


@pytest.mark.parametrize("unsaid", [{}, {"length": 2**32 - 1, "offset": 2**32 - 1}])
def test_both_end_records_are_read(tmp_path: Path, unsaid: dict[str, int]) -> None:
    path = saved(tmp_path / "m.pt")
    wide = path.read_bytes()
    for content in (end_record(wide, **unsaid), narrow(wide)):
        path.write_bytes(content)
        with open_weights(path) as weights:
            assert np.array_equal(weights.read("w"), STATE["w"].numpy())


def grafted(content: bytes) -> bytes:
    """Two directories: one where the end record points, one where Python's zipfile looks."""
    compressed = io.BytesIO()
    with zipfile.ZipFile(compressed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("m/data.pkl", bytes(1000))
    at = compressed.getvalue().index(b"PK\x01\x02")
    both = end_record(compressed.getvalue()[:-22] + narrow(content), offset=at)
    with zipfile.ZipFile(io.BytesIO(both)) as archive:
        assert all(not each.compress_type for each in archive.infolist())
    return both


@pytest.mark.parametrize(
    "change",
    [
        grafted,
        lambda content: content + content,
        lambda content: b"PK\3\4 in front" + content,
        lambda content: b"PK\3\4 in front" + narrow(content),
        lambda content: content + b"behind",
        lambda content: end_record(content, comment=3) + b"abc",
        lambda content: content[:-22] + b"between" + content[-22:],
        lambda content: content[:-98] + b"between" + content[-98:],
        lambda content: content[:-1],
        lambda content: content[:-22],
        lambda content: content[:4],
        lambda content: content[:4] + bytes(100),
        lambda content: end_record(content, offset=10),
        lambda content: end_record(content, length=10),
        lambda content: end_record(narrow(content), offset=2**32 - 1),
        lambda content: content[:-34] + b"\0" + content[-33:],
        lambda content: content[:-98] + b"PK\6\5" + content[-94:],
        lambda content: content[:-50] + b"\0" + content[-49:],
    ],
    ids=range(18),
)
def test_an_ambiguous_directory_is_refused(
    tmp_path: Path, change: Callable[[bytes], bytes]
) -> None:
    path = saved(tmp_path / "m.pt")
    path.write_bytes(change(path.read_bytes()))
    assert "zip directory cannot be read" in refused(path)


def test_a_truncated_or_damaged_file_is_refused_in_words(tmp_path: Path) -> None:
    path = saved(tmp_path / "m.pt")
    whole = path.read_bytes()
    for end in range(0, len(whole), 16):
        path.write_bytes(whole[:end])
        refused(path)
    generator = np.random.default_rng(3)
    for _ in range(100):
        damaged = bytearray(whole)
        for at in generator.integers(4, len(whole), 3):
            damaged[at] = generator.integers(256)
        path.write_bytes(damaged)
        try:
            with open_weights(path) as weights:
                for name in weights.tensors:
                    weights.read(name)
        except SuspectError as error:
            one_line(error)


def test_a_file_that_was_swapped_while_it_was_read_has_no_digest(tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    torch.save({"w": torch.ones(2, 2)}, path)
    with open_weights(path) as weights:
        digest = weights.compute_file_digest()
        assert digest == hashlib.sha256(path.read_bytes()).hexdigest()
        torch.save({"w": torch.zeros(2, 2)}, tmp_path / "other.pt")
        (tmp_path / "other.pt").replace(path)
        with pytest.raises(SuspectError, match="changed while it was read"):
            weights.compute_file_digest()
