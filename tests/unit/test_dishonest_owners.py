"""What dishonest owners and thieves try, one sentence each, and what stops it."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from countermark.alignment import Reference, SuspectWithReference, commit_reference, realign_suspect
from countermark.alignment.symmetries import GroupMember, PermutationGroup, ScaleDomain
from countermark.checkpoints import (
    SafetensorsWeights,
    Suspect,
    TensorInfo,
    compute_model_digest,
    open_weights,
)
from countermark.errors import CountermarkError
from countermark.keys.key import REFERENCE, Key
from countermark.results.verdict import Verdict
from countermark.schemes.stamp.scheme import Stamp
from countermark.schemes.uchida.scheme import Uchida
from countermark.stamping import stamp
from countermark.stamping.making import StampPaths
from countermark.verification.verify import verify

Tensors = dict[str, NDArray[Any]]
Edit = Callable[[Tensors], Tensors]

WORDS, WIDTH, INNER, BLOCKS = 256, 48, 112, 2
TABLE, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def save(path: Path, tensors: Mapping[str, NDArray[Any]]) -> Path:
    """Write a safetensors file whose header lists tensors in the order given."""
    header: dict[str, Any] = {}
    body = b""
    for name, each in tensors.items():
        content = np.ascontiguousarray(each).tobytes()
        header[name] = {
            "dtype": {"float32": "F32", "float64": "F64"}[each.dtype.name],
            "shape": list(each.shape),
            "data_offsets": [len(body), len(body) + len(content)],
        }
        body += content
    said = json.dumps(header).encode()
    said += b" " * (-len(said) % 8)
    path.write_bytes(len(said).to_bytes(8, "little") + said + body)
    return path


def transformer(seed: int) -> Tensors:
    """An untrained decoder with the names of Llama."""
    rng = np.random.default_rng(seed)

    def drawn(*shape: int) -> NDArray[Any]:
        return rng.normal(0, 0.05, shape).astype(np.float32)

    made = {TABLE: drawn(WORDS, WIDTH), HEAD: drawn(WORDS, WIDTH)}
    made["model.norm.weight"] = 1 + drawn(WIDTH)
    for block in range(BLOCKS):
        at = f"model.layers.{block}."
        for part in "qkvo":
            made[f"{at}self_attn.{part}_proj.weight"] = drawn(WIDTH, WIDTH)
        made[f"{at}mlp.gate_proj.weight"] = drawn(INNER, WIDTH)
        made[f"{at}mlp.up_proj.weight"] = drawn(INNER, WIDTH)
        made[f"{at}mlp.down_proj.weight"] = drawn(WIDTH, INNER)
        made[f"{at}input_layernorm.weight"] = 1 + drawn(WIDTH)
        made[f"{at}post_attention_layernorm.weight"] = 1 + drawn(WIDTH)
    return made


def chain(seed: int) -> Tensors:
    """An untrained MLP."""
    rng, sizes, made = np.random.default_rng(seed), (48, 96, 96, 16), Tensors()
    for at, (inputs, outputs) in enumerate(itertools.pairwise(sizes)):
        made[f"{2 * at}.weight"] = rng.normal(0, inputs**-0.5, (outputs, inputs))
        made[f"{2 * at}.bias"] = rng.normal(0, 0.05, outputs)
    return {name: each.astype(np.float32) for name, each in made.items()}


@dataclass(frozen=True)
class Host:
    """A checkpoint from before its mark, the marked tensors, and the key."""

    before: Path
    marked: Tensors
    key: Key

    def read(self, tensors: Mapping[str, NDArray[Any]], folder: Path) -> Verdict:
        return verify(
            SuspectWithReference(save(folder / "suspect", tensors), self.before), self.key
        )


def marked(folder: Path, tensors: Tensors, fields: Mapping[str, Any]) -> Host:
    before = save(folder / "before.safetensors", tensors)
    places = StampPaths(folder / "marked.safetensors", folder / "key")
    key = stamp(before, places, owner="ACME", fields=fields).key
    with open_weights(places.out) as weights:
        return Host(before, {name: weights.read(name) for name in weights.tensors}, key)


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Host:
    layer = [name for name in transformer(1) if "proj" in name]
    return marked(tmp_path_factory.mktemp("decoder"), transformer(1), {"layer": layer, "bits": 128})


@pytest.fixture(scope="module")
def mlp(tmp_path_factory: pytest.TempPathFactory) -> Host:
    fields = {"layer": ["2.weight", "4.weight"], "bits": 128}
    return marked(tmp_path_factory.mktemp("mlp"), chain(1), fields)


@pytest.fixture(scope="module")
def output_layer(tmp_path_factory: pytest.TempPathFactory) -> Host:
    return marked(tmp_path_factory.mktemp("output"), chain(1), {"layer": ["4.weight"], "bits": 128})


def speaks(name: str) -> bool:
    return "o_proj" in name or "down_proj" in name


def reordered(tensors: Tensors) -> Tensors:
    """Channels and units of MLPs in another order."""
    rng = np.random.default_rng(2)
    order = rng.permutation(WIDTH)
    made = {name: each[order] if speaks(name) or each.ndim == 1 else each[:, order]
            for name, each in tensors.items()}  # fmt: skip
    for block in range(BLOCKS):
        units, at = rng.permutation(INNER), f"model.layers.{block}.mlp."
        for part in ("gate", "up"):
            made[f"{at}{part}_proj.weight"] = made[f"{at}{part}_proj.weight"][units]
        made[f"{at}down_proj.weight"] = made[f"{at}down_proj.weight"][:, units]
    return made


def rotated(tensors: Tensors) -> Tensors:
    """Gains folded into what reads them, then another basis of the stream."""
    turn = np.linalg.qr(np.random.default_rng(3).normal(size=(WIDTH, WIDTH)))[0]
    made = {}
    for name, each in tensors.items():
        block, values = name.rpartition("self_attn")[0] or name.rpartition("mlp")[0], each
        if each.ndim == 1:
            made[name] = np.ones(WIDTH, np.float32)
            continue
        if "self_attn" in name and not speaks(name):
            values = each * tensors[f"{block}input_layernorm.weight"]
        elif "mlp" in name and not speaks(name):
            values = each * tensors[f"{block}post_attention_layernorm.weight"]
        elif name == HEAD:
            values = each * tensors["model.norm.weight"]
        made[name] = (turn.T @ values if speaks(name) else values @ turn).astype(np.float32)
    return made


def unused_words(scale: float) -> Edit:
    """Vectors of words that no text has, a third of the table, are large noise."""

    def edit(tensors: Tensors) -> Tensors:
        table = tensors[TABLE].copy()
        table[-80:] = np.random.default_rng(4).normal(0, scale, (80, WIDTH))
        return tensors | {TABLE: table}

    return edit


def longer_table(tensors: Tensors) -> Tensors:
    """More words, which no text has."""
    more = np.random.default_rng(5).normal(0, 0.05, (64, WIDTH)).astype(np.float32)
    return tensors | {name: np.concatenate([tensors[name], more]) for name in (TABLE, HEAD)}


def renamed(tensors: Tensors) -> Tensors:
    return {f"base.{name}": each for name, each in tensors.items()}


def headless(tensors: Tensors) -> Tensors:
    return {name: each for name, each in tensors.items() if name != HEAD}


def rounded(tensors: Tensors) -> Tensors:
    """As bfloat16 cuts numbers off."""
    cut = np.uint32(0xFFFF0000)
    return {
        name: (np.ascontiguousarray(each).view(np.uint32) & cut).view(np.float32)
        for name, each in tensors.items()
    }


def enormous_words(tensors: Tensors) -> Tensors:
    """Vectors of unused words that no square of float64 holds."""
    table = tensors[TABLE].astype(np.float64)
    table[-3:] = 1e200
    return tensors | {TABLE: table}


def dead_inner(tensors: Tensors) -> Tensors:
    """Units of gated MLPs whose one half is zero may have any other half, and send anything."""
    rng, made = np.random.default_rng(6), dict(tensors)
    for block in range(BLOCKS):
        at = f"model.layers.{block}.mlp."
        up, gate, down = (made[f"{at}{n}_proj.weight"].copy() for n in ("up", "gate", "down"))
        up[:12], gate[:12], down[:, :12] = 0, rng.normal(0, 99, (12, WIDTH)), 77.0
        made |= {f"{at}up_proj.weight": up, f"{at}gate_proj.weight": gate}
        made[f"{at}down_proj.weight"] = down
    return made


@pytest.mark.parametrize(
    "edits",
    [
        # Unused words drown the others: each word counts alike, and each line of a table.
        (unused_words(1e3), reordered),
        (unused_words(1e3), rotated),
        (unused_words(1e30), reordered, rotated),
        (enormous_words, reordered),
        # A table of another length says nothing by its shape, and is turned all the same.
        (longer_table, rotated),
        (longer_table, reordered, rotated),
        # Other names: what they have in common is taken off before anything is turned.
        (reordered, rotated, renamed),
        # A part that nobody needs is dropped: the others are turned.
        (rotated, headless),
        # Rounding, and dead units, on top of a disguise.
        (reordered, rotated, rounded),
        (dead_inner, reordered, rotated),
    ],
)
def test_free_edits_of_a_decoder_are_undone(
    edits: tuple[Edit, ...], decoder: Host, tmp_path: Path
) -> None:
    suspect = decoder.marked
    for edit in edits:
        suspect = edit(suspect)
    assert decoder.read(suspect, tmp_path).owned


def order_of_units(tensors: Tensors) -> Tensors:
    """Units in another order and scale."""
    rng, made = np.random.default_rng(7), dict(tensors)
    for at in (0, 2):
        size = len(made[f"{at}.bias"])
        order, scale = rng.permutation(size), np.exp(rng.normal(size=size)).astype(np.float32)
        made[f"{at}.weight"] = (made[f"{at}.weight"] * scale[:, None])[order]
        made[f"{at}.bias"] = (made[f"{at}.bias"] * scale)[order]
        made[f"{at + 2}.weight"] = (made[f"{at + 2}.weight"] / scale)[:, order]
    return made


def dead_units(tensors: Tensors) -> Tensors:
    """A tenth of the units never fires, and would send anything."""
    rng, made = np.random.default_rng(8), dict(tensors)
    for at in (0, 2):
        weight, bias, out = (
            made[n].copy() for n in (f"{at}.weight", f"{at}.bias", f"{at + 2}.weight")
        )
        weight[:9], bias[:9], out[:, :9] = 0, -1, rng.normal(0, 99, (len(out), 9))
        made |= {f"{at}.weight": weight, f"{at}.bias": bias, f"{at + 2}.weight": out}
    return made


def split_units(tensors: Tensors) -> Tensors:
    """Every unit is there twice, nearly, and its two copies send nearly opposite noise."""
    rng, made = np.random.default_rng(9), dict(tensors)
    for at in (0, 2):
        out = made[f"{at + 2}.weight"]
        noise = rng.normal(0, 0.2, out.shape).astype(np.float32)
        for name in (f"{at}.weight", f"{at}.bias"):
            near = made[name] * (1 + rng.normal(0, 2e-3, made[name].shape)).astype(np.float32)
            made[name] = np.concatenate([made[name], near])
        made[f"{at + 2}.weight"] = np.concatenate([out / 2 + noise, out / 2 - noise], 1)
    return made


def scores_moved(tensors: Tensors) -> Tensors:
    """One vector in all rows of the last layer moves all scores alike."""
    rows = tensors["4.weight"]
    vector = np.random.default_rng(10).normal(0, 9, (1, rows.shape[1]))
    return tensors | {"4.weight": rows + vector.astype(np.float32)}


@pytest.mark.parametrize(
    "edits",
    [
        (dead_units, order_of_units),  # bounded values, and lines that drown no others
        (split_units, order_of_units),  # copies are joined
        (scores_moved,),  # what moved all rows is taken off by the reference
        (scores_moved, order_of_units),
    ],
)
def test_free_edits_of_an_mlp_are_undone(
    edits: tuple[Edit, ...], mlp: Host, output_layer: Host, tmp_path: Path
) -> None:
    host = output_layer if scores_moved in edits else mlp
    suspect = host.marked
    for edit in edits:
        suspect = edit(suspect)
    assert host.read(suspect, tmp_path).owned


def keys_of(reference: Suspect, shapes: Mapping[str, tuple[int, ...]], count: int) -> Iterator[Key]:
    """Undated keys that commit to a reference of the cheat's own."""
    with open_weights(reference) as weights:
        frozen = {REFERENCE: commit_reference(weights)}
    for _ in range(count):
        yield Stamp(tuple(shapes), bits=128).generate_key(shapes, owner="Mallory", frozen=frozen)


