"""Measure what free edits leave of the marks that are read from weights, and print a table.

    python tools/measure_free_edits.py

The language models have random weights: a stamp changes weights, and no reading of it depends on
training. The digits MLP is trained with its mark, as in `docs/attacks.md`.
"""

from __future__ import annotations

import copy
import platform
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

import countermark as cm
from countermark._version import VERSION
from countermark.alignment import SuspectWithReference
from countermark.attacks.base import Attack
from countermark.attacks.dead_units import DeadUnits
from countermark.attacks.move_blocks import MoveBlocks
from countermark.attacks.output_layer import ReorderClasses, ShiftLogits
from countermark.attacks.rotate import Rotate, TurnValues
from countermark.checkpoints import save_weights
from countermark.errors import CountermarkError
from countermark.keys.key import Key, KeyMaterial
from countermark.stamping import stamp
from countermark.stamping.making import StampPaths
from countermark.training.data import Dataset, load_data
from countermark.training.models import build

SEED, BITS = 1, 256
WORDS = 4000
MATERIAL = KeyMaterial(bytes([SEED]) * 32, bytes(16))
MADE = "5 % of units made dead"
EDITS: list[tuple[str, Attack]] = [
    (f"{MADE}, outgoing N(0, 100²)", DeadUnits()),
    (f"{MADE}, outgoing 100 × Cauchy", DeadUnits(distribution="cauchy")),
    ("5 % of units unheard, incoming N(0, 100²)", DeadUnits(side="incoming")),
    ("scores shifted, 10 × std", ShiftLogits()),
    ("classes reordered", ReorderClasses()),
    ("stream rotated", Rotate()),
    ("value heads turned", TurnValues()),
    ("value heads, any matrix", TurnValues(orthogonal=False)),
    ("identity block in front", MoveBlocks("identity")),
    ("first block repeated", MoveBlocks("duplicate")),
    ("first block dropped", MoveBlocks("drop")),
]


def language_model(kind: str) -> nn.Module:
    """Build a model of 1 to 3 million weights whose norms and biases are not what they begin as."""
    torch.manual_seed(SEED)
    if kind == "GPT-2":
        model = transformers.GPT2LMHeadModel(
            transformers.GPT2Config(
                vocab_size=WORDS,
                n_embd=160,
                n_layer=5,
                n_head=5,
                n_positions=64,
                bos_token_id=0,
                eos_token_id=0,
            )
        )
    else:
        model = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                vocab_size=WORDS, hidden_size=160, intermediate_size=448, num_hidden_layers=4,
                num_attention_heads=10, num_key_value_heads=5, max_position_embeddings=64,
                tie_word_embeddings=False,
            )
        )  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    return model.eval()


def stamped(model: nn.Module, folder: Path) -> tuple[Key, Path]:
    """Stamp a model in place, with default fields and a fixed secret.

    Returns: the key, and the file of the model as it was, which the key commits to.
    """
    source = {name: each.detach().contiguous().clone() for name, each in model.named_parameters()}
    save_weights(source, folder / "in.safetensors")
    model.config.to_json_file(folder / "config.json")  # says what the neurons are
    places = StampPaths(folder / "out.safetensors", folder / "a.key")
    stamp(
        folder / "in.safetensors", places, owner="Measured", fields={"bits": BITS},
        material=MATERIAL,
    )  # fmt: skip
    model.load_state_dict(load_file(places.out), strict=False)
    return Key.load(places.key), folder / "in.safetensors"


def trained_mlp(data: Dataset) -> tuple[nn.Module, Key, nn.Module]:
    """Train the digits MLP with 256 bits of uchida in its last layer, for five epochs.

    Returns: the model, its key, and the model as it was, which the key commits to.
    """
    torch.manual_seed(SEED)
    images, labels = data.normalised(data.train_images), data.train_labels
    model = build("mlp", {})
    reference = copy.deepcopy(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    scheme = cm.Uchida(layer="2.weight", bits=BITS)
    with scheme.embed(model, owner="Measured", material=MATERIAL) as mark:
        for _ in range(5):
            for rows in torch.randperm(len(labels)).split(32):
                optimizer.zero_grad()
                loss = F.cross_entropy(model(images[rows]), labels[rows]) + mark.penalty()
                loss.backward()
                optimizer.step()
    return model.eval(), mark.key, reference.eval()


def answers(model: nn.Module, given: Tensor) -> Tensor:
    """Return the logarithms of a model's probabilities."""
    with torch.no_grad():
        found: Any = model(given)
    scores: Tensor = getattr(found, "logits", found)
    return scores.log_softmax(-1)


def wrong(suspect: Any, key: Key) -> str:
    """Say how many bits of a key are read wrongly; a dash where it cannot be read."""
    try:
        verdict = cm.verify(suspect, key)
    except CountermarkError:
        return "not read"
    return "not read" if verdict.matched is None else str(key.bits - verdict.matched)


def rows_of(
    kind: str, model: nn.Module, marked: tuple[Key, Path | nn.Module], given: Tensor
) -> Iterator[list[str]]:
    """Yield table rows of one host: before, and after every edit that it allows."""
    key, reference = marked
    before = answers(model, given)
    yield [
        kind,
        "as it is",
        "0",
        wrong(model, key),
        wrong(SuspectWithReference(model, reference), key),
    ]
    for what, attack in EDITS:
        try:
            attacked = attack.run(copy.deepcopy(model)).model.eval()
        except CountermarkError:
            continue
        far = float((answers(attacked, given) - before).abs().max())
        plain = wrong(attacked, key)
        yield [
            kind,
            what,
            f"{far:.1g}",
            plain,
            wrong(SuspectWithReference(attacked, reference), key),
        ]


def main() -> None:
    """Print the table, and what it was measured with."""
    table = [
        ["host", "edit", "log p moves by", "wrong bits", "aligned to the model before the mark"]
    ]
    words = torch.randint(WORDS, (4, 32), generator=torch.Generator().manual_seed(SEED))
    for kind in ("GPT-2", "Llama"):
        model = language_model(kind)
        size = sum(each.numel() for each in model.parameters())
        with tempfile.TemporaryDirectory() as folder:
            marked = stamped(model, Path(folder))
            table += rows_of(f"{kind}-like, {size / 1e6:.1f} M, `stamp`", model, marked, words)
    data = load_data("digits")
    mlp, *marked_mlp = trained_mlp(data)
    images = data.normalised(data.test_images)
    table += rows_of("digits MLP, `uchida`", mlp, tuple(marked_mlp), images)
    table.insert(1, ["---"] * len(table[0]))
    for row in table:
        print("| " + " | ".join(row) + " |")
    packages = (torch, np, transformers)
    versions = ", ".join(f"{each.__name__} {each.__version__}" for each in packages)
    processor = platform.processor() or platform.machine()
    print(
        f"\nSeed {SEED}, {BITS} bits, countermark {VERSION}, "
        f"Python {platform.python_version()}, {versions}, {processor}, "
        f"{torch.get_num_threads()} thread(s)."
    )


if __name__ == "__main__":
    main()
