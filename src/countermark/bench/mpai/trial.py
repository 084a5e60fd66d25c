"""What is evaluated, and what a technology has to do for it."""

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
    """What is evaluated.

    Attributes:
        scheme, fields: the technology.
        model, data: the networks, and what they learn; "" for the usual ones of their kind.
        train: on how many rows; None for all.
        epochs: of each network, and of each marking, which goes on from it.
        networks, payloads: M and D.
        siblings: unmarked relatives of each network, for schemes that need some; insertion pays.
        alpha: of the detector.
        modifications: what is done to every network; () for those of its kind.
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
    def terms(self) -> VerificationOptions:
        """How the detector judges."""
        return VerificationOptions(
            self.alpha, assume_dated=True, blind_choice=True, allow_test_key=True
        )


@dataclass(frozen=True)
class Network:
    """An unmarked network, trained in so many seconds; the marked ones and their keys likewise."""

    plain: nn.Module
    marked: list[nn.Module]
    keys: list[Key]
    trained: float
    seconds: float


class Technology(Protocol):
    """Marks networks of one kind, and reads them."""

    quality: ClassVar[str]
    """What `good` measures: "accuracy" or "psnr"."""

    def marked(self, number: int) -> Network:
        """An unmarked network of that number, and one marked with each payload."""

    def modified(self, model: nn.Module, name: str, fields: Mapping[str, Any]) -> nn.Module:
        """What a network is after a modification at some values; it stays as it is."""

    def asked(self, model: nn.Module, key: Key) -> Verdict:
        """What the detector says of a network."""

    def good(self, model: nn.Module) -> float:
        """How well a network does its task: accuracy in percent, or PSNR in dB."""