READ = {"0.weight": (96, 48), "2.weight": (96, 96)}


@pytest.mark.parametrize(
    "made",
    [
        lambda suspect: suspect,  # the suspect itself: its message is drawn afterwards all the same
        order_of_units,
        dead_units,
        lambda suspect: {name: np.full_like(each, 1) for name, each in suspect.items()},
        lambda suspect: {name: np.zeros_like(each) for name, each in suspect.items()},
        lambda suspect: {name: 1e30 * np.sign(each) for name, each in suspect.items()},
        scores_moved,
    ],
)
def test_no_committed_reference_bends_a_reading(made: Edit, tmp_path: Path) -> None:
    """A reference made of the suspect, or of nothing, changes no chance: the message is younger."""
    suspect = save(tmp_path / "suspect", chain(3))
    reference = save(tmp_path / "reference", made(chain(3)))
    found = [
        verify(SuspectWithReference(suspect, reference), key)
        for key in keys_of(reference, READ, 12)
    ]
    assert all(not each.owned and each.test_count == 2 for each in found)
    assert all(each.subject.reference and each.subject.reference.committed for each in found)
    matched = np.mean([each.matched for each in found])  # the better one of two readings
    assert 60 < matched < 76


def test_the_order_of_a_reference_s_tensors_decides_nothing(tmp_path: Path) -> None:
    """Layers "1", "01", "001" count alike, and a digest fixes no order: names break the tie."""
    rng = np.random.default_rng(11)
    names = [f"{'0' * zeros}1.weight" for zeros in range(5)]
    made = [rng.normal(size=(24, 24)).astype(np.float32) for _ in range(10)]
    suspect = save(tmp_path / "suspect", dict(zip(names, made[5:], strict=True)))
    tensors, digests, read = dict(zip(names, made[:5], strict=True)), set(), set()
    for _ in range(6):
        order = {name: tensors[name] for name in rng.permutation(names).tolist()}
        other = save(tmp_path / "other", order)
        with open_weights(other) as weights:
            digests.add(compute_model_digest(weights))
        with open_weights(suspect) as weights:
            shapes = dict.fromkeys(names, (24, 24))
            found = realign_suspect(weights, Reference(other), shapes, unmarked=names)
        read.add(b"".join(found.tensors[name].tobytes() for name in names))
    assert len(digests) == len(read) == 1


