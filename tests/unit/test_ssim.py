"""SSIM by band matrices against an independent implementation, `pytorch_msssim`."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from pytorch_msssim import ssim as reference
from torch import Tensor

from countermark.schemes.deepstego.networks import compute_ssim
from countermark.training.data import load_data

LOUDNESS = [2 / 255, 20 / 255, 0.3]  # of what is added; the first is what a trigger gets


def random_images(channels: int, side: int) -> Tensor:
    drawn = torch.Generator().manual_seed(channels)
    return torch.rand(32, channels, side, side, generator=drawn)


def digits(channels: int, side: int) -> Tensor:
    """Real digits in a frame; with three channels, three digits on top of each other."""
    images = load_data("digits").test_images[: 32 * channels].float() / 255
    edge = (side - images.shape[3]) // 2
    framed = torch.nn.functional.pad(images, (edge,) * 4)
    return framed.reshape(32, channels, side, side)


def with_gradients(similarity: Tensor, images: tuple[Tensor, Tensor]) -> list[Tensor]:
    return [similarity.detach(), *torch.autograd.grad(similarity.sum(), images)]


@pytest.mark.parametrize("loud", LOUDNESS)
@pytest.mark.parametrize(("channels", "side"), [(3, 32), (1, 28)], ids=["colour", "grey"])
@pytest.mark.parametrize("images", [random_images, digits])
def test_value_and_gradients_are_those_of_the_reference(
    images: Callable[[int, int], Tensor], channels: int, side: int, loud: float
) -> None:
    one = images(channels, side)
    noise = torch.randn(one.shape, generator=torch.Generator().manual_seed(1))
    pair = one.requires_grad_(), (one.detach() + loud * noise).clamp(0, 1).requires_grad_()
    theirs = reference(*pair, data_range=1.0, size_average=False, win_size=11, win_sigma=1.5)
    expected = with_gradients(theirs, pair)
    found = with_gradients(compute_ssim(*pair), pair)
    assert found[0].shape == (32,)
    assert (found[0] - expected[0]).abs().max() < 1e-5
    for ours, other in zip(found[1:], expected[1:], strict=True):
        assert (ours - other).abs().max() < 1e-4 * other.abs().max()


def test_what_is_equal_is_wholly_similar() -> None:
    images = digits(1, 28)
    assert torch.allclose(compute_ssim(images, images), torch.ones(32))
    assert (compute_ssim(images, 1 - images) < 0).all()
