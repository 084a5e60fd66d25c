"""Find the symmetries of a network: reorderings and rescalings of units that keep all outputs.

A unit is a channel or neuron. A permutation group is a set of units for which several tensors share
an axis: the tensors that produce the units, norms between, and the tensors that consume them. All
units of a group can be reordered together. A scale domain is a part of a group, from producers to
consumers, within which a factor for each unit can be moved from the producers to the consumers.

`tracing` finds permutation groups in a live model (torch). `chain` and, for transformers, `blocks`
guess them from names and shapes (numpy). `architecture` reads the number of heads from a
configuration.
"""

from __future__ import annotations

from countermark.alignment.symmetries.architecture import Architecture
from countermark.alignment.symmetries.base import (
    BatchNormTensors,
    GroupMember,
    PermutationGroup,
    ScaleDomain,
)
from countermark.alignment.symmetries.blocks import (
    LinearLayer,
    TransformerBlock,
    find_block_groups,
    find_blocks,
)
from countermark.alignment.symmetries.chain import find_chain_groups

__all__ = [
    "Architecture",
    "BatchNormTensors",
    "GroupMember",
    "LinearLayer",
    "PermutationGroup",
    "ScaleDomain",
    "TransformerBlock",
    "find_block_groups",
    "find_blocks",
    "find_chain_groups",
]  # fmt: skip