class WithViews(SafetensorsWeights):
    """A file that shows some of its tensors once more, by names that no digest holds."""

    def __init__(self, path: Path, views: Mapping[str, str]) -> None:
        super().__init__(path)
        self._shown = views
        shown = {new: TensorInfo(self.tensors[old].shape, "F32") for new, old in views.items()}
        self.tensors, self.views = {**self.tensors, **shown}, frozenset(views)

    def _load(self, name: str) -> NDArray[Any]:
        return super()._load(self._shown.get(name, name))

    def read_part(self, name: str, start: int, count: int) -> NDArray[Any]:
        return super().read_part(self._shown.get(name, name), start, count)


def test_no_view_takes_part_in_a_committed_reference(tmp_path: Path) -> None:
    """Which of many tensors "0.weight" is a view of could be chosen afterwards: it is not there."""
    tensors = {f"pool{i}": each for i, each in enumerate(chain(4)[n] for n in ("2.weight",) * 9)}
    path = save(tmp_path / "pool", tensors)
    committed = WithViews(path, {"0.weight": "pool1", "2.weight": "pool3"})
    key = next(keys_of(committed, {"0.weight": (96, 96), "2.weight": (96, 96)}, 1))
    suspect = save(
        tmp_path / "suspect", {"0.weight": chain(5)["2.weight"], "2.weight": chain(6)["2.weight"]}
    )
    for first in ("pool1", "pool2"):
        weights = WithViews(path, {"0.weight": first, "2.weight": "pool3"})
        verdict = verify(SuspectWithReference(suspect, Reference(weights)), key)
        facts = verdict.subject.reference
        assert not verdict.owned
        assert facts is not None
        assert facts.refused is not None


