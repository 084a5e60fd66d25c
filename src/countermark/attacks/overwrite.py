"""Overwriting: marks of the thief's own are embedded over the owner's, by training or at once."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import PositiveFloat, PositiveInt
from torch import nn

from countermark.attacks.base import Attack, Done, TrainingData
from countermark.attacks.fine_tune import FineTune
from countermark.errors import ConfigError
from countermark.key import Key, KeyMaterial
from countermark.schemes import scheme_named
from countermark.schemes.uchida import Uchida
from countermark.schemes.white_box import WeightScheme
from countermark.weights import open_weights

_APART = 1_000_003  # between the thief's key numbers and those of the owners that he robs


@dataclass(frozen=True)
class Overwrite(FineTune):
    """Fresh marks, one after the other, each embedded while the copy is fine-tuned.

    The thief knows the algorithm and where the owner's mark lies, and has keys of his own.

    Attributes:
        lr: learning rate of the fine-tuning.
        scheme: what the thief embeds, by name.
        mark: fields of that scheme.
        times: how many marks.
    """

    name: ClassVar[str] = "overwrite"
    does: ClassVar[str] = "embeds marks with the thief's own keys over the owner's"
    source: ClassVar[str] = "Uchida et al. 2017, overwriting; Wang et al. 2020, Conclusion"

    lr: PositiveFloat = 0.001
    scheme: str = field(default="uchida", kw_only=True)
    mark: dict[str, Any] = field(kw_only=True)
    times: PositiveInt = field(default=1, kw_only=True)

    def change(self, stolen: nn.Module, data: TrainingData) -> Done:
        """Embed the marks; the thief's keys are not kept.

        Raises:
            ConfigError: as for fine-tuning, or scheme and fields do not fit the model.
        """
        _, share = self.overwritten(stolen, data)
        return Done(float(self.epochs * self.times), share)

    def overwritten(self, stolen: nn.Module, data: TrainingData) -> tuple[list[Key], float]:
        """Embed the marks.

        Returns: the thief's keys, and the share of the training rows that was used.
        """
        scheme = scheme_named(self.scheme).from_stored(self.mark)
        if not isinstance(scheme, WeightScheme):
            raise ConfigError(
                f"{self.name}: {scheme.name} lives in {scheme.family}, not in weights"
            )
        keys, share = [], 0.0
        for number in range(self.times):
            # Drawn from the seed, so that an attack can be repeated: it claims nothing in earnest.
            material = KeyMaterial.for_tests(_APART * (self.seed + 1) + number)
            with scheme.embed(stolen, owner="thief", material=material) as mark:
                share = self.tune(stolen, data, mark)
            if mark.drawn_key is not None:  # MANU draws none before its weights have converged
                keys.append(mark.drawn_key)
        return keys, share


@dataclass(frozen=True)
class OverwriteClosedForm(Attack):
    """Linear marks of the thief's own, put in at once by the least change that gives them a margin.

    It needs no data and no training: one system of T equations a mark.

    Attributes:
        mark: fields of the thief's `uchida`, whose layer is one tensor, read whole.
        times: how many marks, one after the other.
        margin: of each bit, in standard deviations of its reading before.
        seed: draws the thief's keys.
    """

    name: ClassVar[str] = "overwrite_closed_form"
    does: ClassVar[str] = "puts marks of the thief's own in at once, without training"
    source: ClassVar[str] = "the least-norm solution of X·w = y, for the read-out of Uchida 2017"

    mark: dict[str, Any]
    times: PositiveInt = field(default=1, kw_only=True)
    margin: PositiveFloat = field(default=2.0, kw_only=True)
    seed: int = field(default=0, kw_only=True)

    def change(self, stolen: nn.Module, data: Any = None) -> Done:  # noqa: ARG002 - others train
        """Put the marks in; the thief's keys are not kept.

        Raises:
            ConfigError: fields that do not fit, or a mark that is not in one whole tensor.
        """
        keys = self.overwritten(stolen)
        with open_weights(stolen) as weights:
            read = {name: weights.read(name) for name in keys[-1].tensors}
        evidence = whole_tensor(self.mark, self.name).extract(read, keys[-1])
        return Done(found={"bits": evidence.bits, "matched": evidence.matched})

    def overwritten(self, stolen: nn.Module) -> list[Key]:
        """Put the marks in.

        Returns: the thief's keys.
        """
        scheme, keys = whole_tensor(self.mark, self.name), []
        parameters = dict(stolen.named_parameters())
        tensors = scheme.choose({name: tuple(p.shape) for name, p in parameters.items()})
        for number in range(self.times):
            material = KeyMaterial.for_tests(_APART * (self.seed + 1) + number)
            key = scheme.generate_key(tensors, owner="thief", material=material)
            for name in tensors:
                weight = parameters[name].detach().cpu().double().numpy()
                change = self._change(scheme, key, weight.ravel()).reshape(weight.shape)
                with torch.no_grad():
                    parameters[name].add_(torch.from_numpy(change).to(parameters[name]))
            keys.append(key)
        return keys

    def _change(self, scheme: Uchida, key: Key, w: NDArray[np.float64]) -> NDArray[np.float64]:
        """The least change (M,) after which every bit has its margin."""
        X = np.concatenate(list(scheme.generate_row_blocks(key))).astype(np.float64)  # (T, M)
        y, signs = X @ w, 2.0 * key.message - 1  # (T,)
        wanted = signs * np.maximum(signs * y, self.margin * y.std())
        found: NDArray[np.float64] = np.linalg.lstsq(X, wanted - y, rcond=None)[0]
        return found


def whole_tensor(mark: dict[str, Any], attack: str) -> Uchida:
    """The thief's linear scheme, which reads one tensor as a whole.

    Raises:
        ConfigError: fields that do not fit, or that say otherwise.
    """
    scheme = Uchida.from_stored(mark)  # plain unless it says so: the least change is linear then
    if not isinstance(scheme.layer, str) or scheme.layer == "all" or scheme.read != "tensor":
        raise ConfigError(
            f"{attack} marks one tensor that is read whole: name one layer, read=tensor"
        )
    return scheme
