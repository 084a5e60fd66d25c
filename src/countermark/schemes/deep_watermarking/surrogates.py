"""Surrogates: networks that a thief trains on another network's outputs, Zhang et al. 2021.

The architectures are the paper's: CNet, a chain of convolutions; Res9 and Res16, residual blocks
between two halvings and two doublings; UNet. The losses are the paper's too: L1, L2, or a loss of
features, each with or without a PatchGAN. Owners train surrogates as teachers of R, and experiments
as suspects that R must read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from countermark._internal.progress import show_progress
from countermark.schemes.deep_watermarking.networks import Critic, Hider, HidingSizes
from countermark.schemes.outputs_training import TrainingStore

Architecture: TypeAlias = Literal["cnet", "res9", "res16", "unet"]
Loss: TypeAlias = Literal["l1", "l2", "perceptual"]
Features: TypeAlias = Callable[[Tensor], Tensor]

_RATE, _BETAS = 1e-3, (0.5, 0.999)
_ADVERSARIAL = 0.01
_PIXELS_BESIDE = 0.1  # weight of L2 beside features, which do not determine brightness alone


@dataclass(frozen=True)
class CopyingOptions:
    """Options of a surrogate's training.

    Attributes:
        architecture: of the network; width: of its first layer.
        loss: between the surrogate's outputs and the outputs to copy.
        adversarial: whether a PatchGAN joins the loss.
        steps, batch, seed, precision: of the training.
        features: for the perceptual loss, the features to compare, of images (N, C, H, W).
        spoil: a transform that the thief applies to a pair of images before a step; None for no
            transform.
    """

    architecture: Architecture = "unet"
    loss: Loss = "l2"
    adversarial: bool = False
    steps: int = 1000
    batch: int = 16
    seed: int = 0
    width: int = 0
    precision: Literal["fp32", "bf16"] = "fp32"
    features: Features | None = field(default=None, repr=False)
    spoil: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = field(
        default=None, repr=False
    )


# Widths with which a CPU trains a surrogate in minutes.
_WIDTHS = {"cnet": 24, "res9": 12, "res16": 12, "unet": 16}


def make_surrogate(architecture: Architecture, channels: int, width: int = 0) -> nn.Module:
    """Make an untrained network from images (N, C, H, W) to images, which adds to its input.

    Args:
        architecture: one of the paper's.
        channels: C.
        width: of its first layer; 0 for a width that a CPU trains in minutes.
    """
    wide = width or _WIDTHS[architecture]
    if architecture == "unet":
        return _ResidualNetwork(_SurrogateUNet(channels, HidingSizes(wide, 4, 1, 1, residual=True)))
    if architecture == "cnet":
        return _ResidualNetwork(_make_cnet(channels, wide))
    return _ResidualNetwork(_make_resnet(channels, wide, 9 if architecture == "res9" else 16))


def train_surrogate(
    inputs: Tensor, outputs: Tensor, copying: CopyingOptions, saving: TrainingStore | None = None,
    *, also: Callable[[Tensor], Tensor] | None = None, network: nn.Module | None = None,
) -> nn.Module:  # fmt: skip
    """Train a surrogate on pairs of images uint8 (N, C, H, W); return it frozen, in eval mode.

    Args:
        inputs: the inputs of the victim.
        outputs: the victim's answers, marked or not.
        copying: the options of the training.
        saving: store for the state of a long training.
        also: an additional loss () of the surrogate's outputs.
        network: the network to train, in place of the paper's architectures.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(copying.seed)
        # Initial weights follow from the seed; the caller's random numbers do not change.
        own = network or make_surrogate(copying.architecture, outputs.shape[1], copying.width)
        course = _SurrogateCourse((inputs, outputs), own, copying, also)
        course.restore(saving.load() if saving else None)
        what = f"a surrogate, {copying.architecture}"
        with torch.enable_grad(), show_progress(what, copying.steps) as advance:
            advance(course.step)
            while course.step < copying.steps:
                course.take_step()
                advance(1)
                if saving and (saving.due() or course.step == copying.steps):
                    saving.save(course.export_state())
    return course.network.eval().requires_grad_(False)


def run_network(network: nn.Module, inputs: Tensor, batch: int = 32) -> Tensor:
    """Run a network on images uint8 (N, C, H, W); return images uint8, shaped alike."""
    found = []
    with torch.no_grad():
        for first in range(0, len(inputs), batch):
            made = network(inputs[first : first + batch].float() / 255)
            found.append((255 * made).round().clamp(0, 255).to(torch.uint8))
    return torch.cat(found)


