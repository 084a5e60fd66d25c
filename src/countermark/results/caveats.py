"""Caveats: the sentences in every verdict about what the verdict does not say."""

from __future__ import annotations

from typing import TYPE_CHECKING

from countermark.results import key_dating
from countermark.results.null_hypotheses import PermutedUnits, SecretClassMap, UnmarkedModels
from countermark.results.owner_statements import describe_hidden_units
from countermark.results.reading import Disclosure, Reading
from countermark.results.subject import Subject
from countermark.results.test_result import TestResult

if TYPE_CHECKING:
    from countermark.results.verdict import Outcome, VerificationOptions

ALIGNED = (
    "the suspect's neurons were put into the order and scale of a reference (mean cosine "
    "{alike:.3f}) before reading, by tensors that the key does not read or that the reference has "
    "as they were before the mark; a reference can be made afterwards, so this proves something "
    "only if the reference is older than the suspect"
)
COMMITTED_REFERENCE = (
    "the suspect's neurons were put into the order and scale of the reference (mean cosine "
    "{alike:.3f}) before reading; the key's commitment holds that reference as it was before the "
    "mark, so that p is exact and rests on nobody's word about it"
)
MARKED_REFERENCE = (
    "the reference bears the mark: that p holds after alignment to it was simulated on disjoint "
    "pairs of models, not proven; weights from before the mark are the better reference"
)
UNMARKED_REFERENCE = (
    "p is exact if the reference was fixed before the key's message was drawn; the key does not "
    "find its mark in it, but that it is so old is the owner's own statement"
)

# A key may read hundreds of tensors: only the first renamed ones are listed by name.
_SHOWN = 5  # renamed tensors

WHOSE = (
    "it says that the mark of a key is present or not; who owns the model is another question, "
    "answered by dated claims under a policy"
)
WHAT_P_IS = (
    "p is the chance of this reading on a model made without the key's secret; it is not the "
    "probability that the suspect is innocent"
)
NOT_INNOCENT = (
    "not proven is not innocent: a mark can be removed, and tensors that were permuted, rescaled "
    "or folded are realigned before reading only where --reference is given"
)
NOT_INNOCENT_OF_TRIGGERS = (
    "not proven is not innocent: a mark can be removed, classes can be renamed, and whoever "
    "answers can recognise triggers and lie"
)
NOT_INNOCENT_OF_OUTPUTS = (
    "not proven is not innocent: images that were cropped, resized or filtered, or made by a "
    "network that could not learn the mark, are read as they are"
)
ONE_SET = (
    "all images count as one set with one message: how many there are makes the reading better, "
    "and p no smaller; p holds only if whoever chose them did not know what the key reads in them"
)
CHOSEN_BLINDLY = (
    "that whoever chose the images did not know what is read in them, or answered to them, is the "
    "examiner's own statement"
)
BURNT = (
    "whoever saw the triggers, the operator of a queried service included, can train them out: "
    "they are evidence once"
)

OPENED_LATER = (
    "p is about a model made without knowledge of the opened triggers: one made after they were "
    "opened can be trained on them"
)


def _describe_disclosure(shown: Disclosure) -> str:
    """Describe how many triggers were opened, and how that limits p."""
    if shown.opened == shown.committed:
        return f"all {shown.committed} of the key's triggers were opened"
    # Without the statement unopened triggers count as misses, so that an owner gains nothing by
    # opening only triggers that the suspect answers as wished.
    if shown.blind_choice:
        what = (
            "p is about these alone and holds only if whoever chose them did not know their "
            "labels: the owner did not choose them, as the examiner states"
        )
    else:
        what = "the others count as misses, so p holds whoever chose these"
    return f"{shown.opened} of the key's {shown.committed} triggers were opened; {what}"


