"""The command `verify`: read a suspect with a key and judge the reading."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from countermark.cli.options import (
    ALPHA,
    Alpha,
    AsJson,
    AssumeDated,
    Authorities,
    Commitment,
    ModelArguments,
    Signers,
    parse_pairs,
    read_key_passphrase,
    show_result,
)
from countermark.cli.suspect_options import (
    Ask,
    BlindChoice,
    ClaimsCounted,
    Host,
    NullName,
    ReaderCode,
    Recorded,
    ReferenceFile,
    SuspectDate,
    SuspectOptions,
    TranscriptFile,
    UnmarkedFiles,
    load_unmarked_models,
    make_fresh_triggers,
    open_suspect,
)
from countermark.errors import ConfigError
from countermark.report.dated import ClaimOptions

if TYPE_CHECKING:
    from countermark.keys.key import Key
    from countermark.verification.disclosure import TriggerDisclosure


def verify(
    suspect: Annotated[
        str,
        typer.Argument(
            metavar="FILE|URL|IMAGES_DIR",
            help="A .safetensors, torch, TorchScript, ONNX or GGUF file, or a folder of a checkpoint; for "
            "a key of triggers also a prediction service or a transcript; for a key of outputs a "
            "folder of published images.",
        ),
    ],
    key: Annotated[
        Path | None, typer.Option("--key", metavar="DIR", help="The key folder.")
    ] = None,
    opened: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="In place of a key, triggers that `key open` wrote."),
    ] = None,
    commitment: Commitment = None,
    blind_choice: BlindChoice = False,
    model: Host = None,
    model_arguments: ModelArguments = None,
    ask: Ask = None,
    transcript: TranscriptFile = None,
    recorded: Recorded = False,
    fresh: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|DIR",
            help="Ask about fresh triggers, made of the first test images of these data, in place "
            "of the committed ones.",
        ),
    ] = None,
    fresh_images: Annotated[
        int, typer.Option(metavar="N", help="Of how many test images fresh triggers are made.")
    ] = 200,
    reference: ReferenceFile = None,
    unmarked: UnmarkedFiles = None,
    alpha: Alpha = ALPHA,
    assume_dated: AssumeDated = False,
    claim: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="A claim of this key, as evidence of its age."),
    ] = None,
    authority: Authorities = None,
    signer: Signers = None,
    suspect_date: SuspectDate = None,
    ledger: ClaimsCounted = None,
    null: NullName = None,
    file_digest: Annotated[
        bool, typer.Option("--file-digest", help="Record the digest of the whole file too.")
    ] = False,
    resume: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Where an interrupted reading of many images goes on; else unused."
        ),
    ] = None,
    reader: ReaderCode = None,
    as_json: AsJson = False,
) -> int:
    """Say whether a key's mark is in a suspect, and how sure that is.

    The answer states how probable a false accusation is.
    A key of triggers asks a live model: a model that is built and filled from the file, or a
    service. With --opened the model is asked about disclosed triggers, and the key is not needed. A
    key of outputs reads images. Files that are no plain images are skipped and counted, and the
    mark can only be found in images of a --blind-choice.

    With --claim, the key counts as older than the suspect if an --authority timestamped a tree head
    of the --ledger, with that claim under it, before the --suspect-date.

    Exits 0 when the mark is present, 1 when it is not proven, 3 when this key gives no verdict, 2
    when something stopped the answer.

    \b
    Example:
        countermark verify m.safetensors --key acme.key
        countermark verify other.safetensors --key acme.key --json  # exit 1
        countermark verify other.safetensors --key acme.key --reference m.safetensors  # exit 1
    """
    from countermark.keys.key import Key
    from countermark.results.verdict import VerificationOptions
    from countermark.schemes import load_scheme
    from countermark.schemes.outputs import OutputScheme
    from countermark.verification.verify import examine

    loaded = _load_key_or_disclosure(key, opened, commitment, reader)
    dated = ClaimOptions(claim, authority or [], signer or [], suspect_date, ledger)
    asked = SuspectOptions(
        parse_pairs(ask, "--ask"), model, parse_pairs(model_arguments, "--model-arg"), transcript, reference,
        replay=recorded,
    )  # fmt: skip
    # A statement about a choice is refused if nothing was chosen: it would be recorded in the
    # verdict and mislead its readers.
    named = recorded or "class_names" in asked.options
    pictures = isinstance(loaded, Key) and load_scheme(loaded).family == OutputScheme.family
    if blind_choice and not (named or pictures or opened or fresh):
        raise ConfigError(
            "--blind-choice is for --opened, --fresh, pictures and class_names: here is nothing "
            "that anybody could have chosen"
        )
    # The whole judgement is inside the block, because the transcript is written at its end.
    with open_suspect(suspect, loaded, asked) as found:
        # Fresh triggers replace the committed ones; the key itself still says how they are read.
        terms = VerificationOptions(
            alpha, assume_dated, blind_choice, dating=dated.date_key(loaded)
        )
        judged = make_fresh_triggers(loaded, fresh, fresh_images) if fresh else loaded
        verdict = examine(
            found, judged, terms, null=null, digest=file_digest, resume=resume,
            unmarked=load_unmarked_models(unmarked, loaded, asked),
        )  # fmt: skip
    show_result(verdict.to_json(), as_json, verdict.explain())
    return verdict.exit_code


def _load_key_or_disclosure(
    key: Path | None, opened: Path | None, commitment: str | None, reader: str | None
) -> Key | TriggerDisclosure:
    """Load what `verify` judges by: a key folder, or a disclosure of some of its triggers.

    Args:
        key: a key folder.
        opened: a file that `key open` wrote.
        commitment: the commitment that the disclosure must belong to, in hexadecimal.
        reader: the module:factory of the key's own reader, if its code is trusted.

    Raises:
        ConfigError: both `key` and `opened` are given, or neither, or an option that belongs to the
            other one.
        KeyFileError: the key folder cannot be read.
    """
    from countermark.keys.key import Key
    from countermark.verification.disclosure import TriggerDisclosure

    if (key is None) == (opened is None):
        raise ConfigError(
            "verify needs a key: give either --key DIR, or --opened FILE with some of its triggers"
        )
    if key is not None:
        if commitment is not None:
            raise ConfigError("--commitment is for --opened: a key folder has its own")
        return Key.load(key, read_key_passphrase(key)).with_trusted_code(reader)
    if opened is None or reader is not None:
        raise ConfigError("--reader is for --key: opened triggers run no code")
    loaded = TriggerDisclosure.load(opened)
    # The file comes from the owner, who could have made it up: check it before it judges anybody.
    loaded.check(commitment)
    return loaded
