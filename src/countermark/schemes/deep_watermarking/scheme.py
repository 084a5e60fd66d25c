"""Zhang et al. 2020/2021, deep watermarking: an invisible image in every output of a network.

The published form hides one image with networks H and R that are trained on this very image.
Whatever R reveals depends on its training, and no probability follows from it. In the default
form, H and R are trained on a fresh random message in every image and then frozen. Only then is
the owner's message drawn from secret and commitment, so that its bits are fair coins on any images
that were made without the message.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from countermark._internal.plugins import load_object
from countermark.errors import ConfigError
from countermark.images.image_files import Pixels
from countermark.keys.key import Key
from countermark.results.null_hypotheses import NullHypothesis, UnmarkedModels
from countermark.results.reading import ImageSimilarity, Reading
from countermark.schemes.base import Paper
from countermark.schemes.key_limits import Count, CountOrNone, FactorOrNone
from countermark.schemes.learnt_reader import SIBLINGS, check_calibration
from countermark.schemes.outputs import ImageNetworks, OutputReader, OutputScheme

_FOLDER = "countermark.schemes.deep_watermarking"
PICTURE = "picture"
"""Name of the hidden picture of the published form, uint8 (C, S, S), among the frozen tensors."""

SUCCESS = 0.95
"""The paper counts an image whose revealed picture has a higher NC with the hidden one."""

_MOST_VOTES = 1 << 22  # float64 votes of a reading, over all shifts: 32 MiB
_TAKEN = 0.5  # least share of successes in the owner's own images, for the published form


@dataclass(frozen=True)
class DeepWatermarking(OutputScheme):
    """A barrier behind a network from images to images; every image that leaves carries the mark.

    Attributes:
        as_published: hide one image, with networks that are trained on it.
        picture: an image file that the published form hides; "" for an image drawn from the
            secret.
        sizes: of the networks: "cpu", "published" (41.8, 3.4 and 1.6 million parameters as in the
            paper), or "tiny" for demonstrations.
        side: S, the side of the square that carries a whole message or image; images of other
            sizes carry it as often as it fits.
        placement: "tile" puts each bit at a place of that square, so that a network can learn the
            bit only if it sees the whole square in its place; "everywhere" puts all bits at every
            place.
        register: read at every shift of the square, each both as it is and as a negative, and
            take the best reading; p is corrected for the choice. For "tile" only.
        psnr: of marked images against the network's own images, in dB, on average.
        steps, batch, precision: of the training of H and R; "bf16" is quicker where the machine
            supports it.
        together: how many images of a batch share their message; R then reads in part the
            residual that H adds to all of them, which is the part that copies learn. For "tile"
            only.
        jitter: shift, crop and resize marked images while R is trained, by up to half a cell.
        teachers: architectures of networks on whose outputs R is trained before it is frozen. In
            the published form, R is trained on them last: the adversarial stage. An empty list
            skips this stage.
        teacher_steps: how long each teacher is trained, and R on each teacher.
        lambda1, lambda2, lambda3: weights of the published embedding loss: pixels, features by
            `perceptual`, adversarial.
        lambda4, lambda5, lambda6: weights of the published extracting loss: marked images,
            unmarked images, consistency.
        perceptual: module:factory of a network whose outputs are compared by lambda2.
        task: the task of the network, where this library's own experiments make the network.
    """

    name: ClassVar[str] = "deep_watermarking"
    null_as_published: ClassVar[type[NullHypothesis] | None] = UnmarkedModels
    paper: ClassVar[Paper] = Paper(
        authors="J. Zhang, D. Chen, J. Liao, W. Zhang, H. Feng, G. Hua, N. Yu",
        title="Deep Model Intellectual Property Protection via Deep Watermarking",
        venue="IEEE Transactions on Pattern Analysis and Machine Intelligence",
        year=2021,
        doi="10.48550/arXiv.2103.04980",
    )

    as_published: bool = field(default=False, kw_only=True)
    picture: str = field(default="", kw_only=True)
    sizes: Literal["tiny", "cpu", "published"] = field(default="cpu", kw_only=True)
    side: Annotated[int, Field(ge=16, le=1024)] = field(default=64, kw_only=True)
    placement: Literal["tile", "everywhere"] = field(default="tile", kw_only=True)
    register: bool = field(default=False, kw_only=True)
    psnr: Annotated[float, Field(gt=20, lt=60)] = field(default=34.5, kw_only=True)
    steps: Count = field(default=3000, kw_only=True)
    batch: Count = field(default=16, kw_only=True)
    precision: Literal["fp32", "bf16"] = field(default="fp32", kw_only=True)
    together: Count = field(default=4, kw_only=True)
    jitter: bool = field(default=False, kw_only=True)
    teachers: tuple[Literal["cnet", "res9", "res16", "unet"], ...] = field(default=(), kw_only=True)
    teacher_steps: CountOrNone = field(default=600, kw_only=True)
    lambda1: FactorOrNone = field(default=1.0, kw_only=True)
    lambda2: FactorOrNone = field(default=0.0, kw_only=True)
    lambda3: FactorOrNone = field(default=0.01, kw_only=True)
    lambda4: FactorOrNone = field(default=1.0, kw_only=True)
    lambda5: FactorOrNone = field(default=1.0, kw_only=True)
    lambda6: FactorOrNone = field(default=1.0, kw_only=True)
    perceptual: str = field(default="", kw_only=True)
    task: Literal["", "derain", "denoise", "super_resolution"] = field(default="", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        # The bits are laid out as a square of cells, √T in a row.
        if math.isqrt(self.bits) ** 2 != self.bits:
            near = math.isqrt(self.bits)
            raise ConfigError(
                f"{self.name}: {self.bits} bits make no square: expected a square number such as "
                f"{near**2} or {(near + 1) ** 2}"
            )
        if self.register and (self.placement != "tile" or self.as_published):
            raise ConfigError(
                f"{self.name}: register is for bits in the cells of a tile: leave it out"
            )
        # A reading with registration keeps the votes of all shifts in memory.
        if self.register and self.side**2 * self.bits > _MOST_VOTES:
            raise ConfigError(
                f"{self.name}: {self.bits} bits at {self.side}x{self.side} shifts are too many to "
                "register: take fewer bits or a smaller side"
            )
        if self.grid_size > self.side // 2:
            raise ConfigError(
                f"{self.name}: {self.grid_size} bits in a row do not fit {self.side} pixels: expected "
                f"{self.side // 2} at the most; take fewer bits or a larger side"
            )
        if bool(self.lambda2) != bool(self.perceptual):
            raise ConfigError(
                f"{self.name}: lambda2 weighs what the network of perceptual sees: give both, or "
                "neither"
            )

    @property
    def grid_size(self) -> int:
        """How many bits stand in a row of the square: √T."""
        return math.isqrt(self.bits)

    @property
    def shift_count(self) -> int:
        """At how many shifts of the square images are read."""
        return self.side**2 if self.register else 1

    @property
    def test_count(self) -> int:
        """How many readings are tried: 1, or with `register` two for each shift."""
        return 2 * self.shift_count if self.register else 1

    @property
    def needs_siblings(self) -> bool:
        """True in the published form: only unmarked networks can judge its readings."""
        return self.as_published

    def check_outputs(self, size: tuple[int, int]) -> None:
        """Raise `ConfigError` for images (H, W) that are smaller than the square of the mark."""
        if min(size) < self.side:
            raise ConfigError(
                f"outputs have {size[1]}x{size[0]} pixels, and a square that bears the mark "
                f"{self.side}x{self.side}: give larger ones, or a smaller side"
            )

    def check_key(self, key: Key) -> None:
        """Raise `ConfigError` for a key whose networks or measurements do not fit the scheme."""
        self.load_networks(key)  # raises for damaged networks
        if not self.as_published:
            return
        hidden = key.frozen.get(PICTURE, np.zeros(0, dtype=np.uint8))
        expected = (self.channels, self.side, self.side)
        if hidden.dtype != np.uint8 or hidden.shape != expected:
            raise ConfigError(
                f"the key's picture is {hidden.dtype} {list(hidden.shape)}: expected uint8 "
                f"{list(expected)}"
            )
        check_calibration(key.learnt)
        # A share above 1 is above that of any suspect: each such value would make p smaller.
        if (key.learnt.get(SIBLINGS, np.zeros(0)) > 1).any():
            raise ConfigError(f"the key's {SIBLINGS} are shares of images: expected 1 at the most")

    def make_reader(self, key: Key) -> OutputReader:
        """Start to read a set of images: votes on bits, or as published a count of successes."""
        live = self.load_networks(key)
        return (
            _SuccessReader(live, self, key) if self.as_published else _VoteReader(live, self, key)
        )

    def nulls(self, key: Key) -> dict[str, NullHypothesis]:
        """Return `FairCoin`; as published `UnmarkedModels` with the measurements of the key."""
        if not self.as_published:
            return super().nulls(key)
        return {UnmarkedModels.name: UnmarkedModels(key.learnt.get(SIBLINGS, np.zeros(0)))}

    def with_calibration(self, key: Key, siblings: Sequence[Iterable[Pixels]]) -> Key:
        """Return the key with the share of failures among the images of each unmarked network."""
        if not siblings or not self.as_published:
            return key
        shares = [self.extract(each, key).mark_distance for each in siblings]
        return replace(key, learnt={**key.learnt, SIBLINGS: np.array(shares, dtype=np.float64)})

    def embedding_failure(self, evidence: Reading) -> str | None:
        """Return why verify would not find the mark in the owner's images; None if it would.

        The published form applies the criterion of the paper; only a verdict says how much that
        proves.
        """
        if not self.as_published:
            return super().embedding_failure(evidence)
        if evidence.match_count >= _TAKEN * evidence.bits:
            return None
        return (
            f"the picture is revealed in {evidence.match_count} of {evidence.bits} marked images "
            "(expected half or more): train longer, or take a lower psnr"
        )

    @property
    def training_class(self) -> str:
        """The class that trains the mark of this form, as module:class."""
        if self.as_published:
            return f"{_FOLDER}.training_published:PublishedDeepWatermarkingTraining"
        return f"{_FOLDER}.training:MessageAgnosticTraining"

    def load_networks(self, key: Key) -> ImageNetworks:
        """Return the key's networks, loaded with torch, which marking and reading need.

        Raises:
            ConfigError: the key's networks are damaged or missing.
        """
        networks: ImageNetworks = load_object("countermark.schemes.outputs_training:load_networks")(
            self, key
        )
        return networks


class _VoteReader:
    """A reading of the default form: every image votes on every bit, with 1 at most.

    With `register`, an image votes at every shift of the square. The shift that agrees best with
    the message counts, or its negative: the residual that H adds may alternate from row to row, and
    is then read inverted after an odd shift of the image. Each shift and sign is one test, for
    which the caller corrects p.
    """

    def __init__(self, live: ImageNetworks, scheme: DeepWatermarking, key: Key) -> None:
        self._live, self._scheme, self._key = live, scheme, key
        self._votes = np.zeros((scheme.shift_count, scheme.bits))
        self._count = 0

    def add_image(self, picture: Pixels) -> None:
        """Add the votes of one image: tanh of half its scores, which bounds each vote by 1."""
        self._votes += np.tanh(self._live.read_scores(picture) / 2)
        self._count += 1

    def make_reading(self) -> Reading:
        """Return the sign of all votes on each bit as a reading."""
        if not self._count:
            raise ConfigError("there is no image to read: give some")
        # (shifts, T), and twice as many rows with the negatives.
        tried = self._votes
        if self._scheme.register:
            tried = np.concatenate([tried, -tried])
        agree = ((tried > 0) == self._key.message.astype(bool)).sum(1)
        votes = tried[agree.argmax()]  # (T,)
        read = (votes > 0).astype(np.uint8)
        # The likeness compares the mean votes with the message, both as grey levels. A blank image
        # lies at ½.
        found = (1 + votes / self._count) / 2  # (T,), as grey levels 0 to 1
        hidden = self._key.message.astype(np.float64)
        return Reading(
            read,
            self._key.message,
            payload=self._key.check_payload(read),
            scores=votes,
            likeness=ImageSimilarity(
                compute_correlation(found, hidden),
                compute_correlation(np.full_like(hidden, 0.5), hidden),
            ),
        )

    def state(self) -> dict[str, Any]:
        """Return the votes and the number of images."""
        return {"votes": self._votes.tolist(), "count": self._count}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from stored votes; raise `ConfigError` if they do not fit the key."""
        votes = np.array(state.get("votes", ()), dtype=np.float64)
        count = state.get("count")
        if not isinstance(count, int) or votes.shape != self._votes.shape:
            raise _make_state_error()
        # No image votes with more than 1. The negated comparison also refuses NaN.
        if not (np.abs(votes) <= count).all():
            raise _make_state_error()
        self._votes, self._count = votes, count


