"""What people put into files of torch: tensors are read by their paths, all else is inert."""

from __future__ import annotations

import argparse
import collections
import enum
import io
import json
import pickle
import struct
import time
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from keys import one_line
from torch import nn

from countermark.checkpoints import (
    ModelDigest,
    compute_model_digest,
    find_assignments,
    load_state,
    open_suspect,
    open_weights,
    save_weights,
)
from countermark.checkpoints.safe_unpickle import PickledCall, parse_pickle
from countermark.errors import SuspectError


class Mode(enum.Enum):
    """A setting."""

    FAST = 1


class Trainer:
    """An object that holds a module, refers to itself, and lists its parts."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.trainer, self.callbacks = model, self, [self, {"of": self}]


class Slotted:
    """An object without a dict."""

    __slots__ = ("shadow",)

    def __init__(self, shadow: dict[str, torch.Tensor]) -> None:
        self.shadow = shadow


class Blocks(nn.Module):
    """Modules in modules, one of two names, a buffer and a plain attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.front = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.BatchNorm1d(8))
        self.back = self.front[0]
        self.settings = argparse.Namespace(lr=0.1)
        self.optimized = nn.Linear(2, 2)


def model() -> Blocks:
    torch.manual_seed(0)
    return Blocks().eval()


def names(path: Path) -> set[str]:
    with open_weights(path) as weights:
        for name in weights.tensors:
            weights.read(name)
        return set(weights.tensors)


def digest_of(path: Path) -> ModelDigest:
    with open_weights(path) as weights:
        return compute_model_digest(weights)


def saved(folder: Path, content: Any, **options: Any) -> Path:
    torch.save(content, folder / "m.pt", **options)
    return folder / "m.pt"


STATE = {"0.weight": torch.randn(3, 2), "0.bias": torch.ones(3)}
EXTRAS = {
    "settings": argparse.Namespace(lr=1e-3, mode=Mode.FAST), "best": np.float64(0.9),
    "curve": np.arange(5.0), "out": Path("runs/x"), "epoch": 3, "seen": {1, 2}, "dtype": torch.half,
    "counts": collections.Counter("abc"), "sizes": torch.Size([3, 2]), "device": torch.device("cpu"),
    "empty": collections.defaultdict(list), "raw": b"\0\1", "big": 10**30, "odd": {(1, 2): 3.0},
}  # fmt: skip


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("zipped", [True, False])
def test_all_but_tensors_is_inert(tmp_path: Path, protocol: int, zipped: bool) -> None:
    content = {"state_dict": STATE, **EXTRAS}
    options = {"pickle_protocol": protocol, "_use_new_zipfile_serialization": zipped}
    path = saved(tmp_path, content, **options)
    with open_weights(path) as weights:
        assert weights.tensors.keys() == STATE.keys()
        assert all(np.array_equal(weights.read(n), each.numpy()) for n, each in STATE.items())
    assert all(torch.equal(each, STATE[n]) for n, each in load_state(path).items())


@pytest.mark.parametrize("zipped", [True, False])
def test_every_dtype_has_the_bytes_and_the_digest_of_safetensors(
    tmp_path: Path, zipped: bool
) -> None:
    words = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8")
    words += ("uint8", "bool", "uint16", "float8_e4m3fn", "float8_e5m2")
    state = {f"a.{word}": torch.ones(3, 4).to(getattr(torch, word)) for word in words}
    state["a.turned"] = torch.arange(12.0).reshape(3, 4).T
    state["a.part"] = torch.arange(12.0)[3:9].reshape(2, 3)
    plain = {name: each.contiguous().clone() for name, each in state.items()}
    safetensors.torch.save_file(plain, tmp_path / "m.safetensors")
    path = saved(tmp_path, state, _use_new_zipfile_serialization=zipped)
    with open_weights(path) as one, open_weights(tmp_path / "m.safetensors") as other:
        assert {n: (i.shape, i.dtype) for n, i in one.tensors.items()} == {
            n: (i.shape, i.dtype) for n, i in other.tensors.items()
        }
        assert compute_model_digest(one) == compute_model_digest(other)
    loaded = load_state(path)
    assert all(loaded[n].dtype == each.dtype for n, each in state.items())
    assert torch.equal(loaded["a.turned"], state["a.turned"])