ANYBODYS = (
    "these triggers and answers are no keyed random output: whoever can ask a model, or knows how "
    "the stego network was trained, may make triggers that get such answers"
)
BLIND_COVERS = (
    "the covers of fresh triggers, and their classes, must be given by somebody who did not look "
    "at what the suspect answers: p does not know how they were chosen"
)
RANK_AMONG_UNMARKED = (
    "log10 p is a rank among {n} unmarked models {whose}: it is never below 1/{more}, "
    "and speaks of models like them"
)
OWNERS_MODELS = "that the owner says were read, which nobody else has checked"
EXAMINERS_MODELS = "that the examiner supplied"
COMPARED = (
    "that the supplied models are unmarked, and no two of them nearly the same, is the examiner's "
    "own statement; their number supports no rank below 1/{more}: a reader that was trained on "
    "what the suspect shares with none of them is not found out by them"
)
NOT_COMPARED = (
    "siblings, sibling threshold and loudness in the key are its owner's word, which can only make "
    "a verdict stricter; L2 and its rank are measured here"
)


RECORDED = (
    "nobody was asked: the answers are a record, which whoever made it may have written as he liked"
)
NAMED = (
    "the classes came by name: p is multiplied by all {names}! orders of the names, of which one "
    "that fits could have been given"
)
NAMED_BLINDLY = (
    "the classes came by name: that whoever gave their order did not know the answers is the "
    "examiner's own statement"
)
INDEPENDENT_ONLY = (
    "log10 p is against models trained independently from other initial weights; against "
    "fine-tunes of a shared base and twins from the same initial weights only the supplied "
    "unmarked models and the owner's sibling threshold speak"
)
UNITS_ARE_HIDDEN = (
    "p takes hidden units for exchangeable, which independent initial weights make them: {shown}"
)
BITS_MEAN_NOTHING = (
    "the reader was trained on the message, so the number of matching bits, its interval and the "
    "payload are no evidence by themselves: p is the rank of L2"
)


def list_caveats(
    evidence: Reading,
    result: TestResult,
    outcome: Outcome,
    terms: VerificationOptions,
    subject: Subject,
) -> tuple[str, ...]:
    """List the caveats of a verdict, each a sentence without its full stop.

    Args:
        evidence: the reading that was judged.
        result: the probability of the reading, with its null hypothesis.
        outcome: outcome of the verdict.
        terms: statements that were not measured.
        subject: description of the suspect.
    """
    # The two general caveats come first in every verdict, whatever the outcome.
    limits = [WHOSE, WHAT_P_IS, *_list_reading_caveats(evidence, result, subject)]
    # Each family of schemes has its own ways to lose a mark; an owned verdict has no such caveat.
    if outcome == "not_proven":
        limits.append(_choose_innocence_caveat(evidence))
    limits += _list_subject_caveats(subject)
    if names := subject.class_names:
        blind = is_name_order_stated(terms, opened=evidence.disclosure is not None)
        limits.append(NAMED_BLINDLY if blind else NAMED.format(names=names))
    if terms.blind_choice and describe_image_choice(evidence, result.null):
        limits.append(CHOSEN_BLINDLY)
    if terms.assume_dated:
        limits.append("that the key is older than the suspect is the owner's own statement")
    if terms.dating is not None:
        limits += key_dating.list_dating_caveats(terms.dating)
    # The payload needs error correction to succeed; p is about raw bits and stands without it.
    if evidence.payload is False and outcome == "owned":
        limits.append("the payload is lost: the mark is present by its raw bits only")
    return tuple(limits)


def is_name_order_stated(terms: VerificationOptions, *, opened: bool) -> bool:
    """Return true if the stated blind choice covers class names, not opened triggers."""
    # With opened triggers a blind choice already states how the triggers were chosen.
    return terms.blind_choice and not opened


def describe_image_choice(evidence: Reading, null: str) -> str | None:
    """Describe how somebody could choose images or covers that fit; None if nobody could."""
    if evidence.likeness is not None:
        return (
            "of many pictures some can be chosen in which any key finds its mark: whoever chose "
            "these must not have known what it reads"
        )
    if null == SecretClassMap.name:
        return (
            "covers can be chosen, or given classes, to which any model answers by any key's map: "
            "whoever chose these must not have known what the suspect answers"
        )
    return None


