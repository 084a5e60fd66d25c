"""What all parts of a specification share: no unknown fields, and a form that keeps its hash."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, SerializerFunctionWrapHandler, model_serializer


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
