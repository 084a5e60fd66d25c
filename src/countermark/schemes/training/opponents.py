"""Steganographic adversarial training, Li and Guo 2019, Section 4.2: two networks, no host.

The stego network paints images that the discriminator shall take for covers. Neither sees a host,
which makes this the whole recipe of whoever knows the paper.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from countermark.schemes.training.stego import Discriminator, StegoNetwork, ssim

ALPHA, BETA, GAMMA = 3.0, 5.0, 1.0
"""The weights of Eq. (3) and (5), which the paper does not print: those of its authors' public code
for Li et al., ACSAC 2019, as are the optimizers."""

_LR, _BETAS = 1e-3, (0.5, 0.999)


class Opponents:
    """Stego network and discriminator, each with its optimizer.

    Args:
        logo: uint8 (C, H, W).
        level: the root mean square error that stego images are held at, white being 1; None holds
            nothing.
        adversarial: δ of Eq. (5).
        seed: of the weights that both begin with.
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
        """One step of each on covers uint8 (n, C, H, W): first the discriminator, then the painter.

        Returns: the stego images uint8 (n, C, H, W) that the steps were taken on.
        """
        covers = images.float() / 255
        with torch.enable_grad(), torch.autocast(images.device.type, enabled=False):
            stego = self.network(covers, self._logo.expand(len(covers), -1, -1, -1))
            self._tells.zero_grad()
            told_apart(self.discriminator(covers), self.discriminator(stego.detach())).backward()  # type: ignore[no-untyped-call]
            self._tells.step()
            taken_for_a_cover = F.softplus(-self.discriminator(stego)).mean()  # Eq. (4)
            # Differs from the paper: log(1 − p(I')) has no lower bound; this is −log p(I').
            loss = GAMMA * apart(covers, stego, self._level)
            loss = loss + self._adversarial * taken_for_a_cover  # Eq. (5)
            self._paints.zero_grad()
            loss.backward(inputs=self._parameters)  # type: ignore[no-untyped-call]
            self._paints.step()
        return eight_bit(stego.detach())

    def state(self) -> dict[str, Any]:
        """Networks and optimizers as they are now, for a checkpoint."""
        return {name: copy.deepcopy(each.state_dict()) for name, each in self._parts().items()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from `state()`."""
        for name, each in self._parts().items():
            each.load_state_dict(state[name])

    def _parts(self) -> dict[str, Any]:
        return {
            "network": self.network,
            "discriminator": self.discriminator,
            "paints": self._paints,
            "tells": self._tells,
        }


def apart(covers: Tensor, stego: Tensor, level: float | None) -> Tensor:
    """α·MSE + β·(1 − SSIM) () of images (n, C, H, W), levels 0 to 1.

    With a level the first term is the distance of the MSE from level², so that it is held from both
    sides; what is left to itself ends as the cover, with no logo in it.
    """
    # Differs from the paper: Eq. (1) is printed without the square.
    error = F.mse_loss(stego, covers)  # Eq. (1)
    if level is not None:
        # Differs from the paper: held from both sides, by its logarithm, as dB are counted.
        error = (error.clamp_min(1e-10).log() - math.log(level**2)).square()
    return ALPHA * error + BETA * (1 - ssim(stego, covers).mean())  # Eq. (2), (3)


def told_apart(of_covers: Tensor, of_stego: Tensor) -> Tensor:
    """The discriminator's loss () by its logits (n,) of "cover"."""
    # Differs from the paper: Eq. (6) has no lower bound; this is −log p(I) − log(1 − p(I')).
    return F.softplus(-of_covers).mean() + F.softplus(of_stego).mean()  # Eq. (6), (7)


def eight_bit(images: Tensor) -> Tensor:
    """Images with levels 0 to 1 as uint8, shaped alike."""
    return (255 * images).round().clamp(0, 255).to(torch.uint8)
