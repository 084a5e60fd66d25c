"""Forgery: keys, readers and originals of the thief's own, for a model that they stole.

These attacks leave the model unchanged, except `invert`, which makes a counterfeit original. The
field `found` says how well each forgery reads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from pydantic import PositiveFloat, PositiveInt
from torch import nn

from countermark.attacks.base import Attack, ChangeResult
from countermark.attacks.overwrite import make_whole_tensor_scheme
from countermark.checkpoints import open_weights
from countermark.errors import ConfigError, suggest_nearest
from countermark.keys.key import KeyMaterial
from countermark.results.statistics import find_least_matches
from countermark.schemes.uchida.scheme import Uchida

_FORGERY_BITS = 80.0  # forgery bits that a verdict demands of an undated key
_APART = 2_000_003  # offset of the thief's key numbers, to avoid the owners'


def _read_values(model: nn.Module, layer: str) -> NDArray[np.float64]:
    """Read the named tensor of a model as float64, flattened (M,).

    Raises:
        ConfigError: the model has no tensor of this name; the message names the nearest.
    """
    with open_weights(model) as weights:
        if layer not in weights.tensors:
            raise ConfigError(
                f"the model has no tensor {layer!r}: {suggest_nearest(layer, weights.tensors)}"
            )
        return weights.read(layer).astype(np.float64).ravel()


@dataclass(frozen=True)
class ForgeReader(Attack):
    """An attack that trains a small network to read any message from a layer without a mark.

    Attributes:
        layer: name of the tensor that is read.
        bits: length of the random message.
        hidden: number of hidden units of the reader.
        steps: number of Adam steps at learning rate 1e-3.
        seed: seed of message and reader.
    """

    name: ClassVar[str] = "forge_reader"
    does: ClassVar[str] = "trains a reader that finds the thief's message in the unchanged model"
    source: ClassVar[str] = "against Wang et al. 2020 and other learnt readers"

    layer: str
    bits: PositiveInt = field(default=512, kw_only=True)
    hidden: PositiveInt = field(default=256, kw_only=True)
    steps: PositiveInt = field(default=200, kw_only=True)
    seed: int = field(default=0, kw_only=True)

    def change(self, stolen: nn.Module, data: Any = None) -> ChangeResult:  # noqa: ARG002 - others train
        """Train the reader; the model stays unchanged."""
        w = torch.from_numpy(_read_values(stolen, self.layer)).float()
        generator = torch.Generator().manual_seed(self.seed)
        message = torch.randint(0, 2, (self.bits,), generator=generator).float()
        drawn = [
            torch.randn(rows, columns, generator=generator) / columns**0.5
            for rows, columns in ((self.hidden, len(w)), (self.bits, self.hidden))
        ]
        factors = [each.requires_grad_() for each in drawn]
        # Divide by the spread: layers differ in scale, and the learning rate is fixed.
        optimizer, inputs = torch.optim.Adam(factors, 1e-3), w / w.std()
        with torch.enable_grad():
            for _ in range(self.steps):
                optimizer.zero_grad()
                read = factors[1] @ torch.relu(factors[0] @ inputs)  # (T,)
                loss = F.binary_cross_entropy_with_logits(read, message)
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
        # The counts are in-sample: the reader was trained on this one layer and message.
        matched = int(((read > 0).float() == message).sum())
        return ChangeResult(
            found={"bits": self.bits, "matched": matched, "L2": float(loss.detach())}
        )


@dataclass(frozen=True)
class ForgeSigns(Attack):
    """An attack that forges an unrestricted linear key: it flips rows until every bit fits.

    Attributes:
        layer: name of the tensor that is read.
        bits: length of the random message.
        seed: seed of message and rows.
    """

    name: ClassVar[str] = "forge_signs"
    does: ClassVar[str] = "flips rows of a free linear key until it reads any message"
    source: ClassVar[str] = "against Uchida et al. 2017 where X may be any matrix"

    layer: str
    bits: PositiveInt = field(default=256, kw_only=True)
    seed: int = field(default=0, kw_only=True)

    def change(self, stolen: nn.Module, data: Any = None) -> ChangeResult:  # noqa: ARG002 - others train
        """Make the forged key; the model stays unchanged."""
        w, drawn = _read_values(stolen, self.layer), np.random.default_rng(self.seed)
        message = drawn.integers(0, 2, self.bits)
        X = drawn.normal(size=(self.bits, len(w)))  # (T, M)
        # A row with the other sign reads the other bit, so one flip for each wrong bit suffices.
        X *= np.where((X @ w > 0) == (message == 1), 1.0, -1.0)[:, None]
        matched = int(((X @ w > 0) == (message == 1)).sum())
        return ChangeResult(found={"bits": self.bits, "matched": matched})


@dataclass(frozen=True)
class SearchKey(Attack):
    """An attack that draws keys as the scheme does, and reports the best one.

    Attributes:
        mark: fields of the thief's `uchida`.
        tries: number of keys that are drawn.
        seed: seed of the keys.
    """

    name: ClassVar[str] = "search_key"
    does: ClassVar[str] = "draws keys until one fits by luck; tells the best and the work it takes"
    source: ClassVar[str] = "against undated keys: what forgery_bits counts"

    mark: dict[str, Any]
    tries: PositiveInt = field(default=1000, kw_only=True)
    seed: int = field(default=0, kw_only=True)

    def change(self, stolen: nn.Module, data: Any = None) -> ChangeResult:  # noqa: ARG002 - others train
        """Draw the keys and read each of them; the model stays unchanged."""
        scheme = Uchida.from_stored_fields(self.mark)
        with open_weights(stolen) as weights:
            shapes = {name: info.shape for name, info in weights.tensors.items()}
            tensors = scheme.choose_tensors(shapes)
            read = {name: weights.read(name) for name in tensors}
        best = 0
        for number in range(self.tries):
            material = KeyMaterial.from_test_seed(_APART * (self.seed + 1) + number)
            key = scheme.generate_key(tensors, owner="thief", material=material)
            best = max(best, scheme.extract(read, key).match_count)
        # The number of matching bits that convicts with an undated key: luck has probability 2^-80.
        needed = find_least_matches(scheme.bits, -_FORGERY_BITS * math.log10(2))
        return ChangeResult(found={
            "bits": scheme.bits, "tries": self.tries, "best": best,
            "matches_needed_undated": needed, "log2_tries_needed": _FORGERY_BITS,
        })  # fmt: skip


@dataclass(frozen=True)
class Invert(Attack):
    """An attack that subtracts a mark of the thief's own from the model: a counterfeit original.

    The thief presents the result as their original. Compared with this original, the stolen model
    bears the thief's mark, just as it bears the owner's mark compared with the owner's original.
    Read without an original, as Countermark reads, the model bears only the owner's mark.

    Attributes:
        mark: fields of the thief's `uchida`, whose layer is one tensor, read whole.
        margin: margin of each bit, in standard deviations of the reading before.
        seed: seed of the thief's key.
    """

    name: ClassVar[str] = "invert"
    does: ClassVar[str] = (
        "makes a counterfeit original, compared with which the model is the thief's"
    )
    source: ClassVar[str] = "Craver et al. 1998, Resolving Rightful Ownerships"

    mark: dict[str, Any]
    margin: PositiveFloat = field(default=2.0, kw_only=True)
    seed: int = field(default=0, kw_only=True)

    def change(self, stolen: nn.Module, data: Any = None) -> ChangeResult:  # noqa: ARG002 - others train
        """Turn the copy into the counterfeit original.

        Raises:
            ConfigError: the fields do not fit, or the mark does not lie in one whole tensor.
        """
        scheme, drawn = (
            make_whole_tensor_scheme(self.mark, self.name),
            KeyMaterial.from_test_seed(_APART + self.seed),
        )
        layer = str(scheme.layer)
        w = _read_values(stolen, layer)
        weight = stolen.get_parameter(layer)
        key = scheme.generate_key({layer: tuple(weight.shape)}, owner="thief", material=drawn)
        X = np.concatenate(list(scheme.generate_row_blocks(key))).astype(np.float64)  # (T, M)
        aims = (2.0 * key.message - 1) * self.margin * (X @ w).std()  # (T,)
        # The least-norm solution d of X·d = aims carries the mark, and the stolen model is the
        # original plus d.
        original = w - np.linalg.lstsq(X, aims, rcond=None)[0]
        with torch.no_grad():
            weight.copy_(torch.from_numpy(original).reshape(weight.shape).to(weight))

        def count_matches(values: NDArray[np.float64]) -> int:
            """Return how many bits of the thief's message the values (M,) carry."""
            return int(((X @ values > 0) == (key.message == 1)).sum())

        # The reading of `w - original` is the mark as a comparison of both models shows it.
        found = {"bits": key.bits, "matched": count_matches(w),
                 "matched_against_original": count_matches(w - original)}  # fmt: skip
        return ChangeResult(found=found)
