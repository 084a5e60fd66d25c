"""The training half of the learnt reader: who gets which gradient, what it is shown, and when."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from keys import one_line
from readers import BITS, material
from torch import Tensor, nn

from countermark.embedding import Embedding
from countermark.errors import ConfigError, LoopError, MarkNotTakenError
from countermark.keys.key import Key
from countermark.schemes.independent_network.augmentation import MissingUnits
from countermark.schemes.independent_network.scheme import IndependentNetwork
from countermark.schemes.independent_network.training import IndependentNetworkTraining
from countermark.schemes.learnt_reader import SIBLINGS, MlpReader
from countermark.verification.verify import read_suspect, verify

LAYER, SHAPE = "2.weight", (6, 12)
OWN_READER = "unit.readers:linear_reader"
MANU = {"mode": "manu", "convergence_std": 0.5, "convergence_epochs": 2, "start_epoch": 2}
FORMS: dict[str, dict[str, Any]] = {
    "auto": {},
    "few negatives": {"negatives": 3},
    "no unit missing": {"positives": 0},
    "auto published": {"as_published": True},
    "manu": MANU,
    "manu published": {**MANU, "as_published": True},
    "own reader": {"reader": OWN_READER},
    "own reader, manu": {"reader": OWN_READER, **MANU},
}
every_form = pytest.mark.parametrize("form", FORMS)


def network(**fields: Any) -> IndependentNetwork:
    return IndependentNetwork.from_fields({"layer": LAYER, "bits": BITS, "hidden": 32, **fields})


def host(seed: int = 1) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 12), nn.ReLU(), nn.Linear(12, 6))


def marked_weight(model: nn.Module) -> nn.Parameter:
    return model.get_parameter(LAYER)


class Course:
    """A host that learns something beside its mark, a step or an epoch at a time."""

    def __init__(self, form: str, *, unmarked: list[nn.Module] | None = None) -> None:
        self.model = host()
        self.mark = network(**FORMS[form]).embed(
            self.model, owner="ACME Inc.", material=material(1), unmarked=unmarked or [],
            siblings=[host(7), host(8)],
        )  # fmt: skip
        self.optimizer = torch.optim.Adam(self.model.parameters(), 2e-3)
        self.steps = 0

    def train(self, steps: int) -> None:
        for _ in range(steps):
            generator = torch.Generator().manual_seed(self.steps)
            images = torch.randn(8, 5, generator=generator)
            loss = (self.model(images) - images.sum(dim=1, keepdim=True)).square().mean()
            (loss + self.mark.penalty()).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.steps += 1
            if self.steps % 10 == 0:
                self.mark.end_epoch()

    def state(self) -> dict[str, Any]:
        states = (self.model.state_dict(), self.optimizer.state_dict(), self.mark.state())
        return dict(zip(("model", "optimizer", "mark"), states, strict=True))

    def restore(self, state: dict[str, Any], steps: int) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.mark.restore(state["mark"])
        self.steps = steps


def taken(form: str) -> tuple[nn.Module, Key]:
    """A host with a mark in it, and its key."""
    course = Course(form)
    with course.mark:
        course.train(1000 if "own" in form else 600)
    return course.model, course.mark.key


def training_of(key: Key, unmarked: int = 1, **fields: Any) -> IndependentNetworkTraining:
    models = [{LAYER: marked_weight(host(n)).detach().numpy()} for n in range(1, 1 + unmarked)]
    return IndependentNetworkTraining(network(**fields, units=(1,)), key, models)


def fresh_key(**fields: Any) -> Key:
    return network(**fields, units=(1,)).generate_key(
        {LAYER: SHAPE}, owner="ACME Inc.", material=material(1)
    )


def tensors_of(training: IndependentNetworkTraining) -> dict[str, Tensor]:
    return {
        name: torch.from_numpy(each) for name, each in training.export_post_commit_tensors().items()
    }


def plain_logits(tensors: dict[str, Tensor], vectors: Tensor) -> Tensor:
    """The paper's network in float64, by torch alone."""
    gate, first, last = (tensors[f"reader.{name}"] for name in ("gate", "first", "last"))
    return F.linear(F.relu(F.linear(vectors * gate, first)), last)


def gradients(training: IndependentNetworkTraining) -> dict[str, Tensor]:
    """What the reader's last step was taken with."""
    found = dict(training._reader.named_parameters())
    return {f"reader.{name}": cast(Tensor, each.grad) for name, each in found.items()}


# --- gradients