class _SurrogateCourse:
    """The state of a surrogate's training, and its steps."""

    def __init__(
        self, pairs: tuple[Tensor, Tensor], network: nn.Module, copying: CopyingOptions,
        also: Callable[[Tensor], Tensor] | None,
    ) -> None:  # fmt: skip
        self.network, self.step = network.train(), 0
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload] # a third less CPU time
        self._pairs, self._copying, self._also = pairs, copying, also
        self._critic = Critic(pairs[1].shape[1], 16)
        self._optimizer = torch.optim.Adam(self.network.parameters(), _RATE, _BETAS)
        self._tells = torch.optim.Adam(self._critic.parameters(), _RATE, _BETAS)
        self._schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self._optimizer, copying.steps)
        self._generator = torch.Generator().manual_seed(copying.seed)

    def take_step(self) -> None:
        """Take one optimizer step on a random batch of pairs."""
        copying = self._copying
        # A seed a step, from the saved generator, makes a resumed training the same.
        torch.manual_seed(int(torch.randint(1 << 62, (), generator=self._generator)))
        rows = torch.randint(len(self._pairs[0]), (copying.batch,), generator=self._generator)
        given, wanted = (each[rows].float() / 255 for each in self._pairs)
        if copying.spoil:
            given, wanted = copying.spoil(given, wanted)
        # The network's weights are channels-last too: a CPU is faster where both agree.
        given = given.contiguous(memory_format=torch.channels_last)
        # Only the network runs in half precision; losses are computed in float32.
        with torch.autocast(given.device.type, torch.bfloat16, enabled=copying.precision == "bf16"):
            made = self.network(given)
        loss = self._compute_copying_loss(made.float(), wanted)
        if self._also:
            loss = loss + self._also(made.float())
        if copying.adversarial:
            loss = loss + self._compute_adversarial_loss(made.float(), wanted)
        self._optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()
        self._schedule.step()
        self.step += 1

    def _compute_copying_loss(self, made: Tensor, wanted: Tensor) -> Tensor:
        """Return the copying loss () between outputs and wanted outputs."""
        if self._copying.loss == "l1":
            return F.l1_loss(made, wanted)
        pixels = F.mse_loss(made, wanted)
        if self._copying.loss == "l2" or self._copying.features is None:
            return pixels
        seen = F.mse_loss(self._copying.features(made), self._copying.features(wanted))
        return seen + _PIXELS_BESIDE * pixels

    def _compute_adversarial_loss(self, made: Tensor, wanted: Tensor) -> Tensor:
        """Take a step of the critic, then return the surrogate's loss () of a least-squares GAN."""
        # The critic takes its own step first, on detached outputs.
        real, fake = self._critic(wanted), self._critic(made.detach())
        self._tells.zero_grad()
        ((real - 1).square().mean() + fake.square().mean()).backward()
        self._tells.step()
        return _ADVERSARIAL * cast(Tensor, (self._critic(made) - 1).square().mean())

    def export_state(self) -> dict[str, Any]:
        """Return the state for a checkpoint."""
        parts = {name: each.state_dict() for name, each in self._collect_parts().items()}
        return parts | {"generator": self._generator.get_state(), "step": self.step}

    def restore(self, state: dict[str, Any] | None) -> None:
        """Continue from a saved state; None begins at step 0."""
        if state is None:
            return
        for name, each in self._collect_parts().items():
            each.load_state_dict(state[name])
        self._generator.set_state(state["generator"])
        self.step = state["step"]

    def _collect_parts(self) -> dict[str, Any]:
        """Return the networks, optimizers and schedule that a checkpoint holds, by name."""
        return {
            "network": self.network, "critic": self._critic, "optimizer": self._optimizer,
            "tells": self._tells, "schedule": self._schedule,
        }  # fmt: skip


class _ResidualNetwork(nn.Module):
    """A network that adds the output of an inner network to its input."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, images: Tensor) -> Tensor:
        """Return the images plus the inner network's output."""
        return images + cast(Tensor, self.inner(images))


class _SurrogateUNet(Hider):
    """The U-Net of H for a single input image."""

    def __init__(self, channels: int, sizes: HidingSizes) -> None:
        super().__init__(channels, sizes)
        self.enter = nn.Conv2d(channels, sizes.hider, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:  # type: ignore[override]
        """Return the last layer's output for images alone."""
        # A slice of no channels in place of the hidden image.
        return self.paint_image(images, images[:, :0])


def _make_cnet(channels: int, width: int) -> nn.Sequential:
    """Make six convolutions: each pixel depends on 13 × 13 pixels, and never on its position."""
    layers: list[nn.Module] = [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
    for _ in range(4):
        layers += [nn.Conv2d(width, width, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv2d(width, channels, 3, padding=1))


class _ResidualBlock(nn.Module):
    """A residual block of two convolutions with instance norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1), nn.InstanceNorm2d(width, affine=True),
            nn.ReLU(), nn.Conv2d(width, width, 3, padding=1),
            nn.InstanceNorm2d(width, affine=True),
        )  # fmt: skip

    def forward(self, features: Tensor) -> Tensor:
        """Return the features plus the output of the block's layers."""
        return features + cast(Tensor, self.layers(features))


def _make_resnet(channels: int, width: int, blocks: int) -> nn.Sequential:
    """Make residual blocks between two halvings and two doublings of the size."""
    four = 4 * width
    return nn.Sequential(
        nn.Conv2d(channels, width, 7, padding=3), nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, stride=2, padding=1), nn.ReLU(),
        nn.Conv2d(2 * width, four, 3, stride=2, padding=1), nn.ReLU(),
        *(_ResidualBlock(four) for _ in range(blocks)),
        nn.ConvTranspose2d(four, 2 * width, 4, stride=2, padding=1), nn.ReLU(),
        nn.ConvTranspose2d(2 * width, width, 4, stride=2, padding=1), nn.ReLU(),
        nn.Conv2d(width, channels, 7, padding=3),
    )  # fmt: skip
