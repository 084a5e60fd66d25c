"""Evidence: what a key reads from a suspect, and how it was read."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict, Field

from countermark.subject import STORED


@dataclass(frozen=True)
class Reader:
    """What is known of the learnt reader that read a suspect.

    Attributes:
        siblings: n, how many held-out unmarked siblings of the marked model it was measured on;
            fine-tunes of the same base, or twins from the same initial weights.
        threshold: a `quiet_loss` above it may be a sibling's; None where n is too small to set one.
        quiet_loss: the loss with no hidden unit of the suspect louder than in the marked model,
            since logits grow with the weights; None where there is no threshold.
        permuted: how many hidden-unit permutations of the suspect it also read.
        false_reads: how many of these give at least as many matching bits as the suspect.
        published: the published criterion's threshold for the loss; None in the hardened form.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STORED

    siblings: Annotated[int, Field(ge=0)]
    threshold: float | None
    permuted: Annotated[int, Field(ge=0)]
    false_reads: Annotated[int, Field(ge=0)]
    quiet_loss: float | None = None
    published: float | None = None


@dataclass(frozen=True)
class Disclosure:
    """How many of a key's triggers were opened to whoever judges.

    Attributes:
        opened: k, how many were opened.
        committed: n, of how many.
        blind_choice: whether it was stated that they were chosen without knowledge of their
            labels; else those that were not opened count as misses.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STORED

    opened: Annotated[int, Field(ge=1)]
    committed: Annotated[int, Field(ge=1)]
    blind_choice: bool


@dataclass(frozen=True)
class Alignment:
    """What a suspect was aligned to before it was read.

    Attributes:
        bears_mark: whether the key finds its mark in the reference, too.
        similarity: mean cosine of the neurons that were matched; 1 for a copy.
        is_committed: whether the key's commitment holds the reference, which is older than the
            message then: every freedom of the alignment was fixed before the message was drawn.
        names_architecture: whether the reference's names and shapes alone say which neurons belong
            together; else it was named (--model, the key's host, a config.json), by whoever asked.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STORED

    bears_mark: bool
    similarity: float
    is_committed: bool = False
    names_architecture: bool = True


@dataclass(frozen=True)
class Likeness:
    """How like the hidden picture what was revealed is, by normalised correlation (NC).

    Attributes:
        nc: of the suspect's images: the mean over them, or that of the votes.
        nc_blank: of a blank picture, which anybody's images may reveal.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STORED

    nc: float
    nc_blank: float


@dataclass(frozen=True)
class Evidence:
    """What a key read out of a suspect.

    Attributes:
        read: the raw bits (T,) that were read; or the classes that a suspect gave T triggers, −1
            where it gave none.
        expected: the message (T,), or the triggers' labels.
        committed: whether `expected` is XOF output over a commitment that holds everything else;
            only then does a cheat have to search for a key that fits.
        payload: whether the payload decodes; None when the message has none.
        scores: the real values (T,) whose signs are the bits, where a scheme has them.
        reader: what is known of the reader, where it was learnt.
        choices: C, how many values each of them can have: 2 for bits, else the classes.
        unit: what they are; images succeed (1) or fail, and each shall succeed.
        disclosure: which part of the key this is about, where it was not the whole.
        alignment: to what the suspect was aligned before, where it was.
        likeness: of hidden and revealed pictures, where there are some.
    """

    read: NDArray[np.integer[Any]] = field(repr=False)
    expected: NDArray[np.integer[Any]] = field(repr=False)
    committed: bool = True
    payload: bool | None = None
    scores: NDArray[np.float64] | None = field(default=None, repr=False)
    reader: Reader | None = None
    choices: int = 2
    unit: Literal["bits", "triggers", "images"] = "bits"
    disclosure: Disclosure | None = None
    alignment: Alignment | None = None
    likeness: Likeness | None = None

    @property
    def bits(self) -> int:
        """T."""
        return len(self.expected)

    @property
    def readable(self) -> int:
        """How many of the T could agree: those that were opened, where not all were."""
        return self.bits if self.disclosure is None else self.disclosure.opened

    @property
    def answered(self) -> int:
        """For how many of the T there is anything to compare."""
        return int(np.count_nonzero(self.read >= 0))

    @property
    def matched(self) -> int:
        """How many of the T are as expected."""
        return int(np.count_nonzero(self.read == self.expected))

    @property
    def cross_entropy(self) -> float | None:
        """E_R per bit (Uchida), L2 (Wang) in nats: mean −log P(expected bit) by sigmoid(scores)."""
        if self.scores is None:
            return None
        agreement = (2.0 * self.expected - 1.0) * self.scores
        return float(np.logaddexp(0.0, -agreement).mean())

    @property
    def distance(self) -> float | None:
        """How far the reading is from the mark, by what models are ranked: a loss, or misses.

        The cross-entropy of scores, how many triggers did not get their labels, or the share of
        images that failed, since sets differ in size; None for bits without scores. Of a learnt
        reader the `quiet_loss` where that is larger: how loud the marked model is, is its owner's
        word, which may make a reading worse and never better.
        """
        loss = self.cross_entropy
        if self.reader is not None and self.reader.quiet_loss is not None and loss is not None:
            return max(loss, self.reader.quiet_loss)
        if self.unit == "images":
            return (self.bits - self.matched) / self.bits
        return float(self.bits - self.matched) if self.unit == "triggers" else self.cross_entropy

    @property
    def quality(self) -> tuple[int, float]:
        """By what the best of several readings is chosen: matching bits, then the loss."""
        return self.matched, -(self.cross_entropy or 0.0)
