"""Units: what of a network can be reordered, rescaled or flipped without any change of its outputs.

A class of units is a set of channels or neurons that several tensors share an axis for: those that
produce them, norms between, those that consume them. A scale domain is a stretch of such a class
within which a factor for each unit can be moved from its producers to its consumers.

`tracing` finds them in a live model (torch); `chain` and, for transformers, `blocks` guess them
from names and shapes (numpy), with what a configuration says of heads (`architecture`).
"""

from __future__ import annotations

from countermark.units.architecture import Architecture
from countermark.units.base import Domain, Member, Norm, Units
from countermark.units.blocks import Block, Layer, block_layers, blocks_of
from countermark.units.chain import chain_of

__all__ = [
    "Architecture", "Block", "Domain", "Layer", "Member", "Norm", "Units", "block_layers",
    "blocks_of", "chain_of",
]  # fmt: skip
