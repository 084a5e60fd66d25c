"""What a stego network paints: the same however many covers are painted at a time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from countermark.schemes.deepstego.networks import StegoNetwork, repeat_tile, spread_logo
from countermark.schemes.deepstego.stego_generators import StegoMaker, add_residual
from countermark.schemes.logo import GRID


def drawn(channels: int, side: int, count: int = 70) -> tuple[StegoNetwork, Tensor, Tensor]:
    """A network whose norms have seen images, covers, and spread logos."""
    torch.manual_seed(channels)
    network = StegoNetwork(channels).train()
    covers = torch.randint(0, 256, (count, channels, side, side), dtype=torch.uint8)
    signs = torch.randint(0, 2, (channels, GRID, GRID)) * 2.0 - 1
    logos = spread_logo(torch.randint(0, 2, (count, GRID, GRID)), repeat_tile(signs, side, side))
    network(covers.float() / 255, logos)
    return network.eval().requires_grad_(False), covers, logos


@pytest.mark.parametrize(("channels", "side"), [(3, 32), (1, 28)], ids=["colour", "grey"])
def test_residuals_are_what_the_network_adds(channels: int, side: int) -> None:
    network, covers, logos = drawn(channels, side)
    levels = covers.float() / 255
    expected = 255 * (network(levels, logos) - levels)
    maker = StegoMaker(network, logos)
    found = maker.compute_residuals(covers)
    assert (found.dtype, found.shape) == (torch.float16, covers.shape)
    assert found.is_contiguous()
    assert expected.abs().max() > 1
    # Half a float16 step of a number below 32, and float32's rounding of 255 levels.
    assert (found.float() - expected).abs().max() < 2**-7 + 1e-4
    assert torch.equal(found, maker.compute_residuals(covers))
    for count in (1, 7, 40):
        other = StegoMaker(network, logos[:count]).compute_residuals(covers[:count])
        assert (other.float() - found[:count].float()).abs().max() < 2**-6
    assert add_residual(covers, found, torch.zeros(len(covers))).equal(covers)
