"""Verify a key against a suspect: find the tensors, read the bits, judge them."""

from __future__ import annotations

import hmac
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

from countermark.alignment import Disguised, Reference
from countermark.answers import Predict, Recorded, asked_of
from countermark.errors import ConfigError, KeyFileError, SuspectError
from countermark.evidence import Evidence
from countermark.examine_aligned import Reading, after_alignment, aligned, reference_for
from countermark.hidden_units import find_hidden_units
from countermark.key import Key
from countermark.keyfile import load_header
from countermark.limits import names_stated
from countermark.nulls import FairCoin, Null, SecretLabels
from countermark.openings import Openings
from countermark.passphrase import VARIABLE, passphrase_file
from countermark.pictures import Pixels
from countermark.readings import Read, read_folder, read_images
from countermark.schemes import as_trigger_scheme, as_weight_scheme, scheme_of
from countermark.schemes.base import Scheme
from countermark.schemes.black_box import FreshTriggers, TriggerScheme
from countermark.schemes.box_free import OutputScheme
from countermark.schemes.white_box import WeightScheme
from countermark.subject import ReferenceFacts, Subject, UnmarkedModel
from countermark.test_result import MOST_ORDERED, corrections_of, total_factor
from countermark.unmarked import (
    Supplied,
    ask_unmarked,
    look_at_unmarked,
    ranked_among,
    read_unmarked,
)  # fmt: skip
from countermark.verdict import KeyIdentity, Terms, Verdict, judge, no_verdict
from countermark.weights import (
    IN_PART,
    MOST_CANDIDATES,
    Suspect,
    Weights,
    as_numbers,
    assignments,
    open_weights,
)  # fmt: skip

_REFUSED_DRAWS = 256  # for a rank that cannot count: its axis is not shown to hold hidden units


