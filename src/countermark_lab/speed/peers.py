"""CPU time that other packages need for the same work, measured beside this package in one run.

Only packages among the development requirements are compared: a missing package fails the
benchmark. Most watermarking libraries have no counterpart here, because they train and read with a
GPU.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch
from pytorch_msssim import ssim as other_ssim
from torch import Tensor

from countermark.schemes.deepstego.networks import (
    StegoNetwork,
    compute_ssim,
    repeat_tile,
    spread_logo,
)
from countermark.schemes.deepstego.stego_generators import StegoMaker
from countermark.schemes.logo import GRID
from countermark_lab.speed.ratios import Ratio, measure_in_turn, summarise_ratios
from countermark_lab.steganalysis.embedders import AdaptiveEmbedder

_PAIRS = 7
_SHAPE = (3, 32, 32)


def neighbour_ratios() -> list[Ratio]:
    """Measure all ratios to other packages; takes about a minute."""
    # One thread on both sides: the ratio must not depend on the number of cores.
    torch.set_num_threads(1)
    return [measure_ssim(), measure_trigger_hiding()]


def measure_ssim(batch: int = 32, repeats: int = 20) -> Ratio:
    """Measure the CPU time of our SSIM and its gradient against pytorch-msssim on equal images."""
    one = torch.rand(batch, *_SHAPE, requires_grad=True)
    other = torch.rand(batch, *_SHAPE)

    # pytorch-msssim is untyped; the annotation gives the result its type.
    def compute_other_ssim(a: Tensor, b: Tensor) -> Tensor:
        """Compute the other package's SSIM of each pair of images (N, C, H, W), shape (N,)."""
        found: Tensor = other_ssim(a, b, data_range=1.0, size_average=False)
        return found

    def time_gradients(compare: Callable[[Tensor, Tensor], Tensor]) -> float:
        """Return the seconds of CPU time that `repeats` gradients of one SSIM take."""
        began = time.process_time()
        for _ in range(repeats):
            torch.autograd.grad(compare(one, other).sum(), one)
        return time.process_time() - began

    what = f"SSIM and its gradient, {batch} images of 3 × 32 × 32"
    ratios = measure_in_turn(
        lambda: time_gradients(compute_ssim), lambda: time_gradients(compute_other_ssim), _PAIRS
    )
    return summarise_ratios(what, "pytorch-msssim", ratios, 1.0)


def measure_trigger_hiding(images: int = 32) -> Ratio:
    """Measure the CPU time of making triggers, against S-UNIWARD of the package conseal.

    S-UNIWARD hides 0.4 bit a pixel in as many covers.
    """
    covers = np.random.default_rng(0).integers(0, 256, (images, *_SHAPE), dtype=np.uint8)
    tile = repeat_tile(2.0 * torch.randint(0, 2, (_SHAPE[0], GRID, GRID)) - 1, *_SHAPE[1:])
    network = StegoNetwork(_SHAPE[0]).eval().requires_grad_(False)
    make = StegoMaker(network, spread_logo(torch.randint(0, 2, (images, GRID, GRID)), tile))
    hide = AdaptiveEmbedder("s_uniward")

    def time_stego_maker() -> float:
        began = time.process_time()
        make(covers)
        return time.process_time() - began

    def time_s_uniward() -> float:
        began = time.process_time()
        hide(covers, 0)
        return time.process_time() - began

    what = f"deepstego, {images} triggers of 3 × 32 × 32"
    return summarise_ratios(
        what,
        "conseal's S-UNIWARD in as many",
        measure_in_turn(time_stego_maker, time_s_uniward, _PAIRS),
        1.0,
    )
