"""Verify a key against a suspect: find the tensors, read the bits, judge them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from countermark.alignment import SuspectWithReference
from countermark.checkpoints import Suspect
from countermark.errors import ConfigError, KeyFileError
from countermark.images.image_files import Pixels
from countermark.keys.key import Key
from countermark.keys.passphrase import VARIABLE, read_passphrase_file
from countermark.keys.storage import load_header
from countermark.predictors.base import Predictor
from countermark.results.reading import Reading
from countermark.results.verdict import Verdict, VerificationOptions
from countermark.schemes import load_scheme
from countermark.schemes.base import Scheme
from countermark.schemes.triggers import FreshTriggers
from countermark.verification.disclosure import TriggerDisclosure
from countermark.verification.family import ExaminerInputs, SchemeFamily
from countermark.verification.unmarked_models import Supplied
from countermark.verification.verify_aligned import prepare_reference
from countermark.verification.verify_outputs import OutputFamily
from countermark.verification.verify_triggers import TriggerFamily
from countermark.verification.verify_weights import WeightFamily

FAMILIES: Mapping[str, SchemeFamily] = {
    "weights": WeightFamily(), "triggers": TriggerFamily(), "outputs": OutputFamily(),
}  # fmt: skip
"""How keys are read and judged, by the `family` of their scheme."""


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
        suspect: a .safetensors, torch, TorchScript, ONNX or GGUF file, a folder of one, or a live
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
    scheme = _load_scheme(key)
    inputs = ExaminerInputs(null, digest, resume, unmarked, reference)
    return FAMILIES[scheme.family].examine(suspect, scheme, key, terms, inputs)


def read_suspect(suspect: Suspect | Predictor | Iterable[Pixels], key: Key) -> Reading:
    """Read a suspect with a key and return the reading without judging it.

    Weights are read from tensors with exactly the key's own names.
    """
    scheme = load_scheme(key)
    return FAMILIES[scheme.family].read(suspect, scheme, key)


def _load_scheme(key: Key | TriggerDisclosure | FreshTriggers) -> Scheme:
    """Return the scheme of a key, of opened triggers or of fresh triggers."""
    if isinstance(key, TriggerDisclosure):
        return key.trigger_scheme
    return load_scheme(key.key if isinstance(key, FreshTriggers) else key)
