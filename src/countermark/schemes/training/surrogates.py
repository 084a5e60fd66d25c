"""Networks that a thief trains on somebody's inputs and outputs, Zhang et al. 2021.

The architectures are the paper's: CNet, a chain of convolutions; Res9 and Res16, residual blocks
between two halvings and two doublings; UNet. So are the losses: L1, L2, or of features, each with
or without a PatchGAN. Owners train them too, as teachers of R, and laboratories as what R must
read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from countermark.progress import progress
from countermark.schemes.training.box_free import Saving
from countermark.schemes.training.hiding import Critic, Hider, Sizes

Architecture: TypeAlias = Literal["cnet", "res9", "res16", "unet"]
Loss: TypeAlias = Literal["l1", "l2", "perceptual"]
Features: TypeAlias = Callable[[Tensor], Tensor]

_RATE, _BETAS = 1e-3, (0.5, 0.999)
_ADVERSARIAL = 0.01
_PIXELS_BESIDE = 0.1  # weight of L2 beside features, which alone say nothing of brightness


@dataclass(frozen=True)
class Copying:
    """How a surrogate is trained.

    Attributes:
        architecture: of the network; width: of its first layer.
        loss: between its outputs and those it copies.
        adversarial: whether a PatchGAN joins the loss.
        steps, batch, seed, precision: of the training.
        features: for the perceptual loss, what is compared: a function of images (N, C, H, W).
        spoil: what the thief does to a pair of images before a step; nothing by default.
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


_WIDTHS = {"cnet": 24, "res9": 12, "res16": 12, "unet": 16}


def surrogate(architecture: Architecture, channels: int, width: int = 0) -> nn.Module:
    """An untrained network from images (N, C, H, W) to such images; adds to its input.

    Args:
        architecture: one of the paper's.
        channels: C.
        width: of its first layer; 0 for one that a CPU trains in minutes.
    """
    wide = width or _WIDTHS[architecture]
    if architecture == "unet":
        return _Residual(_UNet(channels, Sizes(wide, 4, 1, 1, residual=True)))
    if architecture == "cnet":
        return _Residual(_cnet(channels, wide))
    return _Residual(_resnet(channels, wide, 9 if architecture == "res9" else 16))


