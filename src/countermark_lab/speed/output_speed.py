"""Cost of marks in outputs: the barrier behind a network, and the reading of images."""

from __future__ import annotations

import time

import torch
from torch import Tensor, nn

from countermark.keys.key import Key, KeyMaterial
from countermark.schemes.deep_watermarking.placement import make_placement
from countermark.schemes.deep_watermarking.scheme import DeepWatermarking
from countermark.schemes.frozen_networks import export_weights
from countermark.schemes.outputs_training import NETWORKS
from countermark.training.models import build
from countermark_lab.speed.ratios import Ratio, measure_in_turn, summarise_ratios

_PAIRS = 15
_IMAGES = 64


def measure_output_ratios() -> list[Ratio]:
    """Measure all ratios of marks in outputs; takes some seconds."""
    torch.set_num_threads(1)
    network, images = build("unet", {"channels": 1}).eval(), torch.rand(_IMAGES, 1, 64, 64)
    scheme = DeepWatermarking()
    key = _make_key(scheme)
    # `wrap` puts the barrier behind the network, as an owner would serve it.
    served, pictures = scheme.wrap(network, key), (255 * images).to(torch.uint8).numpy()
    against = "the network alone"

    def time_reading() -> float:
        """Return the seconds of CPU time that reading all images takes."""
        start = time.process_time()
        scheme.extract(list(pictures), key)
        return time.process_time() - start

    return [
        summarise_ratios(
            f"deep_watermarking, {_IMAGES} images of 64 × 64 by a U-Net with the barrier", against,
            measure_in_turn(
                lambda: _time_network(served, images), lambda: _time_network(network, images), _PAIRS
            ), 2.5,
        ),
        summarise_ratios(
            f"deep_watermarking, reading {_IMAGES} images of 64 × 64", f"{against} on as many",
            measure_in_turn(time_reading, lambda: _time_network(network, images), _PAIRS), 3.0,
        ),
    ]  # fmt: skip


def _time_network(network: nn.Module, images: Tensor) -> float:
    """Return the seconds of CPU time in which a network processes images (N, C, H, W)."""
    start = time.process_time()
    with torch.no_grad():
        # Batches of 16 images keep the activations of the U-Net small.
        for part in torch.split(images, 16):
            network(part)
    return time.process_time() - start


def _make_key(scheme: DeepWatermarking) -> Key:
    """Make a key of untrained networks: they cost as much CPU time as trained networks."""
    return scheme.generate_key(
        export_weights(make_placement(scheme), NETWORKS),
        owner="bench",
        material=KeyMaterial.from_test_seed(0),
    )
