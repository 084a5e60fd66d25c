"""Marks in the answers to trigger images, read from predicted classes alone.

What all such schemes share: a key holds n committed triggers, and its secret gives each of them a
salt, which draws its label. The root of a Merkle tree over salts and triggers is committed too, so
that some triggers can be shown without the others (`openings`). A trigger scheme has no reading of
its own; its training half makes the triggers.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, final

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from countermark import merkle
from countermark.answers import Images, Labels, Predict
from countermark.errors import ConfigError
from countermark.evidence import Evidence
from countermark.key import OPENINGS, Key, KeyMaterial, tensor_digest
from countermark.nulls import LEAST_FORGERY_BITS, Null, SecretLabels, forgery_bits
from countermark.schemes.base import Scheme
from countermark.schemes.bounds import Levels, Spreads
from countermark.schemes.reader import SIBLINGS
from countermark.verdict import ALPHA
from countermark.xof import frame

if TYPE_CHECKING:
    from torch import Tensor, nn

    from countermark.embedding import KeyPlace, TriggerEmbedding
    from countermark.schemes.training.black_box import TriggerTraining

TRIGGERS = "triggers"
"""Name of the committed triggers, uint8 (n, C, H, W), among the key's tensors; the root of the tree
over their leaves (`leaf`) is the one named `OPENINGS`, uint8 (32,)."""


@dataclass(frozen=True)
class TriggerScheme(Scheme):
    """A mark in the answers of a classifier, read black-box.

    Attributes:
        classes: how many classes the host tells apart.
        triggers: n, how many triggers are committed.
        mean, deviation: what a live host is fed with is (image − mean) / deviation; grey levels,
            one value or one for each channel.
        batch_share: how many rows join a batch, for each row of it.
    """

    classes: Annotated[int, Field(ge=2, le=1 << 20)]
    triggers: Annotated[int, Field(ge=1, le=1 << 16)] = field(default=128)
    mean: Levels = field(default=(0.0,), kw_only=True)
    deviation: Spreads = field(default=(255.0,), kw_only=True)
    batch_share: Annotated[float, Field(gt=0, le=4)] = field(default=1.0, kw_only=True)

    family: ClassVar[str] = "triggers"
    threat_model: ClassVar[str] = "black-box: a function images -> classes"
    null: ClassVar[type[Null]] = SecretLabels

    @property
    def size(self) -> int:
        """n, the number of triggers."""
        return self.triggers

    @classmethod
    def paced(cls, batches: int) -> dict[str, Any]:  # noqa: ARG003 - most schemes keep no time
        """Fields that follow from how many batches a host is trained with."""
        return {}

    def check_files(self) -> None:
        """Raise `ConfigError` for a file of the fields that cannot be used; most name none."""
        return

    @final
    def generate_key(
        self, frozen: Mapping[str, NDArray[Any]], *, owner: str, material: KeyMaterial
    ) -> Key:
        """Make a key whose triggers, and what made them, are fixed before their labels.

        Raises:
            ConfigError: there are no such triggers among what is frozen.
        """
        rooted = {}
        if self.keyed_labels:
            triggers = self.images_in(frozen, TRIGGERS)
            rooted = {OPENINGS: _root(triggers, material)}
        return Key(
            scheme=self.name,
            fields=self.to_fields(),
            tensors={},
            owner=owner,
            material=material,
            frozen={**frozen, **rooted},
        )

    def check_key(self, key: Key) -> None:
        """Raise `ConfigError` for a key without the triggers that it speaks of."""
        channels = self.committed(key).shape[1]
        for name, each in (("mean", self.mean), ("deviation", self.deviation)):
            if len(each) not in (1, channels):
                raise ConfigError(
                    f"{self.name}: field {name} has {len(each)} values: expected 1, or {channels}, "
                    "one for each channel of the triggers"
                )

    def committed(self, key: Key) -> Images:
        """The key's triggers (n, C, H, W).

        Raises:
            ConfigError: the key holds no such triggers, or they are not those of its tree.
        """
        images = self.images_in(key.frozen, TRIGGERS)
        found = key.frozen.get(OPENINGS, np.zeros(0, dtype=np.uint8))
        root = _root(images, key.material)
        if found.dtype != np.uint8 or not np.array_equal(found, root):
            raise ConfigError(
                f"the key's openings, {found.dtype} {list(found.shape)}, do not follow from its "
                "secret and its triggers: this library never made such a key"
            )
        return images

    @final
    def images_in(self, tensors: Mapping[str, NDArray[Any]], name: str) -> Images:
        """The n images (n, C, H, W) of that name among a key's tensors.

        Raises:
            ConfigError: there are none, or not so many.
        """
        found = tensors.get(name, np.zeros(0, dtype=np.uint8))
        if found.dtype != np.uint8 or found.ndim != 4 or len(found) != self.triggers:
            raise ConfigError(
                f"the key's {name} are {found.dtype} {list(found.shape)}: expected "
                f"{self.triggers} images, uint8 [n, C, H, W]"
            )
        return found

    @property
    def keyed_labels(self) -> bool:
        """Whether labels are keyed random output over a commitment that holds the triggers."""
        return True

    def labels(self, key: Key) -> NDArray[np.int64]:
        """The label (n,) of each committed trigger."""
        return key.labels(self.triggers, self.classes)

    @final
    def extract(self, predict: Predict, key: Key) -> Evidence:
        """Ask a suspect about the committed triggers.

        Raises:
            ConfigError: the key's triggers are damaged, or `predict` answers in another form.
        """
        return self.compare(predict, self.committed(key), self.labels(key))

    @final
    def compare(self, predict: Predict, images: Images, labels: NDArray[np.int64]) -> Evidence:
        """Ask a suspect about images (n, C, H, W) that have labels (n,).

        Raises:
            ConfigError: `predict` answers in another form.
        """
        read = np.asarray(predict(images))
        if read.shape != (len(images),) or read.dtype.kind != "i":
            raise ConfigError(
                f"a suspect answered {len(images)} images with {read.dtype} {list(read.shape)}: "
                f"expected classes, int64 [{len(images)}], −1 where there is none"
            )
        return Evidence(
            read, labels, committed=self.keyed_labels, choices=self.classes, unit="triggers"
        )

    def nulls(self, key: Key) -> dict[str, Null]:  # noqa: ARG002 - most keys hold none of theirs
        """The null hypotheses that this scheme can be judged by; its own one first."""
        return {SecretLabels.name: SecretLabels()}

    def ask_fresh(
        self,
        predict: Predict,  # noqa: ARG002 - a scheme that can makes use of both
        fresh: FreshTriggers,  # noqa: ARG002
    ) -> tuple[Evidence, Null]:
        """Ask a suspect about fresh triggers; with the null that judges them.

        Raises:
            ConfigError: the scheme has committed triggers only, or the covers do not fit the key.
        """
        raise ConfigError(
            f"{self.name} makes no fresh triggers: its committed ones are all that it has"
        )

    @final
    def calibrated(self, key: Key, siblings: Sequence[Predict]) -> Key:
        """The key with the misses of unmarked models among its triggers; as it is without any.

        Args:
            key: with its triggers.
            siblings: unmarked models of the host's task that training never saw.
        """
        if not siblings:
            return key
        misses = np.array([self.extract(each, key).distance for each in siblings], dtype=np.float64)
        return replace(key, learnt={**key.learnt, SIBLINGS: misses})

    def not_taken(self, evidence: Evidence) -> str | None:
        """Why a mark would not be found in the owner's own model; None when it would."""
        tail = SecretLabels().log10_p(evidence)
        enough = min(LEAST_FORGERY_BITS, evidence.bits * np.log2(evidence.choices))
        if 10**tail <= ALPHA and forgery_bits(evidence) >= enough:
            return None
        return (
            f"only {evidence.matched} of {evidence.bits} triggers get their labels "
            f"(log10 p {tail:.1f}): train longer, or raise batch_share"
        )

    @final
    def embed(  # noqa: PLR0913 - what is stated stands by its name
        self, model: nn.Module, *, owner: str, covers: Images | Tensor,
        labels: NDArray[np.int64] | Tensor, key: str | Path | KeyPlace | None = None,
        resume: bool = False, material: KeyMaterial | None = None,
        siblings: Sequence[nn.Module | Predict] = (),
    ) -> TriggerEmbedding:  # fmt: skip
        """Start to mark a model while it is trained; see `countermark.embedding.TriggerEmbedding`.

        Args:
            model: the host.
            owner: whose mark it is.
            covers: images uint8 (N, C, H, W) of the host's task, of which triggers are made.
            labels: their classes (N,).
            key: where the finished key is saved when the block ends; a path, or a `KeyPlace` with a
                passphrase. It is looked at now: a key that exists is never overwritten. While
                training runs, the secret lies in a private folder beside it.
            resume: go on with the key that an interrupted training left at that place; without one
                begin anew.
            material: secret and nonce, where the caller keeps them; else drawn.
            siblings: unmarked models of the same task that training never sees, for a form that
                is judged by them.

        Raises:
            KeyFileError: the key exists, an unfinished one does and `resume` is false, or nothing
                can be written there.
            ConfigError: covers and labels do not fit each other or the scheme.
        """
        from countermark.embedding import TriggerEmbedding, place_for

        return TriggerEmbedding(
            self, model, owner=owner, material=material, covers=covers, labels=labels,
            siblings=siblings, place=place_for(key, resume=resume),
        )  # fmt: skip

    @final
    def training(self) -> type[TriggerTraining]:
        """The training half of this scheme, loaded with torch when somebody trains."""
        half: type[TriggerTraining] = self.half()
        return half