def test_a_whole_module_has_the_names_of_its_state_dict(tmp_path: Path) -> None:
    state = model().state_dict()
    for zipped in (True, False):
        with open_weights(
            saved(tmp_path, model(), _use_new_zipfile_serialization=zipped)
        ) as weights:
            assert weights.tensors.keys() == state.keys()
            assert all(np.array_equal(weights.read(n), t.float().numpy()) for n, t in state.items())
    with open_weights(saved(tmp_path, Trainer(model()))) as weights:
        assert weights.tensors.keys() == {f"model.{name}" for name in state}
    assert names(saved(tmp_path, Slotted(STATE))) == {"shadow.0.weight", "shadow.0.bias"}


def test_nested_state_dicts_have_their_path_as_a_prefix(tmp_path: Path) -> None:
    net = {"generator": {"params_ema": STATE}, "list": [STATE, 3]}
    assert names(saved(tmp_path, net)) == {
        f"{before}.{name}" for before in ("generator.params_ema", "list.0") for name in STATE
    }
    ordered = collections.OrderedDict(STATE)
    ordered._metadata = {"": {"version": 1}}  # type: ignore[attr-defined]
    assert names(saved(tmp_path, collections.defaultdict(dict, net=ordered))) == {
        f"net.{name}" for name in STATE
    }


def test_beside_a_state_dict_that_was_always_read_others_are_views(tmp_path: Path) -> None:
    digest = digest_of(saved(tmp_path, STATE))
    ema = {name: each + 1 for name, each in STATE.items()}
    for wrapper in ("state_dict", "model"):
        path = saved(tmp_path, {"ema": ema, wrapper: STATE, "aliased": STATE})
        with open_weights(path) as weights:
            assert list(weights.tensors)[:2] == list(STATE)
            assert weights.views == {f"ema.{name}" for name in STATE}
            assert compute_model_digest(weights) == digest
            shapes = {name: tuple(each.shape) for name, each in STATE.items()}
            ways = list(find_assignments(weights, shapes))
        assert ways == [{n: n for n in STATE}, {n: f"ema.{n}" for n in STATE}]
        assert load_state(path).keys() == STATE.keys()


def test_states_of_optimizers_are_left_out(tmp_path: Path) -> None:
    net = model()
    optimizer = torch.optim.Adam(net.parameters())
    for each in net.parameters():
        each.grad = torch.ones_like(each)
    optimizer.step()
    content = {
        "net": net.state_dict(), "optimizer": optimizer.state_dict(), "opt_g": optimizer.state_dict(),
        "optim_states": {"0": {"exp_avg": torch.ones(3)}}, "whole": optimizer,
        "optimized_net": STATE,
    }  # fmt: skip
    kept = {f"net.{name}" for name in net.state_dict()} | {f"optimized_net.{n}" for n in STATE}
    assert names(saved(tmp_path, content)) == kept


