"""The base class of all schemes: a frozen dataclass whose fields are its whole configuration.

The three families are in `weights` (marks in named tensors), `triggers` (marks in the answers to
trigger images) and `outputs` (marks in the images that a network makes).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping
from dataclasses import MISSING, dataclass, fields
from functools import cache
from typing import Any, ClassVar, Self, cast, final, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError

from countermark._internal.plugins import load_object
from countermark.errors import ConfigError, make_printable, suggest_nearest
from countermark.keys.key import Key
from countermark.results.null_hypotheses import NullHypothesis


@dataclass(frozen=True)
class Paper:
    """The publication that a scheme or an attack comes from, as docs and listings cite it."""

    authors: str
    title: str
    venue: str
    year: int
    doi: str

    def __str__(self) -> str:
        doi = f" doi:{self.doi}" if self.doi else ""
        return f"{self.authors}: {self.title}. {self.venue} {self.year}.{doi}"


def _translate_message(part: Any) -> str:
    """Return the message of one pydantic error, with Python types named as in JSON."""
    said = str(part["msg"]).replace("a valid tuple", 'a list, such as ["a"]')
    return said.replace("a valid dictionary", "an object")


@dataclass(frozen=True)
class Configuration:
    """A frozen dataclass whose field values are checked against their types when it is made."""

    name: ClassVar[str]

    def __post_init__(self) -> None:
        # Validation also converts: JSON has lists where a field is a tuple. The dataclass is
        # frozen, so the converted value is written past its own __setattr__.
        for each, adapter in _make_adapters(cast(Hashable, type(self))).items():
            value = getattr(self, each)
            try:
                object.__setattr__(self, each, adapter.validate_python(value))
            except ValidationError as error:
                # A union field reports one error for each of its members; equal messages are said
                # once.
                what = "; ".join(dict.fromkeys(_translate_message(part) for part in error.errors()))
                range_ = _describe_range(adapter)
                raise ConfigError(
                    f"{self.name}: field {each} is {make_printable(repr(value), 200)}: {what}{range_}"
                ) from None

    @classmethod
    def from_fields(cls, values: Mapping[str, Any]) -> Self:
        """Make an instance from field values as JSON or a command line gives them.

        Raises:
            ConfigError: a field does not exist, is missing, or has a wrong value.
        """
        known = {each.name: each for each in fields(cls)}
        for name in values:
            if name not in known:
                raise ConfigError(
                    f"{cls.name} has no field {name!r}: {suggest_nearest(name, known)}"
                )
        for each in known.values():
            if each.default is MISSING and each.name not in values:
                raise ConfigError(f"{cls.name} needs {each.name!r}: give it a value")
        return cls(**values)

    def to_fields(self) -> dict[str, Any]:
        """Return all fields as JSON values; `from_fields` turns them into an equal instance."""
        return {
            each.name: list(value) if isinstance(value := getattr(self, each.name), tuple)
            else value
            for each in fields(self)
        }  # fmt: skip

    @classmethod
    def list_default_fields(cls) -> dict[str, Any]:
        """Return the default of each field by name, "(required)" for a field without default."""
        return {
            each.name: "(required)" if each.default is MISSING else each.default
            for each in fields(cls)
        }


def _describe_range(adapter: TypeAdapter[Any]) -> str:
    """Return the range of numbers that a field takes, as the end of an error message.

    The text is "" for a field that takes no number or has no two bounds.
    """
    schema = adapter.json_schema()
    # The bounds are at the top of the schema, in a member of a union, or in the items of a list.
    for each in (schema, *schema.get("anyOf", ()), schema.get("items", {})):
        low = each.get("minimum", each.get("exclusiveMinimum"))
        high = each.get("maximum", each.get("exclusiveMaximum"))
        if low is not None and high is not None:
            return f"; expected {'above ' * ('minimum' not in each)}{low:,} to {high:,}"
    return ""


@cache
def _make_adapters(cls: Hashable) -> dict[str, TypeAdapter[Any]]:
    """Return a pydantic adapter for each field of a configured dataclass, by field name."""
    hints = get_type_hints(cls, include_extras=True)
    # Infinities and NaN have no canonical JSON, so that a commitment could not contain them.
    config = ConfigDict(allow_inf_nan=False)
    names = [each.name for each in fields(cast(type[Configuration], cls))]
    return {name: TypeAdapter(hints[name], config=config) for name in names}


@dataclass(frozen=True)
class Scheme(Configuration, ABC):
    """A published method: where its mark lives, how it is read, and what a reading proves."""

    paper: ClassVar[Paper]
    family: ClassVar[str]
    threat_model: ClassVar[str]
    null: ClassVar[type[NullHypothesis]]
    null_as_published: ClassVar[type[NullHypothesis] | None] = None
    """The null of the form `as_published`, where that is another one."""
    earlier_fields: ClassVar[Mapping[str, Any]] = {}
    """Fields that keys of earlier versions do not have, with the values by which they are read."""

    @final
    @classmethod
    def from_stored_fields(cls, values: Mapping[str, Any]) -> Self:
        """Make a scheme from stored fields, which an earlier version may have written.

        Raises:
            ConfigError: as `from_fields`.
        """
        return cls.from_fields({**cls.earlier_fields, **values})

    @property
    @abstractmethod
    def reading_length(self) -> int:
        """The number of bits or triggers that a reading compares."""

    @abstractmethod
    def check_key(self, key: Key) -> None:
        """Raise `ConfigError` for a key of this scheme that this library cannot have made."""

    @property
    @abstractmethod
    def training_class(self) -> str:
        """The class that trains the mark, as module:class; importing it loads torch."""

    @final
    def load_training_class(self) -> Any:
        """Import the training class of this scheme with torch, which reading does not need."""
        return load_object(self.training_class)

    @property
    def reader_code(self) -> str | None:
        """The "module:factory" that reading runs; None where reading runs only this library."""
        return None

    @property
    def needs_siblings(self) -> bool:
        """True where a reading is judged by unmarked models that are trained beside the host."""
        return False

    @final
    @classmethod
    def describe_scheme(cls) -> dict[str, Any]:
        """Return a description of the scheme for lists and pages, as JSON values."""
        return {
            "name": cls.name,
            "paper": str(cls.paper),
            "family": cls.family,
            "threat_model": cls.threat_model,
            "null": cls.null.name,
            "null_says": cls.null.says,
            "null_as_published": (cls.null_as_published or cls.null).name,
            "fields": cls.list_default_fields(),
        }
