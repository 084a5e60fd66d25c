"""The sources of a finding: measured here, supplied by the examiner, or stated by the key's owner.

The owner of a key may be dishonest. Nothing that a key brings along, and nothing that only its
owner measured, can make a verdict *owned*; it can only make a verdict stricter.
"""

from __future__ import annotations

import math

from countermark.results.null_hypotheses import PermutedUnits, UnmarkedModels
from countermark.results.reading import Reading
from countermark.results.subject import HiddenUnits, Subject, UnmarkedModel
from countermark.results.test_result import TestResult

CHANCE_LEVEL = 0.01
"""Each of n unmarked models must rank above this level / n among its own permutations."""

CHANCE_LOSS = math.log(2) * (1 - 1e-9)
"""ln 2 nats a bit, less rounding: the loss of a reader that knows nothing."""

APART = 10.0
"""How many times the suspect's loss that of an unmarked model must be, at least."""


def find_loss_problem(evidence: Reading) -> str | None:
    """Return why a learnt reader's loss is no better than chance; None if it is better."""
    # No permutation or rank helps here: a loss of ln 2 or more carries no information about bits.
    if (
        evidence.reader is None
        or evidence.mark_distance is None
        or evidence.mark_distance < CHANCE_LOSS
    ):
        return None
    return (
        f"the mark of this key was not found: L2 is {evidence.mark_distance:.3g}, and a reader that "
        "knows nothing has ln 2 = 0.693"
    )


def find_exchangeability_problem(result: TestResult, subject: Subject) -> str | None:
    """Return why a rank among permutations is invalid for this suspect; None if it is valid."""
    if result.null != PermutedUnits.name:
        return None
    if subject.hidden_units is None:
        return "nothing of the suspect shows that what the key permutes are hidden units"
    return subject.hidden_units.refused


def find_comparison_problem(evidence: Reading, result: TestResult, subject: Subject) -> str | None:
    """Return why the examiner's unmarked models do not support a finding; None if they do.

    A learnt reader needs unmarked models under any null hypothesis, and a rank among unmarked
    models counts only among the examiner's.
    """
    if evidence.reader is None and result.null != UnmarkedModels.name:
        return None
    unmarked = subject.unmarked
    if not unmarked:
        return (
            "only the owner's word says that the key does not find its mark in unmarked models: "
            "expected some that you supply, public bases among them (--unmarked)"
        )
    if evidence.reader is None:
        return None
    # The loss as measured here: `distance` may depend on the owner's word about loudness.
    loss = math.inf if evidence.cross_entropy is None else evidence.cross_entropy
    found = [each for each in unmarked if not _is_chance_level(each, len(unmarked))]
    near = [each for each in unmarked if each.distance < APART * loss]
    # A reader may be trained to find its mark in any model, or to read the suspect only slightly
    # better than other models: both are checked.
    for models, why in (
        (found, "the reader also finds its mark in unmarked models"),
        (near, "the reader does not tell the suspect from unmarked models"),
    ):
        if models:
            first = min(models, key=lambda each: each.distance)
            return (
                f"{why}: in {len(models)} of {len(unmarked)}, such as {first.name} with L2 "
                f"{first.distance:.3g}, the suspect's being {loss:.3g}"
            )
    return None


def _is_chance_level(model: UnmarkedModel, count: int) -> bool:
    """Return true if the model's loss is ordinary among permutations of its own units."""
    # Bonferroni over the models: one in a hundred would otherwise be flagged by chance.
    return model.log10_p is not None and model.log10_p > math.log10(CHANCE_LEVEL / count)


def compute_rank(evidence: Reading, subject: Subject) -> int:
    """Return the suspect's rank among the examiner's unmarked models, from 1; ties count."""
    least = math.inf if evidence.mark_distance is None else evidence.mark_distance
    return 1 + sum(each.distance <= least for each in subject.unmarked)


def describe_hidden_units(units: HiddenUnits) -> str:
    """Describe the permuted axis, and how it is shown to hold hidden units or why it is refused."""
    axes = " with ".join(f"axis {axis} of {name}" for name, axis in units.axes.items())
    if units.shown_by is None:
        return f"{axes} ({units.size}): refused, {units.refused}"
    shower = {
        "architecture": "the traced architecture of the suspect",
        "configuration": "the configuration beside the suspect and its names and shapes",
        "shapes": "the suspect's shapes, which leave no other way to see it",
    }[units.shown_by]
    return f"{axes}: {units.size} hidden units, as shown by {shower}"
