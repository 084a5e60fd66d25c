"""Stego network against discriminator: their losses, and the band that holds the PSNR."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from stego_keys import digits

from countermark.schemes.deepstego.adversarial import (
    StegoOpponents,
    compute_discriminator_loss,
    compute_distortion_loss,
)
from countermark.schemes.deepstego.networks import compute_ssim
from countermark.schemes.logo import load_logo_pixels

LOGO = torch.from_numpy(load_logo_pixels("", (1, 28, 28)))
IMAGES = digits().train_images


def opponents(level: float | None, adversarial: float = 1.0, seed: int = 1) -> StegoOpponents:
    return StegoOpponents(LOGO, level=level, adversarial=adversarial, seed=seed)


def trained(made: StegoOpponents, steps: int) -> StegoOpponents:
    generator = torch.Generator().manual_seed(2)
    for _ in range(steps):
        made.step(IMAGES[torch.randint(len(IMAGES), (16,), generator=generator)])
    return made


def reached(made: StegoOpponents) -> float:
    """The PSNR in dB that is left after 8 bits, on images in training mode."""
    seen = [made.step(IMAGES[first : first + 16]) for first in range(0, 128, 16)]
    error = (torch.cat(seen).float() - IMAGES[:128].float()).square().mean() / 255**2
    return -10 * math.log10(float(error))


def distant(decibels: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Images, and the same with noise of that PSNR which wants a gradient."""
    covers = 0.5 + 0.2 * torch.rand(4, 1, 28, 28, generator=torch.Generator().manual_seed(1))
    noise = torch.randn(covers.shape, generator=torch.Generator().manual_seed(2))
    stego = covers + noise * 10 ** (-decibels / 20) / noise.square().mean().sqrt()
    return covers, stego.requires_grad_()


def outward(decibels: float, level: float | None) -> float:
    """By how much the loss falls when stego images move on from their covers; < 0 when it rises."""
    covers, stego = distant(decibels)
    compute_distortion_loss(covers, stego, level).backward()  # type: ignore[no-untyped-call]
    assert stego.grad is not None
    return -float((stego.grad * (stego - covers).detach()).sum())


def test_a_band_pushes_from_both_sides_and_nothing_does_without() -> None:
    level = 10 ** (-28 / 20)
    assert outward(40, level) > 0
    assert outward(32, level) > 0
    assert outward(24, level) < 0
    assert all(outward(each, None) < 0 for each in (50, 40, 28, 20))


def test_the_losses_are_those_of_the_paper() -> None:
    covers, stego = distant(30)
    error = (covers - stego).square().mean()
    likeness = 1 - compute_ssim(covers, stego).mean()
    assert torch.allclose(compute_distortion_loss(covers, stego, None), 3 * error + 5 * likeness)
    held = 3 * (math.log(10) / 10 * (30 - 28)) ** 2  # two dB away
    with torch.no_grad():
        banded = float(compute_distortion_loss(covers, stego, 10 ** (-28 / 20)) - 5 * likeness)
    assert banded == pytest.approx(held, rel=1e-3)
    logits = torch.tensor([2.0, -1.0]), torch.tensor([0.5, -3.0])
    p = [1 / (1 + np.exp(-each.numpy())) for each in logits]
    expected = -np.log(p[0]).mean() - np.log(1 - p[1]).mean()
    assert float(compute_discriminator_loss(*logits)) == pytest.approx(expected, rel=1e-6)


def test_the_psnr_is_held_from_below_and_from_above() -> None:
    near = trained(opponents(10 ** (-30 / 20)), 100)
    assert reached(near) == pytest.approx(30, abs=2)
    louder = opponents(10 ** (-23 / 20))
    louder.restore(near.export_state())  # it begins 7 dB too near
    assert reached(trained(louder, 40)) == pytest.approx(23, abs=2)


def test_without_a_band_it_goes_on_towards_the_cover() -> None:
    begun = trained(opponents(10 ** (-22 / 20)), 60)
    free = opponents(None)
    free.restore(begun.export_state())
    assert reached(trained(free, 80)) > reached(begun) + 1.5


def test_the_discriminator_learns_by_its_own_loss_alone() -> None:
    """Whatever weight the stego network gives it."""
    ends = []
    for adversarial in (0.0, 1.0, 30.0):
        made = opponents(0.04, adversarial)
        made.step(IMAGES[:16])
        ends.append((made.discriminator.state_dict(), made.network.state_dict()))
    for told, painted in ends[1:]:
        assert all(torch.equal(each, ends[0][0][name]) for name, each in told.items())
        assert not torch.equal(painted["leave.weight"], ends[0][1]["leave.weight"])


def test_the_discriminator_learns_to_tell() -> None:
    made = trained(opponents(10 ** (-22 / 20), adversarial=0.0), 60)
    stego = made.step(IMAGES[:64]).float() / 255
    with torch.no_grad():
        told = made.discriminator(IMAGES[:64].float() / 255), made.discriminator(stego)
    assert (told[0] > 0).float().mean() > 0.9
    assert (told[1] < 0).float().mean() > 0.9


def test_a_step_returns_the_images_it_was_taken_on_in_8_bits() -> None:
    made = opponents(0.04)
    with torch.no_grad():
        before = StegoOpponents(LOGO, level=0.04, adversarial=1.0, seed=1).network(
            IMAGES[:8].float() / 255, LOGO.float()[None].expand(8, -1, -1, -1) / 255
        )
    found = made.step(IMAGES[:8])
    assert found.dtype == torch.uint8
    assert (found.float() / 255 - before).abs().max() <= 0.5 / 255 + 1e-6
    errors = (found.float() / 255 - before).square().mean(dim=(1, 2, 3))
    assert errors.max() < 1e-5  # 50 dB


def test_another_seed_begins_elsewhere_and_draws_nothing() -> None:
    before = torch.get_rng_state()
    one, again, other = opponents(None), opponents(None), opponents(None, seed=2)
    assert torch.equal(torch.get_rng_state(), before)
    weights = [each.network.leave.weight for each in (one, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