def verify(  # noqa: PLR0913 - every statement is a keyword argument
    suspect: Suspect | Predict | Iterable[Pixels] | Disguised,
    key: Key | Openings | FreshTriggers | str | Path,
    *,
    alpha: float = Terms.alpha,
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
            these in a `Disguised`, which adds a second reading after alignment. For a key of
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
            unknown, or the key has a reader of its own that was not trusted (`Key.trusting`).
        KeyFileError: a key folder cannot be loaded, or opened triggers do not belong to their
            commitment.
    """
    key = load_key_like(key)
    terms = Terms(alpha, assume_dated, blind_choice)
    return examine(suspect, key, terms, null=null, digest=digest, unmarked=unmarked)


def load_key_like(
    key: Key | Openings | FreshTriggers | str | Path,
) -> Key | Openings | FreshTriggers:
    """Return the key, opened triggers or fresh triggers to judge by; load a path as a key folder.

    An encrypted key folder is opened with the passphrase from COUNTERMARK_PASSPHRASE_FILE.

    Raises:
        KeyFileError: the folder cannot be loaded, or is encrypted and there is no passphrase.
        ConfigError: the argument is neither a key nor a path.
    """
    if isinstance(key, Key | Openings | FreshTriggers):
        return key
    if not isinstance(key, str | Path):
        raise ConfigError(
            f"the key is a {type(key).__name__}: expected a Key, or the path of a key folder"
        )
    # The header is read first: without a passphrase an encrypted key should say how to give one.
    passphrase = passphrase_file()
    if passphrase is None and load_header(Path(key)).encryption is not None:
        raise KeyFileError(
            f"{key} is encrypted: give Key.load(path, passphrase=…) instead of its path, or name a "
            f"file with the passphrase in {VARIABLE}"
        )
    return Key.load(key, passphrase)


def examine(  # noqa: PLR0913 - as above
    suspect: Suspect | Predict | Iterable[Pixels] | Disguised,
    key: Key | Openings | FreshTriggers,
    terms: Terms,
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
            `readings.read_folder`.
        unmarked: as for `verify`.
    """
    reference = None
    # The reference is refused here, before the suspect is opened, if the key cannot use one.
    if isinstance(suspect, Disguised):
        reference = reference_for(suspect.reference, key)
        suspect = suspect.suspect
    scheme = scheme_of(key) if isinstance(key, Key) else None
    if isinstance(key, Key) and isinstance(scheme, OutputScheme):
        return _look(suspect, scheme, key, terms, (null, resume, unmarked))
    suspect = cast("Suspect | Predict", suspect)
    # Opened and fresh triggers are not ranked among unmarked models; supplied models would be
    # ignored silently, so they are refused.
    if unmarked and not isinstance(key, Key):
        raise ConfigError("opened and fresh triggers are judged by no unmarked models: leave them")
    if isinstance(key, Openings):
        return _ask(suspect, key.trigger_scheme, key, terms, (null, ()))
    if isinstance(key, FreshTriggers):
        return _ask_fresh(suspect, key, terms, null)
    if isinstance(scheme, TriggerScheme):
        return _ask(suspect, scheme, key, terms, (null, unmarked))
    asked = _Asked(null, digest, reference, unmarked)
    weight_scheme = as_weight_scheme(scheme_of(key))
    return _read(cast(Suspect, suspect), weight_scheme, key, terms, asked)


def _look(
    suspect: object, scheme: OutputScheme, key: Key, terms: Terms,
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
    found = _looked(suspect, scheme, key, resume)
    subject = Subject(
        name=str(suspect) if isinstance(suspect, str | Path) else "images",
        # All images are one suspect with one message: `readings` counts tests, not images.
        readings=scheme.tests,
        images=found.images,
        skipped=found.skipped.to_facts(),
        sha256=found.digest,
        unmarked=look_at_unmarked(unmarked, scheme, key) if unmarked else (),
    )
    identity = KeyIdentity.of(key)
    if found.evidence is None:
        reason = "the suspect has no image that could be read"
        return no_verdict(reason, bits=scheme.bits, subject=subject, key=identity, terms=terms)
    chosen = _chosen(scheme, ranked_among(scheme.nulls(key), subject.unmarked), null)
    return judge(found.evidence, chosen, subject=subject, key=identity, terms=terms)


def _looked(suspect: object, scheme: OutputScheme, key: Key, resume: Path | None) -> Read:
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


def _ask(
    suspect: Suspect | Predict, scheme: TriggerScheme, key: Key | Openings, terms: Terms,
    asked: tuple[str | None, Sequence[Supplied]],
) -> Verdict:  # fmt: skip
    """Judge the suspect's answers to a key's triggers, or to the opened triggers of a key.

    Args:
        suspect: a live module, or a function from images to classes.
        scheme: the key's scheme.
        key: a key of triggers, or opened triggers.
        terms: thresholds and statements.
        asked: null hypothesis by name, and unmarked models.
    """
    predict = asked_of(suspect, scheme.mean, scheme.deviation)
    nulls: dict[str, Null]
    null, supplied = asked
    unmarked: tuple[UnmarkedModel, ...] = ()
    if isinstance(key, Openings):
        evidence = key.extract(predict, blind_choice=terms.blind_choice)
        # Opened triggers are judged by their secret labels alone: no rank is offered.
        nulls = {SecretLabels.name: SecretLabels()}
    else:
        unmarked = ask_unmarked(supplied, scheme, key) if supplied else ()
        evidence, nulls = scheme.extract(predict, key), ranked_among(scheme.nulls(key), unmarked)
    subject = replace(_describe_asked(suspect), unmarked=unmarked)
    return _judge_answers(evidence, _chosen(scheme, nulls, null), subject, key, terms)


def _ask_fresh(
    suspect: Suspect | Predict, fresh: FreshTriggers, terms: Terms, null: str | None
) -> Verdict:
    """Judge the suspect's answers to triggers that were freshly made from covers."""
    scheme = as_trigger_scheme(scheme_of(fresh.key))
    evidence, own = scheme.ask_fresh(asked_of(suspect, scheme.mean, scheme.deviation), fresh)
    subject = _describe_asked(suspect)
    null_hypothesis = _chosen(scheme, {own.name: own}, null)
    return _judge_answers(evidence, null_hypothesis, subject, fresh.key, terms)


def _describe_asked(suspect: object) -> Subject:
    """Return the suspect's own description, or a description by its type if it has none."""
    return suspect.subject() if isinstance(suspect, Recorded) else Subject(type(suspect).__name__)


def _judge_answers(
    evidence: Evidence, null: Null, subject: Subject, key: Key | Openings, terms: Terms
) -> Verdict:
    """Judge answers to triggers; without a readable answer, return no verdict."""
    identity, bits = KeyIdentity.of(key), evidence.bits
    if evidence.answered:
        names = subject.class_names
        ordered = not names_stated(terms, opened=evidence.disclosure is not None)
        # Of all orders of many names, some order fits any answers: p cannot be corrected for that.
        if not ordered or names <= MOST_ORDERED:
            return judge(evidence, null, subject=subject, key=identity, terms=terms)
        reason = (
            f"the classes came by name, and of all orders of {names} names some order fits any "
            "answers: whoever gave --ask class_names must not have known these"
            + ("" if evidence.disclosure else ", which you may state (--blind-choice)")
        )
    else:
        asked = evidence.readable
        reason = f"the suspect gave no answer that could be read to any of {asked} triggers"
        # The most frequent failure tells the user what to mend, for example a refused connection.
        if subject.why:
            reason += f"; most often: {subject.why}"
    return no_verdict(
        reason, bits=bits, subject=subject, key=identity, terms=terms, unit="triggers"
    )


def _chosen(scheme: Scheme, nulls: Mapping[str, Null], name: str | None) -> Null:
    """Return the null hypothesis of a given name, or the scheme's own (first) one.

    Raises:
        ConfigError: the scheme does not allow a null hypothesis of this name.
    """
    if name is not None and name not in nulls:
        raise ConfigError(f"{scheme.name} has no null {name!r} here: expected {' or '.join(nulls)}")
    return nulls[name] if name else next(iter(nulls.values()))


@dataclass(frozen=True)
class _Asked:
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


def _read(suspect: Suspect, scheme: WeightScheme, key: Key, terms: Terms, asked: _Asked) -> Verdict:
    """Judge the readings of a suspect's weights: as stored, and aligned to a reference."""
    with as_numbers(open_weights(suspect)) as weights:
        identity = KeyIdentity.of(key)
        ways = assignments(weights, key.tensors, partial=scheme.partial)
        # One way more than the limit is enough to know that there are too many.
        found = list(itertools.islice(ways, MOST_CANDIDATES + 1))
        reason = _unreadable(weights, key, found)
        readings = [] if reason else [_best(weights, scheme, key, found)]
        reference: ReferenceFacts | None = None
        if asked.reference is not None:
            more, reference = aligned(weights, scheme, key, asked.reference)
            readings += more
        if not readings:
            why = f"; aligned: {reference.refused}" if reference else ""
            subject = Subject(name=weights.name)
            return no_verdict(
                f"{reason}{why}", bits=key.bits, subject=subject, key=identity, terms=terms
            )
        # Each assignment of tensors and the aligned reading is one test that p is corrected for.
        tried = (0 if reason else len(found)) + (asked.reference is not None)
        best = _chosen_reading(readings, math.log10(terms.alpha / tried))
        axes = scheme.unit_axes(key)
        subject = Subject(
            name=weights.name,
            readings=tried,
            tensors=best.where,
            missing=tuple(name for name in key.tensors if name not in best.where),
            # The digests cover the tensors read so far, so this line must follow the readings.
            sha256=_told(weights.digests, key),
            file_sha256=weights.file_digest() if asked.digest else None,
            reference=reference,
            hidden_units=find_hidden_units(suspect, weights, best.where, axes) if axes else None,
            unmarked=read_unmarked(asked.unmarked, scheme, key, best.tensors)
            if asked.unmarked
            else (),
        )
    corrections = corrections_of(subject, terms.freedoms(opened=False))
    # A rank reaches alpha only with at least factor/alpha draws, since its floor is 1/(draws + 1).
    draws = math.ceil(total_factor(corrections) / terms.alpha)
    if subject.hidden_units is not None and subject.hidden_units.refused:
        # The refused axis gives no verdict anyway; few draws keep the figure cheap.
        draws = min(draws, _REFUSED_DRAWS)
    nulls = after_alignment(scheme.nulls(best.tensors, key, draws), best.evidence)
    chosen = _chosen(scheme, ranked_among(nulls, subject.unmarked), asked.null)
    return judge(best.evidence, chosen, subject=subject, key=identity, terms=terms)


def _told(digests: Mapping[str, str], key: Key) -> dict[str, str]:
    """Return the digests of the tensors that were read, with digests of tensor parts keyed.

    A digest of a part is an HMAC under the key's secret, so only the key's holder can compute it.
    With a plain digest anybody who has the suspect could find by trial which part a key reads.
    """
    # A stream label of its own keeps these bytes apart from the key's other uses of the secret.
    secret = key.stream("digests of parts").take(32)
    return {
        name: hmac.new(secret, digest.encode(), "sha256").hexdigest()
        if name.endswith(IN_PART) else digest
        for name, digest in digests.items()
    }  # fmt: skip


def _chosen_reading(readings: list[Reading], log10_alpha: float) -> Reading:
    """Return the plain reading if its p is small enough, else the best reading.

    The plain reading is preferred because nobody can fabricate it, unlike a reference.
    """
    plain = readings[0].evidence
    # The first reading is an aligned one if the tensors could not be read as stored.
    if plain.alignment is None and FairCoin().log10_p(plain) <= log10_alpha:
        return readings[0]
    return max(readings, key=lambda each: each.evidence.quality)


def read_evidence(suspect: Suspect | Predict | Iterable[Pixels], key: Key) -> Evidence:
    """Read a suspect with a key and return the reading without judging it.

    Weights are read from tensors with exactly the key's own names.
    """
    scheme = scheme_of(key)
    if isinstance(scheme, OutputScheme):
        return scheme.extract(cast(Iterable[Pixels], suspect), key)
    if isinstance(scheme, TriggerScheme):
        return scheme.extract(asked_of(suspect, scheme.mean, scheme.deviation), key)
    weight_scheme = as_weight_scheme(scheme)
    with as_numbers(open_weights(cast(Suspect, suspect))) as weights:
        where = {name: name for name in key.tensors}
        return weight_scheme.extract(weight_scheme.read_from(weights, where, key), key)


def _best(weights: Weights, scheme: WeightScheme, key: Key, found: list[dict[str, str]]) -> Reading:
    """Return the best reading over all ways to assign the suspect's tensors to the key's."""

    def reading(where: dict[str, str]) -> Reading:
        """Read the suspect with one assignment of the key's tensor names to the suspect's."""
        tensors = scheme.read_from(weights, where, key)
        return Reading(scheme.extract(tensors, key), tensors, where)

    return max(map(reading, found), key=lambda each: each.evidence.quality)


def _unreadable(weights: Weights, key: Key, found: list[dict[str, str]]) -> str:
    """Return why the key's tensors cannot be read as stored; empty if they can be read."""
    if not found:
        return _missing(weights, key)
    return _too_many(weights, key) if len(found) > MOST_CANDIDATES else ""


def _missing(weights: Weights, key: Key) -> str:
    """Describe the tensors that the suspect lacks."""
    wanted = ", ".join(f"{name} {list(shape)}" for name, shape in key.tensors.items())
    return (
        f"the suspect has no tensors of the names or shapes that this key reads ({wanted}) "
        f"among its {len(weights.tensors)}: another architecture, or another form of the model"
    )


def _too_many(weights: Weights, key: Key) -> str:
    """Describe why the suspect's tensors fit the key's in too many ways."""
    return (
        f"the tensors that this key reads were renamed, and {len(weights.tensors)} tensors of the "
        f"suspect can be arranged in more than {MOST_CANDIDATES} ways as {len(key.tensors)}"
    )
