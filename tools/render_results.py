"""Writes docs/results.md from experiments/ and results/; with --check, fails when it is stale."""

import sys
from pathlib import Path

from countermark.bench.tables import page

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "results.md"


def main() -> None:
    rendered = page(list((ROOT / "experiments").rglob("*.toml")), ROOT / "results")
    if "--check" in sys.argv:
        if not PAGE.exists() or PAGE.read_text() != rendered:
            sys.exit("docs/results.md is stale: run make tables")
        return
    PAGE.write_text(rendered)


if __name__ == "__main__":
    main()
