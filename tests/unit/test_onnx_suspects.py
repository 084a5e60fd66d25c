"""ONNX files as suspects: initializers and Constant nodes are read, hostile files are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from countermark.errors import SuspectError
from countermark.weights import OnnxWeights, load_state, open_weights

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
        assert len(weights.file_digest() or "") == 64
    assert load_state(path)["t1"].shape == (4, 2)


def external() -> onnx.ModelProto:
    tensor = TensorProto(name="t0", data_type=TensorProto.FLOAT, dims=[2, 3])
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="/etc/passwd")
    return graph(tensor)


def claiming(*dims: int) -> onnx.ModelProto:
    return graph(
        TensorProto(name="t0", data_type=TensorProto.FLOAT, dims=list(dims), raw_data=b"0" * 8)
    )


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (external(), "lies in another file"),
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
