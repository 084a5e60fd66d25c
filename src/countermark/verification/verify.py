"""Verify a key against a suspect: find the tensors, read the bits, judge them."""

from __future__ import annotations

import hmac
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

from countermark.alignment import Reference, SuspectWithReference
from countermark.checkpoints import (
    IN_PART,
    MOST_CANDIDATES,
    Suspect,
    Weights,
    dequantise_weights,
    open_weights,
)  # fmt: skip
from countermark.errors import ConfigError, KeyFileError, SuspectError
from countermark.images.image_files import Pixels
from countermark.keys.key import Key
from countermark.keys.passphrase import VARIABLE, read_passphrase_file
from countermark.keys.storage import load_header
from countermark.predictors.base import DescribedPredictor, Predictor, make_predictor
from countermark.results.caveats import is_name_order_stated
from countermark.results.null_hypotheses import FairCoin, NullHypothesis, SecretLabels
from countermark.results.reading import Reading
from countermark.results.subject import ReferenceFacts, Subject, UnmarkedModel
from countermark.results.test_result import MOST_ORDERED, list_corrections, multiply_factors
from countermark.results.verdict import (
    KeyIdentity,
    Verdict,
    VerificationOptions,
    judge,
    make_no_verdict,
)
from countermark.schemes import load_scheme, require_trigger_scheme, require_weight_scheme
from countermark.schemes.base import Scheme
from countermark.schemes.outputs import OutputScheme
from countermark.schemes.triggers import FreshTriggers, TriggerScheme
from countermark.schemes.weights import WeightScheme
from countermark.verification.disclosure import TriggerDisclosure
from countermark.verification.hidden_units import find_hidden_units
from countermark.verification.image_sets import ImageSetReading, read_folder, read_images
from countermark.verification.unmarked_models import (
    Supplied,
    add_unmarked_rank,
    query_unmarked_models,
    read_unmarked_images,
    read_unmarked_weights,
)  # fmt: skip
from countermark.verification.verify_aligned import (
    WeightReading,
    prepare_reference,
    read_aligned,
    select_nulls_after_alignment,
)

_REFUSED_DRAWS = 256  # for a rank that cannot count: its axis is not shown to hold hidden units


def verify(  # noqa: PLR0913 - every statement is a keyword argument
    suspect: Suspect | Predictor | Iterable[Pixels] | SuspectWithReference,
    key: Key | TriggerDisclosure | FreshTriggers | str | Path,
    *,
    alpha: float = VerificationOptions.alpha,
    assume_dated: bool = False,
    blind_choice: bool = False,
    null: str | None = None,
    digest: bool = False,
    unmarked: Sequence[Supplied] = (),
) -> Verdict:
    """Check whether the mark of a key is present in a suspect, and how certain that is.

    Args:
        suspect: a .safetensors, torch, TorchScript or ONNX file, a folder of shards, or a live
            module; quantised models (codes with scales) are read as well. With a reference, one of
            these in a `SuspectWithReference`, which adds a second reading after alignment. For a key of
            triggers: a live module, or a function from images uint8 (n, C, H, W) to classes (n,).
            For a key of outputs: a folder of images, or images uint8 (C, H, W).
        key: the owner's key; or some opened triggers of a key, where the unopened triggers count
            as misses; or fresh triggers, made with a key. A path is loaded as a key folder.
        alpha: threshold for the probability of a false accusation, after correction.
        assume_dated: the owner states that the key, and a reference too, is older than the suspect.
        blind_choice: you state that whoever chose the suspect's images did not know which bits the
            key reads in them; likewise for opened triggers and their labels, and for names of
            classes and answers.
        null: one of the null hypotheses that the scheme allows; the scheme's own one by default.
        digest: also record the digest of the whole suspect file, which reads all of it.
        unmarked: models of the suspect's kind that you know to be unmarked, public bases among
            them, given in the same form as suspects. A learnt reader proves nothing without
            unmarked models, nor does a published form that is judged by a rank among them.

    Returns: a verdict; "not owned" and "cannot tell" are values of its `outcome`.

    Raises:
        SuspectError: the suspect cannot be read.
        ConfigError: the key's fields and tensors do not fit each other, the null hypothesis is
            unknown, or the key has a reader of its own that was not trusted (`Key.with_trusted_code`).
        KeyFileError: a key folder cannot be loaded, or opened triggers do not belong to their
            commitment.
    """
    key = load_judging_key(key)
    terms = VerificationOptions(alpha, assume_dated, blind_choice)
    return examine(suspect, key, terms, null=null, digest=digest, unmarked=unmarked)