def test_an_architecture_that_was_named_needs_a_date(mlp: Host, tmp_path: Path) -> None:
    """Of many wrong architectures one may fit: the key commits to its own."""
    suspect = save(tmp_path / "suspect", order_of_units(mlp.marked))
    assert verify(SuspectWithReference(suspect, mlp.before), mlp.key).owned
    weights, units = Reference(mlp.before).open_reference()
    weights.close()
    alone = PermutationGroup(
        1, (GroupMember("4.weight", 0, 0, 1, 1, 3),), (), (ScaleDomain(scalable=False),), False
    )
    named = Reference(mlp.before, (*units, alone))
    verdict = verify(SuspectWithReference(suspect, named), mlp.key)
    assert not verdict.owned
    assert verdict.forgery_bits == 0


HOSTILE: dict[str, NDArray[Any]] = {
    "zeros": np.zeros((32, 16), np.float32),
    "one row": np.random.default_rng(1).normal(size=(1, 512)).astype(np.float32),
    "one column": np.random.default_rng(1).normal(size=(512, 1)).astype(np.float32),
    "denormal": (np.random.default_rng(1).normal(size=(32, 16)) * 1e-42).astype(np.float32),
    "a range of e^100": np.exp(np.random.default_rng(1).normal(0, 30, (32, 16))),
    "a range that squares leave": np.exp(np.random.default_rng(1).normal(0, 200, (32, 16))),
    "constant": np.full((32, 16), 7, np.float32),
    "the largest": np.full((32, 16), 3e38, np.float32),
    "one row of ones": np.eye(32, 1).repeat(16, 1).astype(np.float32),
}