def test_the_host_gets_the_strength_and_the_reader_does_not() -> None:
    """The published form: L1 + λ·L2 for the host, L2 for the reader."""
    key = fresh_key(as_published=True, strength=0.07)
    training = training_of(key, as_published=True, strength=0.07)
    before = {n: each.double().requires_grad_() for n, each in tensors_of(training).items()}
    w = (0.3 * torch.randn(SHAPE, generator=torch.Generator().manual_seed(3))).requires_grad_()
    plain = w.detach().double().requires_grad_()
    message = torch.from_numpy(key.message).double()
    expected = F.binary_cross_entropy_with_logits(
        plain_logits(before, plain.reshape(1, -1))[0], message
    )
    expected.backward()

    found = training.loss([w])
    (3 * found).backward()
    assert found.item() == pytest.approx(0.07 * expected.item(), rel=1e-5)
    torch.testing.assert_close(w.grad.double(), 3 * 0.07 * plain.grad, rtol=1e-4, atol=1e-9)
    for name, each in gradients(training).items():
        torch.testing.assert_close(each.double(), before[name].grad, rtol=1e-4, atol=1e-9)


def test_the_gradient_is_the_slope() -> None:
    key = fresh_key(as_published=True)
    w = 0.3 * torch.randn(SHAPE, generator=torch.Generator().manual_seed(3))
    w.requires_grad_()
    training_of(key, as_published=True).loss([w]).backward()
    assert w.grad is not None
    for at in ((0, 0), (3, 7), (5, 11)):
        nudge = torch.zeros(SHAPE)
        nudge[at] = 1e-2
        up, down = (
            training_of(key, as_published=True).loss([(w + sign * nudge).detach()]).item()
            for sign in (1, -1)
        )
        assert w.grad[at].item() == pytest.approx((up - down) / 2e-2, rel=0.02, abs=1e-6)


@pytest.mark.parametrize(("negatives", "positives"), [(1, 0), (4, 1), (8, 4), (11, 3)])
def test_copies_are_taught_the_message_and_unmarked_vectors_coins(
    negatives: int, positives: int
) -> None:
    """The mean over the host and its copies, and that over unmarked vectors with targets ½."""
    fields = {"negatives": negatives, "positives": positives}
    key = fresh_key(**fields)
    training, again = training_of(key, 3, **fields), training_of(key, 3, **fields)
    before = {n: each.double().requires_grad_() for n, each in tensors_of(training).items()}
    w = 0.3 * torch.randn(SHAPE, generator=torch.Generator().manual_seed(3))
    kept, rows = (each.double() for each in again._draw_companions(w.reshape(-1)))
    assert (kept.shape, rows.shape) == ((1 + positives, 72), (negatives, 72))
    double = w.double().reshape(1, -1).requires_grad_()
    message = torch.from_numpy(key.message).double()
    marked = plain_logits(before, double * kept)  # (1 + positives, 128)
    others = plain_logits(before, rows)
    taught = F.binary_cross_entropy_with_logits(marked, message.expand_as(marked))
    (taught + F.binary_cross_entropy_with_logits(others, torch.full_like(others, 0.5))).backward()
    found = training.loss([w.requires_grad_()])
    found.backward()
    of_the_host = F.binary_cross_entropy_with_logits(marked[0], message)
    assert found.item() == pytest.approx(0.05 * of_the_host.item(), rel=1e-5)
    for name, each in gradients(training).items():
        torch.testing.assert_close(each.double(), before[name].grad, rtol=1e-4, atol=1e-9)
    assert w.grad is not None
    assert double.grad is not None
    torch.testing.assert_close(
        w.grad.double().reshape(1, -1), 0.05 * double.grad, rtol=1e-4, atol=1e-9
    )


def test_copies_lack_the_loudest_units_or_any() -> None:
    training = training_of(fresh_key(dropped=0.75), dropped=0.75)
    w = torch.randn(SHAPE, generator=torch.Generator().manual_seed(5))
    w[:, 7] *= 100
    by_norm = w.norm(dim=0).argsort(descending=True).tolist()
    lacking, any_of_them = [0] * 10, [0] * 12
    for _ in range(300):
        kept, _ = training._draw_companions(w.reshape(-1))
        masks = kept.reshape(5, *SHAPE)
        assert masks[0].all()
        assert torch.equal(masks.amin(dim=1), masks.amax(dim=1))  # a unit is there, or is not
        gone = [(each[0] == 0).nonzero().flatten().tolist() for each in masks[1:]]
        for units in (gone[0], gone[2]):
            assert set(units) == set(by_norm[: len(units)])
        for units in gone:
            lacking[len(units)] += 1
        for unit in gone[1]:
            any_of_them[unit] += 1
    assert min(lacking[1:9]) > 60  # 1,200 copies lack 0 to 9 of 12 units
    assert max(any_of_them) < 1.5 * min(any_of_them)


