"""One real model as safetensors, TorchScript and ONNX: marked once, found in all three (slow).

silero-vad's package holds its network in each of these forms, which call its tensors differently.
The marked weights are put into each, and each answers alike. Which tensor is which the key finds by
shape; p is corrected for every way.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from real_models import place_of
from torch import Tensor

from countermark.checkpoints import load_state
from countermark.keys.key import Key
from countermark.stamping import stamp
from countermark.stamping.making import StampPaths
from countermark.verification.verify import verify

pytestmark = pytest.mark.slow
SAMPLES = 512
ROLES = {
    **{f"conv{n + 1}.{last}": f"encoder.{n}.reparam_conv.{last}"
       for n in range(4) for last in ("weight", "bias")},
    **{f"lstm_cell.{part}_{side}": f"decoder.rnn.{part}_{side}"
       for part in ("weight", "bias") for side in ("ih", "hh")},
    **{f"final_conv.{last}": f"decoder.decoder.2.{last}" for last in ("weight", "bias")},
}  # fmt: skip
LAYERS = [f"conv{n}.weight" for n in (1, 2, 3, 4)] + [f"lstm_cell.weight_{s}" for s in ("ih", "hh")]


@pytest.fixture(scope="module")
def marked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Key, float]:
    folder = tmp_path_factory.mktemp("silero")
    places = StampPaths(folder / "marked.safetensors", folder / "a.key")
    fields = {"layer": LAYERS, "bits": 128, "margin": 2.0}
    done = stamp(place_of("silero"), places, owner="ACME", fields=fields)
    return places.out, Key.load(places.key), done.change


def as_script(state: dict[str, Tensor], path: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is called deprecated
        model = torch.jit.load(place_of("silero").parent / "silero_vad.jit")
        own = model.state_dict()
        for name, role in ROLES.items():
            own[f"_model.{role}"].copy_(state[name])
        torch.jit.save(model, path)
    return model


def as_graph(state: dict[str, Tensor], path: Path) -> None:
    import onnx
    from onnx import numpy_helper

    model = onnx.load(str(place_of("silero").parent / "silero_vad.onnx"))
    ends = {f"then_branch__Inline_0__{role}": name for name, role in ROLES.items()}
    put = 0
    graphs = [model.graph]
    for graph in graphs:
        for node in graph.node:
            for attribute in node.attribute:
                graphs += [attribute.g] if attribute.HasField("g") else []
                name = ends.get(node.output[0].removeprefix("If_0_")) if node.output else None
                if node.op_type == "Constant" and name is not None:
                    values = state[name].numpy()
                    assert tuple(attribute.t.dims) == values.shape
                    attribute.t.CopyFrom(numpy_helper.from_array(values))
                    put += 1
    assert put == len(ROLES)
    path.write_bytes(model.SerializeToString())


def heard(script: Any, graph: Path) -> tuple[list[float], list[float]]:
    """What both say to a second of noise, window by window."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(graph), options)
    drawn = np.random.default_rng(0).normal(0, 0.1, (20, 1, SAMPLES)).astype(np.float32)
    state, context = np.zeros((2, 1, 128), np.float32), np.zeros((1, 64), np.float32)
    one, other = [], []
    script.reset_states()
    for window in drawn:
        with torch.no_grad():
            one.append(script(torch.from_numpy(window), 16000).item())
        given = np.concatenate([context, window], axis=1)
        said = session.run(None, {"input": given, "state": state, "sr": np.array(16000)})
        other.append(said[0].item())
        state, context = said[1], window[:, -64:]
    return one, other


def test_one_mark_is_found_in_three_forms(marked: tuple[Path, Key, float], tmp_path: Path) -> None:
    path, key, _ = marked
    state = load_state(path)
    script = as_script(state, tmp_path / "m.jit")
    as_graph(state, tmp_path / "m.onnx")
    np.testing.assert_allclose(*heard(script, tmp_path / "m.onnx"), atol=1e-4)
    ways = {}
    for suspect in (path, tmp_path / "m.jit", tmp_path / "m.onnx"):
        found = verify(suspect, key)
        assert found.owned, found.explain()
        assert found.matched == 128
        ways[suspect.suffix] = found.test_count
    assert ways == {".safetensors": 1, ".jit": 96, ".onnx": 96}


def test_it_is_not_in_what_the_package_holds(marked: tuple[Path, Key, float]) -> None:
    _, key, _ = marked
    for name in ("silero_vad_16k.safetensors", "silero_vad.jit", "silero_vad.onnx"):
        assert verify(place_of("silero").parent / name, key).outcome == "not_proven"
