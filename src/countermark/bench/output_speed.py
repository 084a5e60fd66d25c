"""What marks in outputs cost: the barrier behind a network, and the reading of images."""

from __future__ import annotations

import time

import torch
from torch import Tensor, nn

from countermark.bench.models import build
from countermark.bench.ratios import Ratio, paired, ratio
from countermark.keys.key import Key, KeyMaterial
from countermark.schemes.deep_watermarking.placement import make_placement
from countermark.schemes.deep_watermarking.scheme import DeepWatermarking
from countermark.schemes.frozen_networks import export_weights
from countermark.schemes.outputs_training import NETWORKS

_PAIRS = 15
_IMAGES = 64


def output_ratios() -> list[Ratio]:
    """All ratios of marks in outputs; some seconds."""
    torch.set_num_threads(1)
    network, images = build("unet", {"channels": 1}).eval(), torch.rand(_IMAGES, 1, 64, 64)
    scheme = DeepWatermarking()
    key = _key(scheme)
    served, pictures = scheme.wrap(network, key), (255 * images).to(torch.uint8).numpy()
    against = "the network alone"

    def read() -> float:
        start = time.process_time()
        scheme.extract(list(pictures), key)
        return time.process_time() - start

    return [
        ratio(
            f"deep_watermarking, {_IMAGES} images of 64 × 64 by a U-Net with the barrier", against,
            paired(lambda: _made(served, images), lambda: _made(network, images), _PAIRS), 2.5,
        ),
        ratio(
            f"deep_watermarking, reading {_IMAGES} images of 64 × 64", f"{against} on as many",
            paired(read, lambda: _made(network, images), _PAIRS), 3.0,
        ),
    ]  # fmt: skip


def _made(network: nn.Module, images: Tensor) -> float:
    start = time.process_time()
    with torch.no_grad():
        for part in torch.split(images, 16):
            network(part)
    return time.process_time() - start


def _key(scheme: DeepWatermarking) -> Key:
    """A key of untrained networks: what they cost is the same."""
    return scheme.generate_key(
        export_weights(make_placement(scheme), NETWORKS),
        owner="bench",
        material=KeyMaterial.from_test_seed(0),
    )
