"""Readings: the values that a key reads from a suspect, and how they were read."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict, Field

from countermark.results.subject import STORED


@dataclass(frozen=True)
class ReaderFacts:
    """Facts about the learnt reader that read a suspect.

    Attributes:
        siblings: n, the number of held-out unmarked siblings of the marked model that the reader
            was measured on: fine-tunes of the same base, or twins from the same initial weights.
        threshold: a suspect with a larger `quiet_loss` may be a sibling; None if n is too small to
            set a threshold.
        quiet_loss: the loss with no hidden unit of the suspect louder than in the marked model,
            since logits grow with the weights; None if there is no threshold.
        permuted: number of hidden-unit permutations of the suspect that the reader also read.
        false_reads: number of these that match at least as many bits as the suspect.
        published: the published criterion's threshold for the loss; None in the hardened form.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STORED

    # Reports store these numbers; the bounds refuse values that no reader can produce.
    siblings: Annotated[int, Field(ge=0)]
    threshold: float | None
    permuted: Annotated[int, Field(ge=0)]
    false_reads: Annotated[int, Field(ge=0)]
    quiet_loss: float | None = None
    published: float | None = None


@dataclass(frozen=True)
class Disclosure:
    """The number of a key's triggers that were opened to the examiner.

    Attributes:
        opened: k, the number of opened triggers.
        committed: n, the number of triggers in the commitment.
        blind_choice: true if it was stated that the triggers were chosen without knowledge of their
            labels; otherwise unopened triggers count as misses.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STORED

    opened: Annotated[int, Field(ge=1)]
    committed: Annotated[int, Field(ge=1)]
    blind_choice: bool


@dataclass(frozen=True)
class Alignment:
    """The reference that a suspect was aligned to before it was read.

    Attributes:
        bears_mark: true if the key finds its mark in the reference, too.
        similarity: mean cosine of the neurons that were matched; 1 for a copy.
        is_committed: true if the key's commitment holds the reference. The reference is then older
            than the message: every choice in the alignment was fixed before the message was drawn.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STORED

    bears_mark: bool
    similarity: float
    is_committed: bool = False


@dataclass(frozen=True)
class ImageSimilarity:
    """Similarity of the hidden and the revealed image, as normalised correlation (NC).

    Attributes:
        nc: NC of the suspect's images: the mean over them, or the NC of their votes.
        nc_blank: NC of a blank image, which anybody's images may reveal.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STORED

    nc: float
    nc_blank: float


@dataclass(frozen=True)
class Reading:
    """The values that a key read from a suspect, beside the values that the key expects.

    Attributes:
        read: the raw bits (T,) that were read; or the suspect's classes for T triggers, −1 for no
            answer.
        expected: the message (T,), or the labels of the triggers.
        committed: true if `expected` is XOF output over a commitment that holds everything else;
            only then must a cheat search for a key that fits.
        payload: true if the payload decodes; None if the message has no payload.
        scores: the real values (T,) whose signs are the bits; None if the scheme has no scores.
        reader: facts about the reader, if the reader is learnt.
        choices: C, the number of values that each entry can have: 2 for bits, else the classes.
        unit: the kind of entry; an image succeeds (1) or fails (0), and 1 is expected of each.
        disclosure: the opened triggers that were read, if the whole key was not available.
        alignment: the reference that the suspect was aligned to, if any.
        likeness: similarity of hidden and revealed images, if there are any.
    """

    # Message, labels and scores reveal the key, so `repr` and logs leave them out.
    read: NDArray[np.integer[Any]] = field(repr=False)
    expected: NDArray[np.integer[Any]] = field(repr=False)
    committed: bool = True
    payload: bool | None = None
    scores: NDArray[np.float64] | None = field(default=None, repr=False)
    reader: ReaderFacts | None = None
    choices: int = 2
    unit: Literal["bits", "triggers", "images"] = "bits"
    disclosure: Disclosure | None = None
    alignment: Alignment | None = None
    likeness: ImageSimilarity | None = None

    @property
    def bits(self) -> int:
        """T, the number of bits, triggers or images."""
        return len(self.expected)

    @property
    def readable_count(self) -> int:
        """Number of entries that could agree: the opened triggers, if not all were opened."""
        return self.bits if self.disclosure is None else self.disclosure.opened

    @property
    def answer_count(self) -> int:
        """Number of entries for which the suspect gave a value."""
        # −1 stands for a trigger without an answer; it never equals a label, so it is a miss.
        return int(np.count_nonzero(self.read >= 0))

    @property
    def match_count(self) -> int:
        """Number of entries that agree with the expected values."""
        return int(np.count_nonzero(self.read == self.expected))

    @property
    def cross_entropy(self) -> float | None:
        """E_R per bit (Uchida), L2 (Wang) in nats: mean −log P(expected bit) by sigmoid(scores)."""
        if self.scores is None:
            return None
        # log(1 + e^−x) by logaddexp: no overflow for scores of a hostile suspect.
        agreement = (2.0 * self.expected - 1.0) * self.scores
        return float(np.logaddexp(0.0, -agreement).mean())

    @property
    def mark_distance(self) -> float | None:
        """Distance of the reading from the mark, by which models are ranked; None for plain bits.

        For bits with scores: their cross-entropy. With a learnt reader: the `quiet_loss` if that is
        larger; the loudness of the marked model is its owner's word, which may make a reading worse
        and never better. For triggers: the number of misses. For images: the share that failed,
        since sets differ in size.
        """
        loss = self.cross_entropy
        if self.reader is not None and self.reader.quiet_loss is not None and loss is not None:
            return max(loss, self.reader.quiet_loss)
        # The suspect decides how many images there are, so a count would not be comparable.
        if self.unit == "images":
            return (self.bits - self.match_count) / self.bits
        return (
            float(self.bits - self.match_count) if self.unit == "triggers" else self.cross_entropy
        )

    @property
    def sort_key(self) -> tuple[int, float]:
        """Sort key for the best of several readings: matching bits, then the smaller loss."""
        # Bits without scores tie in the loss: `max` then keeps the first of equal readings.
        return self.match_count, -(self.cross_entropy or 0.0)
