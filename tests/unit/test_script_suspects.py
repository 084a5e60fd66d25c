"""TorchScript archives as suspects: tensors are read, and nothing in a hostile one ever runs."""

from __future__ import annotations

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
from torch import Tensor, nn

from countermark.checkpoints import (
    TorchWeights,
    compute_model_digest,
    load_state,
    open_weights,
    save_weights,
)
from countermark.checkpoints.safe_unpickle import (
    PersistentReference,
    PickledCall,
    PickledName,
    parse_pickle,
)
from countermark.errors import SuspectError
from countermark.keys.key import Key, KeyMaterial
from countermark.stamping import stamp
from countermark.stamping.making import StampPaths
from countermark.verification.verify import verify


class Host(nn.Module):
    """Layers in layers, a buffer, two dtypes, one layer of two names, and what is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.front = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8))
        self.back = self.front[2]
        self.narrow = nn.Parameter(torch.randn(3, 5).bfloat16())
        self.register_buffer("turned", torch.arange(12.0).reshape(3, 4).T)
        self.steps = 7

    def forward(self, x: Tensor) -> Tensor:
        return self.back(self.front(x)) * self.steps + self.turned.sum() + self.narrow.float().sum()


def quietly(act: Callable[[], object]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is called deprecated
        act()


def scripted(path: Path, model: nn.Module, *, frozen: bool = False) -> Path:
    def write() -> None:
        made = torch.jit.script(model.eval())
        torch.jit.save(torch.jit.freeze(made) if frozen else made, path)

    quietly(write)
    return path


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return scripted(tmp_path_factory.mktemp("script") / "m.pt", Host())


def test_tensors_have_the_names_and_values_of_a_state_dict(archive: Path) -> None:
    torch.manual_seed(0)
    state = Host().state_dict()
    with open_weights(archive) as weights:
        assert isinstance(weights, TorchWeights)
        assert state.keys() <= weights.tensors.keys()
        for name, tensor in state.items():
            assert weights.tensors[name].shape == tuple(tensor.shape)
            assert np.array_equal(weights.read(name), tensor.float().numpy())
        assert weights.tensors["narrow"].dtype == "BF16"
        assert (
            b"".join(weights.read_pieces("narrow"))
            == state["narrow"].view(torch.uint8).numpy().tobytes()
        )
        part = weights.read_part("front.0.weight", 5, 4)
        assert np.array_equal(part, state["front.0.weight"].reshape(-1)[5:9].numpy())
        assert len(weights.compute_file_digest()) == 64
        assert len(weights.digests) >= len(state)
    assert load_state(archive)["turned"].shape == (4, 3)


def test_its_digest_is_that_of_the_same_tensors_elsewhere(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    script = scripted(tmp_path / "m.pt", model)
    save_weights(model.state_dict(), tmp_path / "m.safetensors")
    with open_weights(script) as one, open_weights(tmp_path / "m.safetensors") as other:
        assert compute_model_digest(one) == compute_model_digest(other)


def test_a_mark_is_found_in_a_script_and_in_a_frozen_one(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 32))
    save_weights(model.state_dict(), tmp_path / "m.safetensors")
    places = StampPaths(tmp_path / "marked.safetensors", tmp_path / "a.key")
    secret = KeyMaterial(bytes(range(32)), bytes(16))  # a frozen script rounds what it holds
    fields = {"bits": 128, "margin": 3.0}
    stamp(tmp_path / "m.safetensors", places, owner="ACME", fields=fields, material=secret)
    key = Key.load(places.key)
    model.load_state_dict(load_state(places.out))
    found = verify(scripted(tmp_path / "plain.pt", model), key)
    assert (found.outcome, found.matched, found.test_count) == ("owned", 128, 1)
    found = verify(scripted(tmp_path / "frozen.pt", model, frozen=True), key)
    assert (found.outcome, found.matched) == ("owned", 128)
    assert all(name.startswith("constants.") for name in found.subject.tensors.values())


# --- harm


class Canary:
    """Pickles as a call that makes a folder."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> tuple[object, ...]:
        return (os.mkdir, (str(self.place),))


