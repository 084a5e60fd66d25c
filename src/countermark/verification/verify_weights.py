"""Read bits from a suspect's weights and judge them, as stored and after alignment."""

from __future__ import annotations

import hmac
import math
from collections.abc import Mapping
from itertools import islice

from countermark.checkpoints import (
    IN_PART,
    MOST_CANDIDATES,
    Suspect,
    Weights,
    open_suspect,
)  # fmt: skip
from countermark.errors import SuspectError
from countermark.keys.key import Key
from countermark.results.null_hypotheses import FairCoin
from countermark.results.reading import Reading
from countermark.results.subject import ReferenceFacts, Subject
from countermark.results.test_result import list_corrections, multiply_factors
from countermark.results.verdict import (
    KeyIdentity,
    Verdict,
    VerificationOptions,
    judge,
    make_no_verdict,
)
from countermark.schemes.weights import WeightScheme
from countermark.verification.family import ExaminerInputs, SchemeFamily, choose_null
from countermark.verification.hidden_units import find_hidden_units
from countermark.verification.unmarked_models import add_unmarked_rank, read_unmarked_weights
from countermark.verification.verify_aligned import (
    WeightReading,
    read_aligned,
    select_nulls_after_alignment,
)

_MOST_SHOWN = 20  # tensors that a message names
_REFUSED_DRAWS = 256  # for a rank that cannot count: its axis is not shown to hold hidden units


class WeightFamily(SchemeFamily):
    """Keys that read bits from named tensors."""

    def read(self, suspect: Suspect, scheme: WeightScheme, key: Key) -> Reading:
        """Read a suspect from tensors with exactly the key's own names."""
        with open_suspect(suspect) as weights:
            where = {name: name for name in key.tensors}
            return scheme.extract(scheme.read_suspect_tensors(weights, where, key), key)

    def examine(
        self, suspect: Suspect, scheme: WeightScheme, key: Key, terms: VerificationOptions,
        inputs: ExaminerInputs,
    ) -> Verdict:  # fmt: skip
        """Judge the readings of a suspect's weights: as stored, and aligned to a reference."""
        with open_suspect(suspect) as opened:
            identity = KeyIdentity.from_key(key)
            weights, found = scheme.locate_tensors(opened, key)
            reason = _find_tensor_problem(weights, key, found)
            readings = [] if reason else [_find_best_reading(weights, scheme, key, found)]
            reference: ReferenceFacts | None = None
            if inputs.reference is not None:
                more, reference = read_aligned(opened, scheme, key, inputs.reference)
                readings += more
            if not readings:
                why = f"; aligned: {reference.refused}" if reference else ""
                if weights.form:
                    raise SuspectError(
                        f"{weights.name} is {weights.form}, which may hold tensors folded into others, "
                        f"and {reason}{why}: expected the model's state dict, saved by torch.save"
                    )
                subject = Subject(name=weights.name, notes=weights.notes)
                return make_no_verdict(
                    f"{reason}{why}", bits=key.bits, subject=subject, key=identity, terms=terms
                )
            # Each assignment of tensors and the aligned reading is one test that p is corrected for.
            tried = (0 if reason else len(found)) + (inputs.reference is not None)
            best = _choose_reading(readings, math.log10(terms.alpha / tried))
            axes = scheme.get_unit_axes(key)
            subject = Subject(
                name=weights.name,
                readings=tried,
                tensors=best.where,
                missing=tuple(name for name in key.tensors if name not in best.where),
                # The digests cover the tensors read so far, so this line must follow the readings.
                sha256=_protect_part_digests(weights.digests, key),
                file_sha256=weights.compute_file_digest() if inputs.digest else None,
                reference=reference,
                hidden_units=find_hidden_units(suspect, weights, best.where, axes)
                if axes
                else None,
                unmarked=read_unmarked_weights(inputs.unmarked, scheme, key, best.tensors)
                if inputs.unmarked
                else (),
                notes=weights.notes,
            )
        corrections = list_corrections(subject, terms.make_freedoms(opened=False))
        # A rank reaches alpha only with at least factor/alpha draws, since its floor is 1/(draws + 1).
        draws = math.ceil(multiply_factors(corrections) / terms.alpha)
        if subject.hidden_units is not None and subject.hidden_units.refused:
            # The refused axis gives no verdict anyway; few draws keep the figure cheap.
            draws = min(draws, _REFUSED_DRAWS)
        nulls = select_nulls_after_alignment(scheme.nulls(best.tensors, key, draws), best.evidence)
        chosen = choose_null(scheme, add_unmarked_rank(nulls, subject.unmarked), inputs.null)
        return judge(best.evidence, chosen, subject=subject, key=identity, terms=terms)


