"""The report as one HTML file: the question, the findings, and the facts that they rest on."""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from countermark.claims.statement import parse_time
from countermark.errors import make_printable
from countermark.report import figures
from countermark.report.measured import MeasuredForm, UnmarkedCount, find_measured_form
from countermark.report.record import Record, is_recomputed
from countermark.results import statistics
from countermark.results.owner_statements import describe_hidden_units
from countermark.results.test_result import describe_corrections
from countermark.results.verdict import Verdict

_CUT = 10_000  # cells of a figure, so that a long reading does not make a page of megabytes


@dataclass(frozen=True)
class TriggerImage:
    """A trigger as the page shows it.

    Attributes:
        trigger, cover: data URLs of the images; no cover if the key keeps none.
        says: the trigger's label and the suspect's answer.
    """

    trigger: str
    cover: str | None
    says: str


@dataclass(frozen=True)
class PageDetails:
    """The page's content beside record and verdict.

    Attributes:
        paper: the scheme's paper.
        error_rate: e, the rate at which bits of a copy are assumed to be lost, for the likelihood
            ratio.
        fields: the scheme's fields, by which its measured form is found.
        pictures: triggers to show, if the key was opened.
        each_bit: whether the page shows which bits agree. Somebody who can have their own suspects
            read could learn the key from these bits.
    """

    paper: str
    error_rate: float
    fields: Mapping[str, Any]
    pictures: Sequence[TriggerImage] = ()
    each_bit: bool = True


NO_RATIO = (
    "none: the reader was trained on its message, so that its bits follow no error model; see p"
)
NOT_MEASURED = "not measured for this form of the scheme"
MEASURED = (
    "models without a mark, {group}: owned would have been said, were the key dated, of {counts}. "
    "Measured: {source}, seeds {seeds}; {made}; {track}."
)
COUNT = "{claims} of {judged} at alpha {level} (95 % interval {low:.4f} to {high:.4f})"
BY_NULL = (
    "Under the null hypothesis a claim at this threshold is false with a probability of at most "
    "{alpha:g}; what was measured is of other models and other keys, too few for so small an alpha."
)
MARGIN = (
    "{matched} agree and {least} are needed: {more} more may be lost before the mark is no longer "
    "found."
)
ROBUST = (
    "Measured on other models, and no property of this one ({name}; {source}; mean [least, most] "
    "of the seeds, and how often each verdict): {says}"
)
NOT_ROBUST = "What attacks leave of a mark was not measured for this form of the scheme."
SHORT = "{matched} agree and {least} are needed: the mark was not found."
BY_RANK = "it is judged by a rank, not by a count: a margin in bits would say nothing."


def render_page(
    record: Record,
    verdict: Verdict,
    content: Mapping[str, bytes],
    about: PageDetails,
) -> bytes:
    """Render the page as UTF-8.

    Args:
        record: the record of the verdict.
        verdict: the verdict.
        content: the files of the bundle, by their names; the page shows their digests.
        about: the page's other content.
    """
    context = _make_context(record, verdict, content, about)
    return _make_environment().get_template("page.html.j2").render(context).encode()


def render_body(
    record: Record, verdict: Verdict, content: Mapping[str, bytes], about: PageDetails
) -> Markup:
    """Render the page's body, for inclusion in another page; the arguments are those of `render_page`."""
    context = _make_context(record, verdict, content, about)
    told = _make_environment().get_template("body.html.j2").render(context)
    return Markup(told)  # noqa: S704 - the template escapes


def _make_context(
    record: Record, verdict: Verdict, content: Mapping[str, bytes], about: PageDetails
) -> dict[str, Any]:
    """Make the variables of the templates."""
    form = find_measured_form(verdict.scheme, about.fields)
    # Figures are drawn from the record, so that they show the same as a replay.
    evidence = record.reading.rebuild_reading()
    # The chance that one value agrees on an unmarked model: 1/2 for bits, 1/C for C classes.
    rate = 1 / evidence.choices
    least = statistics.find_least_matches(evidence.bits, _compute_needed_log10_p(verdict), rate)
    shown = slice(0, _CUT)
    return {
        "v": verdict,
        "paper": make_printable(about.paper),
        "log10_alpha": math.log10(verdict.alpha),
        "false_claims": _describe_false_claims(form, verdict.alpha),
        "ratio": _describe_ratio(verdict, evidence.bits, rate, about.error_rate),
        "margin": _describe_margin(verdict, least),
        "robust": _describe_robustness(form),
        "dated": _describe_dating(verdict),
        # The figures are made of numbers and escaped text only.
        "matches": Markup(  # noqa: S704
            figures.draw_matches(evidence.match_count, evidence.bits, rate, least)
        ),
        "message": Markup(  # noqa: S704
            figures.draw_message(record.reading.read[shown], record.reading.expected[shown])
        )
        if about.each_bit
        else None,
        "time_line": Markup(figures.draw_time_line(_list_events(record, verdict))),  # noqa: S704
        "pictures": about.pictures,
        "opened": "key.json" in content,
        "more_limits": _list_more_caveats(record),
        "files": [(name, hashlib.sha256(each).hexdigest()) for name, each in content.items()],
        "made": record.made.model_dump(),
        "corrections": describe_corrections(record.result.corrections),
        "permuted": None
        if (units := verdict.subject.hidden_units) is None
        else describe_hidden_units(units),
    }


