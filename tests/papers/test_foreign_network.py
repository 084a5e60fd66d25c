"""A barrier behind a network that nobody here trained: the 2× upscaler of an npm package (MIT).

The package is fetched with `npm pack`; where that is not possible, the test is skipped and says so.
"""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import countermark as cm
from countermark.schemes.deep_watermarking.surrogates import run_network
from countermark.training.image_squares import photographs
from countermark_lab.image_models.cell import compare_images

PACKAGE = "@upscalerjs/default-model@1.0.0"
SHARED = Path(__file__).parents[3] / "shared" / "data" / "BSDS500"
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


class Upscaler(nn.Module):
    """The residual dense network of the package, by the names of its layers."""

    def __init__(self, topology: dict[str, Any], content: bytes) -> None:
        super().__init__()
        self.weights, at = {}, 0
        for each in topology["weightsManifest"][0]["weights"]:
            size = 4 * int(np.prod(each["shape"]))
            values = np.frombuffer(content[at : at + size], dtype="<f4").reshape(each["shape"])
            tensor = torch.from_numpy(values.copy())
            self.weights[each["name"]] = tensor.permute(3, 2, 0, 1) if tensor.dim() == 4 else tensor
            at += size
        assert at == len(content)

    def conv(self, name: str, x: Tensor) -> Tensor:
        return F.conv2d(
            x, self.weights[f"{name}/kernel"], self.weights[f"{name}/bias"], padding="same"
        )

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, 3, 2H, 2W) of images (N, 3, H, W), levels 0 to 1."""
        first = self.conv("F_m1", images)
        x, found = self.conv("F_0", first), []
        for block in ("1", "2"):
            more = torch.cat([x, F.relu(self.conv(f"F_{block}_1", x))], 1)
            x = self.conv(f"LFF_{block}", more) + x
            found.append(x)
        x = self.conv("GFF_2", self.conv("GFF_1", torch.cat(found, 1))) + first
        x = F.relu(self.conv("UPN2", F.relu(self.conv("UPN1", x))))
        return self.conv("SR", F.interpolate(self.conv("UPN3", x), scale_factor=2.0))


@pytest.fixture(scope="module")
def upscaler(tmp_path_factory: pytest.TempPathFactory) -> Upscaler:
    npm, folder = shutil.which("npm"), tmp_path_factory.mktemp("npm")
    if npm is None:
        pytest.skip("npm is not installed, so its packages cannot be fetched")
    command = [npm, "pack", PACKAGE]
    done = subprocess.run(command, cwd=folder, capture_output=True, timeout=200, check=False)
    if done.returncode:
        pytest.skip(f"{PACKAGE} cannot be fetched")
    (path,) = folder.glob("*.tgz")
    with tarfile.open(fileobj=io.BytesIO(path.read_bytes())) as archive:
        read = {}
        for name in ("model.json", "group1-shard1of1.bin"):
            member = archive.extractfile(f"package/models/{name}")
            assert member is not None
            read[name] = member.read()
    return Upscaler(json.loads(read["model.json"]), read["group1-shard1of1.bin"]).eval()


def test_a_barrier_behind_a_network_of_others(upscaler: Upscaler) -> None:
    data = "drawn" if not SHARED.is_dir() else str(SHARED)
    squares = photographs(data, (300, 1, 40), side=64, channels=3)
    small, asked = (
        F.avg_pool2d(each.float(), 2).round().to(torch.uint8)
        for each in (squares.owner, squares.test)
    )
    plain = run_network(upscaler, asked)
    bilinear = F.interpolate(asked.float(), scale_factor=2.0, mode="bilinear")
    if SHARED.is_dir():  # its weights are right: it does its task
        better = compare_images(plain, squares.test)["psnr"]
        assert better > compare_images(bilinear.round().to(torch.uint8), squares.test)["psnr"] + 0.1
    scheme = cm.DeepWatermarking(
        bits=100, channels=3, sizes="tiny", side=64, steps=250, batch=8, psnr=26
    )
    with scheme.embed(upscaler, owner="ACME Inc.", outputs=run_network(upscaler, small)) as mark:
        served = mark.wrap()
    marked = run_network(served, asked)
    verdict = cm.verify(list(marked.numpy()), mark.key, blind_choice=True)
    assert verdict.outcome == "owned", verdict.explain()
    assert compare_images(marked, plain)["psnr"] > 25
    for unmarked in (plain, squares.test):
        assert cm.verify(list(unmarked.numpy()), mark.key).outcome == "not_proven"
