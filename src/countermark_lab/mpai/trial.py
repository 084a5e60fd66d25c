"""Settings of an evaluation, and the interface of a marking technology."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, TypeAlias

from torch import nn

from countermark.keys.key import Key
from countermark.results.verdict import ALPHA, Verdict, VerificationOptions

Modification: TypeAlias = tuple[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Trial:
    """The settings of an evaluation.

    Attributes:
        scheme, fields: the scheme that is evaluated.
        model, data: the networks, and the data set they learn; "" for the default of their kind.
        train: number of training images; None for all.
        epochs: epochs of each network, and again of each marking, which continues its training.
        networks, payloads: M and D of the standard.
        siblings: number of unmarked relatives of each network, for schemes that need them; their
            training counts as cost of insertion.
        alpha: level of the detector.
        modifications: modifications of every network; () for the default ones of its kind.
    """

    scheme: str
    fields: Mapping[str, Any]
    model: str = ""
    data: str = ""
    train: int | None = None
    epochs: int = 3
    networks: int = 2
    payloads: int = 2
    siblings: int = 8
    alpha: float = ALPHA
    modifications: Sequence[Modification] = ()

    @property
    def verification_options(self) -> VerificationOptions:
        """Options of the detector."""
        # Nobody here prefers an outcome, so keys count as dated and images as chosen blindly.
        return VerificationOptions(
            self.alpha, assume_dated=True, blind_choice=True, allow_test_key=True
        )


@dataclass(frozen=True)
class MarkedNetworks:
    """An unmarked network, its marked copies, and their keys.

    Attributes:
        plain: the unmarked network.
        marked: one copy for each payload.
        keys: the key of each copy.
        trained: CPU seconds of training `plain`.
        seconds: CPU seconds of making all marked copies.
    """

    plain: nn.Module
    marked: list[nn.Module]
    keys: list[Key]
    trained: float
    seconds: float


class Technology(Protocol):
    """A way to mark and read networks of one kind."""

    quality: ClassVar[str]
    """What `measure_quality` measures: "accuracy" or "psnr"."""

    def mark_network(self, number: int) -> MarkedNetworks:
        """Train the unmarked network `number`, and mark a copy of it with each payload."""

    def modify_network(self, model: nn.Module, name: str, fields: Mapping[str, Any]) -> nn.Module:
        """Return a modified copy of a network; `model` itself does not change."""

    def judge_network(self, model: nn.Module, key: Key) -> Verdict:
        """Judge a network by a key."""

    def measure_quality(self, model: nn.Module) -> float:
        """Measure how well a network does its task: accuracy in percent, or PSNR in dB."""
