"""Marks in the outputs of a network that makes images, read from what somebody published.

What all such schemes share: nothing is added to the network. A barrier behind it marks every image
that leaves, and whoever trains a network of his own on these images is taught the mark with them.
A reading goes once over a whole set of images: they share one message, so that they are votes on
its bits and no independent trials.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Protocol, final

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from countermark.answers import Images
from countermark.errors import ConfigError
from countermark.evidence import Evidence
from countermark.key import Key, KeyMaterial
from countermark.nulls import LEAST_FORGERY_BITS, FairCoin, Null, forgery_bits
from countermark.pictures import Pixels
from countermark.schemes.base import Scheme
from countermark.verdict import ALPHA

if TYPE_CHECKING:
    from torch import Tensor, nn

    from countermark.embedding import Barrier, KeyPlace, OutputEmbedding
    from countermark.schemes.training.box_free import Live, OutputTraining

LEAST_SIDE = 16
"""Images with a shorter side say nothing that a reader could be trusted with."""


class Reading(Protocol):
    """A reading of a set of images that goes on picture by picture."""

    def add(self, picture: Pixels) -> None:
        """Read one more picture uint8 (C, H, W), of the key's channels."""

    def evidence(self) -> Evidence:
        """What all pictures so far say together."""

    def state(self) -> dict[str, Any]:
        """Where it stands, as JSON values; secret, since they are what the reader says."""

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from `state()`.

        Raises:
            ConfigError: it is not one of this key's readings.
        """


@dataclass(frozen=True)
class OutputScheme(Scheme):
    """A mark in the images that a network makes, read box-free.

    Attributes:
        bits: T, the message length.
        channels: of the images: 1 for grey, 3 for colour.
    """

    bits: Annotated[int, Field(ge=1, le=1 << 12)] = field(default=144)
    channels: Literal[1, 3] = field(default=1, kw_only=True)

    family: ClassVar[str] = "outputs"
    threat_model: ClassVar[str] = "box-free: images that somebody published"
    null: ClassVar[type[Null]] = FairCoin

    @property
    def size(self) -> int:
        """T, the message length."""
        return self.bits

    @property
    def tests(self) -> int:
        """Of how many readings evidence is the best; p is corrected for them."""
        return 1

    @final
    def generate_key(
        self, frozen: Mapping[str, NDArray[Any]], *, owner: str, material: KeyMaterial
    ) -> Key:
        """Make a key whose networks are fixed before its message is drawn."""
        return Key(
            scheme=self.name,
            fields=self.to_fields(),
            tensors={},
            owner=owner,
            material=material,
            frozen=frozen,
        )

    def check_outputs(self, size: tuple[int, int]) -> None:
        """Raise `ConfigError` for images (H, W) that the networks cannot be trained on."""

    @abstractmethod
    def reading(self, key: Key) -> Reading:
        """Begin to read a set of images.

        Raises:
            ConfigError: the key's networks are damaged.
        """

    @abstractmethod
    def live(self, key: Key) -> Live:
        """The key's networks, loaded with torch: marking and reading need it.

        Raises:
            ConfigError: they are damaged.
        """

    @final
    def mark(self, outputs: Images, key: Key) -> Images:
        """Marked images (n, C, H, W) of outputs uint8 (n, C, H, W), as the barrier gives them.

        Raises:
            ConfigError: the key's networks are damaged, or the outputs are of other channels.
        """
        return self.live(key).marked(outputs)

    @final
    def wrap(self, model: nn.Module, key: Key) -> Barrier:
        """The network behind which every image is marked, as an embedding's `wrap` makes it."""
        from countermark.embedding import Barrier

        return Barrier(model, self.live(key))

    @final
    def extract(self, outputs: Iterable[Pixels], key: Key) -> Evidence:
        """Read the message out of a set of images, uint8 (C, H, W) each, of any sizes.

        Raises:
            ConfigError: the key's networks are damaged, there is no image, or one cannot be read.
        """
        reading = self.reading(key)
        for picture in outputs:
            reading.add(self.fitted(picture))
        return reading.evidence()

    @final
    def fitted(self, picture: Pixels) -> Pixels:
        """A picture (c, H, W) in the key's channels: grey for colour, or grey in every channel.

        Raises:
            ConfigError: it is none, or too small.
        """
        if picture.dtype != np.uint8 or picture.ndim != 3 or len(picture) not in (1, 3):
            raise ConfigError(
                f"an output is {picture.dtype} {list(picture.shape)}: expected an image uint8 "
                "[C, H, W] with one channel of grey or three of colour"
            )
        if min(picture.shape[1:]) < LEAST_SIDE:
            raise ConfigError(
                f"an output has {picture.shape[2]}x{picture.shape[1]} pixels: expected "
                f"{LEAST_SIDE} or more on each side"
            )
        if len(picture) == self.channels:
            return picture
        return grey(picture) if self.channels == 1 else np.repeat(picture, 3, axis=0)

    def nulls(self, key: Key) -> dict[str, Null]:  # noqa: ARG002 - most keys hold none of theirs
        """The null hypotheses that this scheme can be judged by; its own one first."""
        return {FairCoin.name: FairCoin()}

    def calibrated(self, key: Key, siblings: Sequence[Iterable[Pixels]]) -> Key:  # noqa: ARG002
        """The key with what it reads from sets of images that unmarked networks made."""
        return key

    def not_taken(self, evidence: Evidence) -> str | None:
        """Why a mark would not be found in the owner's own images; None when it would."""
        tail = FairCoin().log10_p(evidence)
        if 10**tail <= ALPHA and forgery_bits(evidence) >= min(LEAST_FORGERY_BITS, evidence.bits):
            return None
        return (
            f"only {evidence.matched} of {evidence.bits} bits are read from marked images "
            f"(log10 p {tail:.1f}): train longer, or take a lower psnr"
        )

    @final
    def embed(  # noqa: PLR0913 - what is stated stands by its name
        self, model: nn.Module, *, owner: str, outputs: Images | Tensor,
        inputs: Images | Tensor | None = None, key: str | Path | KeyPlace | None = None,
        resume: bool = False, material: KeyMaterial | None = None,
        siblings: Sequence[Images] = (),
    ) -> OutputEmbedding:  # fmt: skip
        """Start to put a barrier behind a network; see `countermark.embedding.OutputEmbedding`.

        Args:
            model: the network, from images to images; it is left as it is.
            owner: whose mark it is.
            outputs: images uint8 (N, C, H, W) like those that it makes.
            inputs: what it made them of, in the same order; teachers of R need them.
            key: where the finished key is saved when the block ends; a path, or a `KeyPlace` with a
                passphrase. It is looked at now: a key that exists is never overwritten. While
                training runs, the secret lies in a private folder beside it.
            resume: go on with the key that an interrupted training left at that place; without one
                begin anew.
            material: secret and nonce, where the caller keeps them; else drawn.
            siblings: a set of images (n, C, H, W) from each of some unmarked networks, for a form
                that is judged by them.

        Raises:
            KeyFileError: the key exists, an unfinished one does and `resume` is false, or nothing
                can be written there.
            ConfigError: the outputs do not fit the scheme.
        """
        from countermark.embedding import OutputEmbedding, place_for

        return OutputEmbedding(
            self, model, owner=owner, outputs=outputs, inputs=inputs, material=material,
            siblings=siblings, place=place_for(key, resume=resume),
        )  # fmt: skip

    @final
    def training(self) -> type[OutputTraining]:
        """The training half of this scheme, loaded with torch when somebody trains."""
        half: type[OutputTraining] = self.half()
        return half


def grey(picture: Pixels) -> Pixels:
    """Rec. 601 luma (1, H, W) of a picture (3, H, W), rounded as pillow does."""
    red, green, blue = picture.astype(np.uint32)
    luma: Pixels = ((19595 * red + 38470 * green + 7471 * blue + 0x8000) >> 16).astype(np.uint8)
    return luma[None]
