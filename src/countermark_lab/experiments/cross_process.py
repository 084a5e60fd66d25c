"""Answers of a second process: it has a host's weight file and answers images, and knows no key.

The process is given a folder with the weights, the name and arguments of the model, and images.
This shows that triggers still work after a host was written to a file and loaded elsewhere.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import nn

from countermark.checkpoints import load_state, save_weights
from countermark.errors import SuspectError
from countermark.predictors.base import Images, Labels, make_module_predictor
from countermark.training.models import build
from countermark_lab.experiments.experiment import HostSettings

Scale = tuple[Sequence[float], Sequence[float]]
"""Mean and deviation of a host's inputs in grey levels, see `predictors.base.normalise_images`."""

_WEIGHTS, _HOST, _IMAGES, _ANSWERS = "m.safetensors", "host.json", "images.npy", "answers.npy"


def predict_in_other_process(
    model: nn.Module, host: HostSettings, scale: Scale, images: Images
) -> Labels:
    """Return the classes (n,) that another process gives to images (n, C, H, W).

    Raises:
        SuspectError: the process failed; the message quotes the last line of its errors.
    """
    with tempfile.TemporaryDirectory(prefix="countermark-") as name:
        folder = Path(name)
        save_weights(model.state_dict(), folder / _WEIGHTS)
        told = {"model": host.model, "arguments": host.model_arguments, "scale": scale}
        (folder / _HOST).write_text(json.dumps(told))
        np.save(folder / _IMAGES, images, allow_pickle=False)
        # This very module, run as a script; the folder is the only thing the processes share.
        command = [sys.executable, "-m", "countermark_lab.experiments.cross_process", str(folder)]
        ended = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
        if ended.returncode:
            last = (ended.stderr.strip() or "nothing").splitlines()[-1]
            raise SuspectError(f"the other machine ended with {ended.returncode}: {last}")
        answers: NDArray[np.int64] = np.load(folder / _ANSWERS, allow_pickle=False)
    return answers


def answer_folder(folder: Path) -> None:
    """Build the host of a folder, load its weights, and write its answers to the images."""
    # Runs in the second process. Arrays are read without pickle, as from any foreign file.
    told = json.loads((folder / _HOST).read_text())
    model = build(told["model"], told["arguments"])
    model.load_state_dict(load_state(folder / _WEIGHTS))
    images = np.load(folder / _IMAGES, allow_pickle=False)
    np.save(folder / _ANSWERS, make_module_predictor(model, *told["scale"])(images))


if __name__ == "__main__":
    answer_folder(Path(sys.argv[1]))