def copied(
    inputs: Tensor, outputs: Tensor, copying: Copying, saving: Saving | None = None,
    *, also: Callable[[Tensor], Tensor] | None = None, network: nn.Module | None = None,
) -> nn.Module:  # fmt: skip
    """A surrogate, trained on pairs of images uint8 (N, C, H, W); frozen, in eval mode.

    Args:
        inputs: what the victim was given.
        outputs: what it answered, marked or not.
        copying: how.
        saving: where the training is saved now and then.
        also: a loss () of what it makes, beside the loss of copying.
        network: what is trained, where it is none of the paper's architectures.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(copying.seed)
        own = network or surrogate(copying.architecture, outputs.shape[1], copying.width)
        course = _Course((inputs, outputs), own, copying, also)
        course.restore(saving.load() if saving else None)
        what = f"a surrogate, {copying.architecture}"
        with torch.enable_grad(), progress(what, copying.steps) as advance:
            advance(course.step)
            while course.step < copying.steps:
                course.one_step()
                advance(1)
                if saving and (saving.due() or course.step == copying.steps):
                    saving.save(course.state())
    return course.network.eval().requires_grad_(False)


def answers(network: nn.Module, inputs: Tensor, batch: int = 32) -> Tensor:
    """What a network makes of images uint8 (N, C, H, W): images uint8, shaped alike."""
    found = []
    with torch.no_grad():
        for first in range(0, len(inputs), batch):
            made = network(inputs[first : first + batch].float() / 255)
            found.append((255 * made).round().clamp(0, 255).to(torch.uint8))
    return torch.cat(found)


class _Course:
    """The state of a surrogate's training, and how it takes a step."""

    def __init__(
        self, pairs: tuple[Tensor, Tensor], network: nn.Module, copying: Copying,
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

    def one_step(self) -> None:
        copying = self._copying
        torch.manual_seed(int(torch.randint(1 << 62, (), generator=self._generator)))
        rows = torch.randint(len(self._pairs[0]), (copying.batch,), generator=self._generator)
        given, wanted = (each[rows].float() / 255 for each in self._pairs)
        if copying.spoil:
            given, wanted = copying.spoil(given, wanted)
        given = given.contiguous(memory_format=torch.channels_last)
        with torch.autocast(given.device.type, torch.bfloat16, enabled=copying.precision == "bf16"):
            made = self.network(given)
        loss = self._apart(made.float(), wanted)
        if self._also:
            loss = loss + self._also(made.float())
        if copying.adversarial:
            loss = loss + self._unlike(made.float(), wanted)
        self._optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()
        self._schedule.step()
        self.step += 1

    def _apart(self, made: Tensor, wanted: Tensor) -> Tensor:
        if self._copying.loss == "l1":
            return F.l1_loss(made, wanted)
        pixels = F.mse_loss(made, wanted)
        if self._copying.loss == "l2" or self._copying.features is None:
            return pixels
        seen = F.mse_loss(self._copying.features(made), self._copying.features(wanted))
        return seen + _PIXELS_BESIDE * pixels

    def _unlike(self, made: Tensor, wanted: Tensor) -> Tensor:
        """A least-squares GAN: a step of the critic, then what the network is told by it."""
        real, fake = self._critic(wanted), self._critic(made.detach())
        self._tells.zero_grad()
        ((real - 1).square().mean() + fake.square().mean()).backward()
        self._tells.step()
        return _ADVERSARIAL * cast(Tensor, (self._critic(made) - 1).square().mean())

    def state(self) -> dict[str, Any]:
        parts = {name: each.state_dict() for name, each in self._parts().items()}
        return parts | {"generator": self._generator.get_state(), "step": self.step}

    def restore(self, state: dict[str, Any] | None) -> None:
        if state is None:
            return
        for name, each in self._parts().items():
            each.load_state_dict(state[name])
        self._generator.set_state(state["generator"])
        self.step = state["step"]

    def _parts(self) -> dict[str, Any]:
        return {
            "network": self.network, "critic": self._critic, "optimizer": self._optimizer,
            "tells": self._tells, "schedule": self._schedule,
        }  # fmt: skip


class _Residual(nn.Module):
    """Adds what a network says to its input."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, images: Tensor) -> Tensor:
        return images + cast(Tensor, self.inner(images))


class _UNet(Hider):
    """The U-Net of H, with nothing to hide."""

    def __init__(self, channels: int, sizes: Sizes) -> None:
        super().__init__(channels, sizes)
        self.enter = nn.Conv2d(channels, sizes.hider, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:  # type: ignore[override]
        return self.painted(images, images[:, :0])


def _cnet(channels: int, width: int) -> nn.Sequential:
    """Six convolutions: each pixel sees 13 × 13 others, and none knows where it is."""
    layers: list[nn.Module] = [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
    for _ in range(4):
        layers += [nn.Conv2d(width, width, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv2d(width, channels, 3, padding=1))


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1), nn.InstanceNorm2d(width, affine=True),
            nn.ReLU(), nn.Conv2d(width, width, 3, padding=1),
            nn.InstanceNorm2d(width, affine=True),
        )  # fmt: skip

    def forward(self, features: Tensor) -> Tensor:
        return features + cast(Tensor, self.layers(features))


def _resnet(channels: int, width: int, blocks: int) -> nn.Sequential:
    four = 4 * width
    return nn.Sequential(
        nn.Conv2d(channels, width, 7, padding=3), nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, stride=2, padding=1), nn.ReLU(),
        nn.Conv2d(2 * width, four, 3, stride=2, padding=1), nn.ReLU(),
        *(_Block(four) for _ in range(blocks)),
        nn.ConvTranspose2d(four, 2 * width, 4, stride=2, padding=1), nn.ReLU(),
        nn.ConvTranspose2d(2 * width, width, 4, stride=2, padding=1), nn.ReLU(),
        nn.Conv2d(width, channels, 7, padding=3),
    )  # fmt: skip
