"""The schemes by name. A new scheme is its reading file, its training file and one line here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from countermark.errors import ConfigError, named, printable
from countermark.key import Key
from countermark.schemes.adi import Adi
from countermark.schemes.base import Scheme
from countermark.schemes.black_box import TriggerScheme
from countermark.schemes.box_free import OutputScheme
from countermark.schemes.deep_watermarking import DeepWatermarking
from countermark.schemes.deepstego import DeepStego
from countermark.schemes.guo import Guo
from countermark.schemes.hash_filter import HashFilter
from countermark.schemes.independent_network import IndependentNetwork
from countermark.schemes.stamp import Stamp
from countermark.schemes.uchida import Uchida
from countermark.schemes.white_box import WeightScheme
from countermark.schemes.zhang import Zhang

SCHEMES: Mapping[str, type[Scheme]] = {
    Uchida.name: Uchida,
    HashFilter.name: HashFilter,
    IndependentNetwork.name: IndependentNetwork,
    Stamp.name: Stamp,
    DeepStego.name: DeepStego,
    DeepWatermarking.name: DeepWatermarking,
    Adi.name: Adi,
    Zhang.name: Zhang,
    Guo.name: Guo,
}


def scheme_named(name: str) -> type[Scheme]:
    """The scheme class of that name.

    Raises:
        ConfigError: there is none; names the nearest.
    """
    return named("scheme", name, SCHEMES)


def scheme_from(name: str, fields: Mapping[str, Any]) -> Scheme:
    """The scheme of that name, with the fields of a key.

    Raises:
        ConfigError: there is none, or the fields are not exactly those that it writes.
    """
    kind = scheme_named(name)
    scheme = kind.from_stored(fields)
    known = {**kind.earlier_fields, **fields}
    for field, value in scheme.to_fields().items():
        if field not in known or known[field] != value:
            raise ConfigError(
                f"the key's field {field!r} is {fields.get(field, 'missing')!r}, where "
                f"{scheme.name} writes {value!r}: this library never made such a key"
            )
    return scheme


def scheme_of(key: Key) -> Scheme:
    """The scheme that a key belongs to, with the key's fields.

    Raises:
        ConfigError: the key's fields are not exactly those of its scheme, or its bits do not fit
            what it reads: no such key was ever made. Or it reads with code that nobody trusted.
    """
    scheme = scheme_from(key.scheme, key.fields)
    if scheme.code not in (None, key.trusted):
        raise ConfigError(
            f"this key reads with code of its own, {printable(scheme.code, 200)}: if you trust it, "
            "name it with --reader or Key.trusting"
        )
    scheme.check_key(key)
    return scheme


def weight_scheme_of(key: Key) -> WeightScheme:
    """The scheme of a key that reads weights.

    Raises:
        ConfigError: as `scheme_of`, or the key reads something else.
    """
    return as_weight_scheme(scheme_of(key))


def as_weight_scheme(scheme: Scheme) -> WeightScheme:
    """The same scheme, as one that reads weights.

    Raises:
        ConfigError: it reads something else.
    """
    if not isinstance(scheme, WeightScheme):
        raise ConfigError(f"{scheme.name} reads {scheme.family}: expected a key that reads weights")
    return scheme


def as_output_scheme(scheme: Scheme) -> OutputScheme:
    """The same scheme, as one of outputs.

    Raises:
        ConfigError: it reads something else.
    """
    if not isinstance(scheme, OutputScheme):
        raise ConfigError(f"{scheme.name} reads {scheme.family}: expected a key of outputs")
    return scheme


def as_trigger_scheme(scheme: Scheme) -> TriggerScheme:
    """The same scheme, as one of triggers.

    Raises:
        ConfigError: it reads something else.
    """
    if not isinstance(scheme, TriggerScheme):
        raise ConfigError(f"{scheme.name} reads {scheme.family}: expected a key of triggers")
    return scheme
