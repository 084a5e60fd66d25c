"""What all parts of a specification share: no unknown fields, and a form that keeps its hash."""

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
"""Of an experiment, and of the folder of its results."""


class Strict(BaseModel):
    """A part of a specification.

    A field of `since`, added after cells had been computed, is left out where it is not set: what
    a cell is called must not change with the library.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    since: ClassVar[frozenset[str]] = frozenset()

    @model_serializer(mode="wrap")
    def _without_unset(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {n: v for n, v in handler(self).items() if v or n not in self.since}


class Addressed(Strict):
    """A cell: whatever changes a figure changes its name."""

    experiment: str
    track: str
    seed: int

    @property
    def digest(self) -> str:
        """The cell's name: a hash of its specification."""
        return hashlib.sha256(rfc8785.dumps(self.model_dump(mode="json"))).hexdigest()[:16]
