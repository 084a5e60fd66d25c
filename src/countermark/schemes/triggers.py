"""Marks in the answers to trigger images, read from predicted classes alone.

All trigger schemes share this: a key holds n committed triggers, and its secret gives each trigger
a salt and a random label. The key also commits to the root of a Merkle tree over salts and
triggers, so that its owner can disclose some triggers without the others
(`verification.disclosure`). Reading is the same for all trigger schemes; their training files make
the triggers.
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

from countermark._internal import merkle
from countermark._internal.plugins import load_object
from countermark.errors import ConfigError
from countermark.keys.key import OPENINGS, Key, KeyMaterial, digest_tensor
from countermark.keys.key_place import KeyPlace, make_unfinished_key
from countermark.keys.streams import frame
from countermark.predictors.base import Images, Labels, Predictor
from countermark.results.null_hypotheses import (
    LEAST_FORGERY_BITS,
    NullHypothesis,
    SecretLabels,
    compute_forgery_bits,
)
from countermark.results.reading import Reading
from countermark.results.verdict import ALPHA
from countermark.schemes.base import Scheme
from countermark.schemes.key_limits import Levels, Spreads
from countermark.schemes.learnt_reader import SIBLINGS

if TYPE_CHECKING:
    from torch import Tensor, nn

    from countermark.embedding.base import Embedding

TRIGGERS = "triggers"
"""Name of the committed triggers, uint8 (n, C, H, W), among the key's tensors; the root of the tree
over their leaves (`compute_leaf`) is the one named `OPENINGS`, uint8 (32,)."""


@dataclass(frozen=True)
class TriggerScheme(Scheme):
    """A mark in the answers of a classifier, read black-box.

    Attributes:
        classes: how many classes the host distinguishes.
        triggers: n, how many triggers are committed.
        mean, deviation: a live host is fed with (image − mean) / deviation; in grey levels, one
            value or one for each channel.
        batch_share: how many rows of the mark join a batch, for each row of the batch.
    """

    classes: Annotated[int, Field(ge=2, le=1 << 20)]
    triggers: Annotated[int, Field(ge=1, le=1 << 16)] = field(default=128)
    mean: Levels = field(default=(0.0,), kw_only=True)
    deviation: Spreads = field(default=(255.0,), kw_only=True)
    batch_share: Annotated[float, Field(gt=0, le=4)] = field(default=1.0, kw_only=True)

    family: ClassVar[str] = "triggers"
    threat_model: ClassVar[str] = "black-box: a function images -> classes"
    null: ClassVar[type[NullHypothesis]] = SecretLabels

    @property
    def reading_length(self) -> int:
        """n, the number of triggers."""
        return self.triggers

    @classmethod
    def schedule_fields(cls, batches: int) -> dict[str, Any]:  # noqa: ARG003 - overridden
        """Return the fields that follow from the number of batches with which a host is trained."""
        return {}

    def check_files(self) -> None:
        """Raise `ConfigError` if a field names a file that cannot be used; most name no file."""
        return

    @final
    def generate_key(
        self, frozen: Mapping[str, NDArray[Any]], *, owner: str, material: KeyMaterial
    ) -> Key:
        """Make a key whose triggers, and everything that made them, are fixed before their labels.

        Args:
            frozen: tensors that are fixed before the commitment, the triggers among them.
            owner: the name of the owner.
            material: secret and nonce.

        Raises:
            ConfigError: the frozen tensors do not hold the triggers.
        """
        # The published form makes its triggers after the commitment and cannot commit to their
        # tree.
        rooted = {}
        if self.has_keyed_labels:
            triggers = self.read_key_images(frozen, TRIGGERS)
            rooted = {OPENINGS: _compute_root(triggers, material)}
        return Key(
            scheme=self.name,
            fields=self.to_fields(),
            tensors={},
            owner=owner,
            material=material,
            frozen={**frozen, **rooted},
        )

    def check_key(self, key: Key) -> None:
        """Raise `ConfigError` for a key whose triggers are missing or do not fit its fields."""
        channels = self.read_committed_triggers(key).shape[1]
        for name, each in (("mean", self.mean), ("deviation", self.deviation)):
            if len(each) not in (1, channels):
                raise ConfigError(
                    f"{self.name}: field {name} has {len(each)} values: expected 1, or {channels}, "
                    "one for each channel of the triggers"
                )

    def read_committed_triggers(self, key: Key) -> Images:
        """Return the triggers of a key (n, C, H, W).

        Raises:
            ConfigError: the key holds no such triggers, or its tree root does not follow from them.
        """
        images = self.read_key_images(key.frozen, TRIGGERS)
        # The root is computed anew: a key with another root could disclose triggers that it does
        # not hold.
        found = key.frozen.get(OPENINGS, np.zeros(0, dtype=np.uint8))
        root = _compute_root(images, key.material)
        if found.dtype != np.uint8 or not np.array_equal(found, root):
            raise ConfigError(
                f"the key's openings, {found.dtype} {list(found.shape)}, do not follow from its "
                "secret and its triggers: this library never made such a key"
            )
        return images

    @final
    def read_key_images(self, tensors: Mapping[str, NDArray[Any]], name: str) -> Images:
        """Return the n images (n, C, H, W) with this name among the tensors of a key.

        Raises:
            ConfigError: the images are missing, of another type or shape, or not n.
        """
        found = tensors.get(name, np.zeros(0, dtype=np.uint8))
        if found.dtype != np.uint8 or found.ndim != 4 or len(found) != self.triggers:
            raise ConfigError(
                f"the key's {name} are {found.dtype} {list(found.shape)}: expected "
                f"{self.triggers} images, uint8 [n, C, H, W]"
            )
        return found

    @property
    def has_keyed_labels(self) -> bool:
        """True where labels are keyed random output over a commitment that holds the triggers."""
        return True

    def derive_labels(self, key: Key) -> NDArray[np.int64]:
        """Return the label (n,) of each committed trigger."""
        return key.draw_labels(self.triggers, self.classes)

    @final
    def extract(self, predict: Predictor, key: Key) -> Reading:
        """Ask a suspect for the classes of the committed triggers.

        Raises:
            ConfigError: the key's triggers are damaged, or `predict` returns another type or shape.
        """
        return self.compare_answers(
            predict, self.read_committed_triggers(key), self.derive_labels(key)
        )

    @final
    def compare_answers(
        self, predict: Predictor, images: Images, labels: NDArray[np.int64]
    ) -> Reading:
        """Ask a suspect for the classes of images (n, C, H, W); return them beside the labels (n,).

        Raises:
            ConfigError: `predict` returns another type or shape.
        """
        # A suspect may be a foreign service. Its answer is checked before anything is counted: a
        # wrong shape would broadcast and match by accident.
        read = np.asarray(predict(images))
        if read.shape != (len(images),) or read.dtype.kind != "i":
            raise ConfigError(
                f"a suspect answered {len(images)} images with {read.dtype} {list(read.shape)}: "
                f"expected classes, int64 [{len(images)}], −1 where there is none"
            )
        return Reading(
            read, labels, committed=self.has_keyed_labels, choices=self.classes, unit="triggers"
        )

    def nulls(self, key: Key) -> dict[str, NullHypothesis]:  # noqa: ARG002 - overrides use it
        """Return the null hypotheses that can judge this scheme; the scheme's own is first."""
        return {SecretLabels.name: SecretLabels()}

    def query_fresh_triggers(
        self,
        predict: Predictor,  # noqa: ARG002 - overrides use both
        fresh: FreshTriggers,  # noqa: ARG002
    ) -> tuple[Reading, NullHypothesis]:
        """Ask a suspect about fresh triggers; return the reading and the null hypothesis for it.

        Raises:
            ConfigError: the scheme has committed triggers only, or the covers do not fit the key.
        """
        raise ConfigError(
            f"{self.name} makes no fresh triggers: its committed ones are all that it has"
        )

    @final
    def with_calibration(self, key: Key, siblings: Sequence[Predictor]) -> Key:
        """Return the key with the misses of unmarked models among its triggers.

        Args:
            key: with its triggers.
            siblings: unmarked models of the host's task that training never saw; without siblings
                the key is returned unchanged.
        """
        if not siblings:
            return key
        misses = np.array(
            [self.extract(each, key).mark_distance for each in siblings], dtype=np.float64
        )
        # Measurements need the finished triggers: they enter the second commitment C1 and not C0.
        return replace(key, learnt={**key.learnt, SIBLINGS: misses})

    def embedding_failure(self, evidence: Reading) -> str | None:
        """Return why verify would not find the mark in the owner's model; None if it would."""
        tail = SecretLabels().compute_log10_p(evidence)
        # Few triggers or classes cannot give the usual forgery bits. Then all triggers must match.
        enough = min(LEAST_FORGERY_BITS, evidence.bits * np.log2(evidence.choices))
        if 10**tail <= ALPHA and compute_forgery_bits(evidence) >= enough:
            return None
        return (
            f"only {evidence.match_count} of {evidence.bits} triggers get their labels "
            f"(log10 p {tail:.1f}): train longer, or raise batch_share"
        )

    @final
    def embed(  # noqa: PLR0913 - all but the model are keyword-only
        self, model: nn.Module, *, owner: str, covers: Images | Tensor,
        labels: NDArray[np.int64] | Tensor, key: str | Path | KeyPlace | None = None,
        resume: bool = False, material: KeyMaterial | None = None,
        siblings: Sequence[nn.Module | Predictor] = (),
    ) -> Embedding:  # fmt: skip
        """Start to embed a mark while a model is trained; see `embedding.TriggerEmbedding`.

        Args:
            model: the host.
            owner: the name of the owner of the mark.
            covers: images uint8 (N, C, H, W) of the host's task, from which triggers are made.
            labels: their classes (N,).
            key: where the finished key is saved when the block ends; a path, or a `KeyPlace` with a
                passphrase. The place is checked at once: an existing key is never overwritten.
                While training runs, the secret lies in a private folder beside the place.
            resume: continue with the key that an interrupted training left at that place; if there
                is no such key, start with a new one.
            material: secret and nonce, where the caller keeps them; drawn if None.
            siblings: unmarked models of the same task that training never sees, for a form that
                is judged by them.

        Raises:
            KeyFileError: the key exists, an unfinished key exists and `resume` is false, or nothing
                can be written at the place.
            ConfigError: covers and labels do not fit each other or the scheme.
        """
        # Imported here because it loads torch, which reading a mark does not need.
        start_embedding = load_object("countermark.embedding:TriggerEmbedding")
        started: Embedding = start_embedding(
            self, model, owner=owner, material=material, covers=covers, labels=labels,
            siblings=siblings, place=make_unfinished_key(key, resume=resume),
        )  # fmt: skip
        return started


