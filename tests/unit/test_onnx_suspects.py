"""ONNX files as suspects: initializers and Constant nodes are read, hostile files are refused."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from countermark.checkpoints import OnnxWeights, load_state, open_weights
from countermark.errors import SuspectError

A = np.arange(6, dtype=np.float32).reshape(2, 3)
B = np.ones((4, 2), dtype=np.float32)


def graph(*tensors: TensorProto, nodes: Any = ()) -> onnx.ModelProto:
    return helper.make_model(helper.make_graph(list(nodes), "g", [], [], list(tensors)))


def written(path: Path, model: onnx.ModelProto) -> Path:
    path.write_bytes(model.SerializeToString())
    return path


def test_initializers_and_constants_are_read(tmp_path: Path) -> None:
    constant = helper.make_node("Constant", [], ["t1"], value=numpy_helper.from_array(B, "other"))
    path = written(tmp_path / "m.bin", graph(numpy_helper.from_array(A, "t0"), nodes=[constant]))
    with open_weights(path) as weights:
        assert isinstance(weights, OnnxWeights)
        assert {name: info.shape for name, info in weights.tensors.items()} == {
            "t0": (2, 3), "t1": (4, 2),
        }  # fmt: skip
        assert np.array_equal(weights.read("t0"), A)
        assert np.array_equal(weights.read("t1"), B)
        assert weights.digests.keys() == {"t0", "t1"}
        assert len(weights.compute_file_digest() or "") == 64
    assert load_state(path)["t1"].shape == (4, 2)


def external(location: str, *, length: str = "24", offset: str = "8", **fields: Any) -> TensorProto:
    """A tensor `t0` of six numbers, which lie in another file."""
    given = {"name": "t0", "data_type": TensorProto.FLOAT, "dims": [2, 3]} | fields
    tensor = TensorProto(**given, data_location=TensorProto.EXTERNAL)
    entries = {"location": location, "offset": offset, "length": length}
    for key, value in entries.items():
        if value:
            tensor.external_data.add(key=key, value=value)
    return tensor


def test_values_in_files_beside_the_model_are_read(tmp_path: Path) -> None:
    (tmp_path / "parts").mkdir()
    (tmp_path / "m.onnx.data").write_bytes(bytes(8) + A.tobytes())
    (tmp_path / "parts" / "more data").write_bytes(B.tobytes())
    more = external("parts/more data", length="", offset="", name="t1", dims=[4, 2])
    half = external("m.onnx.data", length="2", data_type=TensorProto.INT4, dims=[4], name="t2")
    path = written(tmp_path / "m.onnx", graph(external("m.onnx.data"), more, half))
    with open_weights(path) as weights:
        assert np.array_equal(weights.read("t0"), A)
        assert np.array_equal(weights.read("t1"), B)
        digest = weights.compute_file_digest()
        (tmp_path / "parts" / "more data").write_bytes(2 * B.tobytes())
        with pytest.raises(SuspectError, match="was changed"):
            weights.read("t1")
    files = [path, tmp_path / "m.onnx.data", tmp_path / "parts" / "more data"]
    with open_weights(path) as weights:
        assert weights.compute_file_digest() != digest
        lines = "".join(
            f"{hashlib.sha256(each.read_bytes()).hexdigest()}  {each.relative_to(tmp_path)}\n"
            for each in files
        )
        assert weights.compute_file_digest() == hashlib.sha256(lines.encode()).hexdigest()


@pytest.mark.parametrize(
    ("tensor", "why"),
    [
        (external("/etc/passwd"), "no plain path"),
        (external("../above"), "no plain path"),
        (external("in/../../above"), "no plain path"),
        (external("./data"), "no plain path"),
        (external("in\\data"), "no plain path"),
        (external("C:data"), "no plain path"),
        (external("da\nta"), "no plain path"),
        (external(""), "no plain path"),
        (external("link"), "leads out"),
        (external("folder"), "no regular file"),
        (external("missing"), "cannot be read"),
        (external("data", offset="-8"), "no byte numbers"),
        (external("data", offset="9" * 5000), "no byte numbers"),
        (external("data", length="25"), "by its shape"),
        (external("data", offset="9"), "ends at byte 33"),
        (external("data", dims=[1 << 40, 1 << 40], length=""), "ends at byte"),
        (external("data", dims=[-2, -3]), "by its shape"),
        (external("data", data_type=TensorProto.STRING), "dtype 8"),
    ],
)
def test_values_elsewhere_are_refused(tmp_path: Path, tensor: TensorProto, why: str) -> None:
    (tmp_path / "above").write_bytes(bytes(99))
    (tmp_path / "in" / "folder").mkdir(parents=True)
    (tmp_path / "in" / "data").write_bytes(bytes(32))
    (tmp_path / "in" / "link").symlink_to("../above")
    with pytest.raises(SuspectError, match=why) as caught:
        open_weights(written(tmp_path / "in" / "m.onnx", graph(tensor)))
    assert "\n" not in str(caught.value)


def test_small_files_do_not_claim_to_be_large(tmp_path: Path) -> None:
    (tmp_path / "data").write_bytes(bytes(32))
    tensors = [external("data", name=f"t{number}") for number in range(11)]
    with pytest.raises(SuspectError, match="claim 264 bytes of smaller files"):
        open_weights(written(tmp_path / "m.onnx", graph(*tensors)))


def claiming(*dims: int) -> onnx.ModelProto:
    return graph(
        TensorProto(name="t0", data_type=TensorProto.FLOAT, dims=list(dims), raw_data=b"0" * 8)
    )


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (claiming(1 << 40, 1 << 20), "claims"),
        (claiming(-1, 2), "claims"),
        (claiming(3, 1), "cannot be read"),
        (graph(TensorProto(name="t0", data_type=TensorProto.STRING, dims=[1],
                           string_data=[b"x"])), "cannot be read"),
        (graph(numpy_helper.from_array(A, "t0"), numpy_helper.from_array(A, "t0")), "twice"),
        (graph(), "holds no weights"),
    ],
)  # fmt: skip
def test_hostile_files_are_refused_in_one_line(
    tmp_path: Path, model: onnx.ModelProto, why: str
) -> None:
    path = written(tmp_path / "m.onnx", model)
    with pytest.raises(SuspectError, match=why) as caught:
        open_weights(path).read("t0")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"\x08\xff\xff\xff", b"\x08", b"no graph at all"])
def test_what_is_no_graph_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "m.onnx").write_bytes(content)
    with pytest.raises(SuspectError, match="refused"):
        open_weights(tmp_path / "m.onnx")


# --- layers, as exporters and quantisers store them

W = np.random.default_rng(1).normal(size=(4, 6)).astype(np.float32)  # (out, in)
BIAS = numpy_helper.from_array(np.arange(4, dtype=np.float32), "up.dense.bias")
OTHER = numpy_helper.from_array(np.arange(4, dtype=np.float32), "shift")


def stored(values: np.ndarray[Any, Any], name: str) -> TensorProto:
    return numpy_helper.from_array(np.ascontiguousarray(values), name)


def read(path: Path, model: onnx.ModelProto, name: str) -> np.ndarray[Any, Any]:
    with open_weights(written(path, model)) as weights:
        assert weights.tensors[name].shape == weights.read(name).shape
        return weights.read(name)


def product(weight: str, *, added: str = "up.dense.bias", op: str = "MatMul") -> list[Any]:
    nodes = [helper.make_node(op, ["x", weight], ["y"])]
    if op == "MatMulInteger":
        nodes.append(helper.make_node("Cast", ["y"], ["y1"], to=1))
        nodes.append(helper.make_node("Mul", ["y1", "factor"], ["y2"]))
    return [*nodes, helper.make_node("Add", [nodes[-1].output[0], added], ["z"])]


@pytest.mark.parametrize("reverse", [False, True])
def test_a_transposed_weight_is_found_by_its_bias(tmp_path: Path, reverse: bool) -> None:
    nodes = product("onnx::MatMul_7")
    if reverse:
        nodes[-1].input[:] = reversed(nodes[-1].input)
    model = graph(stored(W.T, "onnx::MatMul_7"), BIAS, nodes=nodes)
    assert np.array_equal(read(tmp_path / "m.onnx", model, "up.dense.weight"), W)
    assert np.array_equal(read(tmp_path / "m.onnx", model, "onnx::MatMul_7"), W.T)
    assert "up.dense.weight" not in load_state(tmp_path / "m.onnx")


def test_without_a_name_in_the_bias_it_is_there_transposed(tmp_path: Path) -> None:
    for extra, nodes in ((OTHER, product("t", added="shift")), (BIAS, product("t")[:1])):
        model = graph(stored(W.T, "t"), extra, nodes=nodes)
        assert np.array_equal(read(tmp_path / "m.onnx", model, "t, transposed"), W)


@pytest.mark.parametrize(
    ("name", "scopes", "found"),
    [
        ("n", "['', 'up', 'up.dense', 'linear_3']", "up.dense.weight"),
        ("/up/dense/MatMul", None, "up.dense.weight"),
        ("MatMul", "[]", "t, transposed"),
        ("/MatMul", "up", "t, transposed"),
    ],
)
def test_without_a_bias_the_exporter_notes_the_layer(
    tmp_path: Path, name: str, scopes: str | None, found: str
) -> None:
    nodes = product("t")[:1]
    nodes[0].name = name
    if scopes is not None:
        nodes[0].metadata_props.add(key="pkg.torch.onnx.name_scopes", value=scopes)
    assert np.array_equal(read(tmp_path / "m.onnx", graph(stored(W.T, "t"), nodes=nodes), found), W)


def test_a_bias_of_two_layers_names_neither(tmp_path: Path) -> None:
    second = [helper.make_node("MatMul", ["x", "s"], ["v"]),
              helper.make_node("Add", ["v", "up.dense.bias"], ["w"])]  # fmt: skip
    model = graph(stored(W.T, "t"), stored(2 * W.T, "s"), BIAS, nodes=[*product("t"), *second])
    assert np.array_equal(read(tmp_path / "m.onnx", model, "s, transposed"), 2 * W)
    with open_weights(tmp_path / "m.onnx") as weights:
        assert "up.dense.weight" not in weights.tensors


@pytest.mark.parametrize("flag", [0, 1])
def test_gemm_says_how_it_reads(tmp_path: Path, flag: int) -> None:
    node = helper.make_node("Gemm", ["x", "t", "up.dense.bias"], ["y"], transB=flag)
    model = graph(stored(W if flag else W.T, "t"), BIAS, nodes=[node])
    with open_weights(written(tmp_path / "m.onnx", model)) as weights:
        assert ("up.dense.weight" in weights.tensors) == (not flag)


def test_a_tensor_that_has_the_name_already_keeps_it(tmp_path: Path) -> None:
    """GPT-2's layers are (in, out) where they come from, too."""
    name = "up.dense.weight"
    model = graph(stored(W.T, name), BIAS, nodes=product(name))
    assert np.array_equal(read(tmp_path / "m.onnx", model, name), W.T)


