"""Steganographic adversarial training, Li and Guo 2019, Section 4.2: two networks without a host.

The stego network paints images that the discriminator shall take for covers. Neither network sees a
host, so that anybody who knows the paper can repeat the training.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from countermark.schemes.deepstego.networks import Discriminator, StegoNetwork, compute_ssim

ALPHA, BETA, GAMMA = 3.0, 5.0, 1.0
"""The weights of Eq. (3) and (5), which the paper does not print: those of its authors' public code
for Li et al., ACSAC 2019, as are the optimizers."""

_LR, _BETAS = 1e-3, (0.5, 0.999)


class StegoOpponents:
    """Stego network and discriminator, each with its optimizer.

    Args:
        logo: uint8 (C, H, W).
        level: the root mean square error at which stego images are held, white being 1; None does
            not hold the error.
        adversarial: δ of Eq. (5).
        seed: of the initial weights of both networks.
    """

    def __init__(self, logo: Tensor, *, level: float | None, adversarial: float, seed: int) -> None:
        self._logo = logo.float()[None] / 255  # (1, C, H, W)
        self._level, self._adversarial = level, adversarial
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.network = StegoNetwork(len(logo), keyed=False)
            self.discriminator = Discriminator(*logo.shape)
        self._parameters = list(self.network.parameters())
        self._paints = torch.optim.Adam(self._parameters, _LR, _BETAS)
        self._tells = torch.optim.Adam(self.discriminator.parameters(), _LR, _BETAS)

    def step(self, images: Tensor) -> Tensor:
        """Take a step of the discriminator, then of the painter, on covers uint8 (n, C, H, W).

        Returns: the stego images uint8 (n, C, H, W) of this step.
        """
        covers = images.float() / 255
        with torch.enable_grad(), torch.autocast(images.device.type, enabled=False):
            stego = self.network(covers, self._logo.expand(len(covers), -1, -1, -1))
            self._tells.zero_grad()
            compute_discriminator_loss(
                self.discriminator(covers), self.discriminator(stego.detach())
            ).backward()  # type: ignore[no-untyped-call]
            self._tells.step()
            taken_for_a_cover = F.softplus(-self.discriminator(stego)).mean()  # Eq. (4)
            # Differs from the paper: log(1 − p(I')) has no lower bound; this is −log p(I').
            loss = GAMMA * compute_distortion_loss(covers, stego, self._level)
            loss = loss + self._adversarial * taken_for_a_cover  # Eq. (5)
            # The gradient also reaches the discriminator, so `backward` is limited to the painter.
            self._paints.zero_grad()
            loss.backward(inputs=self._parameters)  # type: ignore[no-untyped-call]
            self._paints.step()
        return round_to_uint8(stego.detach())

    def export_state(self) -> dict[str, Any]:
        """Return the current state of networks and optimizers, for a checkpoint."""
        return {
            name: copy.deepcopy(each.state_dict()) for name, each in self._collect_parts().items()
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved state."""
        for name, each in self._collect_parts().items():
            each.load_state_dict(state[name])

    def _collect_parts(self) -> dict[str, Any]:
        """Return the networks and optimizers that a checkpoint holds, by name."""
        return {
            "network": self.network,
            "discriminator": self.discriminator,
            "paints": self._paints,
            "tells": self._tells,
        }


def compute_distortion_loss(covers: Tensor, stego: Tensor, level: float | None) -> Tensor:
    """Return the loss α·MSE + β·(1 − SSIM) () of images (n, C, H, W), levels 0 to 1.

    With a level, the first term is the distance of the MSE from level², so that the MSE is held
    from both sides. Without a level, the stego image ends as the cover, with no logo in it.
    """
    # Differs from the paper: Eq. (1) is printed without the square.
    error = F.mse_loss(stego, covers)  # Eq. (1)
    if level is not None:
        # Differs from the paper: held from both sides, by its logarithm, as dB are counted.
        error = (error.clamp_min(1e-10).log() - math.log(level**2)).square()
    return ALPHA * error + BETA * (1 - compute_ssim(stego, covers).mean())  # Eq. (2), (3)


def compute_discriminator_loss(of_covers: Tensor, of_stego: Tensor) -> Tensor:
    """Return the discriminator's loss () from its logits (n,) of "cover"."""
    # Differs from the paper: Eq. (6) has no lower bound; this is −log p(I) − log(1 − p(I')).
    return F.softplus(-of_covers).mean() + F.softplus(of_stego).mean()  # Eq. (6), (7)


def round_to_uint8(images: Tensor) -> Tensor:
    """Round images with levels 0 to 1 to uint8, shaped alike."""
    return (255 * images).round().clamp(0, 255).to(torch.uint8)