def _make_environment() -> Environment:
    """Make the Jinja environment, with escaping and without silent undefined variables."""
    return Environment(
        loader=PackageLoader("countermark", "report"),
        # Names of suspects, owners and files may come from anybody.
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )


def _compute_needed_log10_p(verdict: Verdict) -> float:
    """Return log10 of the largest uncorrected p that is still "owned"."""
    # The corrected p, which is p times this factor, is compared with alpha.
    return math.log10(verdict.alpha) - math.log10(_get_correction_factor(verdict))


def _get_correction_factor(verdict: Verdict) -> int:
    """Return the factor by which p is multiplied."""
    return 1 if verdict.result is None else verdict.result.factor


def _is_counted(verdict: Verdict) -> bool:
    """Return true if the verdict is judged by how many bits agree."""
    # Under these null hypotheses p depends only on the count, so a margin in bits has a meaning.
    return verdict.null in ("fair_coin", "aligned_coin", "secret_labels")


def _describe_ratio(verdict: Verdict, bits: int, rate: float, error_rate: float) -> str:
    """Describe the likelihood ratio of the two propositions in words."""
    if not _is_counted(verdict) or verdict.matched is None:
        return NO_RATIO
    ratio = statistics.compute_log10_likelihood_ratio(verdict.matched, bits, error_rate, rate)
    # Divided like p is multiplied: somebody who may choose among n readings shows the best one.
    choices = _get_correction_factor(verdict)
    return (
        f"log10 of {ratio - math.log10(choices):.2f} for the first proposition against the second, "
        f"if {verdict.unit} of a copy are lost independently with probability {error_rate:g} and "
        f"agree on another model with probability {rate:g}"
        + (f"; divided by {choices:,}, by which p is multiplied" if choices > 1 else "")
    )


def _describe_margin(verdict: Verdict, least: int | None) -> str:
    """Describe how many more bits could be lost before the mark is not found."""
    if not _is_counted(verdict) or least is None or verdict.matched is None:
        return BY_RANK if not _is_counted(verdict) else "no number of agreements would be enough."
    words = MARGIN if verdict.matched >= least else SHORT
    return words.format(matched=verdict.matched, least=least, more=verdict.matched - least)


def _describe_false_claims(form: MeasuredForm | None, alpha: float) -> list[str]:
    """Make a sentence for each group of unmarked models, and one about the verdict's alpha."""
    said = [
        MEASURED.format(
            group=each.group, counts=", ".join(_format_counts(each)), source=each.source,
            seeds=", ".join(map(str, each.seeds)), made="; ".join(each.made), track=each.track,
        )
        for each in (form.unmarked if form else ())
    ]  # fmt: skip
    return [*(said or [NOT_MEASURED]), BY_NULL.format(alpha=alpha)]


def _format_counts(group: UnmarkedCount) -> list[str]:
    """Format the false claims of a group for each alpha, with 95 % intervals."""
    return [
        COUNT.format(claims=claims, judged=group.judged, level=level, low=low, high=high)
        for level, claims in group.claims.items()
        for low, high in [statistics.compute_clopper_pearson(claims, group.judged)]
    ]


def _describe_robustness(form: MeasuredForm | None) -> str:
    """Describe the measured robustness of a form."""
    if form is None or not form.robustness:
        return NOT_ROBUST
    return ROBUST.format(name=form.name, source=form.robustness_source, says=form.robustness)


def _describe_dating(verdict: Verdict) -> str:
    """Describe by when the key was committed to; empty without a claim."""
    dating = verdict.dating
    if dating is None:
        return ""
    if dating.committed is None:
        return f"The claim {dating.claim} does not date the key: {dating.why}."
    return (
        f"The key was committed to by {dating.committed}, as {', '.join(dating.authorities)} "
        f"stamped over the claim {dating.claim}, and was one of {dating.commitments} commitments."
    )


def _list_events(record: Record, verdict: Verdict) -> list[tuple[datetime, str]]:
    """List the dated events of the time line, in UTC."""
    # The record's date is by the clock of the machine that made the report.
    events = [(parse_time(record.made.date), "this report")]
    dating = verdict.dating
    if dating is not None:
        when = parse_time(dating.suspect_date)
        events.append((when, "the suspect is not older, as the examiner states"))
        if dating.committed is not None:
            stamped = f"the key was committed to at the latest ({', '.join(dating.authorities)})"
            events.append((parse_time(dating.committed), stamped))
    return [(when.astimezone(UTC), what) for when, what in events]


def _list_more_caveats(record: Record) -> list[str]:
    """List the caveats that follow from the record alone."""
    if is_recomputed(record.result):
        return []
    return [f"log10 p by {record.result.null} can only be repeated with suspect and key"]


def make_data_url(png: bytes) -> str:
    """Encode a PNG image as a data URL, so that the page needs no other file."""
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