def test_pruned_copies_lack_the_smallest_weights() -> None:
    training = training_of(fresh_key(pruned=0.95), pruned=0.95)
    w = torch.randn(SHAPE, generator=torch.Generator().manual_seed(5)).reshape(-1)
    by_size = w.abs().argsort().tolist()
    shares = []
    for _ in range(50):
        kept, _ = training._draw_companions(w)
        units = kept[[1, 3]].reshape(2, *SHAPE)
        assert torch.equal(units.amin(dim=1), units.amax(dim=1))
        for mask in kept[[2, 4]]:
            gone = (mask == 0).nonzero().flatten().tolist()
            assert set(gone) == set(by_size[: len(gone)])
            shares.append(len(gone) / len(w))
    assert 0.85 < max(shares) <= 0.95
    assert min(shares) < 0.1


def test_half_of_the_unmarked_vectors_lack_units_too() -> None:
    training, whole = (training_of(fresh_key(), 3) for _ in range(2))
    whole._missing = None
    w = torch.randn(72, generator=torch.Generator().manual_seed(4))
    lacking = torch.zeros(8)
    for _ in range(200):
        kept, unmarked = training._draw_companions(w)
        alone, complete = whole._draw_companions(w)
        assert (len(kept), len(alone)) == (5, 1)
        assert complete.all()  # no weight is zero
        assert (unmarked == complete)[unmarked != 0].all()  # the same vectors else
        lacking += (unmarked == 0).any(dim=1)
    assert (lacking > 60).all()
    assert (lacking < 120).all()


def test_weights_that_belong_to_no_unit_never_lack() -> None:
    scheme = network(layer=["0.weight", LAYER], units=[-1, 1])
    key = replace(fresh_key(), tensors={"0.weight": (12, 5), LAYER: SHAPE})
    masks = MissingUnits(scheme, key).draw_masks(torch.randn(40, 132))
    assert masks[:, :60].all()
    assert not masks[:, 60:].all()


def test_a_reader_that_knows_every_bit_rests() -> None:
    training = training_of(fresh_key(as_published=True), as_published=True)
    reader = training._reader
    w = torch.full(SHAPE, 0.3)
    signs = 2.0 * torch.from_numpy(training.key.message).float() - 1
    with torch.no_grad():
        for name, values in (
            ("first", torch.ones(32, 72)),
            ("last", signs[:, None].expand(-1, 32)),
        ):
            reader.get_parameter(name).copy_(values)
    before = tensors_of(training)
    w.requires_grad_()
    training.loss([w]).backward()
    assert w.grad is not None
    assert not w.grad.any()
    assert all(torch.equal(before[name], each) for name, each in tensors_of(training).items())


def test_reading_and_training_halves_agree() -> None:
    key = fresh_key()
    training = training_of(key)
    w = torch.randn(5, 72)
    tensors = training.export_post_commit_tensors()
    reader = MlpReader(*(tensors[f"reader.{name}"] for name in ("gate", "first", "last")))
    np.testing.assert_allclose(
        reader(w.numpy()), training._reader(w).detach().numpy(), rtol=1e-4, atol=1e-6
    )


def test_the_reader_follows_from_the_key_alone() -> None:
    one, again = (training_of(fresh_key()).export_post_commit_tensors() for _ in range(2))
    other = training_of(replace(fresh_key(), material=material(2))).export_post_commit_tensors()
    for name in one:
        assert np.array_equal(one[name], again[name])
    assert not np.array_equal(one["reader.first"], other["reader.first"])
    assert (one["reader.gate"] == 1).all()
    for name, shape in (("first", (32, 72)), ("last", (128, 32))):
        drawn = fresh_key().make_stream("reader", name).draw_normal_rows(*shape)
        expected = (drawn * math.sqrt(2 / sum(shape))).astype(np.float32)
        np.testing.assert_allclose(one[f"reader.{name}"], expected, rtol=1e-6)


# --- what is shown


