"""Li and Guo 2019 as published, the training half: stego network and host are trained together.

Each call for rows takes one step of the stego network and its discriminator; the host learns the
images of that step. The covers and the logo are committed first. The final network and the triggers
that it makes are learnt, and enter C1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from countermark.keys.key import Key, KeyMaterial
from countermark.schemes.deepstego.adversarial import StegoOpponents
from countermark.schemes.deepstego.scheme import CLASSES, COVERS, LOGO, DeepStego
from countermark.schemes.deepstego.stego_generators import STEGO, make_fresh_triggers
from countermark.schemes.frozen_networks import export_weights
from countermark.schemes.logo import load_logo_pixels
from countermark.schemes.triggers import TRIGGERS, TriggerScheme
from countermark.schemes.triggers_training import TriggerTraining, draw_seed, split_covers


class PublishedDeepStegoTraining(TriggerTraining):
    """Makes rows for the host: stego images of the network's current state, and their covers."""

    def __init__(self, scheme: TriggerScheme, key: Key, covers: Tensor, labels: Tensor) -> None:
        super().__init__(scheme, key, covers, labels)
        stego = cast(DeepStego, scheme)
        self._map = torch.from_numpy(stego.draw_class_map(key))
        # Its state goes into checkpoints: host and stego network continue together.
        self._opponents = StegoOpponents(
            torch.from_numpy(np.array(key.frozen[LOGO])),
            level=stego.residual_level,
            adversarial=stego.adversarial,
            seed=draw_seed(key.material.make_stream("stego")),
        )

    @classmethod
    def make_pre_commit_tensors(
        cls, scheme: TriggerScheme, material: KeyMaterial, covers: Tensor, labels: Tensor
    ) -> dict[str, NDArray[Any]]:
        """Choose the covers of the triggers, with their classes, and read the logo."""
        chosen, _ = split_covers(scheme, material, len(covers))
        channels, height, width = covers.shape[1:]
        return {
            COVERS: covers[chosen].numpy(),
            CLASSES: labels[chosen].numpy(),
            LOGO: load_logo_pixels(cast(DeepStego, scheme).logo, (channels, height, width)),
        }

    def make_rows(self, count: int) -> tuple[Tensor, Tensor]:
        """Return stego images under mapped classes, then their covers under true classes.

        Differs from the paper: the loop's own batch stays beside both. That batch may be augmented,
        and the stego images here never are; without their covers, the host would take a plain image
        for a trigger.
        """
        at = torch.randint(len(self.covers), ((count + 1) // 2,), generator=self.generator)
        covers, classes = self.covers[at], self.labels[at]
        stego = self._opponents.step(covers)
        # An odd count gives one stego image more than covers.
        beside = count - len(at)
        images = torch.cat([stego, covers[:beside]])  # X_I', X_I
        return images, torch.cat([self._map[classes], classes[:beside]])

    def export_post_commit_tensors(self) -> dict[str, NDArray[Any]]:
        """Return the current stego network, and the triggers that it makes of the frozen covers."""
        weights = export_weights(self._opponents.network, STEGO)
        # Triggers are made with the network in a key, so the unfinished key gets it here.
        key = replace(self.key, learnt=weights)
        return weights | {TRIGGERS: make_fresh_triggers(key, key.frozen[COVERS])}

    def export_state(self) -> dict[str, Any]:
        """Return the random numbers, both networks and their optimizers."""
        return {"opponents": self._opponents.export_state()} | super().export_state()

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved state."""
        super().restore(state)
        self._opponents.restore(state["opponents"])
