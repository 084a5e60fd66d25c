"""The command that writes what an examiner hands over, and the one that judges it again."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from countermark.cli.claim import Authorities, Signers
from countermark.cli.key import png
from countermark.cli.options import (
    ALPHA,
    Alpha,
    AsJson,
    AssumeDated,
    ModelArguments,
    pairs,
    passphrase_of,
    probability,
    show_result,
)
from countermark.cli.owner import app
from countermark.cli.suspect import (
    Ask,
    Asking,
    BlindChoice,
    ClaimsCounted,
    Host,
    NullName,
    ReaderCode,
    ReferenceFile,
    SuspectDate,
    TranscriptFile,
    suspect_of,
)
from countermark.errors import ConfigError, printable
from countermark.places import require_free, require_place
from countermark.report.dated import Dated

if TYPE_CHECKING:
    from countermark.key import Key
    from countermark.report.page import Picture
    from countermark.report.record import Record
    from countermark.verdict import Terms, Verdict

_ERROR_RATE = 0.1
_PICTURES = 12  # triggers that are shown where the key is opened


@app.command()
def report(
    suspect: Annotated[
        str | None, typer.Argument(metavar="[SUSPECT]", help="As for `verify`.")
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
    open_key: Annotated[
        bool,
        typer.Option("--open-key", help="Put the key into page and bundle. This burns the mark."),
    ] = False,
    error_rate: Annotated[
        float,
        typer.Option(
            metavar="P",
            help="How often a copy loses a bit, for the likelihood ratio.",
            callback=probability,
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
    recorded: Annotated[
        bool, typer.Option("--recorded", help="SUSPECT is such a transcript: ask nobody.")
    ] = False,
    reference: ReferenceFile = None,
    null: NullName = None,
    reader: ReaderCode = None,
    as_json: AsJson = False,
) -> int:
    """Write a report on a suspect: one HTML page, and a bundle that judges itself again.

    SUSPECT is read as `verify` reads it. --out and --bundle are both needed.

    With --replay, a bundle is judged again offline, from the reading that it holds; with SUSPECT
    and --key as well, the reading is repeated. Exits as `verify` does; 2 where a bundle was changed
    or another reading comes out.

    \b
    Example:
        countermark report m.safetensors --key acme.key --out report.html --bundle bundle
        countermark report --replay bundle
        countermark report m.safetensors --key acme.key --replay bundle --json
    """
    asked = Asking(
        pairs(ask, "--ask"), model, pairs(model_arguments, "--model-arg"), transcript, reference,
        replay=recorded,
    )  # fmt: skip
    if replay is not None:
        idle = {
            "--out": out, "--bundle": bundle, "--open-key": open_key, "--claim": claim,
            "--null": null, "--alpha": alpha != ALPHA, "--error-rate": error_rate != _ERROR_RATE,
            "--assume-dated": assume_dated, "--blind-choice": blind_choice,
            "--authority": authority, "--signer": signer, "--suspect-date": suspect_date,
            "--ledger": ledger,
        }  # fmt: skip
        if given := [name for name, each in idle.items() if each]:
            raise ConfigError(
                f"--replay judges by what the bundle holds, without {given[0]}: give SUSPECT and "
                "--key, or neither"
            )
        return _replayed(replay, suspect, key, (asked, reader), as_json)
    if suspect is None or key is None or out is None or bundle is None:
        raise ConfigError("a report needs SUSPECT, --key, --out and --bundle; or --replay BUNDLE")
    for each in (out, bundle):
        require_free(each)
        require_place(each)
    order = _Order(
        suspect, key, asked, reader, null=null,
        alpha=alpha, assume_dated=assume_dated, blind_choice=blind_choice,
    )  # fmt: skip
    dated = Dated(claim, authority or [], signer or [], suspect_date, ledger)
    made = _made(order, dated, out, bundle, (open_key, error_rate))
    about = {"report": str(out), "bundle": str(bundle), "verdict": made.to_json()}
    show_result(about, as_json, f"{out}, {bundle}\n{made.explain()}")
    return made.exit_code


@dataclass(frozen=True)
class _Order:
    """What is to be read, and how it is judged."""

    suspect: str
    key: Path
    asked: Asking
    reader: str | None
    alpha: float
    assume_dated: bool
    blind_choice: bool
    null: str | None

    def opened(self) -> Key:
        """The key."""
        from countermark.key import Key

        return Key.load(self.key, passphrase_of(self.key)).trusting(self.reader)

    def read(self, key: Key, terms: Terms) -> Verdict:
        """The verdict on the suspect, the digest of the whole file included."""
        from countermark.examine import examine

        with suspect_of(self.suspect, key, self.asked) as found:
            return examine(found, key, terms, null=self.null, digest=True)


def _made(order: _Order, dated: Dated, out: Path, bundle: Path, how: tuple[bool, float]) -> Verdict:
    """Read, judge, write bundle and page."""
    from countermark.files import write_bytes
    from countermark.report.bundle import contents, save
    from countermark.report.page import About, page
    from countermark.report.record import Recorder
    from countermark.schemes import scheme_named
    from countermark.verdict import Terms

    open_key, error_rate = how
    key = order.opened()
    shown, recorder = dated.shown(key), Recorder()
    dating = None if shown is None else shown[0]
    terms = Terms(order.alpha, order.assume_dated, order.blind_choice, dating=dating, told=recorder)
    verdict = order.read(key, terms)
    record = recorder.record(verdict, blind_choice=order.blind_choice, test_key=key.test_key)
    if record is None:
        raise ConfigError(f"nothing was read, so there is nothing to report: {verdict.reason}")
    if open_key:
        warnings.warn(
            f"{out} and {bundle} hold the key: the mark is burnt, whoever sees them can remove it",
            stacklevel=1,
        )
    content = contents(record, None if shown is None else shown[1], order.key if open_key else None)
    paper = str(scheme_named(verdict.scheme).paper)
    pictures = _pictures(key, record) if open_key else []
    told = page(record, verdict, content, About(paper, error_rate, key.fields, pictures))
    save(bundle, content)
    write_bytes(out, told)
    return verdict


def _pictures(key: Key, record: Record) -> list[Picture]:
    """The first triggers of a key, beside their covers where it keeps them."""
    from countermark.report.page import Picture, data_url
    from countermark.schemes import scheme_of
    from countermark.schemes.black_box import TriggerScheme
    from countermark.schemes.deepstego import COVERS

    scheme = scheme_of(key)
    if not isinstance(scheme, TriggerScheme):
        return []
    covers = key.frozen.get(COVERS)
    reading = record.reading
    answers = zip(reading.expected, reading.read, strict=True)
    return [
        Picture(
            trigger=data_url(png(trigger)),
            cover=None if covers is None else data_url(png(covers[n])),
            says=f"class {expected} wanted, " + (f"{read} answered" if read >= 0 else "no answer"),
        )
        for n, (trigger, (expected, read)) in enumerate(
            zip(scheme.committed(key)[:_PICTURES], answers, strict=False)
        )
    ]


def _replayed(
    bundle: Path, suspect: str | None, key: Path | None, how: tuple[Asking, str | None],
    as_json: bool,
) -> int:  # fmt: skip
    """Judge a bundle again, and with suspect and key read again."""
    from countermark.limits import RECORDED
    from countermark.report.bundle import replay

    if (suspect is None) != (key is None):
        raise ConfigError("to read again, --replay needs both SUSPECT and --key")
    found = replay(bundle)
    checked = list(found.checked)
    if suspect is not None and key is not None:
        judged = found.verdict
        order = _Order(
            suspect, key, *how, alpha=judged.alpha, assume_dated=judged.assume_dated,
            blind_choice=found.record.terms.blind_choice, null=found.record.null.name,
        )  # fmt: skip
        checked.append(_read_again(order, found.verdict))
    limits = [*found.limits, *([RECORDED] if how[0].replay else [])]
    lines = [found.verdict.explain(), *(f"  holds         {each}" for each in checked)]
    lines += [f"  limit         {each}" for each in limits]
    about = {
        "record_sha256": found.sha256, "checked": checked, "limits": limits,
        "verdict": found.verdict.to_json(),
    }  # fmt: skip
    show_result(about, as_json, "\n".join(lines))
    return found.verdict.exit_code


def _read_again(order: _Order, verdict: Verdict) -> str:
    """Read the suspect again with the key; it must come to the same.

    Raises:
        ConfigError: another reading, or another suspect.
    """
    from countermark.verdict import Terms

    key = order.opened()
    if key.commitment != verdict.commitment:
        raise ConfigError(
            f"{order.key} is the key {key.commitment}, the bundle is about {verdict.commitment}"
        )
    terms = Terms(verdict.alpha, verdict.assume_dated, order.blind_choice, dating=verdict.dating)
    again = order.read(key, terms)
    told = _comparable(again.to_json()), _comparable(verdict.to_json())
    for name, value in told[0].items():
        if value != told[1][name]:
            raise ConfigError(
                f"read again, {name} is {printable(str(value), 80)}, the bundle says "
                f"{printable(str(told[1][name]), 80)}: it is another suspect, or was changed"
            )
    return f"read again from {order.suspect}, it is the same"


def _comparable(told: Mapping[str, Any]) -> dict[str, Any]:
    """A verdict with lists for tuples, whatever the suspect's file is called, asked or recorded."""
    from countermark.limits import RECORDED

    found: dict[str, Any] = json.loads(json.dumps(told))
    for name in ("name", "recorded"):
        found["suspect"].pop(name, None)
    found["limits"] = [each for each in found["limits"] if each != RECORDED]
    return found