@dataclass(frozen=True)
class FreshTriggers:
    """The parts of triggers that are made from covers now and that no commitment holds.

    p is exact only if whoever chose the covers did not look at the answers of the suspect.

    Attributes:
        key: determines how the triggers are made, and which class each trigger shall be taken for.
        covers: images (m, C, H, W) of the host's task.
        classes: the true classes of the covers (m,).
    """

    key: Key
    covers: Images = field(repr=False)
    classes: Labels = field(repr=False)


@dataclass(frozen=True)
class DrawnTriggerScheme(TriggerScheme):
    """A trigger scheme whose triggers are drawn at random and memorised by the host one by one."""

    batch_share: Annotated[float, Field(gt=0, le=4)] = field(default=0.25, kw_only=True)

    @property
    def training_class(self) -> str:
        """The class that trains the mark, as module:class."""
        return "countermark.schemes.drawn_triggers.training:DrawnTriggersTraining"

    @abstractmethod
    def draw_triggers(self, covers: Images, material: KeyMaterial) -> Images:
        """Draw the triggers (n, C, H, W).

        Args:
            covers: n images of the host's task, in random order.
            material: its streams give everything that is secret in the drawing.
        """


def compute_leaf(salt: bytes, image: Images) -> bytes:
    """Return the Merkle leaf of a trigger: its salt, and the digest of its image (C, H, W).

    The digest is that of a tensor with the name "trigger".
    """
    # Without the salt, anybody could test guessed images against a disclosed tree.
    return frame(salt, digest_tensor("trigger", image))


def _compute_root(triggers: Images, material: KeyMaterial) -> NDArray[np.uint8]:
    """Compute the root (32,) of the tree over triggers (n, C, H, W) and their salts."""
    salted = zip(material.draw_salts(len(triggers)), triggers, strict=True)
    return np.frombuffer(
        merkle.compute_root([compute_leaf(*each) for each in salted]), dtype=np.uint8
    )