def test_parameters_and_quantised_layers_are_tensors(tmp_path: Path) -> None:
    scales, zeros = torch.tensor([0.1, 0.2]), torch.tensor([1, -2])
    dense = torch.randn(2, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # quantised tensors are called deprecated
        content = {
            "a": nn.Parameter(torch.ones(2)), "b": nn.Parameter(torch.ones(2), requires_grad=False),
            "c": torch.quantize_per_tensor(dense, 0.1, 3, torch.quint8),
            "d": torch.quantize_per_channel(dense, scales, zeros, 0, torch.qint8),
        }  # fmt: skip
        path = saved(tmp_path, content)
    with open_weights(path) as weights:
        assert weights.read("a").tolist() == weights.read("b").tolist() == [1.0, 1.0]
        for name in ("c", "d"):
            assert np.array_equal(weights.read(name), content[name].dequantize().numpy())
        with pytest.raises(SuspectError, match="no word in safetensors"):
            compute_model_digest(weights)


def test_an_ordered_dict_of_python_2_is_a_mapping() -> None:
    pairs = b"(lp1\n(lp2\nS'w'\naI1\naa(lp3\nS'v'\naI2\naa"
    found = parse_pickle(b"ccollections\nOrderedDict\n(" + pairs + b"tR.")
    assert isinstance(found, PickledCall)
    assert found.items == {"w": 1, "v": 2}


@pytest.mark.parametrize("protocol", range(6))
def test_every_protocol_is_parsed(protocol: int) -> None:
    plain = [1, -7, 2**70, 1.5, "é", b"\0", True, None, (1, (2, 3, 4, 5)), {"a": [1], 2: "b"}, []]
    found = parse_pickle(pickle.dumps(plain, protocol))
    # Bytes are a call of a codec in the first protocols.
    assert [each for each in found if not isinstance(each, PickledCall)] == [
        each for at, each in enumerate(plain) if protocol >= 3 or at != 5
    ]
    told = parse_pickle(pickle.dumps([{1, 2}, frozenset("a"), argparse.Namespace(a=1)], protocol))
    assert told[2].state == {"a": 1}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"\x80\x02" + b"K\x01" * (1 << 21) + b".", "more than 2,097,152 steps"),
        (b"X\x00\x00\x02\x00" + b"a" * (1 << 17) + b"q\0" + b"0h\0h\0\x93" * 1000 + b".", "too long"),
        (b"\x8b\x01\x00\x00\x00\x01.", "LONG4 is not known"),
        (b"\x82\x01.", "EXT1 is not known"),
    ],
)  # fmt: skip
def test_a_pickle_beyond_bounds_is_refused_soon(content: bytes, says: str) -> None:
    before = time.monotonic()
    with pytest.raises(ValueError, match=says):
        parse_pickle(content)
    assert time.monotonic() - before < 30


def test_objects_that_refer_to_each_other_end(tmp_path: Path) -> None:
    """Forty objects, each of which refers to all others: the paths are without number."""
    objects = [argparse.Namespace(w=torch.ones(2)) for _ in range(40)]
    for each in objects:
        each.others = objects
    assert len(names(saved(tmp_path, objects))) == 40


NESTED = b")" + b"\x85" * 200_000  # a tuple in a tuple in a tuple …
OLD = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03."
OLD += b"\x80\x02}X\r\0\0\0little_endian\x88s."


@pytest.mark.parametrize(
    "content",
    [
        OLD + b"\x80\x02}.\x80\x02](" + NESTED + b"e.",
        OLD + b"\x80\x02}X\1\0\0\0w" + NESTED + b"s.\x80\x02].",
        OLD + b"\x80\x02}" + NESTED + b"K\1s.\x80\x02].",
        OLD + b"\x80\x02" + NESTED + b"Q.\x80\x02].",
        OLD + b"\x80\x02" + NESTED + b")R.\x80\x02].",
        OLD + b"\x80\x02}.\x80\x02" + NESTED + b".",
        OLD[:15] + b"\x80\x02" + NESTED + b".",
        b"\x80\x02" + NESTED + b".",
    ],
    ids=range(8),
)
def test_endless_nesting_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "m.pt").write_bytes(content)
    with pytest.raises(SuspectError) as caught:
        open_weights(tmp_path / "m.pt")
    one_line(caught.value)


@pytest.mark.parametrize("field", ["fqn", "relative_path", "size", "offset"])
def test_endless_nesting_in_metadata_is_refused(tmp_path: Path, field: str) -> None:
    folder = distributed(tmp_path / "d", STATE)
    content = (folder / ".metadata").read_bytes()
    word = b"\x8c" + bytes([len(field)]) + field.encode() + b"\x94"
    # The first value after the word is dropped, and the nested tuple stands in its place.
    assert word in content
    changed = content.replace(word, word + NESTED + b"X\1\0\0\0z", 1)
    (folder / ".metadata").write_bytes(b"\x80\x04" + changed[11:])
    with pytest.raises(SuspectError) as caught:
        open_weights(folder)
    one_line(caught.value)


