"""Overwriting: embed the thief's own marks over the owner's mark, by training or in closed form."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import PositiveFloat, PositiveInt
from torch import nn

from countermark.attacks.base import Attack, ChangeResult, TrainingData
from countermark.attacks.fine_tune import FineTune
from countermark.checkpoints import open_weights
from countermark.errors import ConfigError
from countermark.keys.key import Key, KeyMaterial
from countermark.schemes import find_scheme_class
from countermark.schemes.uchida.scheme import Uchida
from countermark.schemes.weights import WeightScheme

_APART = 1_000_003  # offset of the thief's key numbers, to avoid the owners'


@dataclass(frozen=True)
class Overwrite(FineTune):
    """An attack that embeds fresh marks one after the other while it fine-tunes the copy.

    The thief knows the algorithm and the place of the owner's mark, and has keys of their own.

    Attributes:
        lr: learning rate of the fine-tuning.
        scheme: name of the scheme that the thief embeds.
        mark: fields of that scheme.
        times: number of marks.
    """

    name: ClassVar[str] = "overwrite"
    does: ClassVar[str] = "embeds marks with the thief's own keys over the owner's"
    source: ClassVar[str] = "Uchida et al. 2017, overwriting; Wang et al. 2020, Conclusion"

    lr: PositiveFloat = 0.001
    scheme: str = field(default="uchida", kw_only=True)
    mark: dict[str, Any] = field(kw_only=True)
    times: PositiveInt = field(default=1, kw_only=True)

    def change(self, stolen: nn.Module, data: TrainingData) -> ChangeResult:
        """Embed the marks; the thief's keys are thrown away.

        Raises:
            ConfigError: as for fine-tuning, or scheme and fields do not fit the model.
        """
        _, share = self.embed_marks(stolen, data)
        return ChangeResult(float(self.epochs * self.times), share)

    def embed_marks(self, stolen: nn.Module, data: TrainingData) -> tuple[list[Key], float]:
        """Embed the marks.

        Returns: the thief's keys, and the share of the training rows that was used.

        Raises:
            ConfigError: the scheme does not mark weights, or its fields do not fit the model.
        """
        scheme = find_scheme_class(self.scheme).from_stored_fields(self.mark)
        if not isinstance(scheme, WeightScheme):
            raise ConfigError(
                f"{self.name}: {scheme.name} lives in {scheme.family}, not in weights"
            )
        keys, share = [], 0.0
        for number in range(self.times):
            # A test key from the seed makes the attack repeatable; nobody will claim with this key.
            material = KeyMaterial.from_test_seed(_APART * (self.seed + 1) + number)
            with scheme.embed(stolen, owner="thief", material=material) as mark:
                share = self.tune(stolen, data, mark)
            if mark.drawn_key is not None:  # MANU has no key before its weights converge
                keys.append(mark.drawn_key)
        return keys, share


@dataclass(frozen=True)
class OverwriteClosedForm(Attack):
    """An attack that embeds the thief's linear marks by the least change that gives each a margin.

    It needs neither data nor training: each mark is one system of T equations.

    Attributes:
        mark: fields of the thief's `uchida`, whose layer is one tensor, read whole.
        times: number of marks, embedded one after the other.
        margin: margin of each bit, in standard deviations of the reading before.
        seed: seed of the thief's keys.
    """

    name: ClassVar[str] = "overwrite_closed_form"
    does: ClassVar[str] = "puts marks of the thief's own in at once, without training"
    source: ClassVar[str] = "the least-norm solution of X·w = y, for the read-out of Uchida 2017"

    mark: dict[str, Any]
    times: PositiveInt = field(default=1, kw_only=True)
    margin: PositiveFloat = field(default=2.0, kw_only=True)
    seed: int = field(default=0, kw_only=True)

    def change(self, stolen: nn.Module, data: Any = None) -> ChangeResult:  # noqa: ARG002 - others train
        """Embed the marks and read the last one back; the thief's keys are thrown away.

        Raises:
            ConfigError: the fields do not fit, or the mark does not lie in one whole tensor.
        """
        keys = self.embed_marks(stolen)
        with open_weights(stolen) as weights:
            read = {name: weights.read(name) for name in keys[-1].tensors}
        # The last mark only: later marks may weaken the earlier ones.
        evidence = make_whole_tensor_scheme(self.mark, self.name).extract(read, keys[-1])
        return ChangeResult(found={"bits": evidence.bits, "matched": evidence.match_count})

    def embed_marks(self, stolen: nn.Module) -> list[Key]:
        """Embed the marks.

        Returns: the thief's keys.
        """
        scheme, keys = make_whole_tensor_scheme(self.mark, self.name), []
        parameters = dict(stolen.named_parameters())
        tensors = scheme.choose_tensors({name: tuple(p.shape) for name, p in parameters.items()})
        for number in range(self.times):
            material = KeyMaterial.from_test_seed(_APART * (self.seed + 1) + number)
            key = scheme.generate_key(tensors, owner="thief", material=material)
            # The uchida scheme of a whole tensor chooses exactly one tensor.
            for name in tensors:
                # In double precision the change is rounded once only, to the stored dtype.
                weight = parameters[name].detach().cpu().double().numpy()
                change = self._compute_change(scheme, key, weight.ravel()).reshape(weight.shape)
                with torch.no_grad():
                    parameters[name].add_(torch.from_numpy(change).to(parameters[name]))
            keys.append(key)
        return keys

    def _compute_change(
        self, scheme: Uchida, key: Key, w: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """Compute the least change (M,) of weights (M,) after which every bit has its margin."""
        X = np.concatenate(list(scheme.generate_row_blocks(key))).astype(np.float64)  # (T, M)
        y, signs = X @ w, 2.0 * key.message - 1  # (T,)
        # Bits that already exceed the margin keep their reading.
        wanted = signs * np.maximum(signs * y, self.margin * y.std())
        found: NDArray[np.float64] = np.linalg.lstsq(X, wanted - y, rcond=None)[0]
        return found


def make_whole_tensor_scheme(mark: dict[str, Any], attack: str) -> Uchida:
    """Return the thief's linear scheme, which reads one whole tensor.

    Raises:
        ConfigError: the fields do not fit, or they choose several layers or another reading.
    """
    scheme = Uchida.from_stored_fields(mark)  # "plain" by default, so readings are linear
    if not isinstance(scheme.layer, str) or scheme.layer == "all" or scheme.read != "tensor":
        raise ConfigError(
            f"{attack} marks one tensor that is read whole: name one layer, read=tensor"
        )
    return scheme