def test_the_published_form_is_shown_the_host_alone() -> None:
    training = training_of(fresh_key(as_published=True), as_published=True)
    seen: list[tuple[int, ...]] = []
    training._reader.register_forward_pre_hook(lambda _, given: seen.append(given[0].shape))
    training.loss([torch.ones(SHAPE)])
    assert seen == [(1, 72)]
    assert training._negatives is None
    assert training._missing is None


def test_negatives_are_what_they_are_called() -> None:
    training = training_of(fresh_key(negatives=8), 3, negatives=8)
    assert training._negatives is not None
    shown = [marked_weight(host(n)).detach().reshape(-1) for n in (1, 2, 3)]
    w = torch.randn(72, generator=torch.Generator().manual_seed(4)) * 0.3 + 0.1
    columns = {tuple(each) for each in w.reshape(SHAPE).t().tolist()}
    noise, met = [], set()
    for _ in range(40):
        rows = training._negatives.draw_rows(w)
        permuted, others, mixed = rows[:2], rows[2:4], rows[4:6]
        for each in permuted:
            assert {tuple(column) for column in each.reshape(SHAPE).t().tolist()} == columns
            assert not torch.equal(each, w)
        met |= {at for at, known in enumerate(shown) for each in others if torch.equal(each, known)}
        for each in mixed:
            of_them = [torch.equal(each.sort().values, known.sort().values) for known in shown]
            assert sum(of_them) == 1
            assert not any(torch.equal(each, known) for known in shown)
            source = shown[of_them.index(True)].reshape(SHAPE).t().tolist()
            assert sorted(each.reshape(SHAPE).t().tolist()) == sorted(source)
        noise.append(rows[6])
        assert torch.equal(rows[7], -w)
    assert met == {0, 1, 2}
    drawn = torch.stack(noise)
    assert drawn.std().item() == pytest.approx(w.std().item(), rel=0.05)
    assert abs(drawn.mean().item()) < 0.03


def test_every_kind_has_its_turn_however_few_are_shown() -> None:
    training, all_at_once = (
        training_of(fresh_key(negatives=n), 1, negatives=n) for n in (1, 8)
    )  # fmt: skip
    w = torch.randn(72)
    assert training._negatives is not None
    assert all_at_once._negatives is not None
    single = torch.cat([training._negatives.draw_rows(w) for _ in range(8)])
    whole = all_at_once._negatives.draw_rows(w)
    for fixed in (-w, marked_weight(host(1)).detach().reshape(-1)):
        counts = [int((rows == fixed).all(dim=1).sum()) for rows in (single, whole)]
        assert counts[0] == counts[1] > 0


def test_the_start_and_the_given_models_are_shown(tmp_path: Path) -> None:
    start = marked_weight(host()).detach().clone().reshape(-1)
    course = Course("auto", unmarked=[host(2)])
    with torch.no_grad():
        marked_weight(course.model).zero_()  # it was noted before
    training = cast(IndependentNetworkTraining, course.mark._training)
    assert training._negatives is not None
    expected = torch.stack([start, marked_weight(host(2)).detach().reshape(-1)])
    assert torch.equal(training._negatives._unmarked, expected)


def test_training_makes_coins_of_what_it_was_shown() -> None:
    course = Course("auto", unmarked=[host(2)])
    with course.mark:
        course.train(1200)
    key = course.mark.key
    assert read_suspect(course.model, key).match_count == BITS
    losses = [read_suspect(host(n), key).cross_entropy for n in (1, 2)]
    assert losses == pytest.approx([math.log(2)] * 2, abs=0.1)
    flipped = host()
    with torch.no_grad():
        marked_weight(flipped).copy_(-marked_weight(course.model))
    assert read_suspect(flipped, key).cross_entropy == pytest.approx(math.log(2), abs=0.1)
    others = [host(seed) for seed in (11, 12, 13)]
    verdict = verify(course.model, key, alpha=1e-3, assume_dated=True, unmarked=others)
    assert verdict.outcome == "owned", verdict.explain()
    assert key.learnt[SIBLINGS].shape == (2,)


def test_the_published_reader_reads_its_message_from_others_as_well() -> None:
    """Why the criterion is refused: shown the host alone, it has memorised."""
    _, key = taken("auto published")
    assert np.mean([read_suspect(host(n), key).match_count for n in range(1, 6)]) > 0.8 * BITS


# --- one step of the reader for each of the host


def learnt(mark: Embedding) -> dict[str, bytes]:
    training = mark._training
    assert training is not None
    return {name: each.tobytes() for name, each in training.export_post_commit_tensors().items()}


