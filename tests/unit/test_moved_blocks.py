"""Blocks put in, taken out or moved: found by values from before the mark, else by counted runs."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from keys import InMemory
from safetensors.numpy import save_file
from scipy import stats

from countermark.checkpoints import layouts, moved_blocks
from countermark.keys.key import Key, KeyMaterial
from countermark.results.verdict import VerificationOptions
from countermark.schemes.stamp.scheme import BEFORE, Stamp
from countermark.verification.identify import identify
from countermark.verification.verify import verify
from stamped import Tensors, draw_tensors, stamp_tensors

BLOCKS = 6
SHAPES = {
    f"model.layers.{block}.{end}": shape
    for block in range(BLOCKS)
    for end, shape in {"up.weight": (96, 64), "down.weight": (64, 96), "norm.weight": (64,)}.items()
} | {"model.embed.weight": (100, 64)}
MARKED = [name for name in SHAPES if "up" in name or "down" in name]


def arrange(tensors: Tensors, order: list[int | None], head: str = "model.layers.") -> Tensors:
    """Build a model of the given old blocks in order; None is a new block that adds nothing."""
    found = {name: each for name, each in tensors.items() if ".layers." not in name}
    ends = {name.split(".", 3)[3] for name in tensors if ".layers." in name}
    for block, old in enumerate(order):
        for end in ends:
            new = np.random.default_rng(block).normal(0, 0.02, SHAPES[f"model.layers.0.{end}"])
            new = new * (not end.startswith("down"))
            own = tensors[f"model.layers.{old}.{end}"] if old is not None else new
            found[f"{head}{block}.{end}"] = own.astype(np.float32)
    return found


ONE_RUN: dict[str, list[int | None]] = {
    "a block in front": [None, 0, 1, 2, 3, 4, 5],
    "two blocks in the middle": [0, 1, None, None, 2, 3, 4, 5],
    "the first block taken out": [1, 2, 3, 4, 5],
    "two blocks in the middle taken out": [0, 3, 4, 5],
    "up-scaled": [0, 1, 2, 3, 2, 3, 4, 5],
}
MORE: dict[str, list[int | None]] = {
    "a block after every second": [0, 1, None, 2, 3, None, 4, 5, None],
    "each block twice": [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5],
    "in another order": [5, 3, 1, 0, 2, 4],
    "one taken out and one put in": [None, 0, 1, 2, 4, 5],
    "half of them, and in another order": [3, 5, 4],
}


@pytest.fixture(scope="module")
def with_values(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tensors, Tensors, Key]:
    plain = draw_tensors(SHAPES)
    return (plain, *stamp_tensors(plain, tmp_path_factory.mktemp("with"), layer=MARKED))


@pytest.fixture(scope="module")
def without_values(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tensors, Tensors, Key]:
    plain, folder = draw_tensors(SHAPES), tmp_path_factory.mktemp("without")
    return (plain, *stamp_tensors(plain, folder, keep_before=False, layer=MARKED))


@pytest.mark.parametrize("kind", ONE_RUN | MORE)
def test_blocks_are_found_by_their_values_in_one_test(
    with_values: tuple[Tensors, Tensors, Key], kind: str
) -> None:
    plain, marked, key = with_values
    order = (ONE_RUN | MORE)[kind]
    verdict = verify(InMemory(arrange(marked, order)), key)
    assert verdict.owned
    assert verdict.test_count == (2 if {*range(BLOCKS)} <= {*range(len(order))} else 1)
    places = verdict.subject.tensors or {}
    for name, other in places.items():
        assert order[int(other.split(".")[2])] == int(name.split(".")[2])
    assert len(places) == 2 * len({*order} - {None})
    assert set(verdict.subject.missing) == set(MARKED) - set(places)
    innocent = verify(InMemory(arrange(plain, order)), key)
    assert innocent.outcome == "not_proven"
    assert innocent.test_count == verdict.test_count


def add_idle_blocks(tensors: Tensors, first: int, count: int) -> Tensors:
    """Add blocks of higher numbers, which no model uses; they share the memory of block 0."""
    ends = [name.split(".", 3)[3] for name in tensors if name.startswith("model.layers.0.")]
    return tensors | {
        f"model.layers.{block}.{end}": tensors[f"model.layers.0.{end}"]
        for block in range(first, first + count)
        for end in ends
    }


def test_another_state_dict_does_not_hide_a_moved_block(
    with_values: tuple[Tensors, Tensors, Key],
) -> None:
    plain, marked, key = with_values
    decoy = {f"ema.{name}": each for name, each in draw_tensors(SHAPES, 2).items()}
    for tensors, outcome in ((marked, "owned"), (plain, "not_proven")):
        moved = arrange(tensors, ONE_RUN["a block in front"])
        verdict = verify(InMemory({f"net.{n}": each for n, each in moved.items()} | decoy), key)
        # Each of the two by its names, and the moved one by its values.
        assert (verdict.outcome, verdict.test_count) == (outcome, 3)


@pytest.mark.parametrize("turned", [False, True], ids=["as stored", "transposed"])
def test_blocks_that_no_model_uses_do_not_hide_a_moved_block(
    with_values: tuple[Tensors, Tensors, Key], monkeypatch: pytest.MonkeyPatch, turned: bool
) -> None:
    monkeypatch.setattr(moved_blocks, "_MOST_PAIRS", 200)
    monkeypatch.setattr(layouts, "_MOST_BLOCKS", 10)
    plain, marked, key = with_values
    for tensors, outcome in ((marked, "owned"), (plain, "not_proven")):
        moved = arrange(tensors, ONE_RUN["a block in front"])
        many = add_idle_blocks(moved, BLOCKS + 1, 50)
        shown = {n: each.T if turned and ".layers." in n else each for n, each in many.items()}
        assert verify(InMemory(shown), key).outcome == outcome


@pytest.mark.parametrize("kind", ONE_RUN)
def test_without_values_one_run_is_tried_at_every_place(
    without_values: tuple[Tensors, Tensors, Key], kind: str
) -> None:
    plain, marked, key = without_values
    order = ONE_RUN[kind]
    verdict = verify(InMemory(arrange(marked, order)), key)
    assert verdict.owned
    assert verdict.test_count == min(BLOCKS, len(order)) + 1
    told = verdict.to_json()["corrections"]
    assert {"name": "readings tried", "factor": verdict.test_count} in told
    innocent = verify(InMemory(arrange(plain, order)), key)
    assert (innocent.outcome, innocent.test_count) == ("not_proven", verdict.test_count)


def test_without_values_nothing_else_is_tried(
    without_values: tuple[Tensors, Tensors, Key],
) -> None:
    _, marked, key = without_values
    assert verify(InMemory(marked), key).test_count == 1
    assert verify(InMemory(arrange(marked, MORE["in another order"])), key).test_count == 1
    gap = {name: each for name, each in marked.items() if ".layers.2." not in name}
    verdict = verify(InMemory(gap), key)
    assert (verdict.owned, verdict.test_count) == (True, 1)


def test_another_beginning_of_the_names_changes_nothing(
    with_values: tuple[Tensors, Tensors, Key],
) -> None:
    _, marked, key = with_values
    suspect = arrange(marked, ONE_RUN["a block in front"], head="module.model.layers.")
    verdict = verify(InMemory(suspect), key)
    assert (verdict.owned, verdict.test_count) == (True, 2)


def test_blocks_are_found_after_noise_and_training(
    with_values: tuple[Tensors, Tensors, Key],
) -> None:
    _, marked, key = with_values
    drawn = np.random.default_rng(5)
    noisy = {n: v + drawn.normal(0, 0.02, v.shape).astype(np.float32) for n, v in marked.items()}
    assert verify(InMemory(arrange(noisy, ONE_RUN["a block in front"])), key).owned


def test_all_names_may_be_unknown(with_values: tuple[Tensors, Tensors, Key]) -> None:
    plain, marked, key = with_values
    drawn = np.random.default_rng(7).permutation(len(marked))
    for tensors, outcome in ((marked, "owned"), (plain, "not_proven")):
        names = zip(drawn, tensors.values(), strict=True)
        verdict = verify(InMemory({f"tensor_{at}": values for at, values in names}), key)
        assert verdict.outcome == outcome
        assert verdict.test_count == 1


def test_identify_finds_moved_blocks(
    with_values: tuple[Tensors, Tensors, Key], tmp_path: Path
) -> None:
    _, marked, key = with_values
    suspect, folder = tmp_path / "suspect.safetensors", tmp_path / "key"
    save_file(arrange(marked, ONE_RUN["a block in front"]), suspect)
    key.save(folder)
    found = identify(suspect, [folder], VerificationOptions())
    assert len(found.found) == 1


# --- the null


ENDS = {"mlp.c_fc.weight": (16, 24), "mlp.c_proj.weight": (24, 16)}


@cache
def base(blocks: int, seed: int) -> Tensors:
    return draw_tensors(
        {f"h.{b}.{e}": shape for b in range(blocks) for e, shape in ENDS.items()}, seed
    )


def rearrange(blocks: int, seed: int) -> Tensors:
    """Build a model of blocks of the model before the mark, and of new ones."""
    drawn, new = np.random.default_rng(seed), base(blocks, seed)
    found = {}
    for block in range(blocks):
        old = int(drawn.integers(-1, 6))
        for end in ENDS:
            found[f"h.{block}.{end}"] = (
                base(6, 1)[f"h.{old}.{end}"] if old >= 0 else new[f"h.{block}.{end}"]
            )
    return found


def unmarked_models() -> list[Tensors]:
    """Models of 4 to 48 blocks that no key marked: strangers, and what the base was made to."""
    front = base(1, 9) | {
        f"h.{int(name.split('.')[1]) + 1}.{name.split('.', 2)[2]}": each
        for name, each in base(6, 1).items()
    }
    unknown = {f"tensor_{at}": each for at, each in enumerate(rearrange(8, 3).values())}
    transposed = {name: each.T for name, each in rearrange(24, 4).items()}
    return [front, base(4, 2), unknown, transposed, base(36, 5), rearrange(48, 6)]


def fresh_key(*, keep: bool) -> Key:
    """Draw a key for the model of 6 blocks, with or without its values."""
    tensors, material = base(6, 1), KeyMaterial.generate()
    scheme = Stamp(layer=tuple(tensors), bits=128, values=200)
    shapes = {name: each.shape for name, each in tensors.items()}
    kept = {
        f"{BEFORE}.{name}": tensors[name].reshape(-1)[place.start : place.stop]
        for name, place in scheme.draw_places(shapes, material).items()
    }
    return scheme.generate_key(shapes, owner="ACME", material=material, frozen=kept if keep else {})


def accuse_strangers(keys: int, models: list[Tensors]) -> None:
    """Assert that p is not too small too often: fresh keys on models that no key marked."""
    counts, total = [], 0
    for model in models:
        suspect = InMemory(model)
        verdicts = [verify(suspect, fresh_key(keep=n % 2 == 0)) for n in range(keys)]
        found = np.array([v.log10_p for v in verdicts if v.log10_p is not None])
        counts.append([int((found <= math.log10(x)).sum()) for x in (0.1, 0.01, 0.001)])
        total += len(found)
        assert len(found) >= keys // 2
    for n, rows in ((keys, counts), (keys * len(models), [np.sum(counts, axis=0)])):
        for row in rows:
            for x, count in zip((0.1, 0.01, 0.001), row, strict=True):
                assert count <= stats.binom.ppf(0.999, n, x), (x, count, n)


def test_strangers_are_not_accused() -> None:
    accuse_strangers(100, [unmarked_models()[0], unmarked_models()[3]])


@pytest.mark.slow
def test_many_strangers_are_not_accused() -> None:
    accuse_strangers(1000, unmarked_models())