def rewritten(source: Path, path: Path, change: dict[str, bytes], *, deflate: str = "") -> Path:
    """An archive with other entries, whatever their check sums were."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(path, "w") as new:
        for entry in old.infolist():
            short = entry.filename.partition("/")[2]
            kind = zipfile.ZIP_DEFLATED if short == deflate else zipfile.ZIP_STORED
            new.writestr(entry.filename, change.get(short, old.read(entry)), kind)
    return path


def refused(path: Path) -> str:
    with pytest.raises(SuspectError) as caught:
        read_all(path)
    return one_line(caught.value)


def read_all(path: Path) -> None:
    with open_weights(path) as weights:
        for name in weights.tensors:
            weights.read(name)


@pytest.mark.parametrize("entry", ["data.pkl", "constants.pkl"])
def test_code_in_a_pickle_is_told_and_not_run(archive: Path, tmp_path: Path, entry: str) -> None:
    place = tmp_path / "canary"
    harm = pickle.dumps({"a": Canary(place)}, protocol=2)
    path = rewritten(archive, tmp_path / "m.pt", {entry: harm})
    if entry == "data.pkl":
        assert "holds no module" in refused(path)
    else:
        with open_weights(path) as weights:
            assert "front.0.weight" in weights.tensors
    told = parse_pickle(harm)
    assert isinstance(told["a"], PickledCall)
    assert told["a"].by == PickledName("posix.mkdir")
    assert told["a"].given == (str(place),)
    assert not place.exists()
    pickle.loads(harm)  # noqa: S301 - the canary sings when it is let out
    assert place.exists()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "exhausted"),
        (b"\x80\x02", "exhausted"),
        (b"\x80\x02.", "no whole pickle"),
        (b"\x80\x02)\x85", "exhausted"),
        (b"\x80\x02tt.", "no whole pickle"),
        (b"\x80\x02h\x05.", "no whole pickle"),
        (b"\x80\x02K\x01K\x02R.", "no whole pickle"),
        (b"\x80\x05\x97.", "NEXT_BUFFER is not known"),
        (b"\x80\x02cos\nsystem\n.", "holds no module"),
        (b"\x80\x02}.", "holds no module"),
        (b"\xff\xff", ""),
    ],
)
def test_damaged_pickles_are_one_line(
    archive: Path, tmp_path: Path, content: bytes, says: str
) -> None:
    path = rewritten(archive, tmp_path / "m.pt", {"data.pkl": content})
    assert says in refused(path)


def test_names_that_fill_the_memory_are_refused(
    archive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from countermark.checkpoints import pickled_tensors

    monkeypatch.setattr(pickled_tensors, "_MOST_LETTERS", 10)
    assert "too many" in refused(archive)


def test_a_pickle_of_endless_modules_is_refused_soon(archive: Path, tmp_path: Path) -> None:
    """Each module holds the one before twice: 2 to the 40th paths, in a few hundred bytes."""
    content = b"\x80\x02c__torch__\nM\n)\x81}(X\x01\0\0\0aK\x01ubq\x00"
    for at in range(40):
        content += b"c__torch__\nM\n)\x81}(X\x01\0\0\0ah" + bytes([at])
        content += b"X\x01\0\0\0bh" + bytes([at]) + b"ubq" + bytes([at + 1])
    path = rewritten(archive, tmp_path / "m.pt", {"data.pkl": content + b"."})
    assert "too many" in refused(path)


def tensor(key: str, *, offset: int, shape: str, strides: str, count: int) -> bytes:
    """A pickle of a module whose only tensor says so."""
    ints = {"offset": offset, "count": count}
    told = {name: b"J" + struct.pack("<i", each) for name, each in ints.items()}
    sizes = [
        b"(" + b"".join(b"\x8a\x08" + struct.pack("<q", int(n)) for n in each.split()) + b"t"
        for each in (shape, strides)
    ]
    word = b"X" + struct.pack("<I", len(key)) + key.encode()
    return (
        b"\x80\x02c__torch__\nM\n)\x81}(X\x01\0\0\0wctorch._utils\n_rebuild_tensor_v2\n(("
        b"X\x07\0\0\0storagectorch\nFloatStorage\n" + word + b"X\x03\0\0\0cpu" + told["count"]
        + b"tQ" + told["offset"] + sizes[0] + sizes[1] + b"\x89)tRub."
    )  # fmt: skip


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ({"shape": "3 2", "strides": "2 1", "offset": 0}, None),
        ({"shape": "3 2", "strides": "1 3", "offset": 0}, None),
        ({"shape": "3 3", "strides": "3 1", "offset": 0}, "more than are there"),
        ({"shape": "3 2", "strides": "2 1", "offset": 1}, "more than are there"),
        ({"shape": "2 2", "strides": "9 1", "offset": 0}, "more than are there"),
        ({"shape": "1000000 1000000", "strides": "0 0", "offset": 0}, "more than are there"),
        ({"shape": "2", "strides": "2 1", "offset": 0}, "do not fit each other"),
        ({"shape": "3 2", "strides": "2 -1", "offset": 0}, "no numbers"),
        ({"shape": "3 2", "strides": "2 1", "offset": -4}, "no numbers"),
        ({"shape": "3 2", "strides": "2 1", "offset": 0, "key": "../../etc/passwd"}, "no entry"),
    ],
)
def test_a_tensor_lies_in_its_storage(
    archive: Path, tmp_path: Path, what: dict[str, object], says: str | None
) -> None:
    told = tensor(**({"key": "0", "count": 6} | what))  # type: ignore[arg-type]
    change = {"data.pkl": told, "data/0": np.arange(6, dtype="<f4").tobytes()}
    path = rewritten(archive, tmp_path / "m.pt", change)
    if says is not None:
        assert says in refused(path)
        return
    with open_weights(path) as weights:
        expected = np.arange(6).reshape(3, 2) if what["strides"] == "2 1" else None
        read = weights.read("w")
    assert np.array_equal(read, expected if expected is not None else np.arange(6).reshape(2, 3).T)


@pytest.mark.parametrize("entry", ["data.pkl", "constants.pkl", "data/2"])
def test_compressed_entries_are_refused_before_they_are_inflated(
    archive: Path, tmp_path: Path, entry: str
) -> None:
    path = tmp_path / "m.pt"
    rewritten(archive, path, {entry: bytes(60_000_000)}, deflate=entry)
    tracemalloc.start()
    try:
        assert "is compressed" in refused(path)
        assert tracemalloc.get_traced_memory()[1] < 20_000_000
    finally:
        tracemalloc.stop()


def test_ambiguous_archives_are_refused(archive: Path, tmp_path: Path) -> None:
    content = archive.read_bytes()
    for changed in (content + b"x", b"x" + content, content + content, content[:-30]):
        (tmp_path / "m.pt").write_bytes(changed)
        refused(tmp_path / "m.pt")
    path = tmp_path / "twice.pt"
    rewritten(archive, path, {})
    with zipfile.ZipFile(path, "a") as twice:
        folder = twice.namelist()[0].partition("/")[0]
        twice.writestr(f"{folder}/DATA.pkl", b"")
    assert "one name" in refused(path)


def test_the_other_byte_order_is_refused(archive: Path, tmp_path: Path) -> None:
    path = rewritten(archive, tmp_path / "m.pt", {"byteorder": b"big"})
    assert "little-endian" in refused(path)


def test_an_inert_pickle_is_what_torch_writes() -> None:
    buffer = io.BytesIO()
    torch.save({"w": torch.ones(2)}, buffer)
    with zipfile.ZipFile(buffer) as archive:
        told = parse_pickle(archive.read("archive/data.pkl"))
    assert isinstance(told["w"], PickledCall)
    assert isinstance(told["w"].given[0], PersistentReference)