@pytest.mark.parametrize("scale", [10**300, float("nan"), 1e39], ids=["long", "nan", "wide"])
def test_a_quantiser_without_numbers_is_refused(tmp_path: Path, scale: float) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # quantised tensors are called deprecated
        path = saved(
            tmp_path, {"w": torch.quantize_per_tensor(torch.ones(3), 0.125, 0, torch.qint8)}
        )
    entries = {}
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    old = b"G" + struct.pack(">d", 0.125)
    new = b"\x8a\x7e" + scale.to_bytes(126, "little") if isinstance(scale, int) else None
    entries["m/data.pkl"] = entries["m/data.pkl"].replace(
        old, new or b"G" + struct.pack(">d", scale)
    )
    with zipfile.ZipFile(path, "w") as archive:
        for name, each in entries.items():
            archive.writestr(name, each)
    with open_weights(path) as weights, pytest.raises(SuspectError) as caught:
        weights.read("w")
    one_line(caught.value)


# --- folders of torch.distributed, programs of torch.export


def distributed(folder: Path, content: Any) -> Path:
    from torch.distributed import checkpoint

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one process saves
        checkpoint.save(content, checkpoint_id=folder)
    return folder


def test_a_distributed_checkpoint_is_read(tmp_path: Path) -> None:
    state = STATE | {"step": torch.tensor(3), "half": torch.ones(5).bfloat16()}
    optimizer = {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 0.1}]}
    folder = distributed(tmp_path / "d", {"model": state, "optimizer": optimizer, "best": 0.5})
    for place in (folder, folder / ".metadata"):
        with open_weights(place) as weights:
            assert weights.tensors.keys() == {f"model.{name}" for name in state}
            for name, each in state.items():
                assert np.array_equal(weights.read(f"model.{name}"), each.float().numpy())
            assert len(weights.compute_file_digest() or "") == 64
    plain = distributed(tmp_path / "p", state)
    save_weights(state, tmp_path / "m.safetensors")
    with open_weights(plain) as one, open_weights(tmp_path / "m.safetensors") as other:
        assert compute_model_digest(one) == compute_model_digest(other)
    assert all(torch.equal(each, state[n]) for n, each in load_state(plain).items())


def test_chunks_are_put_together(tmp_path: Path) -> None:
    """Metadata as several processes write it: one tensor in four blocks."""
    from torch.distributed.checkpoint import metadata as words
    from torch.distributed.checkpoint.filesystem import _StorageInfo

    whole = torch.arange(35.0).reshape(5, 7)
    corners = {(0, 0): (2, 7), (2, 0): (3, 3), (2, 3): (3, 2), (2, 5): (3, 2)}
    found, content = {}, b""
    for at, (corner, sizes) in enumerate(corners.items()):
        block = whole[corner[0] : corner[0] + sizes[0], corner[1] : corner[1] + sizes[1]].clone()
        stream = io.BytesIO()
        torch.save(block, stream)
        index = words.MetadataIndex("w", torch.Size(corner), at)
        found[index] = _StorageInfo("__0_0.distcp", len(content), len(stream.getvalue()))
        content += stream.getvalue()
    (tmp_path / "__0_0.distcp").write_bytes(content)
    chunks = [words.ChunkStorageMetadata(torch.Size(a), torch.Size(b)) for a, b in corners.items()]
    about = words.TensorStorageMetadata(
        words.TensorProperties(dtype=torch.float32), whole.shape, chunks
    )
    told = words.Metadata(state_dict_metadata={"w": about}, planner_data=None, storage_data=found)
    (tmp_path / ".metadata").write_bytes(pickle.dumps(told))
    with open_weights(tmp_path) as weights:
        assert np.array_equal(weights.read("w"), whole.numpy())
    about.chunks = chunks[:3]
    (tmp_path / ".metadata").write_bytes(pickle.dumps(told))
    with pytest.raises(SuspectError, match="the chunks of w do not fill it") as caught:
        open_weights(tmp_path)
    one_line(caught.value)


@pytest.mark.parametrize("name", ["../secret.distcp", "/etc/passwd", "a/b.distcp", ".x.distcp"])
def test_no_file_outside_the_folder_is_opened(tmp_path: Path, name: str) -> None:
    folder = distributed(tmp_path / "d", STATE)
    (tmp_path / "secret.distcp").write_bytes((folder / "__0_0.distcp").read_bytes())
    told = pickle.loads((folder / ".metadata").read_bytes())  # noqa: S301 - written above
    for each in told.storage_data.values():
        each.relative_path = name
    (folder / ".metadata").write_bytes(pickle.dumps(told))
    with pytest.raises(SuspectError, match="is no name of a file in it") as caught:
        open_weights(folder)
    one_line(caught.value)


