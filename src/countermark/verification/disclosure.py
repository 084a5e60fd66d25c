"""Disclosed triggers: a third party checks them against the commitment, without the key.

The disclosure of trigger i shows its salt, its image and its path to the root of the key's tree. Of
everything else in C0 it shows digests only. Its holder verifies that image and salt were committed
to at place i, and draws the label again. Undisclosed triggers stay hidden behind their salts.
`docs/format.md` describes the file.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, ClassVar, Final, Literal, Self

import numpy as np
import rfc8785
from pydantic import Field, model_validator

from countermark._internal import files, merkle
from countermark._internal.files import Hex32, StoredDocument
from countermark._internal.output_paths import write_new_file
from countermark.errors import ConfigError, KeyFileError, make_printable
from countermark.keys.key import (
    OPENINGS,
    Key,
    compute_c0,
    compute_c1,
    digest_tensor,
    digest_tensors,
)
from countermark.keys.messages import draw_trigger_labels
from countermark.keys.storage import Hex16, Size
from countermark.predictors.base import Images, Predictor
from countermark.results.reading import Disclosure, Reading
from countermark.schemes import load_scheme, make_scheme, require_trigger_scheme
from countermark.schemes.triggers import TriggerScheme, compute_leaf

TYPE: Final = "countermark/openings/v1"
_LARGEST = 64 << 20  # bytes of a file
# A tree of 2¹⁶ leaves has paths of 16 digests.
_MOST, _DEEPEST = 1 << 16, 16  # triggers of a key, and digests of a path in their tree


@dataclass(frozen=True)
class CheckedTrigger:
    """A disclosed trigger that was checked against the commitment.

    Attributes:
        index: its place among the key's triggers, from 0.
        image: uint8 (C, H, W).
        label: the class that salt and commitment drew for it.
    """

    index: int
    image: Images = field(repr=False)
    label: int


class CommitmentContext(StoredDocument):
    """The part of C0 that is no secret, as a stored document (`Key.commitment_context`)."""

    scheme: str
    fields: dict[str, Any]
    tensors: tuple[tuple[str, tuple[Size, ...]], ...]
    test_key: bool


class DisclosedTrigger(StoredDocument):
    """One disclosed trigger as the file stores it, not yet checked.

    Attributes:
        index: its place among the key's triggers, from 0.
        salt: 32 bytes, in hexadecimal.
        image: the bytes of uint8 (C, H, W) in C order, in base64.
        path: digests from its leaf to the root, lowest first, in hexadecimal.
    """

    index: Annotated[int, Field(ge=0, lt=_MOST)]
    salt: Hex32
    image: str
    path: Annotated[tuple[Hex32, ...], Field(max_length=_DEEPEST)]

    def decode_pixels(self, shape: tuple[int, int, int]) -> Images:
        """Decode the image, uint8 (C, H, W).

        Raises:
            KeyFileError: the image is no canonical base64, or of another size.
        """
        try:
            content = base64.b64decode(self.image, validate=True)
        except ValueError:
            # Fails in the comparison below, with the message for every damaged image.
            content = b""
        # Base64 has several spellings of some bytes. Only the canonical one is accepted, so that
        # one disclosure has one digest.
        if base64.b64encode(content).decode() != self.image or len(content) != math.prod(shape):
            raise KeyFileError(
                f"the image of trigger {self.index} is not {list(shape)} bytes in base64: "
                "ask the owner for another copy of the file"
            )
        return np.frombuffer(content, dtype=np.uint8).reshape(shape)


class TriggerDisclosure(StoredDocument):
    """Some of a key's triggers, disclosed, with everything that is needed to check them.

    Attributes:
        context: scheme, fields, tensors and test flag of the key.
        owner: name of the key's owner.
        nonce: nonce of the key.
        secret_sha256: SHA-256 of the key's secret.
        root: root of the tree of the key's triggers; like all digests here in hexadecimal.
        frozen: digests of the key's other frozen tensors, in the order of their names.
        learnt: digests of the key's learnt tensors, in the order of their names; empty for every
            scheme there is today.
        shape: of each image, (C, H, W).
        opened: the disclosed triggers, in ascending order.
    """

    type: Literal["countermark/openings/v1"]
    context: CommitmentContext
    owner: str
    nonce: Hex16
    secret_sha256: Hex32
    root: Hex32
    frozen: tuple[Hex32, ...]
    learnt: tuple[Hex32, ...]
    shape: tuple[Size, Size, Size]
    opened: Annotated[
        tuple[DisclosedTrigger, ...], Field(min_length=1, max_length=_MOST, repr=False)
    ]

    # A disclosure does not say how the marked model is built.
    model: ClassVar[str | None] = None
    model_arguments: ClassVar[Mapping[str, Any]] = {}

    @model_validator(mode="after")
    def _check_order(self) -> Self:
        """Refuse triggers that are out of order or repeated, and salts that are shared."""
        indices = [each.index for each in self.opened]
        if any(above <= below for below, above in itertools.pairwise(indices)):
            raise ValueError("expected the triggers in ascending order, none of them twice")
        # p assumes labels that were drawn independently. Equal salts draw equal labels, which would
        # count one lucky hit many times.
        if len({each.salt for each in self.opened}) < len(self.opened):
            raise ValueError("two triggers have one salt, hence one label: expected one of its own")
        return self

    @property
    def scheme(self) -> str:
        """Name of the key's scheme."""
        return self.context.scheme

    @property
    def fields(self) -> Mapping[str, Any]:
        """All fields of the scheme, as JSON values."""
        return self.context.fields

    @property
    def test_key(self) -> bool:
        """True if the key's secret was derived from a number and proves nothing."""
        return self.context.test_key

    @cached_property
    def c0(self) -> bytes:
        """C0 of the key (32 bytes), computed from the values in this file.

        Raises:
            ConfigError: a field has no canonical JSON (RFC 8785).
        """
        # The key stores the root as a frozen tensor under the name `OPENINGS`, whose digest comes
        # first in C0.
        root = np.frombuffer(bytes.fromhex(self.root), dtype=np.uint8)
        return compute_c0(
            self.context.model_dump(),
            [digest_tensor(OPENINGS, root), *map(bytes.fromhex, self.frozen)],
            secret=bytes.fromhex(self.secret_sha256),
            owner=self.owner,
            nonce=bytes.fromhex(self.nonce),
        )

    @property
    def commitment(self) -> str:
        """The key's commitment in hexadecimal: C1 if something was learnt, else C0."""
        learnt = [bytes.fromhex(each) for each in self.learnt]
        return (compute_c1(self.c0, learnt) if learnt else self.c0).hex()

    @cached_property
    def trigger_scheme(self) -> TriggerScheme:
        """The key's scheme, with its fields.

        Raises:
            ConfigError: there is no such scheme, its fields are others, or it has no triggers.
        """
        return require_trigger_scheme(make_scheme(self.scheme, self.fields))

    def check(self, commitment: str | None = None) -> list[CheckedTrigger]:
        """Check that all disclosed triggers were committed to, and return them with their labels.

        Args:
            commitment: the key's published commitment, in hexadecimal; None if the caller compares
                it with the property `commitment` instead.

        Raises:
            KeyFileError: the commitment is another one, or a trigger does not belong to it.
            ConfigError: the file has a scheme and fields that this library never wrote.
        """
        scheme = self.trigger_scheme
        if commitment is not None and commitment.lower() != self.commitment:
            raise KeyFileError(
                f"these triggers belong to the commitment {self.commitment}, not to "
                f"{make_printable(commitment, 80)}: ask the owner for those of the one you know"
            )
        images = [each.decode_pixels(self.shape) for each in self.opened]
        for shown, image in zip(self.opened, images, strict=True):
            self._require_inclusion(shown, image, scheme.triggers)
        salts = [bytes.fromhex(each.salt) for each in self.opened]
        # The file holds no labels. They follow from salts and commitment, so nobody can choose
        # them.
        drawn = draw_trigger_labels(salts, self.c0, scheme.classes).tolist()
        return [
            CheckedTrigger(shown.index, image, label)
            for shown, image, label in zip(self.opened, images, drawn, strict=True)
        ]

    def _require_inclusion(self, shown: DisclosedTrigger, image: Images, size: int) -> None:
        """Raise `KeyFileError` unless a trigger's path leads to the root."""
        made = compute_leaf(bytes.fromhex(shown.salt), image)
        if not merkle.is_under(self.root, made, shown.index, size, shown.path):
            raise KeyFileError(
                f"trigger {shown.index} of {size} is not what was committed to: its image, salt, "
                "place or path was changed, so it can prove nothing"
            )

    def extract(self, predict: Predictor, *, blind_choice: bool = False) -> Reading:
        """Ask a suspect about the disclosed triggers, and about no others.

        Undisclosed triggers count as misses. Whoever knows the labels could disclose only the
        triggers that any model happens to answer correctly; with all others as misses, such a
        choice gains nothing.

        Args:
            predict: the suspect.
            blind_choice: the person who chose the triggers did not know their labels, so that the
                evidence may be about the disclosed triggers alone.

        Raises:
            KeyFileError, ConfigError: as in `check`; or `predict` answers in another form.
        """
        # Checked first: a suspect must not be asked about forged triggers.
        opened, scheme = self.check(), self.trigger_scheme
        images = np.stack([each.image for each in opened])
        evidence = scheme.compare_answers(
            predict, images, np.array([each.label for each in opened])
        )
        evidence = replace(
            evidence, disclosure=Disclosure(len(opened), scheme.triggers, blind_choice)
        )
        if blind_choice:
            return evidence
        hidden = scheme.triggers - len(opened)
        return replace(
            evidence,
            # No class is −1, so these never agree with the expected labels.
            read=np.pad(evidence.read, (0, hidden), constant_values=-1),
            expected=np.pad(evidence.expected, (0, hidden)),
        )

    def to_bytes(self) -> bytes:
        """Return the content of the file: canonical JSON (RFC 8785) and a line end."""
        return rfc8785.dumps(self.model_dump(mode="json")) + b"\n"

    def save(self, path: str | Path) -> None:
        """Write the disclosure to a new file, whole or not at all; refuse a name that is taken.

        Raises:
            ConfigError: the name is taken (the existing file is left untouched), or the file would
                be too large to be read again.
        """
        content = self.to_bytes()
        if len(content) > _LARGEST:
            raise ConfigError(
                f"{len(self.opened)} triggers are {len(content):,} bytes, an opening has at most "
                f"{_LARGEST:,}: open them in several files"
            )
        write_new_file(path, content)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a file that anybody may have written; call `check` to find out whether it is true.

        Raises:
            KeyFileError: the file is missing, too large, no disclosure or of another version, or a
                field is unknown, missing or wrong; the message says which.
        """
        try:
            return files.parse_document(cls, files.read_regular(Path(path), _LARGEST))
        except ValueError as error:
            raise KeyFileError(
                f"{path}: {make_printable(str(error), 200)}; expected a file of type {TYPE} "
                "as `countermark key open` writes it"
            ) from None


def disclose_triggers(key: Key, indices: Sequence[int] | None) -> TriggerDisclosure:
    """Disclose some of a key's triggers for a third party.

    Whoever sees a trigger can train a model to answer it differently.

    Args:
        key: a key of triggers.
        indices: places of the triggers to disclose, from 0, in any order; None for all triggers.

    Raises:
        ConfigError: the key has no triggers or is damaged, or `indices` is empty, unknown or
            repeated.
    """
    scheme = require_trigger_scheme(load_scheme(key))
    # As published, labels follow from the covers: whoever picks triggers knows them in advance.
    if not scheme.has_keyed_labels:
        raise ConfigError(
            f"the labels of this key of {scheme.name} are no random output, so that opening some "
            "would prove nothing: expected a key of the default form"
        )
    chosen = _sort_indices(range(scheme.triggers) if indices is None else indices, scheme.triggers)
    triggers, salts = scheme.read_committed_triggers(key), key.material.draw_salts(scheme.triggers)
    leaves = [compute_leaf(salt, image) for salt, image in zip(salts, triggers, strict=True)]
    # The root is stored in the clear as `root`, all other frozen tensors as digests.
    others = {name: each for name, each in key.frozen.items() if name != OPENINGS}
    shown = [
        DisclosedTrigger(
            index=index,
            salt=salts[index].hex(),
            image=base64.b64encode(triggers[index].tobytes()).decode(),
            path=tuple(each.hex() for each in path),
        )
        for index, path in zip(chosen, merkle.prove_inclusions(leaves, chosen), strict=True)
    ]
    return TriggerDisclosure(
        type=TYPE,
        # Through JSON, because strict validation takes a JSON array for a tuple but no Python list.
        context=CommitmentContext.model_validate_json(rfc8785.dumps(key.commitment_context)),
        owner=key.owner,
        nonce=key.material.nonce.hex(),
        secret_sha256=hashlib.sha256(key.material.secret).hexdigest(),
        root=key.frozen[OPENINGS].tobytes().hex(),
        frozen=tuple(each.hex() for each in digest_tensors(others)),
        learnt=tuple(each.hex() for each in digest_tensors(key.learnt)),
        shape=triggers.shape[1:],
        opened=tuple(shown),
    )


def _sort_indices(indices: Sequence[int], size: int) -> list[int]:
    """Return the indices in ascending order.

    Raises:
        ConfigError: there is no index, or one is out of range or repeated.
    """
    chosen = sorted(set(indices))
    if not chosen or len(chosen) < len(indices) or chosen[0] < 0 or chosen[-1] >= size:
        raise ConfigError(
            f"the triggers to open are {make_printable(str(list(indices)), 200)}: expected some of 0 to "
            f"{size - 1}, each once"
        )
    return chosen
