"""A mark in a real language model, and in what thieves make of it (slow).

MiniLM is stamped as advised. Each suspect is made from the marked model and asked about by the
same key. The sentences that a LoRA is trained on are real text, without labels: two readings of one
under dropout are to be nearer than those of different ones (Gao et al. 2021, SimCSE).
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from real_models import place_of, sentences
from torch import Tensor, nn

from codes import forms
from countermark.alignment import SuspectWithReference
from countermark.attacks.base import NamedTensors
from countermark.attacks.invariants import Permute
from countermark.attacks.lora import add_low_rank_terms
from countermark.attacks.noise import Noise
from countermark.attacks.prune import Prune
from countermark.checkpoints import load_state, save_weights
from countermark.keys.key import Key, KeyMaterial
from countermark.results.verdict import Verdict
from countermark.stamping import stamp
from countermark.stamping.making import StampPaths, StampResult
from countermark.training.fidelity import TextFidelity
from countermark.verification.verify import verify

pytestmark = pytest.mark.slow
TRAINED_ON, BATCH, WORDS = 512, 32, 32
SENTENCES = (
    "A sheet of paper bears two marks.", "The second mark on a sheet is the smaller one.",
    "Papermakers signed their work.", "Who owns this network?", "The weather is fine today.",
    "It has been raining since the morning.", "A court hears the expert witness.",
    "The expert was heard in court.", "Bread needs flour, water, salt and time.",
    "Trains to the coast leave every hour.", "The harbour froze in January.",
    "He repaired the old clock himself.",
)  # fmt: skip


@dataclass(frozen=True)
class Marked:
    """The checkpoint from before, the marked one, the key, and what was said of making them."""

    source: Path
    out: Path
    key: Key
    done: StampResult


@pytest.fixture(scope="module")
def marked(tmp_path_factory: pytest.TempPathFactory) -> Marked:
    folder = tmp_path_factory.mktemp("minilm")
    places = StampPaths(folder / "marked", folder / "a.key")
    material = KeyMaterial(bytes(range(32)), bytes(16))
    done = stamp(place_of("minilm"), places, owner="ACME", material=material)
    return Marked(place_of("minilm"), places.out, Key.load(places.key), done)


def loaded(folder: Path) -> nn.Module:
    from transformers import AutoModel

    model: nn.Module = AutoModel.from_pretrained(folder, local_files_only=True)
    return model.eval()


def attacked(attack: Any) -> Callable[[Marked, Path], Path]:
    """A file of the marked model's weights after an attack on every matrix."""

    def make(marked: Marked, folder: Path) -> Path:
        host = NamedTensors(load_state(marked.out))
        save_weights(attack.run(host).model.state_dict(), folder / "m.safetensors")
        return folder / "m.safetensors"

    return make


def as_codes(form: str) -> Callable[[Marked, Path], Path]:
    """A file in which every matrix of a layer is stored as codes."""

    def make(marked: Marked, folder: Path) -> Path:
        from safetensors.torch import save_file

        state = load_state(marked.out)
        for name in [n for n in state if n.startswith("encoder") and state[n].dim() == 2]:
            state |= forms(state.pop(name), name, block=128)[form]
        save_file(state, folder / "m.safetensors")
        return folder / "m.safetensors"

    return make


def batches(tokenizer: Any) -> Iterator[Any]:
    texts = sentences(TRAINED_ON)
    assert len(texts) == TRAINED_ON
    for at in range(0, TRAINED_ON, BATCH):
        yield tokenizer(
            texts[at : at + BATCH], return_tensors="pt", padding=True, truncation=True,
            max_length=WORDS,
        )  # fmt: skip


def embedded(model: nn.Module, tokens: Any) -> Tensor:
    """Embeddings (n, width) of length 1: the last states, averaged over the words."""
    kept = tokens["attention_mask"][:, :, None].float()
    states = model(**tokens).last_hidden_state
    return F.normalize((states * kept).sum(1) / kept.sum(1), dim=1)


def with_lora(marked: Marked, folder: Path) -> Path:
    """One epoch of a LoRA of rank 8 in every linear layer, merged."""
    from transformers import AutoTokenizer

    torch.manual_seed(0)
    model, tokenizer = loaded(marked.out), AutoTokenizer.from_pretrained(marked.out)
    with add_low_rank_terms(model, 8, scale=2.0) as factors:
        optimizer = torch.optim.AdamW(factors, 5e-4)
        model.train()
        for tokens in batches(tokenizer):
            one, other = embedded(model, tokens), embedded(model, tokens)
            F.cross_entropy(one @ other.T / 0.05, torch.arange(len(one))).backward()
            optimizer.step()
            optimizer.zero_grad()
    save_weights(model.state_dict(), folder / "m.safetensors")
    return folder / "m.safetensors"


