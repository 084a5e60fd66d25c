"""Find the tensors of a GGUF file by the names that transformers gives them.

llama.cpp renames tensors, stacks experts, reorders the rows of some query and key weights for its
rotary embedding, transposes the matrices of GPT-2, and adds 1 to the norms of Gemma. Which of these
it does follows from the architecture in the metadata. Names alone decide, never values.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from countermark.checkpoints.gguf_header import GgufHeader, GgufTensor

_PARTS = re.compile(r"(?:blk\.(\d{1,5})\.)?([a-z0-9_]{1,64})\.(weight|bias)")
_MOST_EXPERTS, _MOST_FORMS = 4096, 1 << 18

_LLAMA = {
    "token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head",
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "attn_qkv": "self_attn.qkv_proj",
    "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.gate", "ffn_gate_exps": "mlp.experts.{}.gate_proj",
    "ffn_up_exps": "mlp.experts.{}.up_proj", "ffn_down_exps": "mlp.experts.{}.down_proj",
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate", "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj", "ffn_down_shexp": "mlp.shared_expert.down_proj",
}  # fmt: skip
_MIXTRAL = {
    "ffn_gate_inp": "block_sparse_moe.gate", "ffn_gate_exps": "block_sparse_moe.experts.{}.w1",
    "ffn_down_exps": "block_sparse_moe.experts.{}.w2",
    "ffn_up_exps": "block_sparse_moe.experts.{}.w3",
}  # fmt: skip
# Norms on both sides of attention and MLP.
_SANDWICH = {
    "post_attention_norm": "post_attention_layernorm", "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}  # fmt: skip
_GPT2 = {
    "token_embd": "transformer.wte", "position_embd": "transformer.wpe",
    "output_norm": "transformer.ln_f", "output": "lm_head", "attn_norm": "ln_1",
    "ffn_norm": "ln_2", "attn_qkv": "attn.c_attn", "attn_output": "attn.c_proj",
    "ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj",
}  # fmt: skip
_BERT = {
    "token_embd": "embeddings.word_embeddings", "position_embd": "embeddings.position_embeddings",
    "token_types": "embeddings.token_type_embeddings", "token_embd_norm": "embeddings.LayerNorm",
    "attn_q": "attention.self.query", "attn_k": "attention.self.key",
    "attn_v": "attention.self.value", "attn_output": "attention.output.dense",
    "attn_output_norm": "attention.output.LayerNorm", "ffn_up": "intermediate.dense",
    "ffn_down": "output.dense", "layer_output_norm": "output.LayerNorm",
}  # fmt: skip
# The names inside a block, and before the number of the block. Most architectures follow Llama.
_TABLES: Mapping[str, tuple[Mapping[str, str], str]] = {
    "llama": (_LLAMA | _MIXTRAL, "model.layers"),
    "phi3": (_LLAMA | {"ffn_up": "mlp.gate_up_proj"}, "model.layers"),
    "gemma2": (_LLAMA | _SANDWICH, "model.layers"),
    "gemma3": (_LLAMA | _SANDWICH, "model.layers"),
    "olmo2": (_LLAMA | _SANDWICH, "model.layers"),
    "gpt2": (_GPT2, "transformer.h"),
    "bert": (_BERT, "encoder.layer"),
}
_PERMUTED = {
    "llama", "llama-embed", "mistral3", "granite", "granitemoe", "granitehybrid", "smollm3",
    "arcee", "olmo", "minicpm", "deepseek",
}  # fmt: skip
_SHIFTED = {"gemma", "gemma2", "gemma3"}
_TURNED = {"attn_qkv", "attn_output", "ffn_up", "ffn_down"}  # of GPT-2


@dataclass(frozen=True)
class GgufForm:
    """How a tensor of a given name is made of a tensor that the file stores.

    Attributes:
        source: the file's own name of the stored tensor.
        shape: the shape that comes out.
        expert: the position on the first axis; None for the whole tensor.
        heads: the rows of so many heads are stored as pairs, first half and second half in turn;
            0 if the rows are in order.
        turned: the stored matrix is the transpose.
        shift: the number that was added to every value before it was stored.
    """

    source: str
    shape: tuple[int, ...]
    expert: int | None = None
    heads: int = 0
    turned: bool = False
    shift: float = 0.0

    @property
    def is_changed(self) -> bool:
        """True if the values have to be computed, so that no bytes of the file are theirs."""
        return self.turned or bool(self.shift)


def map_names(header: GgufHeader) -> dict[str, GgufForm]:
    """List the forms of all tensors by the names that transformers gives them.

    A tensor that no table knows keeps its own name.

    Raises:
        ValueError: two tensors get one name, or there are too many.
    """
    found: dict[str, GgufForm] = {}
    for own, stored in header.tensors.items():
        for name, form in _list_forms(header, own, stored):
            if name in found:
                raise ValueError(f"{own!r} and {found[name].source!r} are both {name!r}")
            found[name] = form
            if len(found) > _MOST_FORMS:
                raise ValueError(f"it holds more than {_MOST_FORMS:,} tensors")
    return found


def _list_forms(header: GgufHeader, own: str, stored: GgufTensor) -> Iterator[tuple[str, GgufForm]]:
    """Yield the names of one stored tensor with the form that each stands for."""
    parts = _PARTS.fullmatch(own)
    table, blocks = _TABLES.get(header.architecture, (_LLAMA, "model.layers"))
    known = table.get(parts[2]) if parts else None
    heads = _find_heads(header, parts[2]) if parts else 0
    if parts is None or known is None or not _has_whole_pairs(stored, heads):
        yield own, GgufForm(own, stored.shape)
        return
    name = f"{known}.{parts[3]}" if parts[1] is None else f"{blocks}.{parts[1]}.{known}.{parts[3]}"
    if "{}" in known:
        yield from _list_experts(own, name, stored)
    elif header.architecture == "gpt2" and parts[2] in _TURNED and len(stored.shape) == 2:
        yield name, GgufForm(own, stored.shape[::-1], turned=True)
    elif header.architecture in _SHIFTED and name.endswith("norm.weight"):
        yield name, GgufForm(own, stored.shape, shift=1.0)
    else:
        yield name, GgufForm(own, stored.shape, heads=heads)


def _list_experts(own: str, name: str, stored: GgufTensor) -> Iterator[tuple[str, GgufForm]]:
    """Yield each expert of stacked ones, or the stack where it is none or too large."""
    if len(stored.shape) != 3 or stored.shape[0] > _MOST_EXPERTS:
        yield own, GgufForm(own, stored.shape)
        return
    for expert in range(stored.shape[0]):
        yield name.format(expert), GgufForm(own, stored.shape[1:], expert)


def _find_heads(header: GgufHeader, part: str) -> int:
    """Return the number of heads whose rows are stored as pairs; 0 if they are in order.

    The number is -1 if the rows are stored as pairs and the metadata do not tell of how many heads.
    """
    if header.architecture not in _PERMUTED or part not in ("attn_q", "attn_k"):
        return 0
    queries = f"{header.architecture}.attention.head_count"
    count = header.numbers.get(queries, -1)
    return count if part == "attn_q" else header.numbers.get(f"{queries}_kv", count)


def _has_whole_pairs(stored: GgufTensor, heads: int) -> bool:
    """Return true if the rows of a stored tensor can be pairs of so many heads, or need not be."""
    if heads == 0:
        return True
    # A vector in blocks has no rows of whole bytes.
    whole = len(stored.shape) > 1 or (len(stored.shape) == 1 and stored.type.values == 1)
    return heads > 0 and whole and stored.shape[0] % (2 * heads) == 0
