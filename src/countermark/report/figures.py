"""The figures of a report as inline SVG, without scripts, fonts or external files."""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import datetime
from html import escape

from countermark.results import statistics

_WIDTH, _POINTS = 640, 1000  # SVG units; points of a curve


def draw_matches(matched: int, bits: int, rate: float, least: int | None) -> str:
    """Draw how many bits agree, against how many would agree by coincidence.

    Args:
        matched: how many of `bits` agree.
        bits: T, the number of bits, triggers or images; at least 1.
        rate: the probability that one of them agrees on an unmarked model.
        least: how many must agree; None if no number would be enough.
    """
    # About a thousand points draw the curve, also for a key of 65,536 bits.
    shown = range(0, bits + 1, max(1, bits // _POINTS))
    heights = [_compute_probability(k, bits, rate) for k in shown]
    top, base = max(heights), 170.0

    def scale_x(k: float) -> float:
        """Return the horizontal position of a count."""
        return 20 + (_WIDTH - 40) * k / bits

    points = " ".join(
        f"{scale_x(k):.1f},{base - 140 * h / top:.1f}" for k, h in zip(shown, heights, strict=True)
    )
    parts = [
        f'<polygon class="null" points="{scale_x(0):.1f},{base} {points} {scale_x(bits):.1f},{base}"/>',
        f'<line class="axis" x1="{scale_x(0):.1f}" y1="{base}" x2="{scale_x(bits):.1f}" y2="{base}"/>',
        _draw_marker(scale_x(matched), base, "found", f"found {matched}"),
    ]
    if least is not None:
        parts.append(_draw_marker(scale_x(least), base, "least", f"needed {least}", low=True))
    parts += [
        f'<text x="{scale_x(k):.1f}" y="{base + 16}" text-anchor="middle">{k}</text>'
        for k in sorted({0, round(bits * rate), bits})
    ]
    says = f"{matched} of {bits} agree; by coincidence {bits * rate:.0f} would, as the curve shows"
    return _wrap_svg(205, says, parts)


def draw_message(read: Sequence[int], expected: Sequence[int]) -> str:
    """Draw one cell for each value that was read: dark if it is as expected, else light.

    Args:
        read: the values that were read.
        expected: the expected values, as many.
    """
    columns = min(64, len(read))
    size = (_WIDTH - 40) / 64
    cells = []
    for n, (got, wanted) in enumerate(zip(read, expected, strict=True)):
        place = f'x="{20 + size * (n % columns):.1f}" y="{10 + size * (n // columns):.1f}"'
        kind = "agrees" if got == wanted else "differs"
        side = f'width="{size - 1:.1f}" height="{size - 1:.1f}"'
        cells.append(f'<rect class="{kind}" {place} {side}/>')
    # Ceiling division: the last row may be incomplete.
    rows = -(-len(read) // columns)
    agree = sum(got == wanted for got, wanted in zip(read, expected, strict=True))
    return _wrap_svg(int(20 + size * rows), f"{agree} of {len(read)} agree", cells)


def draw_time_line(events: Sequence[tuple[datetime, str]]) -> str:
    """Draw events in their order, earliest first; distances are not to scale.

    Args:
        events: time and description of each event.
    """
    ordered, parts = sorted(events), ['<line class="axis" x1="30" y1="10" x2="30" y2="{end}"/>']
    for n, (when, what) in enumerate(ordered):
        y = 24 + 34 * n
        parts.append(f'<circle class="found" cx="30" cy="{y}" r="5"/>')
        stamp = when.strftime("%Y-%m-%d %H:%M:%S UTC")
        parts.append(f'<text x="46" y="{y + 4}">{stamp}  {escape(what)}</text>')
    end = 24 + 34 * (len(ordered) - 1) + 14
    parts[0] = parts[0].format(end=end)
    return _wrap_svg(end + 10, "; ".join(what for _, what in ordered), parts)


def _compute_probability(k: int, bits: int, rate: float) -> float:
    """Return P[Bin(bits, rate) = k] as a difference of two tails."""
    tail = 10 ** statistics.compute_log10_binomial_tail(k, bits, rate)
    # Rounding can make the difference negative far out in the tail.
    return max(0.0, tail - 10 ** statistics.compute_log10_binomial_tail(k + 1, bits, rate))


def _draw_marker(x: float, base: float, kind: str, says: str, *, low: bool = False) -> str:
    """Draw a vertical line with a label, which stands left of the line in the right half."""
    y = base - (100 if low else 150)
    anchor = "end" if x > _WIDTH / 2 else "start"
    shift = -6 if anchor == "end" else 6
    text = f'<text x="{x + shift:.1f}" y="{y + 10}" text-anchor="{anchor}">{escape(says)}</text>'
    return f'<line class="{kind}" x1="{x:.1f}" y1="{y}" x2="{x:.1f}" y2="{base}"/>{text}'


def _wrap_svg(height: int, says: str, parts: Sequence[str]) -> str:
    """Wrap parts of a figure in an SVG element with a description for screen readers."""
    head = f'<svg viewBox="0 0 {_WIDTH} {math.ceil(height)}" role="img" aria-label="{escape(says)}"'
    return f'{head} xmlns="http://www.w3.org/2000/svg">{"".join(parts)}</svg>'