def load_judging_key(
    key: Key | TriggerDisclosure | FreshTriggers | str | Path,
) -> Key | TriggerDisclosure | FreshTriggers:
    """Return the key, opened triggers or fresh triggers to judge by; load a path as a key folder.

    An encrypted key folder is opened with the passphrase from COUNTERMARK_PASSPHRASE_FILE.

    Raises:
        KeyFileError: the folder cannot be loaded, or is encrypted and there is no passphrase.
        ConfigError: the argument is neither a key nor a path.
    """
    if isinstance(key, Key | TriggerDisclosure | FreshTriggers):
        return key
    if not isinstance(key, str | Path):
        raise ConfigError(
            f"the key is a {type(key).__name__}: expected a Key, or the path of a key folder"
        )
    # The header is read first: without a passphrase an encrypted key should say how to give one.
    passphrase = read_passphrase_file()
    if passphrase is None and load_header(Path(key)).encryption is not None:
        raise KeyFileError(
            f"{key} is encrypted: give Key.load(path, passphrase=…) instead of its path, or name a "
            f"file with the passphrase in {VARIABLE}"
        )
    return Key.load(key, passphrase)


def examine(  # noqa: PLR0913 - as above
    suspect: Suspect | Predictor | Iterable[Pixels] | SuspectWithReference,
    key: Key | TriggerDisclosure | FreshTriggers,
    terms: VerificationOptions,
    *,
    null: str | None = None,
    digest: bool = False,
    resume: Path | None = None,
    unmarked: Sequence[Supplied] = (),
) -> Verdict:
    """Verify a key under explicit options; benchmarks use them to allow test keys.

    Args:
        suspect: as for `verify`.
        key: as for `verify`.
        null: as for `verify`.
        digest: as for `verify`.
        terms: thresholds and statements.
        resume: file from which an interrupted reading of a folder of images continues, see
            `image_sets.read_folder`.
        unmarked: as for `verify`.
    """
    reference = None
    # The reference is refused here, before the suspect is opened, if the key cannot use one.
    if isinstance(suspect, SuspectWithReference):
        reference = prepare_reference(suspect.reference, key)
        suspect = suspect.suspect
    scheme = load_scheme(key) if isinstance(key, Key) else None
    if isinstance(key, Key) and isinstance(scheme, OutputScheme):
        return _examine_images(suspect, scheme, key, terms, (null, resume, unmarked))
    suspect = cast("Suspect | Predictor", suspect)
    # Opened and fresh triggers are not ranked among unmarked models; supplied models would be
    # ignored silently, so they are refused.
    if unmarked and not isinstance(key, Key):
        raise ConfigError("opened and fresh triggers are judged by no unmarked models: leave them")
    if isinstance(key, TriggerDisclosure):
        return _examine_triggers(suspect, key.trigger_scheme, key, terms, (null, ()))
    if isinstance(key, FreshTriggers):
        return _examine_fresh_triggers(suspect, key, terms, null)
    if isinstance(scheme, TriggerScheme):
        return _examine_triggers(suspect, scheme, key, terms, (null, unmarked))
    asked = _WeightReadingOptions(null, digest, reference, unmarked)
    weight_scheme = require_weight_scheme(load_scheme(key))
    return _examine_weights(cast(Suspect, suspect), weight_scheme, key, terms, asked)