def test_whole_numbers_are_read_with_their_scales(tmp_path: Path) -> None:
    scale = np.linspace(0.1, 0.4, 4).astype(np.float32)
    codes = np.arange(-12, 12, dtype=np.int8).reshape(6, 4)
    parts = [stored(codes, "t_quantized"), stored(scale, "t_scale"),
             stored(np.int8(2).reshape(()), "t_zero_point"), BIAS]  # fmt: skip
    model = graph(*parts, nodes=product("t_quantized", op="MatMulInteger"))
    expected = ((codes - 2.0) * scale).T
    np.testing.assert_allclose(read(tmp_path / "m.onnx", model, "up.dense.weight"), expected)
    back = helper.make_node("DequantizeLinear", ["t_quantized", "t_scale"], ["t"], axis=1)
    model = graph(*parts[:2], BIAS, nodes=[back, *product("t")])
    np.testing.assert_allclose(read(tmp_path / "m.onnx", model, "up.dense.weight"),
                               (codes * scale).T)  # fmt: skip


def test_four_bits_in_blocks_are_read(tmp_path: Path) -> None:
    codes = np.random.default_rng(2).integers(0, 16, (3, 2, 16)).astype(np.uint8)  # blocks of 16
    halves = codes[:, :, ::2] | codes[:, :, 1::2] << 4
    scale = np.random.default_rng(3).random(6).astype(np.float32)
    node = helper.make_node("MatMulNBits", ["x", "t", "s"], ["y"], domain="com.microsoft", K=30,
                            N=3, bits=4, block_size=16)  # fmt: skip
    model = graph(stored(halves, "t"), stored(scale, "s"), nodes=[node])
    expected = ((codes - 8.0) * scale.reshape(3, 2, 1)).reshape(3, 32)[:, :30]
    np.testing.assert_allclose(read(tmp_path / "m.onnx", model, "t, transposed"), expected)


