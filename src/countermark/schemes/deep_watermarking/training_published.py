"""Zhang et al. 2020/2021 as published, the training half: one image is hidden in every output.

H and R are trained together on this image. Then, in the adversarial stage, R alone is trained on
what surrogates make of marked images. What R reveals on other images therefore depends on its
training, and such a key is measured on images of unmarked networks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from countermark._internal.plugins import call_factory
from countermark._internal.progress import show_progress
from countermark.keys.key import Key
from countermark.schemes.deep_watermarking.networks import SIZES, Critic, Hider, Revealer
from countermark.schemes.deep_watermarking.placement import ResidualAdder, repeat_square
from countermark.schemes.deep_watermarking.scheme import PICTURE, DeepWatermarking, get_blank_level
from countermark.schemes.deep_watermarking.surrogates import (
    CopyingOptions,
    run_network,
    train_surrogate,
)
from countermark.schemes.deep_watermarking.training import (
    compute_level,
    compute_loudness,
    convert_in_parts,
    make_autocast,
)
from countermark.schemes.frozen_networks import export_weights, fill_network
from countermark.schemes.hidden_images import make_hidden_image
from countermark.schemes.outputs_training import (
    NETWORKS,
    OutputTraining,
    cut_squares,
    draw_seed,
    round_to_uint8,
)

_SCALE = 1e4  # of every squared error, as in the authors' public code
_RATE, _BETAS = {"tiny": 1e-3, "cpu": 1e-3, "published": 2e-4}, (0.5, 0.999)
_TUNING_RATE = 1e-4  # of the adversarial stage

Perceptual = Callable[[Tensor], Tensor]


class ImageHidingNetworks(ResidualAdder):
    """H and R for one hidden image (C, S, S)."""

    def __init__(self, scheme: DeepWatermarking, picture: Tensor) -> None:
        super().__init__()
        self.scheme, sizes = scheme, SIZES[scheme.sizes]
        self.hider, self.revealer = (
            Hider(scheme.channels, sizes),
            Revealer(scheme.channels, sizes),
        )
        # Not in the state dict: the key holds the image among its frozen tensors.
        self.register_buffer("picture", picture, persistent=False)
        self.blank = get_blank_level(scheme)

    def hide(self, images: Tensor) -> Tensor:
        """Return marked images of images (N, C, H, W), levels 0 to 1."""
        return self.hide_at_level(images, compute_level(self.scheme))

    def hide_at_level(self, images: Tensor, level: float) -> Tensor:
        """Return marked images at a given level; a published H ignores the level."""
        shown = self.repeat_hidden_image(images)
        if not SIZES[self.scheme.sizes].residual:
            return cast(Tensor, self.hider(images, shown))
        # Differs from the paper: held at a PSNR, where the printed loss leaves it to the weights.
        return self.add_residual(images, self.hider.paint_image(images, shown), level)

    def reveal(self, images: Tensor) -> Tensor:
        """Return the mean (N, C, S, S) of all whole squares that R paints."""
        side, painted = self.scheme.side, cast(Tensor, self.revealer(images)).clamp(0, 1)
        # A suspect's image may be smaller than one square.
        short = [max(0, side - size) for size in painted.shape[2:]]
        painted = F.pad(painted, (0, short[1], 0, short[0]), value=self.blank)
        down, right = (size // side for size in painted.shape[2:])
        whole = painted[..., : down * side, : right * side]
        apart = whole.reshape(*painted.shape[:2], down, side, right, side)
        return apart.mean((2, 4))  # (N, C, S, S)

    def compute_mark_loss(self, images: Tensor) -> Tensor:
        """Return the squared error () of R's output."""
        return F.mse_loss(self.revealer(images), self.repeat_hidden_image(images))

    def repeat_hidden_image(self, images: Tensor) -> Tensor:
        """Repeat the hidden image over the size of images (N, C, H, W)."""
        picture = cast(Tensor, self.picture)[None].to(images)
        size = images.shape[2], images.shape[3]
        return repeat_square(picture, size).expand(len(images), -1, -1, -1)


