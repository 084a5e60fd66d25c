"""Scorecard page: every scheme against the criteria of the field, each figure linked."""

from __future__ import annotations

import re
import unicodedata
from pathlib import Path
from typing import Literal

from pydantic import Field

from countermark.errors import ConfigError, DataError, suggest_nearest
from countermark_lab.experiments.experiment import locate_experiment, read_toml
from countermark_lab.experiments.spec import SpecModel
from countermark_lab.tables.tables import TABLES, format_cell, load_table, render_table

Criterion = Literal[
    "fidelity", "effectiveness", "robustness", "security", "legality", "capacity", "efficiency"
]


class Score(SpecModel):
    """Statement about a scheme under one criterion.

    Attributes:
        says: a sentence; {column} stands for that column of the row of the table.
        table: name of the table that the sentence quotes and links to; empty for none.
        row: label of the quoted row in this table.
        link: address of another page, for a sentence that quotes no table.
    """

    says: str
    table: str = ""
    row: str = ""
    link: str = ""


class SchemeScores(SpecModel):
    """One scheme in one form, with its statement under each criterion."""

    name: str
    scores: dict[Criterion, Score]


class Scorecard(SpecModel):
    """Content of a scorecard file: the whole page."""

    title: str
    intro: str
    criteria: dict[Criterion, str]
    schemes: tuple[SchemeScores, ...]
    outro: str = Field(default="")


def render_scorecard(path: Path, results: Path) -> str:
    """Render the scorecard page in Markdown.

    Raises:
        ConfigError: the file is wrong, or quotes a row that its table does not have.
    """
    card = read_toml(path, Scorecard)
    lines = [f"# {card.title}", "", card.intro.strip(), ""]
    for scheme in card.schemes:
        lines += [f"## {scheme.name}", "", "| criterion | |", "|---|---|"]
        lines += [
            f"| **{criterion}**: {meaning} | {_render_score(scheme.scores[criterion], results)} |"
            for criterion, meaning in card.criteria.items()
        ]
        lines.append("")
    return "\n".join([*lines, card.outro.strip(), ""])


def quote_figures(score: Score, results: Path) -> str:
    """Return the sentence of a score with the figures that it quotes.

    Raises:
        ConfigError: the sentence quotes a row that its table does not have.
        DataError: a quoted figure was not measured yet.
    """
    if not score.table:
        return score.says
    table = load_table(locate_experiment(score.table, TABLES))
    rows = tuple(row for row in table.rows if row.label == score.row)
    if not rows:
        labels = suggest_nearest(score.row, [row.label for row in table.rows])
        raise ConfigError(f"{score.table} has no row {score.row!r}: {labels}")
    # Only the quoted row is rendered: other rows of the table may not be computed yet.
    shown = render_table(table.model_copy(update={"rows": rows}), results)
    cells = shown["rows"][0]["cells"]
    figures = {name: format_cell(name, cell, paper=False) for name, cell in cells.items()}
    # Scorecard files belong to this repository; a format string of a stranger would not be safe.
    return score.says.format(**figures)


def _render_score(score: Score, results: Path) -> str:
    """Render a score as Markdown: sentence and link, or a note that figures are missing."""
    if not score.table:
        return f"{score.says} [more]({score.link})" if score.link else score.says
    title = load_table(locate_experiment(score.table, TABLES)).title
    # Tables of one paper share a page, named after the folder of the table.
    address = f"results/{score.table.partition('/')[0]}.md#{make_heading_anchor(title)}"
    try:
        return f"{quote_figures(score, results)} [table]({address})"
    except DataError:
        return f"[not measured yet]({address})"


def make_heading_anchor(heading: str) -> str:
    """Return the anchor of a heading, as Python-Markdown makes it."""
    # Links break unless this equals the anchors of the documentation builder.
    plain = unicodedata.normalize("NFKD", heading).encode("ascii", "ignore").decode()
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", plain).strip().lower())