def describe_blind_choice(evidence: Reading, null: str, subject: Subject) -> str | None:
    """Return what a blind choice states about a reading; None if nothing could be chosen."""
    if evidence.likeness is not None:
        return "whoever chose the images did not know what the key reads in them"
    if null == SecretClassMap.name:
        return "whoever chose the covers did not know the suspect's answers"
    if (opened := evidence.disclosure) is not None:
        # If all triggers were opened, nobody chose among them and no statement is needed.
        if opened.blind_choice and opened.opened < opened.committed:
            return "whoever chose the opened triggers did not know their labels"
        return None
    # One name has one order only, so there is nothing to choose.
    if subject.class_names > 1:
        return "whoever ordered the names of the classes did not know the suspect's answers"
    return None


def _list_reading_caveats(evidence: Reading, result: TestResult, subject: Subject) -> list[str]:
    """List the caveats that follow from the way in which the suspect was read."""
    limits = []
    if evidence.reader is not None:
        limits += [BITS_MEAN_NOTHING, NOT_COMPARED]
    limits += _list_null_caveats(result, evidence, subject)
    if subject.unmarked:
        limits.append(COMPARED.format(more=len(subject.unmarked) + 1))
    if evidence.likeness is not None:
        limits.append(ONE_SET)
    if evidence.unit == "triggers":
        limits.append(BURNT)
    # The committed reference is fixed before the message is drawn; any other may be made to fit.
    if (aligned := evidence.alignment) is not None and aligned.is_committed:
        limits.append(COMMITTED_REFERENCE.format(alike=aligned.similarity))
    elif aligned is not None:
        limits.append(ALIGNED.format(alike=aligned.similarity))
        limits.append(MARKED_REFERENCE if aligned.bears_mark else UNMARKED_REFERENCE)
    if evidence.disclosure is not None:
        limits += [_describe_disclosure(evidence.disclosure), OPENED_LATER]
    return limits


def _list_subject_caveats(subject: Subject) -> list[str]:
    """List the caveats about files, tensors that were renamed or missing, and records."""
    found, limits = subject.tensors or {}, list(subject.notes)
    if subject.recorded:
        limits.append(RECORDED)
    renamed = [f"{wanted} as {name}" for wanted, name in found.items() if wanted != name]
    if renamed:
        more = [f"{len(renamed) - _SHOWN} more"] if len(renamed) > _SHOWN else []
        limits.append(
            "found by shape, not by name, by names of another form, or as part of other tensors: "
            f"{', '.join([*renamed[:_SHOWN], *more])}; p is corrected for every reading that was "
            "tried"
        )
    if missing := subject.missing:
        limits.append(
            f"{len(missing)} of the {len(missing) + len(found)} tensors that the key reads are not "
            "in the suspect: the bits are read from the others"
        )
    if subject.reference is not None and subject.reference.refused:
        limits.append(
            f"the suspect could not be aligned to the reference: {subject.reference.refused}"
        )
    return limits


def _choose_innocence_caveat(evidence: Reading) -> str:
    """Return the caveat of a `not_proven` verdict: ways in which a mark can be lost or hidden."""
    if evidence.likeness is not None:
        return NOT_INNOCENT_OF_OUTPUTS
    return NOT_INNOCENT if evidence.unit == "bits" else NOT_INNOCENT_OF_TRIGGERS


def _list_null_caveats(result: TestResult, evidence: Reading, subject: Subject) -> list[str]:
    """List the caveats of a null hypothesis: assumptions, and models that it does not cover."""
    if result.null == PermutedUnits.name:
        # p assumes exchangeable units: the caveat repeats how the suspect shows that they are.
        units = subject.hidden_units
        shown = (
            [] if units is None else [UNITS_ARE_HIDDEN.format(shown=describe_hidden_units(units))]
        )
        return [INDEPENDENT_ONLY, *shown]
    if result.null == SecretClassMap.name:
        return [BLIND_COVERS]
    if result.null != UnmarkedModels.name:
        return []
    n = result.unmarked_model_count or 0
    whose = EXAMINERS_MODELS if subject.unmarked else OWNERS_MODELS
    ranked = RANK_AMONG_UNMARKED.format(n=n, more=n + 1, whose=whose)
    return [ranked, ANYBODYS] if evidence.unit == "triggers" else [ranked]
