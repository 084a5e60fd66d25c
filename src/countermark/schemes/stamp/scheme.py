"""A mark for finished weights, embedded without data. The reading half.

A spread-spectrum mark (Cox et al. 1997): each value that is read serves one bit, by a keyed sign,

    y_t = Σ sign_i · x_i      over the values i that serve bit t; x as in `bounded_readings`

and bit t is y_t > 0. All values stand in one row, cut into runs of T values. Each run is rotated by
a keyed number of places and serves every bit once. `docs/format.md` defines the orders.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from pydantic import Field

from countermark.checkpoints import Array, Weights
from countermark.checkpoints.dtypes import decode_values
from countermark.errors import ConfigError, make_printable
from countermark.keys.key import REFERENCE, Key, KeyMaterial
from countermark.keys.messages import Bits
from countermark.results.reading import Reading
from countermark.schemes.base import Paper
from countermark.schemes.bounded_readings import Scales, compute_line_scales, compute_plain_scale
from countermark.schemes.key_limits import MOST_CODE_PLACES, MOST_RECIPIENTS, MOST_VALUES, Factor
from countermark.schemes.weights import WeightScheme

BEFORE = "before"
"""Prefix of the names of pre-commit tensors: the values that are read, before the mark."""

_AT_ONCE = 1 << 20  # values whose bits and signs are expanded at a time, in one piece


@dataclass(frozen=True)
class Stamp(WeightScheme):
    """A linear mark without training: each value that is read serves one bit.

    Attributes:
        values: how many values are read of each tensor, from a keyed place on; None for all.
        margin: the reading that each bit gets, in standard deviations without the mark.
        reading: "bounded" values, which a few units cannot outweigh (`schemes.bounded_readings`);
            or "plain", w / rms, as keys of earlier versions are read.
        strength: weight of the mark in a loss, where the mark is trained instead.
        recipients: the number of recipients who have a code word of `bits` places, in place of
            one message; 0 for a message.
        coalition: how many recipients may combine their copies; the code was made for so many.
    """

    name: ClassVar[str] = "stamp"
    earlier_fields: ClassVar[Mapping[str, Any]] = {"reading": "plain"}
    linear: ClassVar[bool] = True
    partial: ClassVar[bool] = True
    paper: ClassVar[Paper] = Paper(
        authors="I. J. Cox, J. Kilian, F. T. Leighton, T. Shamoon",
        title="Secure Spread Spectrum Watermarking for Multimedia",
        venue="IEEE Transactions on Image Processing",
        year=1997,
        doi="10.1109/83.650120",
    )

    values: Annotated[int, Field(ge=1, le=MOST_VALUES)] | None = field(default=None, kw_only=True)
    margin: Factor = field(default=5.0, kw_only=True)
    strength: Factor = field(default=0.01, kw_only=True)
    reading: Literal["bounded", "plain"] = field(default="bounded", kw_only=True)
    recipients: Annotated[int, Field(ge=0, le=MOST_RECIPIENTS)] = field(default=0, kw_only=True)
    coalition: Annotated[int, Field(ge=0, le=MOST_RECIPIENTS)] = field(default=0, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if bool(self.recipients) != bool(self.coalition) or self.coalition > self.recipients:
            raise ConfigError(
                f"stamp: recipients is {self.recipients} and coalition {self.coalition}: expected "
                "both, and no coalition of more than all; or neither"
            )
        # Tracing expands all code words; a hostile key must not make that arbitrarily large.
        if self.recipients * self.bits > MOST_CODE_PLACES:
            raise ConfigError(
                f"stamp: code words of {self.bits:,} bits for {self.recipients:,} recipients have "
                f"{self.recipients * self.bits:,} places: expected at most {MOST_CODE_PLACES:,}; "
                "make several keys"
            )

    def extract(self, weights: Mapping[str, Array], key: Key) -> Reading:
        """Read T bits from whole tensors, or from the parts that `read_suspect_tensors` returns.

        Raises:
            ConfigError: the key belongs to recipients, or a tensor has another shape than in the
                key.
        """
        if self.recipients:
            raise ConfigError(
                "this key tells recipients apart and carries no message: use recipient trace"
            )
        y = self.compute_scores(weights, key)
        read = (y > 0).astype(np.uint8)
        return Reading(read, key.message, payload=key.check_payload(read), scores=y)

    def compute_scores(self, weights: Mapping[str, Array], key: Key) -> NDArray[np.float64]:
        """Return the readings y / √n (T,), n values a bit; standard normal without the mark."""
        carriers, places = CarrierStream(key), self.draw_places(key.tensors, key.material)
        y, served = np.zeros(self.bits), np.zeros(self.bits, dtype=np.int64)
        for name, shape in key.tensors.items():
            if name not in weights:
                # A missing tensor adds nothing to the sums, but its values keep their places in
                # the row: otherwise all later values would serve other bits.
                carriers.skip_values(len(places[name]))
                continue
            part = select_part(weights[name], shape, places[name], name)
            scales = self.compute_scales(part, shape, places[name].start)
            # In pieces, so that memory does not grow with the tensor.
            for start in range(0, len(part), _AT_ONCE):
                values = scales.read(part, start, start + _AT_ONCE)
                bits, signs = carriers.take_carriers(len(values))
                y += np.bincount(bits, weights=signs * values, minlength=self.bits)
                served += np.bincount(bits, minlength=self.bits)
        return y / np.sqrt(np.maximum(1, served))

    def compute_scales(self, part: Array, shape: tuple[int, ...], start: int) -> Scales:
        """Compute the scales in which consecutive values of a tensor are read.

        Args:
            part: (n,) the values.
            shape: of the whole tensor.
            start: place of the first value in the tensor.
        """
        return (
            compute_line_scales(part, shape, start)
            if self.reading == "bounded"
            else compute_plain_scale(part)
        )

    def read_bits(self, weights: Mapping[str, Array], key: Key) -> Bits:
        """Return the signs of the scores as bits (T,)."""
        return (self.compute_scores(weights, key) > 0).astype(np.uint8)

    def read_suspect_tensors(
        self, weights: Weights, where: Mapping[str, str], key: Key
    ) -> dict[str, Array]:
        """Read the parts (n,) of the tensors that the key uses, and nothing else of the file."""
        places = self.draw_places(key.tensors, key.material)
        return {
            wanted: weights.read_part(name, places[wanted].start, len(places[wanted]))
            for wanted, name in where.items()
        }

    @property
    def training_class(self) -> str:
        """The class that trains the mark, as module:class."""
        return "countermark.schemes.stamp.training:StampTraining"

    def capacity(self, tensors: Mapping[str, tuple[int, ...]], selected: int | None) -> int:  # noqa: ARG002
        """Return one bit for each value that is read."""
        return sum(map(self.count_read_values, tensors.values()))

    def count_selected_values(self, key: Key) -> int | None:
        """Return None, because no mask selects values, and check the original values in the key.

        Raises:
            ConfigError: the key keeps original values of a tensor that it does not read, or not one
                for each value that is read.
        """
        for name, before in key.frozen.items():
            if name == REFERENCE:
                continue
            shape = key.tensors.get(name.removeprefix(f"{BEFORE}."))
            if shape is None or before.shape != (self.count_read_values(shape),):
                raise ConfigError(
                    f"the key's {make_printable(name, 200)} has shape {before.shape}: expected one "
                    "value for each that is read of a tensor"
                )
        return None

    def get_original_values(self, key: Key) -> dict[str, tuple[int, Array]]:
        """Return the original values where the key keeps them; uint16 is decoded as bfloat16."""
        places, found = self.draw_places(key.tensors, key.material), {}
        for name, place in places.items():
            if (kept := key.frozen.get(f"{BEFORE}.{name}")) is not None:
                # numpy has no bfloat16, so that a key stores the two bytes of each value as uint16.
                wide = decode_values(kept.tobytes(), "BF16") if kept.dtype == np.uint16 else kept
                found[name] = (place.start, wide)
        return found

    def count_read_values(self, shape: tuple[int, ...]) -> int:
        """Return how many values are read of a tensor of this shape."""
        return min(prod(shape), self.values or prod(shape))

    def draw_places(
        self, tensors: Mapping[str, tuple[int, ...]], material: KeyMaterial
    ) -> dict[str, range]:
        """Return which values are read of each tensor, as a range of places in C order."""
        # Drawn before the commitment exists, because the original values enter the commitment.
        drawn = material.make_stream("places").take_words(len(tensors))
        found = {}
        for (name, shape), word in zip(tensors.items(), drawn, strict=True):
            count = self.count_read_values(shape)
            start = int(word) % (prod(shape) - count + 1)
            found[name] = range(start, start + count)
        return found


class CarrierStream:
    """The bits that a key's values serve, and their signs, in order from the first value."""

    def __init__(self, key: Key) -> None:
        self._signs, self._turns = key.make_stream("signs"), key.make_stream("turns")
        self._turned = sliding_window_view(np.arange(2 * key.bits) % key.bits, key.bits)
        self._bits_of_message = key.bits
        self._bits: NDArray[np.int64] = np.zeros(0, dtype=np.int64)
        self._drawn: NDArray[np.int8] = np.zeros(0, dtype=np.int8)

    def take_carriers(self, count: int) -> tuple[NDArray[np.int64], NDArray[np.int8]]:
        """Return bits (count,), 0 to T − 1, and signs (count,), ±1, of the next values."""
        while len(self._bits) < count:
            self._expand_runs(count - len(self._bits))
        bits, self._bits = self._bits[:count], self._bits[count:]
        signs, self._drawn = self._drawn[:count], self._drawn[count:]
        return bits, signs

    def skip_values(self, count: int) -> None:
        """Skip values, in a time that does not depend on their number.

        A key is hostile input and may name tensors of any size that a suspect does not have.
        """
        T = self._bits_of_message
        drawn = min(count, len(self._bits))
        self._bits, self._drawn = self._bits[drawn:], self._drawn[drawn:]
        # Whole runs use a known number of bytes of each stream: a word of 8 bytes, and a row of
        # signs.
        runs, rest = divmod(count - drawn, T)
        self._turns.skip(8 * runs)
        self._signs.skip(-(-T // 8) * runs)
        self.take_carriers(rest)

    def _expand_runs(self, count: int) -> None:
        """Expand more runs; each has its own rotation, and its signs start on a new byte."""
        T = self._bits_of_message
        # At least one run, even where T is larger than a piece.
        runs = max(1, min(_AT_ONCE, count + T - 1) // T)
        turns = (self._turns.take_words(runs) % np.uint64(T)).astype(np.int64)
        bits = self._turned[turns]  # (runs, T)
        signs = 2 * self._signs.take_bit_rows(runs, T).astype(np.int8) - 1  # (runs, T)
        self._bits = np.concatenate([self._bits, bits.reshape(-1)])
        self._drawn = np.concatenate([self._drawn, signs.reshape(-1)])


def select_part(values: Array, shape: tuple[int, ...], place: range, name: str) -> Array:
    """Return the values (n,) that are read of a tensor, given as a whole or as that part already.

    Raises:
        ConfigError: the values have neither shape.
    """
    if values.shape == shape:
        part: Array = values.reshape(-1)[place.start : place.stop]
        return part
    if values.shape != (len(place),):
        raise ConfigError(f"{name} has shape {values.shape}, the key reads {shape}")
    return values
