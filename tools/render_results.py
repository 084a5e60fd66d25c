"""Writes docs/results, docs/figures and what reports quote from results/; with --check, fails when
one is stale."""

import json
import sys
from pathlib import Path

from countermark.report.measured import FILE
from countermark_lab.figures import FIGURES, FigureSpec, Shown, draw_png, is_drawn_from
from countermark_lab.mpai.page import render_evaluation as mpai_page
from countermark_lab.tables.measured import render_measurements
from countermark_lab.tables.pages import render_page
from countermark_lab.tables.scorecard import render_scorecard

DOCS = Path("docs")
EXPERIMENTS, TABLES, RESULTS = Path("experiments"), Path("tables"), Path("results")
EVALUATED = """# Results: MPAI-NNW

What `python -m countermark_lab mpai` prints, from the files of `results/mpai`; schemes that are not below
were not evaluated yet. M unmarked networks, of seeds from 0 on, and D payloads in each give M×D
marked ones, and all are modified alike. A false positive is an unmarked network that the detector
claims for one of its keys; a false negative a marked one that it does not claim, *no verdict*
included. Symbols are raw bits, or labels of triggers. Small hosts, one thread of a CPU: the tables
say how a scheme fares against the others here, and no more.

In words: marks in weights live through all modifications below, but for units in another
order, and a copy that learns the answers. The reader of the published independent network finds all
of its bits in such a copy, too, which never had them: so the detector does not claim what it reads.
DeepStego's default form is half learnt by this host in so few epochs, and gone after fine-tuning,
the published one not at all; [VGG16](../schemes/deepstego.md#what-breaks-it) learns the former.
A barrier that a network absorbed goes with one epoch of training on true pictures, which makes that
network better, and lives on in a copy that learns from its images.
"""
PAPERS = {
    "uchida2017": "Results: Uchida et al. 2017",
    "wang2020": "Results: Wang et al. 2020",
    "li2019": "Results: Li and Guo 2019",
    "zhang2021": "Results: Zhang et al. 2021",
    "robustness": "Results: what attacks leave",
}


def figures() -> dict[Path, tuple[FigureSpec, Shown]]:
    """Every figure that has results, by its file, and what it shows."""
    found = {}
    for name, drawing in FIGURES.items():
        if shown := drawing.shown(EXPERIMENTS, RESULTS):
            found[DOCS / "figures" / f"{name}.png"] = drawing, shown
    return found


def pages(drawn: dict[Path, tuple[FigureSpec, Shown]]) -> dict[Path, str]:
    """The page of each paper, and the one that leads to them, by file."""
    found = {}
    for paper, title in PAPERS.items():
        pictures = {
            f"../figures/{path.parent.name}/{path.name}": drawing.caption
            for path, (drawing, _) in drawn.items()
            if path.parent.name == paper
        }
        tables, experiments = (
            list((folder / paper).glob("*.toml")) for folder in (TABLES, EXPERIMENTS)
        )
        text = render_page(title, pictures, tables, experiments, RESULTS)
        found[DOCS / "results" / f"{paper}.md"] = text
    found[DOCS / "results" / "mpai.md"] = evaluations()
    leading = render_page("Results", {}, [], list(EXPERIMENTS.glob("*.toml")), RESULTS)
    links = [f"- [{title}](results/{paper}.md)" for paper, title in PAPERS.items()]
    links.append("- [Results: MPAI-NNW](results/mpai.md)")
    found[DOCS / "results.md"] = "\n".join([leading, "## By paper", "", *links, ""])
    card = TABLES / "scorecard.toml"
    found[DOCS / "scorecard.md"] = render_scorecard(card, RESULTS)
    return found | {FILE: render_measurements(TABLES / "measured.toml", card, RESULTS)}


def evaluations() -> str:
    """The evaluations of MPAI-NNW; each file is what `mpai SCHEME --json` printed."""
    parts = [
        f"## {path.stem.replace('_', ' ')}\n\n{mpai_page(json.loads(path.read_text()))}\n"
        for path in sorted((RESULTS / "mpai").glob("*.json"))
    ]
    return "\n".join([EVALUATED, *parts])


def main() -> None:
    drawn = figures()
    if "--check" in sys.argv:
        stale = [path for path, text in pages(drawn).items() if not _says(path, text)]
        stale += [path for path, (_, shown) in drawn.items() if not is_drawn_from(shown, path)]
        if stale:
            sys.exit(f"stale: {', '.join(map(str, stale))}: run make tables")
        return
    for path, text in pages(drawn).items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    for path, (drawing, shown) in drawn.items():
        if not is_drawn_from(shown, path):
            path.parent.mkdir(parents=True, exist_ok=True)
            draw_png(drawing, shown, path)


def _says(path: Path, text: str) -> bool:
    return path.exists() and path.read_text() == text


if __name__ == "__main__":
    main()