class _SuccessReader:
    """A reading of the published form: in how many images R reveals the hidden image."""

    def __init__(self, live: ImageNetworks, scheme: DeepWatermarking, key: Key) -> None:
        self._live, self._scheme = live, scheme
        self._hidden = key.frozen[PICTURE].astype(np.float64) / 255
        self._found: list[float] = []

    def add_image(self, picture: Pixels) -> None:
        """Add the NC of the hidden image with the revealed one, the mean over all squares."""
        self._found.append(compute_correlation(self._live.reveal_image(picture), self._hidden))

    def make_reading(self) -> Reading:
        """Return which images reach the threshold of the paper, as a reading."""
        if not self._found:
            raise ConfigError("there is no image to read: give some")
        read = (np.array(self._found) > SUCCESS).astype(np.uint8)
        # The NC of a blank image is reported beside the result, because it may be nearly as high.
        blank = np.full_like(self._hidden, get_blank_level(self._scheme))
        return Reading(
            read,
            # Every image is expected to succeed. The networks were trained on the hidden image, so
            # that no probability follows from a commitment.
            np.ones_like(read),
            committed=False,
            unit="images",
            likeness=ImageSimilarity(
                float(np.mean(self._found)), compute_correlation(blank, self._hidden)
            ),
        )

    def state(self) -> dict[str, Any]:
        """Return the NC of each image read so far."""
        return {"found": list(self._found)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from stored NC values; raise `ConfigError` if they are not a list of floats."""
        found = state.get("found")
        if not isinstance(found, list) or not all(isinstance(each, float) for each in found):
            raise _make_state_error()
        self._found = list(found)


def get_blank_level(scheme: DeepWatermarking) -> float:  # noqa: ARG001 - the same in all forms
    """Return the level that R shall reveal in an unmarked image: 1, white, as published."""
    return 1.0


def compute_correlation(one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    """Compute the normalised correlation ⟨a, b⟩ / (‖a‖‖b‖) of two images of one shape.

    It is 0 if one of the images is black. A high value is no proof by itself: an image that is
    nearly white has a high correlation with any blank image.
    """
    norms = float(np.linalg.norm(one) * np.linalg.norm(other))
    return float(np.vdot(one, other)) / norms if norms else 0.0


def _make_state_error() -> ConfigError:
    """Make the error for an interrupted reading whose file is damaged."""
    return ConfigError(
        "the interrupted reading is damaged: remove its file and read from the start"
    )