def test_a_program_of_torch_export_is_read(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).eval()
    path = tmp_path / "m.pt2"
    torch.export.save(torch.export.export(net, (torch.zeros(2, 4),)), path)
    with open_weights(path) as weights:
        assert weights.tensors.keys() == net.state_dict().keys()
        assert np.array_equal(weights.read("0.weight"), net[0].weight.detach().numpy())
    # Before torch 2.8 the state dict was a file of torch.save in the archive.
    inner = io.BytesIO()
    torch.save(net.state_dict(), inner)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("serialized_exported_program.json", json.dumps({}))
        archive.writestr("serialized_state_dict.pt", inner.getvalue())
    with open_weights(path) as weights:
        assert np.array_equal(weights.read("0.weight"), net[0].weight.detach().numpy())


# --- weights that are stored as several tensors


def test_pruned_and_normed_weights_are_composed(tmp_path: Path) -> None:
    from torch.nn.utils import parametrizations, prune, weight_norm

    torch.manual_seed(1)
    net = nn.ModuleDict(
        {
            "pruned": nn.Linear(6, 4), "old": nn.Conv1d(3, 4, 5), "new": nn.Linear(6, 4),
            "other": nn.Linear(6, 4), "one": nn.Linear(6, 4),
        }
    )  # fmt: skip
    prune.l1_unstructured(net["pruned"], "weight", amount=0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the older weight norm is called deprecated
        weight_norm(net["old"])
        weight_norm(net["other"], dim=1)
        weight_norm(net["one"], dim=None)
    parametrizations.weight_norm(net["new"])
    digest = digest_of(saved(tmp_path, net.state_dict()))
    with open_suspect(tmp_path / "m.pt") as weights:
        for layer in net:
            expected = net[layer].weight.detach().numpy()
            found = weights.read(f"{layer}.weight")
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)
            assert f"{layer}.weight" in weights.views
            assert np.array_equal(weights.read_part(f"{layer}.weight", 2, 3), found.ravel()[2:5])
        assert compute_model_digest(weights) == digest


def adapted(folder: Path, config: dict[str, Any] | None) -> dict[str, Any]:
    shapes = {"base_layer": (5, 6), "lora_A.default": (2, 6), "lora_B.default": (5, 2)}
    made = {f"{n}.{part}.weight": torch.randn(s) for n in "qv" for part, s in shapes.items()}
    torch.save(made, folder / "m.pt")
    if config is not None:
        (folder / "adapter_config.json").write_text(json.dumps(config))
    return {name: each.numpy() for name, each in made.items()}


@pytest.mark.parametrize(
    ("config", "scaling"),
    [({"lora_alpha": 8}, 4.0), ({"lora_alpha": 8, "use_rslora": True}, 8 / 2**0.5)],
)
def test_adapters_of_a_known_scaling_are_merged(
    tmp_path: Path, config: dict[str, Any], scaling: float
) -> None:
    made = adapted(tmp_path, config)
    added = made["q.lora_B.default.weight"] @ made["q.lora_A.default.weight"]
    wanted = {"q.weight": (5, 6), "v.weight": (5, 6)}
    with open_suspect(tmp_path / "m.pt") as weights:
        merged = made["q.base_layer.weight"] + scaling * added
        np.testing.assert_allclose(weights.read("q.weight"), merged, rtol=1e-4, atol=1e-5)
        assert list(find_assignments(weights, wanted)) == [{name: name for name in wanted}]


@pytest.mark.parametrize(
    "config", [None, {}, {"lora_alpha": "8"}, {"lora_alpha": 8, "use_dora": True}, {"lora_alpha": True}]
)  # fmt: skip
def test_of_adapters_of_an_unknown_scaling_the_base_is_read(
    tmp_path: Path, config: dict[str, Any] | None
) -> None:
    adapted(tmp_path, config)
    wanted = {"q.weight": (5, 6), "v.weight": (5, 6)}
    with open_suspect(tmp_path / "m.pt") as weights:
        assert list(find_assignments(weights, wanted)) == [
            {"q.weight": "q.base_layer.weight", "v.weight": "v.base_layer.weight"}
        ]