def _protect_part_digests(digests: Mapping[str, str], key: Key) -> dict[str, str]:
    """Return the digests of the tensors that were read, with digests of tensor parts keyed.

    A digest of a part is an HMAC under the key's secret, so only the key's holder can compute it.
    With a plain digest anybody who has the suspect could find by trial which part a key reads.
    """
    # A stream label of its own keeps these bytes apart from the key's other uses of the secret.
    secret = key.make_stream("digests of parts").take(32)
    return {
        name: hmac.new(secret, digest.encode(), "sha256").hexdigest()
        if name.endswith(IN_PART) else digest
        for name, digest in digests.items()
    }  # fmt: skip


def _choose_reading(readings: list[WeightReading], log10_alpha: float) -> WeightReading:
    """Return the plain reading if its p is small enough, else the best reading.

    The plain reading is preferred because nobody can fabricate it, unlike a reference. A reference
    that the key commits to cannot be fabricated either: the better of the two readings is taken.
    """
    plain = readings[0].evidence
    # The first reading is an aligned one if the tensors could not be read as stored.
    if plain.alignment is None and FairCoin().compute_log10_p(plain) <= log10_alpha:
        readings = [readings[0], *(each for each in readings[1:] if each.evidence.committed)]
    return max(readings, key=lambda each: each.evidence.sort_key)


def _find_best_reading(
    weights: Weights, scheme: WeightScheme, key: Key, found: list[dict[str, str]]
) -> WeightReading:
    """Return the best reading over all ways to assign the suspect's tensors to the key's."""

    def read_assignment(where: dict[str, str]) -> WeightReading:
        """Read the suspect with one assignment of the key's tensor names to the suspect's."""
        tensors = scheme.read_suspect_tensors(weights, where, key)
        sources = {name: weights.describe_source(other) for name, other in where.items()}
        return WeightReading(scheme.extract(tensors, key), tensors, sources)

    return max(map(read_assignment, found), key=lambda each: each.evidence.sort_key)


def _find_tensor_problem(weights: Weights, key: Key, found: list[dict[str, str]]) -> str:
    """Return why the key's tensors cannot be read as stored; empty if they can be read."""
    if not found:
        return _describe_missing_tensors(weights, key)
    return _describe_ambiguous_tensors(weights, key) if len(found) > MOST_CANDIDATES else ""


def _describe_missing_tensors(weights: Weights, key: Key) -> str:
    """Describe the tensors that the suspect lacks."""
    shown = [f"{name} {list(shape)}" for name, shape in islice(key.tensors.items(), _MOST_SHOWN)]
    # A key of a mixture of experts reads thousands of tensors.
    shown += [f"{more:,} more"] if (more := len(key.tensors) - len(shown)) > 0 else []
    wanted = ", ".join(shown)
    return (
        f"the suspect has no tensors of the names or shapes that this key reads ({wanted}) "
        f"among its {len(weights.tensors)}: another architecture, or another form of the model"
    )


def _describe_ambiguous_tensors(weights: Weights, key: Key) -> str:
    """Describe why the suspect's tensors fit the key's in too many ways."""
    return (
        f"the tensors that this key reads were renamed, and {len(weights.tensors)} tensors of the "
        f"suspect can be arranged in more than {MOST_CANDIDATES} ways as {len(key.tensors)}"
    )
