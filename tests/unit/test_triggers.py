"""Marks in answers: labels, their null, what a key of triggers says of any suspect."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from keys import one_line
from numpy.typing import NDArray
from torch import nn

from countermark.errors import ConfigError, SuspectError
from countermark.keys.key import Key, KeyMaterial
from countermark.keys.messages import draw_trigger_labels
from countermark.keys.streams import KeyStream, frame
from countermark.predictors.base import Images, PredictorWithSubject, make_module_predictor
from countermark.results import statistics
from countermark.results.null_hypotheses import SecretLabels, compute_forgery_bits
from countermark.results.reading import Reading
from countermark.results.subject import Subject
from countermark.results.verdict import VerificationOptions
from countermark.schemes import load_scheme
from countermark.schemes.deepstego.scheme import DeepStego
from countermark.verification.verify import examine, read_suspect, verify

IMAGES = np.random.default_rng(1).integers(0, 256, (128, 1, 8, 8), dtype=np.uint8)
DATED = VerificationOptions(assume_dated=True, allow_test_key=True)


def key(seed: int = 1, classes: int = 10, owner: str = "ACME Inc.") -> Key:
    """A key whose triggers are noise; what made them does not matter here."""
    scheme = DeepStego(classes, 128)
    return scheme.generate_key(
        {"triggers": IMAGES}, owner=owner, material=KeyMaterial.from_test_seed(seed)
    )


class Answers:
    """A suspect that answers with given classes."""

    def __init__(self, classes: NDArray[np.int64]) -> None:
        self.classes = classes

    def __call__(self, images: Images) -> NDArray[np.int64]:
        assert images.dtype == np.uint8
        assert len(images) == len(self.classes)
        return self.classes


# --- labels


def test_labels_follow_from_salts_and_commitment() -> None:
    commitment, salts = bytes(range(32)), KeyMaterial.from_test_seed(1).draw_salts(1000)
    drawn = draw_trigger_labels(salts, commitment, 10)
    assert np.array_equal(drawn, draw_trigger_labels(salts, commitment, 10))
    assert (draw_trigger_labels(salts, bytes(32), 10) == drawn).mean() == pytest.approx(
        0.1, abs=0.05
    )
    others = KeyMaterial.from_test_seed(2).draw_salts(1000)
    assert (draw_trigger_labels(others, commitment, 10) == drawn).mean() == pytest.approx(
        0.1, abs=0.05
    )


def test_each_label_follows_from_its_own_salt_alone() -> None:
    salts = KeyMaterial.from_test_seed(1).draw_salts(100)
    assert len(set(salts)) == 100
    assert salts[:7] == KeyMaterial.from_test_seed(1).draw_salts(7)
    drawn = draw_trigger_labels(salts, bytes(32), 1000)
    assert draw_trigger_labels(salts[40:60], bytes(32), 1000).tolist() == drawn[40:60].tolist()


def test_a_word_beyond_the_last_multiple_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    end = (1 << 64) // 10 * 10
    words = iter(each.to_bytes(8, "big") for each in (end, (1 << 64) - 1, end - 1))
    monkeypatch.setattr(KeyStream, "take", lambda *_: next(words))
    assert draw_trigger_labels([bytes(32)], bytes(32), 10).tolist() == [9]


@pytest.mark.parametrize("classes", [2, 3, 10, 100, 1 << 20])
def test_labels_are_uniform_over_all_classes(classes: int) -> None:
    drawn = draw_trigger_labels(
        KeyMaterial.from_test_seed(1).draw_salts(20_000), b"c" * 32, classes
    )
    assert drawn.min() >= 0
    assert drawn.max() < classes
    if classes <= 100:
        counts = np.bincount(drawn, minlength=classes)
        assert scipy.stats.chisquare(counts).pvalue > 1e-4


def test_salts_do_not_follow_from_each_other() -> None:
    """As far as a test can see: no two share bytes more often than chance lets them."""
    drawn = np.frombuffer(
        b"".join(KeyMaterial.from_test_seed(1).draw_salts(20_000)), dtype=np.uint8
    )
    same = drawn.reshape(-1, 32)[1:] == drawn.reshape(-1, 32)[:-1]
    assert scipy.stats.binomtest(int(same.sum()), same.size, 1 / 256).pvalue > 1e-3


def test_one_changed_trigger_redraws_every_label() -> None:
    images = IMAGES.copy()
    images[0, 0, 0, 0] ^= 1
    other = replace(key(), frozen={**key().frozen, "triggers": images})
    same = key().draw_labels(128, 10) == other.draw_labels(128, 10)
    assert same.mean() < 0.3


# --- the null


@pytest.mark.parametrize(("matched", "classes"), [(0, 10), (13, 10), (60, 10), (128, 10), (90, 2)])
def test_secret_labels_is_the_exact_binomial_tail(matched: int, classes: int) -> None:
    expected = np.zeros(128, dtype=np.int64)
    read = np.where(np.arange(128) < matched, 0, 1)
    evidence = Reading(read, expected, choices=classes, unit="triggers")
    tail = scipy.stats.binom.logsf(matched - 1, 128, 1 / classes) / np.log(10)
    assert SecretLabels().compute_log10_p(evidence) == pytest.approx(tail, rel=1e-9, abs=1e-12)
    assert SecretLabels().compute_log10_floor(evidence) == pytest.approx(-128 * np.log10(classes))
    assert compute_forgery_bits(evidence) == pytest.approx(-tail * np.log2(10), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("classes", [2, 10, 100])
def test_no_suspect_is_accused_more_often_than_alpha_allows(classes: int) -> None:
    """1,000 keys against suspects of every habit: constant, skewed, sensible, random."""
    random = np.random.default_rng(classes)
    habits = [
        np.zeros(128, dtype=np.int64),
        random.integers(0, classes, 128),
        np.minimum(random.geometric(0.5, 128) - 1, classes - 1),
        np.arange(128) % classes,
    ]
    claims = {1e-2: 0, 1e-6: 0}
    for seed in range(1000):
        expected = key(seed, classes).draw_labels(128, classes)
        for each in habits:
            evidence = Reading(each, expected, choices=classes, unit="triggers")
            for alpha in claims:
                claims[alpha] += SecretLabels().compute_log10_p(evidence) <= np.log10(alpha)
    assert claims[1e-2] <= scipy.stats.binom(4000, 1e-2).ppf(0.99)
    assert claims[1e-6] == 0


# --- verdicts


def test_a_suspect_that_knows_the_labels_is_owned() -> None:
    verdict = examine(Answers(key().draw_labels(128, 10)), key(), DATED)
    assert (verdict.outcome, verdict.matched, verdict.unit) == ("owned", 128, "triggers")
    assert verdict.log10_p == pytest.approx(-128)
    assert verdict.payload is None
    assert "128 of 128 triggers (share of misses 0.0000" in verdict.explain()
    assert "payload" not in verdict.explain()
    assert any("can train them out" in limit for limit in verdict.limits)


def test_a_suspect_that_does_not_is_not_proven() -> None:
    verdict = examine(Answers(np.zeros(128, dtype=np.int64)), key(), DATED)
    assert verdict.outcome == "not_proven"
    assert any("classes can be renamed" in limit for limit in verdict.limits)


def test_what_is_not_answered_is_a_miss() -> None:
    answers = key().draw_labels(128, 10)
    answers[:68] = -1
    verdict = examine(Answers(answers), key(), DATED)
    assert (verdict.outcome, verdict.matched, verdict.answer_count) == ("owned", 60, 60)
    assert "60 of 128; the others are misses" in verdict.explain()
    assert verdict.log10_p == pytest.approx(statistics.compute_log10_binomial_tail(60, 128, 0.1))


def test_without_any_answer_there_is_no_verdict() -> None:
    verdict = examine(Answers(np.full(128, -1)), key(), DATED)
    assert (verdict.outcome, verdict.exit_code, verdict.unit) == ("no_verdict", 3, "triggers")
    assert "no answer that could be read to any of 128 triggers" in verdict.reason


def test_renamed_classes_are_not_proven() -> None:
    renamed = np.random.default_rng(3).permutation(10)[key().draw_labels(128, 10)]
    assert examine(Answers(renamed), key(), DATED).outcome == "not_proven"


def test_few_triggers_of_two_classes_prove_nothing_undated() -> None:
    scheme = DeepStego(2, 40)
    short = scheme.generate_key(
        {"triggers": IMAGES[:40]}, owner="ACME Inc.", material=KeyMaterial.generate()
    )
    verdict = verify(Answers(short.draw_labels(40, 2)), short)
    assert verdict.outcome == "no_verdict"
    assert "2^40" in verdict.reason


# --- suspects


class Constant(nn.Module):
    def __init__(self, scores: list[float]) -> None:
        super().__init__()
        self.scores = nn.Parameter(torch.tensor(scores))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        assert not self.training
        return self.scores.expand(len(images), -1)


def test_a_live_module_is_asked_in_eval_mode_and_left_as_it_was() -> None:
    model = Constant([0.0, 2.0, 1.0]).train()
    assert make_module_predictor(model, (0.0,), (255.0,))(IMAGES).tolist() == [1] * 128
    assert model.training


def test_scores_that_are_no_numbers_are_no_answer() -> None:
    model = Constant([0.0, float("nan"), 1.0])
    assert examine(model, key(), DATED).outcome == "no_verdict"


def test_a_module_sees_images_as_its_host_did() -> None:
    seen: list[torch.Tensor] = []

    class Watching(Constant):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            seen.append(images)
            return super().forward(images)

    make_module_predictor(Watching([1.0]), (100.0,), (50.0,))(IMAGES)
    expected = (torch.from_numpy(IMAGES).float() - 100) / 50
    assert torch.equal(torch.cat(seen), expected)


@pytest.mark.parametrize(
    ("model", "says"),
    [(nn.Linear(3, 3), "does not take images"), (nn.Flatten(0), "expected scores [128, classes]")],
)
def test_a_module_that_is_no_classifier_is_one_line(model: nn.Module, says: str) -> None:
    with pytest.raises(SuspectError) as caught:
        examine(model, key(), DATED)
    assert says in str(caught.value)


def test_answers_of_another_form_are_refused() -> None:
    with pytest.raises(ConfigError, match="expected classes"):
        read_suspect(lambda images: np.zeros((len(images), 10)), key())


def test_what_is_recorded_of_a_suspect_stands_in_the_verdict() -> None:
    suspect = PredictorWithSubject(Answers(np.zeros(128, dtype=np.int64)), lambda: Subject("x"))
    assert examine(suspect, key(), DATED).subject == Subject("x")


def test_a_file_alone_cannot_be_asked() -> None:
    with pytest.raises(SuspectError, match="build the model of a file first"):
        examine("model.safetensors", key(), DATED)


@pytest.mark.parametrize(
    "frozen", [{}, {"triggers": IMAGES[:100]}, {"triggers": IMAGES.astype(np.float32)}]
)
def test_a_key_without_its_triggers_is_refused(frozen: dict[str, NDArray[np.uint8]]) -> None:
    with pytest.raises(ConfigError, match="the key's triggers are"):
        load_scheme(replace(key(), frozen=frozen))
    with pytest.raises(ConfigError, match="the key's triggers are"):
        DeepStego(10, 128).generate_key(frozen, owner="A", material=KeyMaterial.from_test_seed(1))


def unrooted() -> dict[str, Key]:
    """Keys whose root does not follow from their secret and their triggers."""
    made, images = key(), IMAGES.copy()
    images[127, 0, 7, 7] ^= 1
    root = made.frozen["openings"]
    changes: dict[str, dict[str, Any]] = {
        "no root": {"openings": np.zeros(0, dtype=np.uint8)},
        "another root": {"openings": root ^ 1},
        "another dtype": {"openings": root.astype(np.int8)},
        "another shape": {"openings": root.reshape(1, 32)},
        "another trigger": {"triggers": images},
        "another order": {"triggers": IMAGES[::-1]},
    }
    found = {n: replace(made, frozen={**made.frozen, **each}) for n, each in changes.items()}
    other = replace(made, material=KeyMaterial.from_test_seed(2))
    return found | {"another secret": other, "none": replace(made, frozen={"triggers": IMAGES})}


@pytest.mark.parametrize("what", unrooted())
def test_a_key_whose_root_does_not_fit_is_refused(what: str) -> None:
    for act in (load_scheme, DeepStego(10, 128).read_committed_triggers):
        with pytest.raises(ConfigError) as caught:
            act(unrooted()[what])
        assert "do not follow from its secret and its triggers" in one_line(caught.value)


def test_the_root_is_that_of_salted_triggers() -> None:
    def sha(*parts: bytes) -> bytes:
        return hashlib.sha256(b"".join(parts)).digest()

    salts = KeyMaterial.from_test_seed(1).draw_salts(128)
    about = [sha(frame(b"trigger", b"uint8 [1, 8, 8]", each.tobytes())) for each in IMAGES]
    level = [sha(b"\0", frame(*each)) for each in zip(salts, about, strict=True)]
    while len(level) > 1:
        level = [sha(b"\1", *level[at : at + 2]) for at in range(0, len(level), 2)]
    root = key().frozen["openings"]
    assert (root.dtype, root.shape, root.tobytes()) == (np.uint8, (32,), level[0])


def test_another_null_must_be_one_of_the_scheme() -> None:
    with pytest.raises(ConfigError, match="has no null 'fair_coin' here: expected secret_labels"):
        verify(Answers(np.zeros(128, dtype=np.int64)), key(), null="fair_coin")
