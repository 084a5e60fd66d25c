"""Insertion, repetition or removal of blocks: the numbers in tensor names change."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from pydantic import NonNegativeInt, PositiveInt
from torch import nn

from countermark.alignment.symmetries import Architecture, find_blocks
from countermark.attacks.base import Attack, ChangeResult
from countermark.attacks.rotate import answer_random_words, require_equal_outputs
from countermark.errors import ConfigError

_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_NORMS_BEHIND = ("output.LayerNorm", "output_layer_norm", "sa_layer_norm")  # BERT, DistilBERT


@dataclass(frozen=True)
class MoveBlocks(Attack):
    """An attack that inserts blocks without effect, repeats blocks or drops blocks.

    The other blocks are renumbered. The attack works on modules and on the tensors of a file.
    Outputs stay equal after "identity" only.

    Attributes:
        do: "identity" inserts copies of a block whose output projections are zero; "duplicate"
            repeats `count` blocks behind themselves (depth up-scaling repeats the middle ones);
            "drop" removes `count` blocks.
        at: number of the first block concerned, from 0; identity blocks go in front of it.
        count: number of blocks.
        blocks: name of the list of blocks; empty for the list with the most weights.
    """

    name: ClassVar[str] = "move_blocks"
    does: ClassVar[str] = "inserts identity blocks, repeats or drops blocks, and renumbers the rest"
    source: ClassVar[str] = "Wu et al. 2024, LLaMA Pro; Kim et al. 2023, SOLAR (depth up-scaling)"

    do: Literal["identity", "duplicate", "drop"] = "identity"
    at: NonNegativeInt = field(default=0, kw_only=True)
    count: PositiveInt = field(default=1, kw_only=True)
    blocks: str = field(default="", kw_only=True)

    def change(self, stolen: nn.Module, data: Any = None) -> ChangeResult:  # noqa: ARG002 - others train
        """Rebuild the list of blocks.

        Raises:
            ConfigError: the model has no such list or place; or, for identity blocks, the output
                projections are unknown or the outputs would change.
        """
        name, inner = self._find_blocks(stolen)
        there = len(inner._modules)
        # By number and not by insertion order: in a file, block 10 may come before block 2.
        old = [inner.get_submodule(str(place)) for place in range(there)]
        last = there if self.do == "identity" else there - self.count
        if self.at > last or (self.do == "drop" and self.count == there):
            raise ConfigError(
                f"{self.name}: {name or 'the model'} has {there} blocks: expected at and count "
                f"within them, found at={self.at}, count={self.count}"
            )
        # Answers to random words prove that identity blocks changed nothing; others change outputs.
        before = answer_random_words(stolen) if self.do == "identity" else None
        order = self._order_blocks(there)
        seen: set[int] = set()
        blocks: list[nn.Module] = []
        for place in order:
            # A repeated block needs its own tensors: a change of shared tensors would change both
            # blocks.
            blocks.append(copy.deepcopy(old[place]) if place in seen else old[place])
            seen.add(place)
        if self.do == "identity":
            for place in range(self.at, self.at + self.count):
                blocks[place] = copy.deepcopy(blocks[place])  # the block itself may be its original
                self._silence_block(stolen, name, order[place], blocks[place])
        inner._modules.clear()
        inner._modules.update({str(place): block for place, block in enumerate(blocks)})
        _renumber_blocks(stolen, blocks, order, there)
        if before is not None:
            require_equal_outputs(before, answer_random_words(stolen), self.name)
        return ChangeResult(found={"blocks": name, "before": there, "after": len(blocks)})

    def _order_blocks(self, there: int) -> list[int]:
        """Return for each new place the number of the original block that stands there."""
        places, end = list(range(there)), self.at + self.count
        if self.do == "drop":
            return places[: self.at] + places[end:]
        if self.do == "duplicate":
            return places[:end] + places[self.at :]
        # Behind the last block no block stands at `at`, so the last block is copied.
        return places[: self.at] + [min(self.at, there - 1)] * self.count + places[self.at :]

    def _find_blocks(self, model: nn.Module) -> tuple[str, nn.Module]:
        """Return name and module of the list of blocks, by name or the one with the most weights.

        Raises:
            ConfigError: the model has no list of similar blocks, or none of the given name.
        """
        lists = {name: each for name, each in model.named_modules() if _is_block_list(each)}
        if self.blocks and self.blocks not in lists:
            raise ConfigError(
                f"{self.name}: expected a list of blocks that are alike in {self.blocks!r}, found "
                f"{', '.join(lists) or 'none in this model'}"
            )
        if not lists:
            raise ConfigError(
                f"{self.name}: no list of blocks that are alike was found in "
                f"{type(model).__name__}: expected modules named 0, 1, … with the same tensors"
            )
        size = {name: sum(p.numel() for p in each.parameters()) for name, each in lists.items()}
        name = self.blocks or max(lists, key=lambda each: size[each])
        return name, lists[name]

    def _silence_block(self, model: nn.Module, name: str, place: int, block: nn.Module) -> None:
        """Zero the layers through which a block adds to the residual stream.

        Raises:
            ConfigError: the block's layers are unknown, or a norm follows them.
        """
        shapes = {each: tuple(tensor.shape) for each, tensor in block.state_dict().items()}
        found = find_blocks(shapes, Architecture.from_model(model))
        # A norm behind the sum changes the stream even where the block adds zero.
        behind = any(norm in each for each in shapes for norm in _NORMS_BEHIND)
        if not found or behind:
            raise ConfigError(
                f"{self.name}: what {name}.{place} adds to its input is not known: expected a "
                "transformer's block with the names of GPT-2, Llama or OPT and no norm behind it"
            )
        state = block.state_dict()
        with torch.no_grad():
            for layer in (each.speak for each in found):
                state[f"{layer.name}.weight"].zero_()
                if layer.bias:
                    state[f"{layer.name}.bias"].zero_()


def _is_block_list(module: nn.Module) -> bool:
    """Return true if a module holds blocks numbered from 0 of equal types, names and shapes."""
    inner = module._modules
    if len(inner) < 2 or set(inner) != {str(place) for place in range(len(inner))}:
        return False
    forms = []
    for block in inner.values():
        state = {} if block is None else block.state_dict()
        forms.append((type(block), {name: tuple(each.shape) for name, each in state.items()}))
    _, shapes = forms[0]
    return any(len(each) > 1 for each in shapes.values()) and all(f == forms[0] for f in forms)


def _renumber_blocks(
    model: nn.Module, blocks: list[nn.Module], order: list[int], there: int
) -> None:
    """Update the layer numbers and counts that models of `transformers` keep."""
    for place, block in enumerate(blocks):
        for module in block.modules():
            if isinstance(getattr(module, "layer_idx", None), int):
                module.layer_idx = place  # type: ignore[assignment]
    # Submodules often share one configuration object; each object is updated once.
    configurations = {id(c): c for m in model.modules() if (c := getattr(m, "config", None))}
    for configuration in configurations.values():
        for name in _COUNTS:
            if getattr(configuration, name, None) == there:
                setattr(configuration, name, len(blocks))
        kinds = getattr(configuration, "layer_types", None)
        if isinstance(kinds, list) and len(kinds) == there:
            configuration.layer_types = [kinds[each] for each in order]