def bomb(*parts: TensorProto, **attributes: int) -> onnx.ModelProto:
    op, given = ("MatMulNBits", ["x", "t", "s"]) if "K" in attributes else (
        "DequantizeLinear", ["t", "s"])  # fmt: skip
    return graph(*parts, nodes=[helper.make_node(op, given, ["w"], **attributes)])


@pytest.mark.parametrize(
    ("model", "name"),
    [
        (bomb(stored(np.ones((1, 100_000), np.int8), "t"), stored(np.ones(100_000), "s"),
              axis=0), "w"),
        (bomb(stored(np.ones((1, 1, 50_000), np.uint8), "t"), stored(np.ones(100_000), "s"), K=9,
              N=1, block_size=100_000), "t, transposed"),
        (bomb(stored(np.ones((2, 1, 8), np.uint8), "t"), stored(np.ones(2), "s"), K=1 << 40, N=2,
              block_size=16), "t, transposed"),
        (bomb(stored(np.ones((2, 1, 8), np.uint8), "t"), stored(np.ones(2), "s"), K=16, N=1 << 40,
              block_size=16), "t, transposed"),
    ],
)  # fmt: skip
def test_scales_that_would_fill_memory_are_refused(
    tmp_path: Path, model: onnx.ModelProto, name: str
) -> None:
    with (
        open_weights(written(tmp_path / "m.onnx", model)) as weights,
        pytest.raises(SuspectError, match="cannot be read") as caught,
    ):
        weights.read(name)
    assert "\n" not in str(caught.value)


def test_branches_are_read_and_told_apart(tmp_path: Path) -> None:
    def branch(factor: float) -> onnx.GraphProto:
        constant = helper.make_node("Constant", [], ["t"], value=stored(factor * W.T, "any"))
        return helper.make_graph([constant, *product("t")], "branch", [], [])

    choice = helper.make_node("If", ["c"], ["z"], then_branch=branch(1), else_branch=branch(2))
    model = graph(BIAS, nodes=[choice])
    with open_weights(written(tmp_path / "m.onnx", model)) as weights:
        named = {name for name in weights.tensors if name not in weights.views}
        assert named == {"up.dense.bias", "t", "t (2)"}
        read = [weights.read(name) for name in ("t", "t (2)")]
        assert any(np.array_equal(each, W.T) for each in read)
        assert any(np.array_equal(each, 2 * W.T) for each in read)