class PublishedDeepWatermarkingTraining(OutputTraining):
    """Freezes the hidden image; learns H and R."""

    def make_pre_commit_tensors(self) -> dict[str, NDArray[Any]]:
        """Return the hidden image, uint8 (C, S, S)."""
        return {PICTURE: make_hidden_image(self.scheme, self.material)}

    def make_post_commit_tensors(self, key: Key) -> dict[str, NDArray[Any]]:
        """Train H and R in the initial stage and, with teachers, in the adversarial stage."""
        seed = draw_seed(key.make_stream("networks"))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            course = _PublishedHidingCourse(
                self, ImageHidingNetworks(self.scheme, _load_levels(key)), seed
            )
            course.restore(self.saving.load() if self.saving else None)
            with torch.enable_grad(), show_progress("training H and R", course.last) as advance:
                advance(course.step)
                while course.step < course.last:
                    course.take_step()
                    advance(1)
                    if self.saving and (self.saving.due() or course.step == course.last):
                        self.saving.save(course.export_state())
        return export_weights(course.networks, NETWORKS)

    @staticmethod
    def load_hiding_networks(scheme: DeepWatermarking, key: Key) -> nn.Module:
        """Load H and R of a key, with the key's hidden image."""
        networks = ImageHidingNetworks(scheme, _load_levels(key))
        fill_network(networks, key.learnt, NETWORKS, "networks are")
        return networks


