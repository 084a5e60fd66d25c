"""The command `report`: write an examiner's report, or judge a written bundle again."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from countermark._internal.output_paths import require_free_path, require_writable_place
from countermark.cli.key import encode_png
from countermark.cli.options import (
    ALPHA,
    Alpha,
    AsJson,
    AssumeDated,
    Authorities,
    ModelArguments,
    Signers,
    parse_pairs,
    read_key_passphrase,
    read_pem_passphrase,
    require_probability,
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
    open_suspect,
)
from countermark.errors import ConfigError, make_printable
from countermark.report.dated import ClaimOptions

if TYPE_CHECKING:
    from countermark.keys.key import Key
    from countermark.report.page import TriggerImage
    from countermark.report.record import Record
    from countermark.results.verdict import Verdict, VerificationOptions

_ERROR_RATE = 0.1
# At most this many triggers are shown in the page if the key is opened.
_PICTURES = 12


def report(
    suspect: Annotated[
        str | None,
        typer.Argument(
            metavar="[SUSPECT]",
            help="As for `verify`. With --replay: read this suspect again, with --key or the "
            "bundle's opened key.",
        ),
    ] = None,
    key: Annotated[
        Path | None, typer.Option("--key", metavar="DIR", help="The key folder.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The page to write; must not exist.")
    ] = None,
    bundle: Annotated[
        Path | None, typer.Option(metavar="DIR", help="The bundle to write; must not exist.")
    ] = None,
    replay: Annotated[
        Path | None, typer.Option(metavar="BUNDLE", help="Judge a bundle again.")
    ] = None,
    private_key: Annotated[
        Path | None, typer.Option(metavar="PEM", help="Ed25519; signs the bundle.")
    ] = None,
    open_key: Annotated[
        bool,
        typer.Option("--open-key", help="Put the key into page and bundle. This burns the mark."),
    ] = False,
    error_rate: Annotated[
        float,
        typer.Option(
            metavar="P",
            help="How often a copy loses a bit, for the likelihood ratio.",
            callback=require_probability,
        ),
    ] = _ERROR_RATE,
    alpha: Alpha = ALPHA,
    assume_dated: AssumeDated = False,
    blind_choice: BlindChoice = False,
    claim: Annotated[Path | None, typer.Option(metavar="FILE", help="A claim of this key.")] = None,
    authority: Authorities = None,
    signer: Signers = None,
    suspect_date: SuspectDate = None,
    ledger: ClaimsCounted = None,
    model: Host = None,
    model_arguments: ModelArguments = None,
    ask: Ask = None,
    transcript: TranscriptFile = None,
    recorded: Recorded = False,
    reference: ReferenceFile = None,
    unmarked: UnmarkedFiles = None,
    null: NullName = None,
    reader: ReaderCode = None,
    as_json: AsJson = False,
) -> int:
    """Write a report on a suspect, or judge a written bundle again.

    A report is one HTML page, and a bundle that can be judged again.
    SUSPECT is read as `verify` reads it. --out and --bundle are both needed.

    With --replay, a bundle is judged again offline, from the reading that it holds. Anybody can
    make up a reading. The command therefore exits 3, unless SUSPECT is read again or a --signer
    whom you pin has signed the bundle. Then it exits as `verify` does, and 2 when the bundle was
    changed or the suspect gives another reading.

    \b
    Example:
        countermark report m.safetensors --key acme.key --out report.html --bundle bundle
        countermark report --replay bundle  # exit 3
        countermark report m.safetensors --replay bundle --key acme.key --json
    """
    asked = SuspectOptions(
        parse_pairs(ask, "--ask"), model, parse_pairs(model_arguments, "--model-arg"), transcript, reference,
        replay=recorded,
    )  # fmt: skip
    # A replay takes its terms from the bundle. An option that would be ignored is refused, so that
    # nobody believes that it had an effect.
    if replay is not None:
        idle = {
            "--out": out, "--bundle": bundle,
            "--open-key": open_key, "--claim": claim, "--private-key": private_key,
            "--null": null, "--alpha": alpha != ALPHA, "--error-rate": error_rate != _ERROR_RATE,
            "--assume-dated": assume_dated, "--blind-choice": blind_choice,
            "--authority": authority, "--suspect-date": suspect_date, "--ledger": ledger,
        }  # fmt: skip
        if given := [name for name, each in idle.items() if each]:
            raise ConfigError(
                f"--replay judges by what the bundle holds, without {given[0]}: give SUSPECT and "
                "--key to read again, and --signer for whom you believe"
            )
        again = _ReplayOptions(suspect, key, asked, reader, unmarked)
        return _replay_bundle(replay, again, signer or [], as_json)
    if suspect is None or key is None or out is None or bundle is None:
        raise ConfigError("a report needs SUSPECT, --key, --out and --bundle; or --replay BUNDLE")
    # Check both paths before the suspect is read, which can take long.
    for each in (out, bundle):
        require_free_path(each)
        require_writable_place(each)
    order = _ReportRequest(
        suspect, key, asked, reader, unmarked=unmarked, null=null,
        alpha=alpha, assume_dated=assume_dated, blind_choice=blind_choice,
    )  # fmt: skip
    dated = ClaimOptions(claim, authority or [], signer or [], suspect_date, ledger)
    made = _write_report(
        order, dated, _ReportPaths(out, bundle, private_key), (open_key, error_rate)
    )
    about = {"report": str(out), "bundle": str(bundle), "verdict": made.to_json()}
    show_result(about, as_json, f"{out}, {bundle}\n{made.explain()}")
    return made.exit_code


@dataclass(frozen=True)
class _ReportPaths:
    """The paths of a report to write.

    Attributes:
        page: the HTML file to write.
        bundle: the folder to write.
        sign: a PEM file with the private key that signs the bundle, or None.
    """

    page: Path
    bundle: Path
    sign: Path | None


@dataclass(frozen=True)
class _ReplayOptions:
    """The options for reading a suspect again during a replay.

    Attributes:
        suspect: the suspect to read; None to judge the recorded reading only.
        key: the key folder; None for the opened key in the bundle.
        asked: how the suspect is loaded or asked.
        reader: the module:factory of the key's own reader, if its code is trusted.
        unmarked: files of unmarked models.
    """

    suspect: str | None
    key: Path | None
    asked: SuspectOptions
    reader: str | None
    unmarked: list[Path] | None


@dataclass(frozen=True)
class _ReportRequest:
    """A suspect to read and the terms of the verdict.

    Attributes:
        suspect: a file, a folder or a URL, as `verify` takes it.
        key: the key folder.
        asked: how the suspect is loaded or asked.
        reader: the module:factory of the key's own reader, if its code is trusted.
        alpha: the threshold for the chance of a false accusation.
        assume_dated, blind_choice: statements of the examiner.
        null: the name of another null hypothesis, or None.
        unmarked: files of unmarked models.
    """

    suspect: str
    key: Path
    asked: SuspectOptions
    reader: str | None
    alpha: float
    assume_dated: bool
    blind_choice: bool
    null: str | None
    unmarked: list[Path] | None

    def load_key(self) -> Key:
        """Load the key, with its own reader if that is trusted."""
        from countermark.keys.key import Key

        return Key.load(self.key, read_key_passphrase(self.key)).with_trusted_code(self.reader)

    def judge_suspect(self, key: Key, terms: VerificationOptions) -> Verdict:
        """Read the suspect and return the verdict, with the digest of the whole file."""
        from countermark.verification.verify import examine

        with open_suspect(self.suspect, key, self.asked) as found:
            unmarked = load_unmarked_models(self.unmarked, key, self.asked)
            return examine(found, key, terms, null=self.null, digest=True, unmarked=unmarked)


def _write_report(
    order: _ReportRequest, dated: ClaimOptions, places: _ReportPaths, how: tuple[bool, float]
) -> Verdict:
    """Read the suspect, judge it, and write bundle and page.

    Args:
        order: what to read and by which terms.
        dated: the options about a claim that dates the key.
        places: what to write.
        how: whether the key goes into page and bundle, and the error rate of the likelihood ratio.

    Raises:
        ConfigError: nothing was read.
    """
    from countermark._internal.files import write_bytes
    from countermark.claims.signing import load_private_key
    from countermark.report.bundle import make_bundle_files, save_bundle
    from countermark.report.page import PageDetails, render_page
    from countermark.report.record import make_record
    from countermark.results.verdict import VerificationOptions
    from countermark.schemes import find_scheme_class

    open_key, error_rate = how
    # Load the private key first: a wrong passphrase must not cost a long reading.
    signer = None
    if places.sign is not None:
        signer = load_private_key(places.sign, read_pem_passphrase(places.sign))
    key = order.load_key()
    shown = dated.date_with_documents(key)
    dating, evidence = (None, None) if shown is None else shown
    verdict = order.judge_suspect(
        key, VerificationOptions(order.alpha, order.assume_dated, order.blind_choice, dating=dating)
    )
    # Without a reading, for example if the suspect lacks the key's tensors, there is no record.
    record = make_record(verdict)
    if record is None:
        raise ConfigError(f"nothing was read, so there is nothing to report: {verdict.reason}")
    if open_key:
        warnings.warn(
            f"{places.page} and {places.bundle} hold the key: the mark is burnt, whoever sees them "
            "can remove it",
            stacklevel=1,
        )
    content = make_bundle_files(record, evidence, order.key if open_key else None, signer)
    paper = str(find_scheme_class(verdict.scheme).paper)
    pictures = _make_trigger_images(key, record) if open_key else []
    told = render_page(
        record, verdict, content, PageDetails(paper, error_rate, key.fields, pictures)
    )
    # The bundle goes first: the page shows the digests of its files.
    save_bundle(places.bundle, content)
    write_bytes(places.page, told)
    return verdict


def _make_trigger_images(key: Key, record: Record) -> list[TriggerImage]:
    """Return the first triggers of a key as images, beside their covers if the key holds them.

    Returns: at most 12 images with the wanted and the answered class; an empty list for a key
        without triggers.
    """
    from countermark.report.page import TriggerImage, make_data_url
    from countermark.schemes import load_scheme
    from countermark.schemes.deepstego.scheme import COVERS
    from countermark.schemes.triggers import TriggerScheme

    scheme = load_scheme(key)
    if not isinstance(scheme, TriggerScheme):
        return []
    covers = key.frozen.get(COVERS)
    reading = record.reading
    answers = zip(reading.expected, reading.read, strict=True)
    # A class below 0 stands for an answer that names no class.
    return [
        TriggerImage(
            trigger=make_data_url(encode_png(trigger)),
            cover=None if covers is None else make_data_url(encode_png(covers[n])),
            says=f"class {expected} wanted, " + (f"{read} answered" if read >= 0 else "no answer"),
        )
        for n, (trigger, (expected, read)) in enumerate(
            zip(scheme.read_committed_triggers(key)[:_PICTURES], answers, strict=False)
        )
    ]


def _replay_bundle(bundle: Path, again: _ReplayOptions, signers: list[Path], as_json: bool) -> int:
    """Judge a bundle again, read the suspect again if one is given, and print the result.

    Args:
        bundle: the folder.
        again: what to read again.
        signers: PEM files of public keys that the examiner pins.
        as_json: print JSON instead of text.

    Returns: the exit code.

    Raises:
        ClaimError: the bundle was changed, or no pinned signer signed it.
        ConfigError: options that do not go together, or another reading.
    """
    from countermark.claims.signing import compute_key_id, load_public_key
    from countermark.report.bundle import FOLLOWS, replay_bundle
    from countermark.results.caveats import RECORDED
    from countermark.results.verdict import EXIT_CODES

    found = replay_bundle(bundle, [compute_key_id(load_public_key(each)) for each in signers])
    verdict, checked, limits = found.verdict, list(found.checked), list(found.limits)
    if again.suspect is not None:
        folder = again.key or (bundle if found.has_key else None)
        if folder is None:
            raise ConfigError("to read SUSPECT again, give --key: the bundle holds no key")
        order = _ReportRequest(
            again.suspect, folder, again.asked, again.reader, unmarked=again.unmarked,
            alpha=verdict.alpha,
            assume_dated=verdict.assume_dated, blind_choice=verdict.blind_choice,
            null=found.record.result.null,
        )  # fmt: skip
        # The null hypothesis and the terms are those of the bundle: they are what is repeated.
        checked.append(_require_same_verdict(order, verdict))
        # The first caveat says that nobody read the suspect again; that is no longer true.
        limits = limits[1:] + ([RECORDED] if again.asked.replay else [])
    elif again.key is not None or again.unmarked:
        raise ConfigError("to read again, --key and --unmarked need SUSPECT")
    # A recorded reading alone supports no verdict, because anybody can write a record.
    is_supported = again.suspect is not None or found.is_vouched_for
    outcome, reason = (verdict.outcome, verdict.reason) if is_supported else ("no_verdict", FOLLOWS)
    lines = [f"{outcome.upper().replace('_', ' ')}: {reason}"]
    lines += [f"  holds         {each}" for each in checked]
    lines += [f"  limit         {each}" for each in limits]
    lines += ["", "What was recorded:", verdict.explain()]
    about = {
        "outcome": outcome, "reason": reason, "record_sha256": found.sha256, "checked": checked,
        "limits": limits, "signers": list(found.signers), "recorded_verdict": verdict.to_json(),
    }  # fmt: skip
    show_result(about, as_json, "\n".join(lines))
    return verdict.exit_code if is_supported else EXIT_CODES["no_verdict"]


def _require_same_verdict(order: _ReportRequest, verdict: Verdict) -> str:
    """Read the suspect again and check that the verdict is the recorded one.

    Returns: a line that says what was checked.

    Raises:
        ConfigError: the key, the reading or the suspect differs from the bundle.
    """
    from countermark.results.verdict import VerificationOptions

    key = order.load_key()
    # Another key would give another reading, and the message would blame the suspect.
    if key.commitment != verdict.commitment:
        raise ConfigError(
            f"{order.key} is the key {key.commitment}, the bundle is about {verdict.commitment}"
        )
    terms = VerificationOptions(
        verdict.alpha, verdict.assume_dated, order.blind_choice, dating=verdict.dating
    )
    again = order.judge_suspect(key, terms)
    told = _remove_file_names(again.to_json()), _remove_file_names(verdict.to_json())
    for name, value in told[0].items():
        if value != told[1][name]:
            raise ConfigError(
                f"read again, {name} is {make_printable(str(value), 80)}, the bundle says "
                f"{make_printable(str(told[1][name]), 80)}: it is another suspect, or was changed"
            )
    return f"read again from {order.suspect}, it is the same"


def _remove_file_names(told: Mapping[str, Any]) -> dict[str, Any]:
    """Return a verdict as JSON values without file names, for comparison.

    The suspect's file may have another name now, and may be a transcript instead of a service.
    """
    from countermark.results.caveats import RECORDED

    # A round trip turns tuples into lists, which the recorded verdict has.
    found: dict[str, Any] = json.loads(json.dumps(told))
    for name in ("name", "recorded"):
        found["suspect"].pop(name, None)
    for model in (found["unmarked"] or {}).get("models", []):
        model.pop("name")
    found["limits"] = [each for each in found["limits"] if each != RECORDED]
    return found