def _examine_images(
    suspect: object, scheme: OutputScheme, key: Key, terms: VerificationOptions,
    asked: tuple[str | None, Path | None, Sequence[Supplied]],
) -> Verdict:  # fmt: skip
    """Judge a set of images that somebody published.

    Args:
        suspect: a folder of images, or images uint8 (C, H, W).
        scheme: the key's scheme.
        key: a key of outputs.
        terms: thresholds and statements.
        asked: null hypothesis by name, file to resume from, and unmarked sets of images.
    """
    null, resume, unmarked = asked
    found = _read_image_set(suspect, scheme, key, resume)
    subject = Subject(
        name=str(suspect) if isinstance(suspect, str | Path) else "images",
        # All images are one suspect with one message: `Subject.readings` counts tests, not images.
        readings=scheme.test_count,
        images=found.images,
        skipped=found.skipped.to_facts(),
        sha256=found.digest,
        unmarked=read_unmarked_images(unmarked, scheme, key) if unmarked else (),
    )
    identity = KeyIdentity.from_key(key)
    if found.evidence is None:
        reason = "the suspect has no image that could be read"
        return make_no_verdict(reason, bits=scheme.bits, subject=subject, key=identity, terms=terms)
    chosen = _choose_null(scheme, add_unmarked_rank(scheme.nulls(key), subject.unmarked), null)
    return judge(found.evidence, chosen, subject=subject, key=identity, terms=terms)


def _read_image_set(
    suspect: object, scheme: OutputScheme, key: Key, resume: Path | None
) -> ImageSetReading:
    """Read a folder of images, or images in memory.

    Raises:
        SuspectError: the suspect is neither a path nor an iterable of images.
    """
    if isinstance(suspect, str | Path):
        return read_folder(Path(suspect), scheme, key, resume=resume)
    if isinstance(suspect, Iterable) and not isinstance(suspect, Mapping):
        return read_images(suspect, scheme, key)
    raise SuspectError(
        f"a key of {scheme.name} reads images, and this is a {type(suspect).__name__}: expected a "
        "folder of pictures, or images uint8 [C, H, W]"
    )


def _examine_triggers(
    suspect: Suspect | Predictor, scheme: TriggerScheme, key: Key | TriggerDisclosure,
    terms: VerificationOptions, asked: tuple[str | None, Sequence[Supplied]],
) -> Verdict:  # fmt: skip
    """Judge the suspect's answers to a key's triggers, or to the opened triggers of a key.

    Args:
        suspect: a live module, or a function from images to classes.
        scheme: the key's scheme.
        key: a key of triggers, or opened triggers.
        terms: thresholds and statements.
        asked: null hypothesis by name, and unmarked models.
    """
    predict = make_predictor(suspect, scheme.mean, scheme.deviation)
    nulls: dict[str, NullHypothesis]
    null, supplied = asked
    unmarked: tuple[UnmarkedModel, ...] = ()
    if isinstance(key, TriggerDisclosure):
        evidence = key.extract(predict, blind_choice=terms.blind_choice)
        # Opened triggers are judged by their secret labels alone: no rank is offered.
        nulls = {SecretLabels.name: SecretLabels()}
    else:
        unmarked = query_unmarked_models(supplied, scheme, key) if supplied else ()
        evidence, nulls = (
            scheme.extract(predict, key),
            add_unmarked_rank(scheme.nulls(key), unmarked),
        )
    subject = replace(_describe_predictor(suspect), unmarked=unmarked)
    return _judge_answers(evidence, _choose_null(scheme, nulls, null), subject, key, terms)


def _examine_fresh_triggers(
    suspect: Suspect | Predictor, fresh: FreshTriggers, terms: VerificationOptions, null: str | None
) -> Verdict:
    """Judge the suspect's answers to triggers that were freshly made from covers."""
    scheme = require_trigger_scheme(load_scheme(fresh.key))
    evidence, own = scheme.query_fresh_triggers(
        make_predictor(suspect, scheme.mean, scheme.deviation), fresh
    )
    subject = _describe_predictor(suspect)
    null_hypothesis = _choose_null(scheme, {own.name: own}, null)
    return _judge_answers(evidence, null_hypothesis, subject, fresh.key, terms)


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


def _choose_null(
    scheme: Scheme, nulls: Mapping[str, NullHypothesis], name: str | None
) -> NullHypothesis:
    """Return the null hypothesis of a given name, or the scheme's own (first) one.

    Raises:
        ConfigError: the scheme does not allow a null hypothesis of this name.
    """
    if name is not None and name not in nulls:
        raise ConfigError(f"{scheme.name} has no null {name!r} here: expected {' or '.join(nulls)}")
    return nulls[name] if name else next(iter(nulls.values()))


