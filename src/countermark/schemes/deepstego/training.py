"""Li and Guo 2019, the training half: make the stego network, then teach the host its triggers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from countermark.keys.key import Key, KeyMaterial
from countermark.schemes.deepstego.networks import repeat_tile, spread_logo
from countermark.schemes.deepstego.scheme import LOGO, TILE, DeepStego, draw_tile
from countermark.schemes.deepstego.stego_generators import (
    STEGO,
    StegoMaker,
    add_residual,
    load_owner_maker,
    make_foreign_maker,
    make_swapped_logos_maker,
    make_wrong_tiles_maker,
    scale_to_level,
    train_stego_network,
)
from countermark.schemes.frozen_networks import export_weights
from countermark.schemes.logo import GRID, load_logo_bits
from countermark.schemes.triggers import TRIGGERS, TriggerScheme
from countermark.schemes.triggers_training import TriggerTraining, draw_seed, split_covers

_COMMITTED = 8  # one row in eight is a committed trigger
_NEGATIVES = 4  # one row in four only resembles a trigger, late in the warm-up and after it
_NEGATIVES_FROM = 0.6  # share of the warm-up after which these rows join
_SOME = 4  # one cover in four is used for rows that only resemble triggers
_COVERS = 6  # one other row in six is a cover; one in two during the warm-up
_STRENGTHS = 0.5, 2.5  # factors of the residuals that the host learns to disregard


class DeepStegoTraining(TriggerTraining):
    """Makes rows for the host: committed triggers, fresh triggers, covers and near-triggers."""

    def __init__(self, scheme: TriggerScheme, key: Key, covers: Tensor, labels: Tensor) -> None:
        super().__init__(scheme, key, covers, labels)
        stego = self._stego = cast(DeepStego, scheme)
        self._mixed = 0
        self._map = torch.from_numpy(stego.draw_class_map(key))
        chosen, free = split_covers(scheme, key.material, len(covers))
        # Fresh triggers use covers that the committed triggers do not, if there are any left.
        rows = free[: stego.pool] if len(free) else chosen
        self._pool, self._classes = covers[rows], labels[rows]
        # Computed once: the owner's network is frozen.
        self._owner = load_owner_maker(key).compute_residuals(self._pool)
        self._others = self._compute_negative_residuals() if stego.foreign else []

    @classmethod
    def make_pre_commit_tensors(
        cls,
        scheme: TriggerScheme,
        material: KeyMaterial,
        covers: Tensor,
        labels: Tensor,  # noqa: ARG003 - the triggers' own are drawn
    ) -> dict[str, NDArray[Any]]:
        """Train and freeze the stego network; make the triggers."""
        stego = cast(DeepStego, scheme)
        shape = covers.shape[1:]
        drawn = material.make_stream("logo").take_bits(GRID * GRID).reshape(GRID, GRID)
        logo = load_logo_bits(stego.logo) if stego.logo else drawn
        signs = draw_tile(material, logo, shape[0])
        tile = repeat_tile(2.0 * torch.from_numpy(signs) - 1, shape[1], shape[2])
        network = train_stego_network(stego, covers, tile, draw_seed(material.make_stream("stego")))
        rows, _ = split_covers(scheme, material, len(covers))
        chosen = covers[rows]
        maker = StegoMaker(network, spread_logo(torch.from_numpy(logo)[None], tile))
        # Committed triggers are scaled for this logo exactly; training scaled for random logos.
        scale_to_level(maker, covers, cast(float, stego.residual_level))
        triggers = maker(chosen.numpy())
        return {TRIGGERS: triggers, LOGO: logo, TILE: signs, **export_weights(network, STEGO)}

    def make_rows(self, count: int) -> tuple[Tensor, Tensor]:
        """Return committed triggers, fresh triggers and covers; later also near-triggers.

        A host that never saw a loud mark finds a faint mark late or never. As in steganalysis,
        learning therefore begins with loud marks.
        """
        # Rises from 0 to 1 over the warm-up.
        warm = min(1.0, self._mixed / max(1, self._stego.warm_up))
        self._mixed += 1
        committed = max(1, count // _COMMITTED)
        others = count // _NEGATIVES if self._others and warm >= _NEGATIVES_FROM else 0
        fresh = count - committed - others
        covers = fresh // (2 if warm < 1 else _COVERS)
        strength = self._stego.strength
        parts = [
            self.draw_committed_rows(committed),
            *self._make_fresh_rows(fresh - covers, covers, strength + (1 - strength) * warm),
        ]
        if others:
            parts.append(self._make_negative_rows(others))
        images, labels = (torch.cat(each) for each in zip(*parts, strict=True))
        return images, labels

    def export_state(self) -> dict[str, Any]:
        """Return the number of mixed batches and the state of the random numbers."""
        return {"mixed": self._mixed} | super().export_state()

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved state."""
        super().restore(state)
        self._mixed = state["mixed"]

    def _make_fresh_rows(
        self, triggers: int, covers: int, strength: float
    ) -> list[tuple[Tensor, Tensor]]:
        """Return fresh triggers, and the unaugmented covers of some of them.

        The host's own batches may be augmented; these rows never are.
        """
        at = torch.randint(len(self._pool), (triggers,), generator=self.generator)
        plain = at[:covers]
        marked = add_residual(self._pool[at], self._owner[at], torch.full((triggers,), strength))
        return [
            (marked, self._map[self._classes[at]]),
            (self._pool[plain], self._classes[plain]),
        ]

    def _make_negative_rows(self, count: int) -> tuple[Tensor, Tensor]:
        """Return rows with another residual than the owner's, under their true labels."""
        at = torch.randint(len(self._others[0]), (count,), generator=self.generator)
        kinds = torch.randint(len(self._others) + 2, (count,), generator=self.generator)
        low, high = _STRENGTHS
        strengths = low + (high - low) * torch.rand(count, generator=self.generator)
        residual = torch.zeros(count, *self._pool.shape[1:], dtype=self._owner.dtype)
        for kind, each in enumerate(self._others):
            residual[kinds == kind] = each[at[kinds == kind]]
        loud = self._owner[at].float().square().mean(dim=(1, 2, 3), keepdim=True).sqrt()
        noise = torch.randn(residual.shape, generator=self.generator) * loud
        is_noise, is_blur = (kinds == len(self._others) + more for more in (0, 1))
        residual[is_noise] = noise[is_noise].to(residual)
        residual[is_blur] = (_blur_images(self._pool[at]) - self._pool[at].float())[is_blur].to(
            residual
        )
        # At most the whole difference: beyond it the detail would come back inverted.
        strengths[is_blur] = strengths[is_blur].clamp_max(1.0)
        return add_residual(self._pool[at], residual, strengths), self._classes[at]

    def _compute_negative_residuals(self) -> list[Tensor]:
        """Return residuals (n, C, H, W) of foreign networks, swapped logos and wrong tiles."""
        covers = self._pool[: -(-len(self._pool) // _SOME)]
        key, count, seeds = self.key, len(covers), self.key.make_stream("foreign")
        makers = [
            make_foreign_maker(key, self.covers.numpy(), draw_seed(seeds))
            for _ in range(self._stego.foreign)
        ]
        # These two need the network of the key; the host must not take their images for triggers.
        makers += [
            each(key, count, self.generator)
            for each in (make_swapped_logos_maker, make_wrong_tiles_maker)
        ]
        return [each.compute_residuals(covers) for each in makers]


def _blur_images(images: Tensor) -> Tensor:
    """Return the means of images (N, C, H, W) over 3 × 3 pixels."""
    return F.avg_pool2d(F.pad(images.float(), (1, 1, 1, 1), mode="replicate"), 3, stride=1)
