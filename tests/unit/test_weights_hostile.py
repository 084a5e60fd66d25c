"""Safetensors files that mean harm: damaged, truncated, or with a header that lies."""

from __future__ import annotations

import json
import os
import random
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from keys import mutated, one_line

from countermark.checkpoints import open_weights
from countermark.errors import SuspectError

MOST_MEMORY = 50_000_000


@contextmanager
def little_memory() -> Iterator[None]:
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < MOST_MEMORY
    finally:
        tracemalloc.stop()


def file_of(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    """A safetensors file with this header (JSON, or bytes as they are) and this data."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    raw = raw.ljust(2)
    path.write_bytes((len(raw) if length is None else length).to_bytes(8, "little") + raw + data)
    return path


def refused(path: Path) -> str:
    with little_memory(), pytest.raises(SuspectError) as caught:
        open_weights(path)
    return one_line(caught.value)


def tensor(
    shape: object = (2,), offsets: object = (0, 8), dtype: object = "F32"
) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def test_a_good_file_is_the_same_here(tmp_path: Path) -> None:
    path = file_of(tmp_path / "s", {"w": tensor(), "e": tensor((0,), (8, 8))}, bytes(8))
    with open_weights(path) as weights:
        assert weights.read("w").tolist() == [0.0, 0.0]
        assert weights.read("e").size == 0
    with open_weights(file_of(tmp_path / "t", {"__metadata__": {"a": "b"}})) as weights:
        assert weights.tensors == {}


@pytest.mark.parametrize(
    "length", [0, 1, 73, 1 << 31, 1 << 32, 1 << 62, (1 << 63) - 1, 1 << 63, (1 << 64) - 1]
)
def test_a_header_length_that_lies_is_refused(tmp_path: Path, length: int) -> None:
    header = {"w": tensor()}
    assert len(json.dumps(header)) not in (length, length - 1)
    refused(file_of(tmp_path / "s", header, bytes(8), length))


def test_a_huge_header_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = file_of(tmp_path / "s", {}, length=100_000_001)
    os.truncate(path, 1 << 30)
    with little_memory():
        assert "claims 100,000,001 bytes" in refused(path)


@pytest.mark.parametrize(
    "about",
    [
        tensor(offsets=(0, 1 << 40)),
        tensor(offsets=(-8, 0)),
        tensor(offsets=(8, 0)),
        tensor(offsets=(0, 7)),
        tensor(offsets=(1, 9)),
        tensor(offsets=(0,)),
        tensor(offsets=(0, 8, 8)),
        tensor(offsets="08"),
        tensor(offsets=None),
        tensor(offsets=(0.0, 8.0)),
        tensor(offsets=(False, 8)),
        tensor(offsets={"0": 0, "8": 8}),
        tensor(offsets=(0, float("nan"))),
        tensor(offsets=(0, 10**4000)),
        tensor((-2,)),
        tensor((-2, -1)),
        tensor((2.0,)),
        tensor((True, 2)),
        tensor(("2",)),
        tensor("2"),
        tensor(2),
        tensor(None),
        tensor((float("nan"),)),
        tensor((1 << 31, 1 << 31)),
        tensor((1 << 62, 8)),
        tensor((1 << 63, 2)),
        tensor((1 << 64,)),
        tensor((0, 1 << 64), (0, 0)),
        tensor(([[2]],)),
        tensor((3,)),
        tensor((1,)),
        tensor(()),
        [],
        {},
        None,
        "w",
        8,
        {"dtype": "F32", "shape": [2]},
        {"shape": [2], "data_offsets": [0, 8]},
    ],
    ids=range(39),
)
def test_a_tensor_that_lies_is_refused(tmp_path: Path, about: object) -> None:
    refused(file_of(tmp_path / "s", {"w": about}, bytes(8)))


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"a": tensor(), "b": tensor()}, "overlap"),
        ({"a": tensor((4,), (0, 16)), "b": tensor((2,), (8, 16))}, "overlap"),
        ({"a": tensor(offsets=(0, 8)), "b": tensor((1,), (12, 16))}, "gap"),
        ({"a": tensor(offsets=(8, 16))}, "gap"),
        ({"a": tensor()}, "the file has"),
        ({"a": tensor((6,), (0, 24))}, "the file has"),
        ({}, "the file has"),
    ],
)
def test_bytes_belong_to_one_tensor_each(
    tmp_path: Path, tensors: dict[str, Any], said: str
) -> None:
    path = file_of(tmp_path / "s", tensors, bytes(16))
    assert said in refused(path)
    with pytest.raises(safetensors.SafetensorError):
        safetensors.deserialize(path.read_bytes())


@pytest.mark.parametrize(
    "header",
    [
        b"{",
        b"{}}",
        b'{"w":}',
        b"{'w': 1}",
        b'{"w": NaN}',
        b"{" + b'"a":{' * 200_000,
        b'{"a":' + b"[" * 500_000,
        b'{"w": ' + b"9" * 5000 + b"}",
        b'{"w": {"dtype":"F32","shape":[0],"data_offsets":[0,0]},"w":{}}',
        b'{"w": {"dtype":"F32","shape":[2],"shape":[2],"data_offsets":[0,8]}}',
        b'{"\xff": {"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
        '{"w": 1}'.encode("utf-16"),
        b"\0" * 80,
    ],
    ids=range(13),
)
def test_a_header_that_is_no_object_of_tensors_is_refused(tmp_path: Path, header: bytes) -> None:
    path = file_of(tmp_path / "s", header, bytes(8))
    said = refused(path)
    assert said.startswith(str(path))


@pytest.mark.parametrize("dimensions", [33, 100_000])
def test_a_tensor_of_too_many_dimensions_leaves_the_others_readable(
    tmp_path: Path, dimensions: int
) -> None:
    odd = tensor((1 << 62,) * dimensions, (0, 8))
    path = file_of(tmp_path / "s", {"odd": odd, "w": tensor(offsets=(8, 16))}, bytes(16))
    with little_memory(), open_weights(path) as weights:
        assert weights.read("w").tolist() == [0.0, 0.0]
        with pytest.raises(SuspectError, match=f"{dimensions} dimensions") as caught:
            weights.read("odd")
    one_line(caught.value)


def test_a_hostile_name_cannot_break_the_message(tmp_path: Path) -> None:
    for name in ("a\nb\x1b[2J\u202e", "x" * 1_000_000):
        said = refused(file_of(tmp_path / "s", {name: tensor((3,))}, bytes(8)))
        assert "obtain the suspect again" in said
        path = file_of(tmp_path / "s", {name: tensor((8,), dtype="F99")}, bytes(8))
        with open_weights(path) as weights, pytest.raises(SuspectError) as caught:
            weights.read(name)
        one_line(caught.value)


def test_a_truncated_file_is_refused_wherever_it_ends(tmp_path: Path) -> None:
    path = tmp_path / "s"
    whole = safetensors.numpy.save({"a": np.ones(50), "b": np.ones((3, 3), dtype=np.float32)})
    for end in range(len(whole)):
        path.write_bytes(whole[:end])
        with pytest.raises(SuspectError) as caught:
            open_weights(path)
        one_line(caught.value)
    path.write_bytes(whole + b"\0")
    refused(path)


def test_a_file_that_shrinks_after_it_was_opened_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "s"
    path.write_bytes(safetensors.numpy.save({"a": np.ones(100_000)}))
    with open_weights(path) as weights:
        os.truncate(path, 1000)
        with pytest.raises(SuspectError, match="ends after") as caught:
            weights.read("a")
    one_line(caught.value)


GOOD = safetensors.numpy.save(
    {
        "layer.weight": np.arange(12, dtype=np.float32).reshape(3, 4),
        "layer.bias": np.arange(3, dtype=np.float64),
        "seen": np.array(7),
        "none": np.zeros((0, 4), dtype=np.float16),
    }
)


@settings(
    max_examples=300,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(seed=st.integers(0, 1 << 32), changes=st.integers(1, 8), honest=st.booleans())
def test_random_damage_is_refused_or_read_as_the_library_reads_it(
    tmp_path: Path, seed: int, changes: int, honest: bool
) -> None:
    end = 8 + int.from_bytes(GOOD[:8], "little")
    header = mutated(GOOD[8:end] if honest else GOOD[:end], random.Random(seed), changes)  # noqa: S311
    start = len(header).to_bytes(8, "little") if honest else b""
    path = tmp_path / "s"
    path.write_bytes(start + header + GOOD[end:])
    found: dict[str, np.ndarray[Any, Any]] = {}
    with little_memory():
        try:
            with open_weights(path) as weights:
                found = {name: weights.read(name) for name in weights.tensors}
        except SuspectError as error:
            one_line(error)
            return
    try:
        oracle = safetensors.numpy.load_file(path)
    except safetensors.SafetensorError:
        return  # the library is stricter about what is beside the tensors
    assert found.keys() == oracle.keys()
    for name, values in found.items():
        wide = oracle[name] if oracle[name].dtype == np.float64 else oracle[name].astype(np.float32)
        assert np.array_equal(values, wide)


def test_what_is_no_regular_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.safetensors")
    with pytest.raises(SuspectError, match="is no regular file"):
        open_weights(tmp_path / "fifo.safetensors")