@dataclass(frozen=True)
class FreshTriggers:
    """Triggers that nobody committed to, to be made of covers just now.

    p is exact only if whoever chose the covers did not look at what the suspect answers.

    Attributes:
        key: says how they are made, and which class each is to be taken for.
        covers: images (m, C, H, W) of the host's task.
        classes: what they show (m,).
    """

    key: Key
    covers: Images = field(repr=False)
    classes: Labels = field(repr=False)


@dataclass(frozen=True)
class DrawnTriggers(TriggerScheme):
    """A trigger scheme whose triggers are drawn, and learnt by the host one by one."""

    batch_share: Annotated[float, Field(gt=0, le=4)] = field(default=0.25, kw_only=True)

    trained_by: ClassVar[str] = "drawn_triggers"

    @abstractmethod
    def draw(self, covers: Images, material: KeyMaterial) -> Images:
        """The triggers (n, C, H, W).

        Args:
            covers: n images of the host's task, in random order.
            material: what is secret in the drawing follows from its streams.
        """


def leaf(salt: bytes, image: Images) -> bytes:
    """A trigger's leaf: its salt, and the digest of its image (C, H, W) as tensor "trigger"."""
    return frame(salt, tensor_digest("trigger", image))


def _root(triggers: Images, material: KeyMaterial) -> NDArray[np.uint8]:
    """The root (32,) of the tree over triggers (n, C, H, W) and their salts."""
    salted = zip(material.salts(len(triggers)), triggers, strict=True)
    return np.frombuffer(merkle.root([leaf(*each) for each in salted]), dtype=np.uint8)