class _PublishedHidingCourse:
    """The state of both stages of a training, and their steps."""

    def __init__(
        self, training: PublishedDeepWatermarkingTraining, networks: ImageHidingNetworks, seed: int
    ) -> None:
        self.networks, self.step = networks.train(), 0
        self._training, self._scheme = training, training.scheme
        self.last = self._scheme.steps + len(self._scheme.teachers) * self._scheme.teacher_steps
        self._critic = Critic(self._scheme.channels, SIZES[self._scheme.sizes].hider)
        rate = _RATE[self._scheme.sizes]
        self._paints = torch.optim.Adam(networks.parameters(), rate, _BETAS)
        self._tells = torch.optim.Adam(self._critic.parameters(), rate, _BETAS)
        self._tunes = torch.optim.Adam(networks.revealer.parameters(), _TUNING_RATE, _BETAS)
        self._schedule = torch.optim.lr_scheduler.CosineAnnealingLR(
            self._paints, self._scheme.steps
        )
        self._generator = torch.Generator().manual_seed(seed)
        self._perceptual = _load_perceptual(self._scheme.perceptual)
        self._copies: Tensor | None = None

    def take_step(self) -> None:
        """Take a step of the initial stage, or after it of the adversarial stage."""
        torch.manual_seed(int(torch.randint(1 << 62, (), generator=self._generator)))
        (
            self._take_initial_step
            if self.step < self._scheme.steps
            else self._take_adversarial_step
        )()
        self.step += 1
        # H is fixed from here on; its level must be right before a teacher learns from it.
        if self.step == self._scheme.steps:
            self._calibrate_gain()

    def _take_initial_step(self) -> None:
        """Train H, R and D on marked images."""
        scheme = self._scheme
        images = self._cut_squares()
        level = compute_loudness(scheme, self.step / scheme.steps)
        with make_autocast(self._scheme):
            marked = self.networks.hide_at_level(images, level)
            revealed = self.networks.revealer(marked)
        loss = self._compute_embedding_loss(images, marked.float()) + self._compute_extraction_loss(
            images, marked, revealed.float()
        )
        self._paints.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self._paints.step()
        self._schedule.step()

    def _compute_embedding_loss(self, images: Tensor, marked: Tensor) -> Tensor:
        """Return λ1·basic + λ2·features + λ3·adversarial, and take a step of D."""
        scheme = self._scheme
        loss = scheme.lambda1 * _SCALE * F.mse_loss(marked, images)
        if self._perceptual is not None:
            seen = F.mse_loss(self._perceptual(marked), self._perceptual(images))
            loss = loss + scheme.lambda2 * _SCALE * seen
        if not scheme.lambda3:
            return loss
        real, fake = self._critic(images), self._critic(marked.detach())
        # A least-squares GAN: D takes its own step on this batch first.
        self._tells.zero_grad()
        ((real - 1).square().mean() + fake.square().mean()).backward()
        self._tells.step()
        unlike: Tensor = (self._critic(marked) - 1).square().mean()
        return loss + scheme.lambda3 * _SCALE * unlike

    def _compute_extraction_loss(self, images: Tensor, marked: Tensor, revealed: Tensor) -> Tensor:
        """Return λ4·marked + λ5·unmarked + λ6·consistency."""
        scheme, wanted = self._scheme, self.networks.repeat_hidden_image(marked)
        with make_autocast(self._scheme):
            blank = self.networks.revealer(images)
        blanks = F.mse_loss(blank.float(), torch.full_like(images, self.networks.blank))
        # Consistency: R shall reveal the same in the two halves of the batch.
        halves = revealed.chunk(2)
        alike = F.mse_loss(halves[0][: len(halves[1])], halves[1])
        found = F.mse_loss(revealed, wanted)
        return _SCALE * (scheme.lambda4 * found + scheme.lambda5 * blanks + scheme.lambda6 * alike)

    def _calibrate_gain(self) -> None:
        """Scale H's residual so that 8-bit images have the scheme's PSNR on average."""
        if not SIZES[self._scheme.sizes].residual:
            return
        networks, images = self.networks.eval(), self._cut_squares()
        wanted = compute_level(self._scheme)
        with torch.no_grad():
            for _ in range(3):
                found = round_to_uint8(networks.hide(images)).float() / 255
                # Rounding and clipping take something away, so that one round is not enough.
                networks.gain.mul_(wanted / (found - images).square().mean().sqrt())

    def _take_adversarial_step(self) -> None:
        """Train R on a surrogate's copies of marked images, beside marked and unmarked images."""
        beyond = self.step - self._scheme.steps
        number, into = divmod(beyond, self._scheme.teacher_steps)
        # Each teacher begins after the steps of the one before; a resumed stage has its copies.
        if self._copies is None or into == 0:
            self._copies = self._copy_with_teacher(number)
        at = torch.randint(len(self._copies), (self._scheme.batch,), generator=self._generator)
        copies, images = self._copies[at].float() / 255, self._cut_squares()
        with torch.no_grad():
            marked = self.networks.hide(images)
        revealer = self.networks.revealer
        # R shall reveal a blank image where there is no mark.
        blank = torch.full_like(images, self.networks.blank)
        loss = F.mse_loss(revealer(copies), self.networks.repeat_hidden_image(copies))
        loss = loss + F.mse_loss(revealer(marked), self.networks.repeat_hidden_image(marked))
        loss = _SCALE * (loss + F.mse_loss(revealer(images), blank))
        self._tunes.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self._tunes.step()

    def _copy_with_teacher(self, number: int) -> Tensor:
        """Train a surrogate on the owner's inputs; return its squares uint8 (n, C, S, S)."""
        inputs, outputs = self._training.crop_pairs()
        marked = convert_in_parts(outputs, self.networks.hide)
        scheme = self._scheme
        copying = CopyingOptions(
            scheme.teachers[number], steps=scheme.teacher_steps, batch=scheme.batch,
            seed=number, precision=scheme.precision,
        )  # fmt: skip
        return run_network(train_surrogate(inputs, marked, copying), inputs)

    def _cut_squares(self) -> Tensor:
        """Cut a batch of random squares out of the outputs."""
        scheme = self._scheme
        return cut_squares(self._training.outputs, scheme.batch, scheme.side, self._generator)

    def export_state(self) -> dict[str, Any]:
        """Return the state for a checkpoint."""
        parts = {name: each.state_dict() for name, each in self._collect_parts().items()}
        return parts | {
            "generator": self._generator.get_state(), "step": self.step, "copies": self._copies
        }  # fmt: skip

    def restore(self, state: dict[str, Any] | None) -> None:
        """Continue from a saved state; None begins at step 0."""
        if state is None:
            return
        for name, each in self._collect_parts().items():
            each.load_state_dict(state[name])
        self._generator.set_state(state["generator"])
        self.step, self._copies = state["step"], state["copies"]

    def _collect_parts(self) -> dict[str, Any]:
        """Return the networks, optimizers and schedule that a checkpoint holds, by name."""
        return {
            "networks": self.networks, "critic": self._critic, "paints": self._paints,
            "tells": self._tells, "tunes": self._tunes, "schedule": self._schedule,
        }  # fmt: skip


def _load_levels(key: Key) -> Tensor:
    """Return a key's hidden image with levels 0 to 1."""
    return torch.from_numpy(np.array(key.frozen[PICTURE])).float() / 255


def _load_perceptual(name: str) -> Perceptual | None:
    """Load the feature network of module:factory, while an owner trains; no key runs this code."""
    if not name:
        return None
    features: Perceptual = call_factory("perceptual", name, "that returns a network of features")
    return features