@pytest.mark.parametrize("scheme", [Stamp("w", bits=128), Uchida("w", bits=128)])
@pytest.mark.parametrize("tensor", HOSTILE.values(), ids=HOSTILE)
def test_tensors_without_units_read_as_chance(tensor: NDArray[Any], scheme: Stamp | Uchida) -> None:
    """Bits of an odd tensor may all be 0 or hang together: the message is uniform beside them."""
    keys = [scheme.generate_key({"w": tensor.shape}, owner="Mallory") for _ in range(40)]
    found = [scheme.extract({"w": tensor}, key) for key in keys]
    assert 58 < np.mean([each.match_count for each in found]) < 70
    assert all(each.scores is not None and np.isfinite(each.scores).all() for each in found)


def test_the_best_of_many_keys_is_far_from_enough(tmp_path: Path) -> None:
    """Keys are drawn until one fits: forgery bits count the tries, and there are not enough."""
    suspect = chain(7)
    scheme = Stamp("2.weight", bits=128)
    keys = (scheme.generate_key({"2.weight": (96, 96)}, owner="Mallory") for _ in range(300))
    best = max(keys, key=lambda key: scheme.extract(suspect, key).match_count)
    verdict = verify(save(tmp_path / "suspect", suspect), best, alpha=0.01)
    assert not verdict.owned
    assert verdict.forgery_bits < 20


def test_decoys_of_the_same_shape_are_counted(tmp_path: Path) -> None:
    """The key names a tensor that the suspect has not, and takes the best: each is a test."""
    rng = np.random.default_rng(12)
    suspect = {f"t{i}": rng.normal(size=(32, 16)).astype(np.float32) for i in range(60)}
    key = Stamp("none", bits=128).generate_key({"none": (32, 16)}, owner="Mallory")
    verdict = verify(save(tmp_path / "suspect", suspect), key)
    assert not verdict.owned
    assert verdict.test_count == 60


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_number_that_is_none_is_an_error_of_one_line(
    value: float, decoder: Host, tmp_path: Path
) -> None:
    """A word that is never used is no number: nothing is read, and no mark is said to be gone."""
    table = decoder.marked[TABLE].copy()
    table[-1] = value
    with pytest.raises(CountermarkError, match="not finite"):
        decoder.read(reordered(decoder.marked | {TABLE: table}), tmp_path)
