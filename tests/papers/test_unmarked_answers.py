"""The null of marks in answers, simulated on models that never saw one.

Every form of the trigger schemes, for 2, 10 and 100 classes: small networks on the bundled digits,
and suspects that answer anything. The data sets themselves: `test_unmarked_answers_real.py`.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from itertools import cycle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from false_claims import (
    FORMS,
    Frozen,
    Keys,
    Pairs,
    asked,
    check,
    form,
    keys_of,
    stego_frozen,
    stego_keys,
    trained,
)

from countermark.predictors.base import Images, Labels, Predictor, make_module_predictor
from countermark.results.verdict import VerificationOptions
from countermark.schemes.deepstego.scheme import DeepStego
from countermark.training.data import Dataset, load_data
from countermark.training.loop import seed_torch
from countermark.training.models import Value, build
from countermark.verification.verify import examine

CLASSES = (2, 10, 100)
ARCHITECTURES: list[tuple[str, dict[str, Value]]] = [
    ("mlp", {}), ("mlp", {"hidden": 24}), ("mlp", {"hidden": 128}), ("lenet", {"width": 0.5}),
]  # fmt: skip
# Pairs of a form and a number of classes. 50 fill the ten classes of a chi-square with five each.
# With 300 pairs, of six forms, `check` allows 8 claims at 1e-2, with 1,020 of them 18. If really
# one in twenty were claimed, 300 would show it with probability .966; 1,020 show one in thirty
# with .998. With 150, of three habits, it allows 5, and would show .06 with probability .89.
PAIRS = pytest.mark.parametrize(
    "pairs", [pytest.param(50, id="few"), pytest.param(170, id="many", marks=pytest.mark.slow)]
)
ANSWERED = 0.6  # by a suspect that answers now and then


@cache
def digits(classes: int) -> Dataset:
    """The bundled digits: odd or even, which digit, or which two side by side."""
    data = load_data("digits")
    if classes == 100:
        images, labels = side_by_side(data.train_images, data.train_labels)
        data = replace(data, name="pairs", train_images=images, train_labels=labels, classes=100)
    elif classes == 2:
        data = replace(data, train_labels=data.train_labels % 2, classes=2)
    return data


def side_by_side(images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """12,000 pictures of two digits, each of half the width; the class is their number."""
    at = torch.randint(len(labels), (2, 12_000), generator=torch.Generator().manual_seed(0))
    left, right = F.avg_pool2d(images.float(), (1, 2))[at]
    return torch.cat([left, right], dim=3).to(torch.uint8), 10 * labels[at[0]] + labels[at[1]]


@cache
def suspects(classes: int) -> list[Predictor]:
    """Perceptrons of three widths and a LeNet, each with a seed and a data order of its own."""
    data, found = digits(classes), []
    for seed, (name, size) in enumerate(ARCHITECTURES):
        seed_torch(seed, "unmarked host")
        model = build(name, {"classes": classes, **size})
        epochs = 3 if classes == 100 else 1 + seed % 2
        least = {2: 0.8, 10: 0.7, 100: 0.2}[classes]
        trained(model, data, epochs=epochs, seed=seed, least=least)
        found.append(make_module_predictor(model, *data.scale))
    return found


@cache
def stego(pairs: bool) -> Frozen:
    """What one stego network made of digits, or of pairs of them; it knows nothing of classes."""
    data = digits(100 if pairs else 10)
    return stego_frozen(form("deepstego", data), data, made=300)


def keys(name: str, classes: int) -> Keys:
    """Fresh keys of a form, each with triggers of its own."""
    data = digits(classes)
    scheme = form(name, data)
    if isinstance(scheme, DeepStego):
        return stego_keys(scheme, stego(classes == 100))
    return keys_of(scheme, data)


@PAIRS
@pytest.mark.parametrize("classes", CLASSES)
def test_unmarked_models_get_labels_by_chance(classes: int, pairs: int) -> None:
    check(*(asked(keys(name, classes), suspects(classes), pairs) for name in FORMS))


def test_one_label_for_all_triggers_would_accuse_the_innocent() -> None:
    """Why each trigger has a label of its own: a model takes many strange images for one class."""
    scheme, make = form("zhang unrelated", digits(10)), keys("zhang unrelated", 10)
    drawn = [make(number) for number in range(60)]
    k = [
        int((suspect(scheme.read_committed_triggers(key)) == scheme.derive_labels(key)[0]).sum())
        for key, suspect in zip(drawn, cycle(suspects(10)), strict=False)
    ]
    assert Pairs(np.array(k), scheme.triggers, 1 / 10).claims(1e-6) >= 3


# --- suspects that look at no image


def habits(classes: int) -> dict[str, Predictor]:
    drawn = np.random.default_rng(classes)

    def random(images: Images) -> Labels:
        return drawn.integers(0, classes, len(images))

    def constant(images: Images) -> Labels:
        return np.full(len(images), classes - 1)

    def now_and_then(images: Images) -> Labels:
        return np.where(drawn.random(len(images)) < ANSWERED, random(images), -1)

    return {"random": random, "constant": constant, "now and then": now_and_then}


@PAIRS
@pytest.mark.parametrize("classes", CLASSES)
def test_answers_without_a_look_at_the_image_get_labels_by_chance(classes: int, pairs: int) -> None:
    by_habit = {
        name: asked(keys("guo", classes), [habit], pairs, first=1000 * number)
        for number, (name, habit) in enumerate(habits(classes).items())
    }
    seldom = by_habit.pop("now and then")
    check(*by_habit.values(), replace(seldom, p=ANSWERED / classes))  # no answer is a miss
    assert seldom.claims(1e-2) <= pairs * 1e-2  # none of 50: each has a chance below 4e-4


@pytest.mark.parametrize("classes", CLASSES)
def test_who_never_answers_is_never_judged(classes: int) -> None:
    make = keys("guo", classes)
    for number in range(5):
        verdict = examine(
            lambda images: np.full(len(images), -1), make(number),
            VerificationOptions(1e-2, assume_dated=True, allow_test_key=True),
        )  # fmt: skip
        assert (verdict.outcome, verdict.exit_code, verdict.log10_p) == ("no_verdict", 3, None)