def rotated(marked: Marked, folder: Path) -> Path:
    """Each head's queries and keys turned by one random rotation, values and outputs by another.

    No order brings these back; what the key reads of the MLPs is untouched.
    """
    model = loaded(marked.out)
    words, heads = torch.arange(5, 14)[None], model.config.num_attention_heads  # type: ignore[union-attr,operator]
    torch.manual_seed(0)
    with torch.no_grad():
        before = model(input_ids=words).last_hidden_state
        for layer in model.encoder.layer:  # type: ignore[union-attr,operator]
            own, out = layer.attention.self, layer.attention.output.dense
            width = own.query.out_features // heads
            for makers in ((own.query, own.key), (own.value,)):
                turn = [torch.linalg.qr(torch.randn(width, width)).Q for _ in range(heads)]
                whole = torch.block_diag(*turn)
                for maker in makers:
                    maker.weight.copy_(whole @ maker.weight)
                    maker.bias.copy_(whole @ maker.bias)
            out.weight.copy_(out.weight @ whole.T)
        after = model(input_ids=words).last_hidden_state
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
    save_weights(model.state_dict(), folder / "m.safetensors")
    return folder / "m.safetensors"


class States(nn.Module):
    """A model from numbers of words to its last states, as exporters like it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, words: Tensor, mask: Tensor) -> Tensor:
        states: Tensor = self.model(input_ids=words, attention_mask=mask).last_hidden_state
        return states


def exported(kind: str) -> Callable[[Marked, Path], Path]:
    """As TorchScript, as ONNX by torch's older or newer exporter, or as ONNX in whole numbers."""

    def make(marked: Marked, folder: Path) -> Path:
        given = (torch.ones(1, 9, dtype=torch.int64), torch.ones(1, 9, dtype=torch.int64))
        model, path = States(loaded(marked.out)), folder / "m.onnx"
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # exporters warn of themselves
            if kind == "script":
                torch.jit.save(torch.jit.trace(model, given, strict=False), folder / "m.pt")
                return folder / "m.pt"
            newer = {"dynamo": True, "external_data": False, "verbose": False}
            torch.onnx.export(
                model, given, path, **(newer if kind == "newer" else {"dynamo": False})
            )
            if kind == "int8":
                from onnxruntime.quantization import quantize_dynamic

                quantize_dynamic(path, folder / "int8.onnx")
                return folder / "int8.onnx"
        return path

    return make


SUSPECTS: dict[str, Callable[[Marked, Path], Path]] = {
    "int8": as_codes("8 by row"),
    "int4": as_codes("4 packed"),
    "pruned 50 %": attacked(Prune(0.5)),
    "noise of half a std": attacked(Noise(0.5)),
    "merged LoRA": with_lora,
    "TorchScript": exported("script"),
    "ONNX, older exporter": exported("older"),
    "ONNX, newer exporter": exported("newer"),
    "ONNX, int8": exported("int8"),
}


def test_the_mark_is_there_and_the_model_as_good(marked: Marked, tmp_path: Path) -> None:
    assert marked.done.key.bits == 256
    assert marked.done.change <= 0.03
    verdict = verify(marked.out, marked.key)
    assert verdict.owned
    assert verdict.log10_p is not None
    assert verdict.log10_p <= -30
    assert verify(marked.source, marked.key).outcome == "not_proven"
    texts = tmp_path / "texts"
    texts.write_text("\n".join(SENTENCES))
    kept = TextFidelity(texts).compare_outputs(
        TextFidelity(texts).measure_outputs(marked.source),
        TextFidelity(texts).measure_outputs(marked.out),
    )
    assert kept["largest_change_of_similarity"] <= 1e-2, kept


def judged(what: str, marked: Marked, folder: Path) -> Verdict:
    return verify(SUSPECTS[what](marked, folder), marked.key)


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("what", SUSPECTS)
def test_what_a_thief_makes_of_it_is_still_owned(what: str, marked: Marked, tmp_path: Path) -> None:
    found = judged(what, marked, tmp_path)
    assert found.owned, found.explain()
    assert found.test_count == 1


def test_rotated_heads_leave_what_the_mlps_bear(marked: Marked, tmp_path: Path) -> None:
    """Enough for a key that is known to be older than the suspect, not for one without a date."""
    path = rotated(marked, tmp_path)
    assert verify(path, marked.key, assume_dated=True).owned
    assert verify(path, marked.key).outcome == "no_verdict"


def permuted(marked: Marked, folder: Path) -> Path:
    """Heads and MLP units of every block in another order; the embeddings stay what they are."""
    model = loaded(marked.out)
    moved = Permute().run(model).model
    words = torch.arange(5, 14)[None]
    with torch.no_grad():
        one, other = (each(input_ids=words).last_hidden_state for each in (model, moved))
    torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-4)
    save_weights(moved.state_dict(), folder / "m.safetensors")
    return folder / "m.safetensors"


def test_permuted_heads_and_units_are_put_back(marked: Marked, tmp_path: Path) -> None:
    """By the checkpoint from before the mark; as for every reference, a date is needed."""
    path = permuted(marked, tmp_path)
    assert not verify(path, marked.key).owned
    found = verify(SuspectWithReference(path, marked.source), marked.key, assume_dated=True)
    assert found.owned, found.explain()
    worn = tmp_path / "worn.safetensors"
    host = NamedTensors(load_state(path))
    save_weights(Noise(0.5).run(Prune(0.5).run(host).model).model.state_dict(), worn)
    assert verify(SuspectWithReference(worn, marked.source), marked.key, assume_dated=True).owned
