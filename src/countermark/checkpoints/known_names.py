"""Know the names that public code gives to the tensors of a transformer.

The same tensor is `model.layers.0.self_attn.q_proj.weight` to one library and
`layers.0.attention.wq.weight` to another. `parse_name` gives both the same place.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple

ALL = -1
"""Block or expert of a tensor that holds all blocks, or all experts, one behind the other."""

_LISTS = frozenset({"layers", "layer", "h", "blocks", "block", "blk"})
# Parts of a name before the number of the block that wrap a model and tell no stacks apart.
_NEUTRAL = _LISTS | {
    "model", "module", "transformer", "gpt_neox", "bert", "roberta", "base_model", "backbone",
    "language_model", "text_model", "params",
}  # fmt: skip
_KINDS = {
    "weight": "weight", "kernel": "weight", "embedding": "weight", "scale": "weight", "bias": "bias"
}  # fmt: skip
_NAMES = {
    "q": "self_attn.q_proj attention.wq attn.q_proj attention.q_proj attention.self.query attn_q",
    "k": "self_attn.k_proj attention.wk attn.k_proj attention.k_proj attention.self.key attn_k",
    "v": "self_attn.v_proj attention.wv attn.v_proj attention.v_proj attention.self.value attn_v",
    "o": "self_attn.o_proj attention.wo attn.o_proj attention.o_proj attention.output.dense "
    "attn_output self_attn.out_proj attn.out_proj attn.c_proj attn.proj attention.dense "
    "self_attention.dense",
    "qkv": "self_attn.qkv_proj attn.qkv_proj attn.c_attn attn.qkv attn.Wqkv attn_qkv "
    "attention.query_key_value self_attention.query_key_value self_attn.W_pack",
    "gate": "mlp.gate_proj feed_forward.w1 mlp.w1 ffn_gate",
    "up": "mlp.up_proj feed_forward.w3 mlp.w3 ffn_up",
    "down": "mlp.down_proj feed_forward.w2 mlp.w2 ffn_down",
    "gate_up": "mlp.gate_up_proj ffn_gate_up",
    "in": "mlp.c_fc mlp.fc1 fc1 intermediate.dense mlp.dense_h_to_4h",
    "out": "mlp.c_proj mlp.fc2 fc2 output.dense mlp.dense_4h_to_h",
    "router": "mlp.gate block_sparse_moe.gate feed_forward.gate ffn_gate_inp mlp.router",
    "experts.gate": "mlp.experts.gate_proj block_sparse_moe.experts.w1 feed_forward.experts.w1 "
    "mlp.experts.w1 ffn_gate_exps",
    "experts.up": "mlp.experts.up_proj block_sparse_moe.experts.w3 feed_forward.experts.w3 "
    "mlp.experts.w3 ffn_up_exps",
    "experts.down": "mlp.experts.down_proj block_sparse_moe.experts.w2 feed_forward.experts.w2 "
    "mlp.experts.w2 ffn_down_exps",
    "experts.gate_up": "mlp.experts.gate_up_proj block_sparse_moe.experts.gate_up_proj",
    "norm before attention": "input_layernorm attention_norm ln_1 attn_norm",
    "norm before mlp": "post_attention_layernorm ffn_norm ln_2",
    "embeddings": "embed_tokens tok_embeddings wte token_embd embed_in",
    "last norm": "norm ln_f final_layer_norm output_norm",
    "head": "lm_head output embed_out",
}
_ROLES = {name: role for role, names in _NAMES.items() for name in names.split()}

PARTS = {
    "qkv": ("q", "k", "v"),
    "gate_up": ("gate", "up"),
    "experts.gate_up": ("experts.gate", "experts.up"),
}
"""Roles of fused tensors, and the roles of their parts in order."""

_JOINED_NUMBER = re.compile(rf"(?<![^.])({'|'.join(sorted(_LISTS))})_(\d{{1,6}})(?=\.)")
_NUMBER = re.compile(r"(?<![^.])\d{1,6}\.")


class BlockName(NamedTuple):
    """A tensor's name, divided at the number of its block: head, number, and tail."""

    head: str
    block: int
    tail: str


@dataclass(frozen=True)
class TensorPlace:
    """The place of a tensor in a transformer, whatever its name.

    Attributes:
        stack: which of several stacks of blocks; "" for the only one.
        block, expert: numbers; None outside of blocks or experts, `ALL` for all of them.
        role: role by the tables above, or the end of the name if it is not known.
        kind: "weight" or "bias".
    """

    stack: str
    block: int | None
    expert: int | None
    role: str
    kind: str


def split_block(name: str) -> BlockName | None:
    """Divide a tensor's name at its first number between dots; None without such a number."""
    if (found := _NUMBER.search(name)) is None:
        return None
    number = found.group()[:-1]
    # A number that would be written in another way, such as 007, could not be put together again.
    if number != str(int(number)):
        return None
    return BlockName(name[: found.start()], int(number), name[found.end() - 1 :])


def parse_name(name: str) -> TensorPlace:
    """Return the place that a tensor's name stands for."""
    parts = _JOINED_NUMBER.sub(r"\1.\2", name).split(".")
    kind = "bias" if parts[-1].endswith("_bias") else "weight"
    if len(parts) > 1 and parts[-1] in _KINDS:
        kind = _KINDS[parts.pop()]
    parts[-1] = parts[-1].removesuffix("_bias")
    block, before, after = _find_block(parts)
    expert: int | None = None
    if "experts" in after[:-1]:
        at, expert = after.index("experts") + 1, ALL
        if after[at].isdecimal() and len(after[at]) <= 6:
            expert = int(after.pop(at))
    role = ".".join(after)
    role = _ROLES.get(role, role)
    if role.startswith("experts.") and expert is None:  # one name for all experts
        expert = ALL
    stack = ".".join(each for each in before if each not in _NEUTRAL)
    return TensorPlace(stack, block, expert, role, kind)


def _find_block(parts: list[str]) -> tuple[int | None, list[str], list[str]]:
    """Return the block's number, and the parts of a name before and after it."""
    for at, each in enumerate(parts):
        if each.isdecimal() and len(each) <= 6:
            return int(each), parts[:at], parts[at + 1 :]
    for at, each in enumerate(parts[:-1]):
        if each in _LISTS and ".".join(parts[at + 1 :]) in _ROLES:
            return ALL, parts[:at], parts[at + 1 :]
    # Outside of blocks all that wraps the model is taken away, and the rest names the tensor.
    at = next((at for at, each in enumerate(parts) if each not in _NEUTRAL), len(parts) - 1)
    return None, [], parts[at:]