@pytest.mark.parametrize("form", ["auto", "auto published", "own reader"])
def test_the_same_weights_are_learnt_from_once(form: str) -> None:
    course = Course(form)
    with course.mark as mark:
        before = learnt(mark)
        first = mark.penalty()
        after = learnt(mark)
        assert after != before
        for _ in range(3):
            assert torch.equal(mark.penalty(), first)
            assert learnt(mark) == after
        with torch.no_grad():
            marked_weight(course.model)[0, 0] += 1e-3
        assert not torch.equal(mark.penalty(), first)
        assert learnt(mark) != after


def test_each_changed_weight_is_one_step() -> None:
    course = Course("auto")
    training = cast(IndependentNetworkTraining, course.mark._training)
    with course.mark as mark:
        for step in range(1, 6):
            mark.penalty()
            mark.penalty()
            (taken_steps,) = {
                int(each["step"]) for each in training._optimizer.state_dict()["state"].values()
            }
            assert taken_steps == step
            with torch.no_grad():
                marked_weight(course.model).mul_(1.01)


def test_accumulated_gradients_are_those_of_one_batch() -> None:
    found = []
    for parts in (1, 4):
        course = Course("auto")
        with course.mark as mark:
            for _ in range(parts):
                (mark.penalty() / parts).backward()
        found.append((marked_weight(course.model).grad, learnt(mark)))
    (one, reader), (four, same) = found
    assert one is not None
    assert four is not None
    torch.testing.assert_close(one, four)
    assert reader == same


@pytest.mark.parametrize("mode", ["manu", "auto"])
@pytest.mark.parametrize("published", [True, False])
def test_the_gate_of_manu_never_moves(mode: str, published: bool) -> None:
    course = Course(mode + " published" * published)
    with course.mark:
        course.train(60)
        key = course.mark.drawn_key
    assert key is not None
    gate = key.learnt["reader.gate"]
    if mode == "manu":
        assert np.array_equal(gate, key.frozen[f"mask.{LAYER}"])
        assert 0 < gate.sum() <= gate.size
    else:
        assert (gate != 1).all()


def test_nothing_converged_is_one_line_with_the_count() -> None:
    fields = {**MANU, "convergence_std": 1e-9}
    model = host()
    with network(**fields).embed(model, owner="A") as mark:
        mark.end_epoch()
        with torch.no_grad():
            marked_weight(model).add_(0.1)
        with pytest.raises(ConfigError, match="0 of 72 weights have converged") as caught:
            mark.end_epoch()
    one_line(caught.value)


def test_before_the_mask_there_is_no_penalty() -> None:
    course = Course("manu")
    with course.mark as mark:
        assert (mark.penalty().item(), mark.drawn_key, mark.read()) == (0, None, None)
        course.train(20)
        assert mark.penalty().item() > 0
        assert mark.drawn_key is not None


# --- going on


@every_form
@pytest.mark.parametrize("at", [5, 25, 37])
def test_going_on_from_a_checkpoint_is_bit_exact(form: str, at: int) -> None:
    whole, half = Course(form), Course(form)
    with whole.mark as one, half.mark as other:
        whole.train(at)
        half.train(at)
        for mark in (one, other):
            mark.penalty()  # as a loop that shows its loss before it saves
        saved = io.BytesIO()
        torch.save(half.state(), saved)
        whole.train(30)
    saved.seek(0)
    again = Course(form)
    with again.mark:
        again.restore(torch.load(saved, weights_only=True), at)
        again.train(30)
    assert torch.equal(marked_weight(whole.model), marked_weight(again.model))
    assert learnt(whole.mark) == learnt(again.mark)
    key, same = whole.mark.drawn_key, again.mark.drawn_key
    assert key is not None
    assert same is not None
    assert key.commitment == same.commitment


# --- the key


@pytest.mark.parametrize("form", ["auto", "manu", "own reader", "own reader, manu"])
def test_the_key_finds_the_mark_and_no_other_model(form: str, tmp_path: Path) -> None:
    model, key = taken(form)
    key.save(tmp_path / "a.key")
    loaded = Key.load(tmp_path / "a.key").with_trusted_code(network(**FORMS[form]).reader_code)
    others = [host(seed) for seed in (11, 12, 13)]
    verdict = verify(model, loaded, alpha=1e-3, assume_dated=True, unmarked=others)
    expected = "no_verdict" if "own" in form else "owned"  # so small a reader tells too little
    assert (verdict.outcome, verdict.log10_p) == (expected, verdict.floor), verdict.explain()
    assert loaded.commitment == key.commitment
    for seed in (1, 2, 3):
        verdict = verify(host(seed), loaded, alpha=1e-3, assume_dated=True)
        assert verdict.outcome == "not_proven", verdict.explain()


