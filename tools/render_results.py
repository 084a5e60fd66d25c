"""Writes docs/results.md and docs/figures from results/; with --check, fails when one is stale."""

import sys
from pathlib import Path

from countermark.bench.figures import draw_false_reads, false_reads, is_drawn_from
from countermark.bench.tables import page

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "results.md"
FIGURE = ROOT / "docs" / "figures" / "false_reads.png"


def main() -> None:
    rendered = page(list((ROOT / "experiments").rglob("*.toml")), ROOT / "results")
    shown = false_reads(ROOT / "experiments" / "wang2020" / "unmarked.toml", ROOT / "results")
    if "--check" in sys.argv:
        if not PAGE.exists() or PAGE.read_text() != rendered:
            sys.exit("docs/results.md is stale: run make tables")
        if not is_drawn_from(shown, FIGURE):
            sys.exit("docs/figures/false_reads.png is stale: run make tables")
        return
    PAGE.write_text(rendered)
    FIGURE.parent.mkdir(exist_ok=True)
    draw_false_reads(shown, FIGURE)


if __name__ == "__main__":
    main()
