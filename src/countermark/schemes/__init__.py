"""The registry: scheme classes by name, and the scheme of a key.

To add a scheme, write its reading file and its training file, and add one line to `SCHEMES`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from countermark.errors import ConfigError, find_by_name, make_printable
from countermark.keys.key import Key
from countermark.schemes.base import Scheme
from countermark.schemes.deep_watermarking.scheme import DeepWatermarking
from countermark.schemes.deepstego.scheme import DeepStego
from countermark.schemes.drawn_triggers.adi import Adi
from countermark.schemes.drawn_triggers.guo import Guo
from countermark.schemes.drawn_triggers.zhang import Zhang
from countermark.schemes.hash_filter.scheme import HashFilter
from countermark.schemes.independent_network.scheme import IndependentNetwork
from countermark.schemes.outputs import OutputScheme
from countermark.schemes.stamp.scheme import Stamp
from countermark.schemes.triggers import TriggerScheme
from countermark.schemes.uchida.scheme import Uchida
from countermark.schemes.weights import WeightScheme

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


def find_scheme_class(name: str) -> type[Scheme]:
    """Return the scheme class with this name.

    Raises:
        ConfigError: no scheme has this name; the message suggests the nearest name.
    """
    return find_by_name("scheme", name, SCHEMES)


def make_scheme(name: str, fields: Mapping[str, Any]) -> Scheme:
    """Make the scheme with this name from the stored fields of a key.

    Raises:
        ConfigError: no scheme has this name, or the fields are not exactly those that the scheme
            writes.
    """
    kind = find_scheme_class(name)
    scheme = kind.from_stored_fields(fields)
    # A key is hostile input. Fields that parse but differ from what the scheme writes (other number
    # types, left-out defaults) would give one scheme two commitments.
    known = {**kind.earlier_fields, **fields}
    for field, value in scheme.to_fields().items():
        if field not in known or known[field] != value:
            raise ConfigError(
                f"the key's field {field!r} is {fields.get(field, 'missing')!r}, where "
                f"{scheme.name} writes {value!r}: this library never made such a key"
            )
    return scheme


def load_scheme(key: Key) -> Scheme:
    """Return the scheme of a key, made from the fields of the key.

    Raises:
        ConfigError: the fields are not exactly those of the scheme, the bits do not fit the
            tensors that are read, or reading the key runs code that the caller did not trust.
    """
    scheme = make_scheme(key.scheme, key.fields)
    # Reading such a key imports a module that the key names. Only the caller may allow that, and
    # only for exactly this name.
    if scheme.reader_code not in (None, key.trusted):
        raise ConfigError(
            f"this key reads with code of its own, {make_printable(scheme.reader_code, 200)}: "
            "if you trust it, name it with --reader or Key.with_trusted_code"
        )
    scheme.check_key(key)
    return scheme


def load_weight_scheme(key: Key) -> WeightScheme:
    """Return the scheme of a key that reads weights.

    Raises:
        ConfigError: as `load_scheme`, or the key belongs to another family.
    """
    return require_weight_scheme(load_scheme(key))


def require_weight_scheme(scheme: Scheme) -> WeightScheme:
    """Return the scheme unchanged, typed as a scheme that reads weights.

    Raises:
        ConfigError: the scheme belongs to another family.
    """
    if not isinstance(scheme, WeightScheme):
        raise ConfigError(f"{scheme.name} reads {scheme.family}: expected a key that reads weights")
    return scheme


def require_output_scheme(scheme: Scheme) -> OutputScheme:
    """Return the scheme unchanged, typed as a scheme that reads outputs.

    Raises:
        ConfigError: the scheme belongs to another family.
    """
    if not isinstance(scheme, OutputScheme):
        raise ConfigError(f"{scheme.name} reads {scheme.family}: expected a key of outputs")
    return scheme


def require_trigger_scheme(scheme: Scheme) -> TriggerScheme:
    """Return the scheme unchanged, typed as a scheme that reads answers to triggers.

    Raises:
        ConfigError: the scheme belongs to another family.
    """
    if not isinstance(scheme, TriggerScheme):
        raise ConfigError(f"{scheme.name} reads {scheme.family}: expected a key of triggers")
    return scheme