@dataclass(frozen=True)
class _WeightReadingOptions:
    """Options of a reading of weights.

    Attributes:
        null: null hypothesis by name; None for the scheme's own one.
        digest: record the digest of the whole suspect file.
        reference: model that the suspect is aligned to for a second reading.
        unmarked: unmarked models that the examiner supplied.
    """

    null: str | None
    digest: bool
    reference: Reference | None
    unmarked: Sequence[Supplied]


def _examine_weights(
    suspect: Suspect,
    scheme: WeightScheme,
    key: Key,
    terms: VerificationOptions,
    asked: _WeightReadingOptions,
) -> Verdict:
    """Judge the readings of a suspect's weights: as stored, and aligned to a reference."""
    with dequantise_weights(open_weights(suspect)) as opened:
        identity = KeyIdentity.from_key(key)
        weights, found = scheme.locate_tensors(opened, key)
        reason = _find_tensor_problem(weights, key, found)
        readings = [] if reason else [_find_best_reading(weights, scheme, key, found)]
        reference: ReferenceFacts | None = None
        if asked.reference is not None:
            more, reference = read_aligned(opened, scheme, key, asked.reference)
            readings += more
        if not readings:
            why = f"; aligned: {reference.refused}" if reference else ""
            subject = Subject(name=weights.name)
            return make_no_verdict(
                f"{reason}{why}", bits=key.bits, subject=subject, key=identity, terms=terms
            )
        # Each assignment of tensors and the aligned reading is one test that p is corrected for.
        tried = (0 if reason else len(found)) + (asked.reference is not None)
        best = _choose_reading(readings, math.log10(terms.alpha / tried))
        axes = scheme.get_unit_axes(key)
        subject = Subject(
            name=weights.name,
            readings=tried,
            tensors=best.where,
            missing=tuple(name for name in key.tensors if name not in best.where),
            # The digests cover the tensors read so far, so this line must follow the readings.
            sha256=_protect_part_digests(weights.digests, key),
            file_sha256=weights.compute_file_digest() if asked.digest else None,
            reference=reference,
            hidden_units=find_hidden_units(suspect, weights, best.where, axes) if axes else None,
            unmarked=read_unmarked_weights(asked.unmarked, scheme, key, best.tensors)
            if asked.unmarked
            else (),
        )
    corrections = list_corrections(subject, terms.make_freedoms(opened=False))
    # A rank reaches alpha only with at least factor/alpha draws, since its floor is 1/(draws + 1).
    draws = math.ceil(multiply_factors(corrections) / terms.alpha)
    if subject.hidden_units is not None and subject.hidden_units.refused:
        # The refused axis gives no verdict anyway; few draws keep the figure cheap.
        draws = min(draws, _REFUSED_DRAWS)
    nulls = select_nulls_after_alignment(scheme.nulls(best.tensors, key, draws), best.evidence)
    chosen = _choose_null(scheme, add_unmarked_rank(nulls, subject.unmarked), asked.null)
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

    The plain reading is preferred because nobody can fabricate it, unlike a reference.
    """
    plain = readings[0].evidence
    # The first reading is an aligned one if the tensors could not be read as stored.
    if plain.alignment is None and FairCoin().compute_log10_p(plain) <= log10_alpha:
        return readings[0]
    return max(readings, key=lambda each: each.evidence.sort_key)


def read_suspect(suspect: Suspect | Predictor | Iterable[Pixels], key: Key) -> Reading:
    """Read a suspect with a key and return the reading without judging it.

    Weights are read from tensors with exactly the key's own names.
    """
    scheme = load_scheme(key)
    if isinstance(scheme, OutputScheme):
        return scheme.extract(cast(Iterable[Pixels], suspect), key)
    if isinstance(scheme, TriggerScheme):
        return scheme.extract(make_predictor(suspect, scheme.mean, scheme.deviation), key)
    weight_scheme = require_weight_scheme(scheme)
    with dequantise_weights(open_weights(cast(Suspect, suspect))) as weights:
        where = {name: name for name in key.tensors}
        return weight_scheme.extract(weight_scheme.read_suspect_tensors(weights, where, key), key)


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
    wanted = ", ".join(f"{name} {list(shape)}" for name, shape in key.tensors.items())
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
