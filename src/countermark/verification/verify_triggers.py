"""Ask a suspect about triggers and judge its answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from countermark.checkpoints import Suspect
from countermark.errors import ConfigError
from countermark.keys.key import Key
from countermark.predictors.base import DescribedPredictor, Predictor, make_predictor
from countermark.results.caveats import is_name_order_stated
from countermark.results.null_hypotheses import NullHypothesis, SecretLabels
from countermark.results.reading import Reading
from countermark.results.subject import Subject, UnmarkedModel
from countermark.results.test_result import MOST_ORDERED
from countermark.results.verdict import (
    KeyIdentity,
    Verdict,
    VerificationOptions,
    judge,
    make_no_verdict,
)
from countermark.schemes.triggers import FreshTriggers, TriggerScheme
from countermark.verification.disclosure import TriggerDisclosure
from countermark.verification.family import ExaminerInputs, SchemeFamily, choose_null
from countermark.verification.unmarked_models import add_unmarked_rank, query_unmarked_models


class TriggerFamily(SchemeFamily):
    """Keys that ask a live model about triggers; a disclosure or fresh triggers stand for a key."""

    def read(self, suspect: Suspect | Predictor, scheme: TriggerScheme, key: Key) -> Reading:
        """Ask a suspect about all triggers of a key."""
        return scheme.extract(make_predictor(suspect, scheme.mean, scheme.deviation), key)

    def examine(
        self, suspect: Suspect | Predictor, scheme: TriggerScheme,
        key: Key | TriggerDisclosure | FreshTriggers, terms: VerificationOptions,
        inputs: ExaminerInputs,
    ) -> Verdict:  # fmt: skip
        """Judge the suspect's answers to triggers of a key, opened triggers, or fresh triggers.

        Raises:
            ConfigError: unmarked models are supplied for opened or fresh triggers.
        """
        predict = make_predictor(suspect, scheme.mean, scheme.deviation)
        nulls: Mapping[str, NullHypothesis]
        unmarked: tuple[UnmarkedModel, ...] = ()
        # Opened and fresh triggers are not ranked among unmarked models; supplied models would be
        # ignored silently, so they are refused.
        if inputs.unmarked and not isinstance(key, Key):
            raise ConfigError(
                "opened and fresh triggers are judged by no unmarked models: leave them"
            )
        if isinstance(key, TriggerDisclosure):
            evidence = key.extract(predict, blind_choice=terms.blind_choice)
            # Opened triggers are judged by their secret labels alone: no rank is offered.
            nulls = {SecretLabels.name: SecretLabels()}
        elif isinstance(key, FreshTriggers):
            evidence, own = scheme.query_fresh_triggers(predict, key)
            nulls, key = {own.name: own}, key.key
        else:
            if inputs.unmarked:
                unmarked = query_unmarked_models(inputs.unmarked, scheme, key)
            evidence = scheme.extract(predict, key)
            nulls = add_unmarked_rank(scheme.nulls(key), unmarked)
        subject = replace(_describe_predictor(suspect), unmarked=unmarked)
        null = choose_null(scheme, nulls, inputs.null)
        return _judge_answers(evidence, null, subject, key, terms)


def _describe_predictor(suspect: object) -> Subject:
    """Return the suspect's own description, or a description by its type if it has none."""
    return (
        suspect.subject()
        if isinstance(suspect, DescribedPredictor)
        else Subject(type(suspect).__name__)
    )


def _judge_answers(
    evidence: Reading,
    null: NullHypothesis,
    subject: Subject,
    key: Key | TriggerDisclosure,
    terms: VerificationOptions,
) -> Verdict:
    """Judge answers to triggers; without a readable answer, return no verdict."""
    identity, bits = KeyIdentity.from_key(key), evidence.bits
    if evidence.answer_count:
        names = subject.class_names
        ordered = not is_name_order_stated(terms, opened=evidence.disclosure is not None)
        # Of all orders of many names, some order fits any answers: p cannot be corrected for that.
        if not ordered or names <= MOST_ORDERED:
            return judge(evidence, null, subject=subject, key=identity, terms=terms)
        reason = (
            f"the classes came by name, and of all orders of {names} names some order fits any "
            "answers: whoever gave --ask class_names must not have known these"
            + ("" if evidence.disclosure else ", which you may state (--blind-choice)")
        )
    else:
        asked = evidence.readable_count
        reason = f"the suspect gave no answer that could be read to any of {asked} triggers"
        # The most frequent failure tells the user what to mend, for example a refused connection.
        if subject.why:
            reason += f"; most often: {subject.why}"
    return make_no_verdict(
        reason, bits=bits, subject=subject, key=identity, terms=terms, unit="triggers"
    )
