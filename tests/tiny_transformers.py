"""Transformers of a few thousand weights, with the tensors' names of BERT, GPT-2 and Llama."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, HEADS, HIDDEN, WORDS, LAYERS = 32, 4, 96, 60, 2


def heads_of(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(-3, -2)  # (n, heads, words, values)


def attended(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v).transpose(-3, -2).flatten(-2)


class Self(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return attended(*(heads_of(each(x), HEADS) for each in (self.query, self.key, self.value)))


class Joined(nn.Module):
    """A layer, and a norm behind what it adds to."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.dense, self.LayerNorm = nn.Linear(inputs, WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor, before: Tensor) -> Tensor:
        return self.LayerNorm(self.dense(x) + before)


def named(**modules: nn.Module) -> nn.Module:
    found = nn.Module()
    for name, module in modules.items():
        found.add_module(name, module)
    return found


class BertLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = named(self=Self(), output=Joined(WIDTH))
        self.intermediate = named(dense=nn.Linear(WIDTH, HIDDEN))
        self.output = Joined(HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        part: Any = self.attention
        x = part.output(part._modules["self"](x), x)
        wide: Any = self.intermediate.dense
        return self.output(F.gelu(wide(x)), x)


class TinyBert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(num_attention_heads=HEADS, hidden_act="gelu")
        self.embeddings = named(word_embeddings=nn.Embedding(WORDS, WIDTH))
        self.encoder = named(layer=nn.Sequential(*(BertLayer() for _ in range(LAYERS))))
        self.pooler = named(dense=nn.Linear(WIDTH, WIDTH))

    def forward(self, words: Tensor) -> Tensor:
        table: Any = self.embeddings.word_embeddings
        layers: Any = self.encoder.layer
        states: Tensor = layers(table(words))
        return states


class Conv1D(nn.Module):
    """A linear layer as GPT-2 has it: its weight is (in, out)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs) / inputs**0.5)
        self.bias = nn.Parameter(torch.randn(outputs) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class GptLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attn = named(c_attn=Conv1D(WIDTH, 3 * WIDTH), c_proj=Conv1D(WIDTH, WIDTH))
        self.mlp = named(c_fc=Conv1D(WIDTH, HIDDEN), c_proj=Conv1D(HIDDEN, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        attn: Any = self.attn
        mlp: Any = self.mlp
        parts = attn.c_attn(self.ln_1(x)).chunk(3, dim=-1)
        x = x + attn.c_proj(attended(*(heads_of(each, HEADS) for each in parts)))
        return x + mlp.c_proj(F.gelu(mlp.c_fc(self.ln_2(x))))


class TinyGpt(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(n_head=HEADS)
        self.wte = nn.Embedding(WORDS, WIDTH)
        self.h = nn.Sequential(*(GptLayer() for _ in range(LAYERS)))
        self.ln_f = nn.LayerNorm(WIDTH)

    def forward(self, words: Tensor) -> Tensor:
        states: Tensor = self.ln_f(self.h(self.wte(words)))
        return states


class LlamaLayer(nn.Module):
    """Two heads of queries share one of keys and values; the MLP has a gate."""

    def __init__(self) -> None:
        super().__init__()
        half = WIDTH // 2
        self.input_layernorm, self.post_attention_layernorm = (nn.RMSNorm(WIDTH) for _ in "ab")
        self.self_attn = named(
            q_proj=nn.Linear(WIDTH, WIDTH, bias=False), k_proj=nn.Linear(WIDTH, half, bias=False),
            v_proj=nn.Linear(WIDTH, half, bias=False), o_proj=nn.Linear(WIDTH, WIDTH, bias=False),
        )  # fmt: skip
        self.mlp = named(
            gate_proj=nn.Linear(WIDTH, HIDDEN, bias=False),
            up_proj=nn.Linear(WIDTH, HIDDEN, bias=False),
            down_proj=nn.Linear(HIDDEN, WIDTH, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        attn: Any = self.self_attn
        mlp: Any = self.mlp
        y = self.input_layernorm(x)
        q = heads_of(attn.q_proj(y), HEADS)
        k, v = (
            heads_of(each(y), HEADS // 2).repeat_interleave(2, -3)
            for each in (attn.k_proj, attn.v_proj)
        )
        x = x + attn.o_proj(attended(q, k, v))
        y = self.post_attention_layernorm(x)
        return x + mlp.down_proj(F.silu(mlp.gate_proj(y)) * mlp.up_proj(y))


class TinyLlama(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(num_attention_heads=HEADS, num_key_value_heads=HEADS // 2)
        self.embed_tokens = nn.Embedding(WORDS, WIDTH)
        self.layers = nn.Sequential(*(LlamaLayer() for _ in range(LAYERS)))
        self.norm = nn.RMSNorm(WIDTH)

    def forward(self, words: Tensor) -> Tensor:
        states: Tensor = self.norm(self.layers(self.embed_tokens(words)))
        return states


TINY = {"bert": TinyBert, "gpt": TinyGpt, "llama": TinyLlama}


def tiny(name: str, seed: int = 0) -> nn.Module:
    """A model whose norms and biases are not what they begin as."""
    torch.manual_seed(seed)
    model: nn.Module = TINY[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn(parameter.shape))
    return model.eval()


class TinyLm(nn.Module):
    """A transformer with a head that scores words, tied to its embeddings or not."""

    def __init__(self, name: str, *, tied: bool) -> None:
        super().__init__()
        self.model = tiny(name)
        self.config = SimpleNamespace(**vars(self.model.config), tie_word_embeddings=tied)
        self.lm_head = nn.Linear(WIDTH, WORDS, bias=False)
        if tied:
            table = next(each for each in self.model.modules() if isinstance(each, nn.Embedding))
            self.lm_head.weight = table.weight

    def forward(self, words: Tensor) -> Tensor:
        scores: Tensor = self.lm_head(self.model(words))
        return scores


def tiny_lm(name: str, *, tied: bool = False) -> nn.Module:
    """A language model with random weights, in eval mode."""
    torch.manual_seed(1)
    return TinyLm(name, tied=tied).eval()


WORDS_GIVEN = torch.randint(WORDS, (3, 9), generator=torch.Generator().manual_seed(7))