@pytest.mark.parametrize("form", ["own reader", "own reader, manu"])
def test_a_reader_of_ones_own_is_run_only_when_trusted(form: str, tmp_path: Path) -> None:
    course = Course(form)
    with course.mark:
        course.train(30)
    key = course.mark.drawn_key
    assert key is not None
    key.save(tmp_path / "a.key")
    loaded = Key.load(tmp_path / "a.key")
    for code in (None, "", "mlp", "unit.readers:wrong_shape", OWN_READER + " "):
        with pytest.raises(ConfigError, match="reads with code of its own") as caught:
            verify(course.model, loaded.with_trusted_code(code))
        assert OWN_READER in one_line(caught.value)
    found = read_suspect(course.model, loaded.with_trusted_code(OWN_READER))
    expected = read_suspect(course.model, key)
    assert found.scores is not None
    assert expected.scores is not None
    assert np.array_equal(found.scores, expected.scores)


@pytest.mark.parametrize(
    ("reader", "said"),
    [
        ("unit.readers:nothing", "cannot be made"),
        ("unit.no_such_module:nothing", "cannot be made"),
        (":", "cannot be made"),
        ("unit.readers:", "cannot be made"),
        ("unit.readers:wrong_shape", "gives logits [2, 129] for two vectors: expected [2, 128]"),
        ("unit.readers:wrong_inputs", "cannot be made"),
        ("unit.readers:no_module", "cannot be made"),
        ("unit.readers:failing", "72 inputs and 128 bits"),
        ("linear_reader", "expected 'mlp' or module:factory"),
    ],
)
def test_a_reader_that_cannot_be_made_is_one_line(reader: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        network(reader=reader).embed(host(), owner="A")
    assert said in one_line(caught.value)


def changed_tensor(key: Key, **changes: Any) -> Key:
    tensors: dict[str, Any] = {**key.learnt, **changes}
    return replace(key, learnt={n: each for n, each in tensors.items() if each is not None})


TRANSFORMS: dict[str, Callable[[Key], Key]] = {
    "missing": lambda key: changed_tensor(key, **{"reader.2.weight": None}),
    "one more": lambda key: changed_tensor(key, **{"reader.more": np.ones(3, np.float32)}),
    "many more": lambda key: changed_tensor(
        key, **{f"reader.\n{n}": np.ones(3, np.float32) for n in range(300)}
    ),
    "narrow": lambda key: changed_tensor(key, **{"reader.2.weight": np.ones((3, 3), np.float32)}),
    "no numbers": lambda key: changed_tensor(
        key, **{"reader.2.weight": np.full((128, 32), "a", dtype="U1")}
    ),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_tensors_that_do_not_fit_ones_own_reader_are_one_line(name: str) -> None:
    course = Course("own reader")
    key = course.mark.drawn_key
    assert key is not None
    with pytest.raises(ConfigError) as caught:
        read_suspect(course.model, TRANSFORMS[name](key))
    assert "does not fit" in one_line(caught.value)


def test_a_mark_that_has_not_taken_gives_no_key() -> None:
    course = Course("auto")
    with course.mark:
        course.train(3)
        with pytest.raises(LoopError):
            _ = course.mark.key
    with pytest.raises(MarkNotTakenError, match="bits are in the model, L2 is") as caught:
        _ = course.mark.key
    one_line(caught.value)


@pytest.mark.parametrize("siblings", [0, 1])
def test_too_few_siblings_are_warned_of(siblings: int) -> None:
    model = host()
    scheme = network(strength=1.0)
    given = [host(7)] * siblings
    with scheme.embed(model, owner="A", material=material(1), siblings=given) as mark:
        optimizer = torch.optim.Adam([marked_weight(model)], 1e-2)
        for _ in range(400):
            mark.penalty().backward()
            optimizer.step()
            optimizer.zero_grad()
    with pytest.warns(UserWarning, match="give 2 or more, or verify will answer no_verdict"):
        key = mark.key
    verdict = verify(model, key, alpha=1e-2, assume_dated=True)
    assert verdict.outcome == "no_verdict"
    assert f"on {siblings} held-out unmarked siblings" in verdict.reason
    assert verdict.reader is not None
    assert (verdict.reader.siblings, verdict.reader.threshold) == (siblings, None)
