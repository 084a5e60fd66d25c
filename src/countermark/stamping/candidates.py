"""Which tensors of a checkpoint can carry a mark, and which of these should."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from math import prod

from countermark.checkpoints import Weights, find_coded_tensors
from countermark.checkpoints.dtypes import FLOATS
from countermark.errors import ConfigError
from countermark.schemes.stamp.scheme import Stamp

LEAST_VALUES = 1 << 12  # smallest tensor to mark: a mark shall lie in many rows
_MOST_NAMES = 4  # of tensors that a sentence names

# The embedding of T5 is called shared; a shared expert is a layer as others are.
_REPLACED = re.compile(
    r"embed|wte|wpe|lm_head|(?<![a-z_])shared(?!_expert)|classifier|position", re.IGNORECASE
)
"""Names of tensors whose rows are replaced most easily: embeddings and output layers."""

_COMPUTED = re.compile(
    r"""(?:^|[._])(?:
        inv_freq | freqs(?:_cis|_cos|_sin)? | (?:cos|sin)(?:_cached|_cache)? | rope | rotary_emb
        | alibi(?:_\w+)? | (?:attn|attention|causal|relative|padding)_mask | masked_bias | tril | triu
        | att(?:n|ention)\.bias | \w*(?:position|pos)_ids | \w*position_index | \w*coords_table
        | i?stft | (?:forward|inverse|dft|stft|mel|fourier)_?basis\w* | mel_?(?:filters?|fb|scale|w)
        | melw | \w*mel_?filter\w* | \w*filter_?bank\w* | fbank | dct_mat | hann\w* | window
        | pe | anchors | anchor_grid
    )(?=$|\.)""",
    re.IGNORECASE | re.VERBOSE,
)
"""Names of tensors that programs compute anew, such as rotary tables, masks and Fourier bases."""


@dataclass(frozen=True)
class Candidates:
    """The tensors of a checkpoint, sorted by whether they can carry a mark.

    Attributes:
        floats: shapes of all floating-point tensors, by name.
        shapes: the same without scales of codes and without tensors that programs compute anew.
        codes: names of the large weights that are stored as codes, which no mark can be put into.
    """

    floats: Mapping[str, tuple[int, ...]]
    shapes: Mapping[str, tuple[int, ...]]
    codes: tuple[str, ...]

    @classmethod
    def from_weights(cls, weights: Weights) -> Candidates:
        """Sort the tensors of an open checkpoint."""
        coded = find_coded_tensors(weights)
        parts = {part for each in coded.values() for part in each.parts}
        floats = {n: each.shape for n, each in weights.tensors.items() if each.dtype in FLOATS}
        # Codes of unknown formats too. Positions are 64-bit integers, and masks are booleans.
        unknown = (
            name for name, info in weights.tensors.items()
            if info.dtype not in (*FLOATS, "I64", "BOOL") and name not in parts
            and prod(info.shape) >= LEAST_VALUES and not _COMPUTED.search(name)
        )  # fmt: skip
        shapes = {
            name: shape for name, shape in floats.items()
            if name not in parts and not _COMPUTED.search(name)
        }  # fmt: skip
        return cls(floats, shapes, (*coded, *unknown))

    def choose_tensors(self, layer: list[str] | str | None) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the named tensors, or of large matrices, embeddings and heads last.

        Raises:
            ConfigError: no floating-point tensor of two dimensions or more is left, or a named
                tensor does not exist.
        """
        if layer is not None:
            given = layer if isinstance(layer, str) else tuple(layer)
            # A tensor that the caller names is taken, whatever it holds.
            return Stamp(layer=given).choose_tensors(self.shapes if layer == "all" else self.floats)
        matrices = {name: shape for name, shape in self.shapes.items() if len(shape) > 1}
        large = {name: shape for name, shape in matrices.items() if prod(shape) >= LEAST_VALUES}
        inner = {name: shape for name, shape in large.items() if not _REPLACED.search(name)}
        # Small models may consist of small tensors or embeddings only: take these then.
        if found := inner or large or matrices:
            return found
        why = f": {_count_codes(self.codes)} stored as codes (quantised)" if self.codes else ""
        raise ConfigError(
            f"the checkpoint has no floating tensor of two dimensions or more{why}: nothing can "
            "carry a mark; stamp a checkpoint whose weights are floats, or name a tensor"
        )

    def describe_weak_place(self, tensors: Collection[str]) -> str:
        """Say that only embeddings and heads carry the mark, because layers are codes; or ""."""
        if not self.codes or not all(map(_REPLACED.search, tensors)):
            return ""
        return (
            f"Only embeddings or output heads can carry the mark here ({_list_names(tensors)}), "
            f"because {_count_codes(self.codes)} stored as codes (quantised): "
            f"{_list_names(self.codes)}. Embeddings and heads are replaced most easily: stamp the "
            "checkpoint from before it was quantised, if you have it."
        )


def _count_codes(codes: Collection[str]) -> str:
    """Return the count of weights with its verb."""
    return f"{len(codes)} weights are" if len(codes) > 1 else "1 weight is"


def _list_names(names: Collection[str]) -> str:
    """Return the first names of a list as a text."""
    shown = list(names)[:_MOST_NAMES]
    return ", ".join(shown) + (", …" if len(names) > len(shown) else "")
