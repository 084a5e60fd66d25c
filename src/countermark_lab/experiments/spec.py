"""Base classes of specifications: unknown fields are refused, and a cell is named by its hash."""

from __future__ import annotations

import hashlib
from typing import Annotated, Any, ClassVar

import rfc8785
from pydantic import (
    BaseModel,
    ConfigDict,
    SerializerFunctionWrapHandler,
    StringConstraints,
    model_serializer,
)

Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9_]+(/[a-z0-9_]+)*$")]
"""The name of an experiment, and of the folder of its results."""


class SpecModel(BaseModel):
    """A part of a specification.

    `since` names fields that were added after cells had been computed. An unset field of
    `since` is left out of the serialised form, so that a new version of the library does not rename
    old cells.
    """

    # A misspelt field of an experiment file must not be ignored silently.
    model_config = ConfigDict(extra="forbid", frozen=True)
    since: ClassVar[frozenset[str]] = frozenset()

    @model_serializer(mode="wrap")
    def _omit_unset_fields(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Serialise all fields except unset fields of `since`."""
        return {n: v for n, v in handler(self).items() if v or n not in self.since}


class CellSpec(SpecModel):
    """Specification of a cell; every field that changes a figure also changes its name."""

    experiment: str
    track: str
    seed: int

    @property
    def digest(self) -> str:
        """The cell's name: 16 hexadecimal digits of the SHA-256 of its specification."""
        # RFC 8785 is canonical JSON: the hash does not depend on the order of fields.
        return hashlib.sha256(rfc8785.dumps(self.model_dump(mode="json"))).hexdigest()[:16]
