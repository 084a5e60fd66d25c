"""The verdict as lines of text for people."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from countermark.errors import make_printable
from countermark.results import key_dating
from countermark.results.null_hypotheses import LEAST_FORGERY_BITS, UnmarkedModels
from countermark.results.owner_statements import compute_rank, describe_hidden_units
from countermark.results.reading import ReaderFacts
from countermark.results.test_result import describe_corrections

if TYPE_CHECKING:
    from countermark.results.subject import Subject
    from countermark.results.verdict import Verdict

_RATES = {
    "bits": "bit error rate", "triggers": "share of misses", "images": "share of failures"
}  # fmt: skip
_PUBLISHED = {"triggers": "trigger accuracy", "images": "success rate"}
_PAYLOAD = {
    True: "decoded: it names this key's owner",
    False: "not decoded (the p-value above is about raw bits and stands without it)",
    None: "none: fewer than 128 bits carry no payload",
}


def format_verdict(verdict: Verdict) -> str:
    """Return a verdict as text: one line for the outcome, then one line for each fact.

    Names in the text may come from a hostile key or suspect; unprintable characters are escaped.
    """
    head = f"{verdict.outcome.upper().replace('_', ' ')}: {verdict.reason}"
    # Each line is escaped on its own: a line break in a name must not start a line of its own.
    return "\n".join(make_printable(line) for line in (head, *_format_lines(verdict)))


def _format_line(name: str, says: str) -> str:
    """Format one fact as an indented line, with its name in a column of twelve characters."""
    return f"  {name:<12}  {says}"


def _format_lines(verdict: Verdict) -> Iterator[str]:
    """Yield the facts of a verdict in the order in which they are printed."""
    if verdict.matched is not None and verdict.ber_interval is not None:
        yield from _format_result(verdict, verdict.matched, verdict.ber_interval)
    if (shown := verdict.subject.reference) is not None:
        yield _format_line("reference", f"{shown.name}, sha256 {shown.sha256}")
    if verdict.subject.images is not None:
        yield _format_line("images", _describe_image_counts(verdict.subject))
    if (alike := verdict.likeness) is not None:
        pictures = f"{alike.nc:.4f} of hidden and revealed pictures"
        yield _format_line("NC", f"{pictures}; a blank gets {alike.nc_blank:.4f}")
    if (opened := verdict.disclosure) is not None:
        yield _format_line("opened", f"{opened.opened} of the key's {opened.committed} triggers")
    if verdict.reader is not None:
        yield from _format_reader(verdict, verdict.reader)
    # Only these keys depend on unmarked models; other verdicts would gain a line without meaning.
    if verdict.reader is not None or verdict.null == UnmarkedModels.name:
        yield _format_line("unmarked", _describe_comparison(verdict))
    if verdict.dating is not None:
        yield _format_line("dated", key_dating.describe_dating(verdict.dating))
    yield from (_format_line("limit", limit) for limit in verdict.limits)


def _format_result(verdict: Verdict, matched: int, interval: tuple[float, float]) -> Iterator[str]:
    """Yield the lines about the number of matches and their probability.

    Args:
        verdict: the verdict of a suspect that could be read.
        matched: number of bits, triggers or images that agree.
        interval: 95 % interval of the share that disagrees.
    """
    low, high = interval
    yield _format_line(
        "matched",
        f"{matched} of {verdict.bits} {verdict.unit} "
        f"({_RATES[verdict.unit]} {verdict.ber:.4f}, 95 % interval {low:.4f} to {high:.4f})",
    )
    yield _format_line(
        "log10 p",
        f"{verdict.log10_p:.2f} after corrections; threshold {math.log10(verdict.alpha):.2f}, "
        f"floor {verdict.floor:.2f}",
    )
    if verdict.result is not None:
        yield _format_line(
            "corrections", f"p is {describe_corrections(verdict.result.corrections)}"
        )
    yield _format_line("null", f"{verdict.null}: {verdict.null_says}")
    yield _format_line(
        "forgery_bits",
        f"{verdict.forgery_bits:.1f} (an undated key needs {LEAST_FORGERY_BITS:.0f})",
    )
    if verdict.unit == "bits":
        yield _format_line("payload", _PAYLOAD[verdict.payload])
    elif verdict.unit == "triggers" and verdict.answer_count != verdict.bits:
        yield _format_line(
            "answered", f"{verdict.answer_count} of {verdict.bits}; the others are misses"
        )
    # The paper's own criterion is printed, but unmarked models can meet it too: it proves nothing.
    if verdict.unit != "bits" and verdict.null == UnmarkedModels.name:
        yield _format_line(
            "published",
            f"{_PUBLISHED[verdict.unit]} {matched / verdict.bits:.4f}: refused as proof, its "
            "rank among unmarked models is judged instead",
        )


def _format_reader(verdict: Verdict, reader: ReaderFacts) -> Iterator[str]:
    """Yield the lines about a learnt reader: its loss, siblings and false reads."""
    yield _format_line(
        "L2", f"{verdict.loss:.3g} nats a bit, measured here; ln 2 = 0.693 knows nothing"
    )
    if (units := verdict.subject.hidden_units) is not None:
        yield _format_line("units", describe_hidden_units(units))
    # Siblings, threshold and loudness come from the key: its owner's word, not measured here.
    if reader.threshold is None:
        yield _format_line(
            "siblings", f"{reader.siblings} held-out, by the owner's word: too few for a threshold"
        )
    elif reader.quiet_loss is None:
        yield _format_line("siblings", "the key does not say how loud the marked model is")
    else:
        yield _format_line(
            "siblings",
            f"L2 must be below {reader.threshold:.3g}, set on {reader.siblings} held-out "
            f"unmarked siblings; one passes with p <= {1 / (reader.siblings + 1):.2g}; it is "
            f"{reader.quiet_loss:.3g} with no unit louder than in the marked model; siblings, "
            "threshold and loudness are the owner's word",
        )
    yield _format_line(
        "false reads",
        f"{reader.false_reads} of {reader.permuted} hidden-unit permutations of the suspect "
        "read at least as many bits",
    )
    if reader.published is not None and verdict.loss is not None:
        met = "met" if verdict.loss <= reader.published else "not met"
        yield _format_line(
            "published",
            f"L2 <= {reader.published:g}: {met}; refused as proof, the rank of L2 is judged "
            "instead",
        )


def _describe_comparison(verdict: Verdict) -> str:
    """Describe the suspect's rank among unmarked models, and who supplied the models."""
    models = verdict.subject.unmarked
    if not models or verdict.evidence is None:
        return "none supplied by the examiner; what the key says of some is its owner's word"
    # n models support no smaller rank than 1/(n + 1): the suspect counts as one of them.
    n, distances = len(models), [each.distance for each in models]
    low, high = min(distances), max(distances)
    rank = compute_rank(verdict.evidence, verdict.subject)
    what = {"bits": "L2", "triggers": "misses", "images": "share of failures"}[verdict.unit]
    return (
        f"{n} supplied by the examiner, {what} {low:.3g} to {high:.3g}; the suspect has "
        f"rank {rank} of {n + 1}, and {n} support no rank below 1/{n + 1} = {1 / (n + 1):.2g}"
    )


def _describe_image_counts(subject: Subject) -> str:
    """Describe how many images were read, and how many were skipped for which reasons."""
    reasons = {} if subject.skipped is None else subject.skipped.reasons
    if not reasons:
        return f"{subject.images} read"
    why = "; ".join(f"{count} {reason}" for reason, count in reasons.items())
    return f"{subject.images} read, {sum(reasons.values())} skipped ({why})"
