"""Experiments as documentation pages: figures of every cell, and the tables made from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from countermark.errors import DataError
from countermark_lab.experiments.experiment import Experiment, get_result_path, locate_experiment
from countermark_lab.experiments.experiment_types import (
    AnyExperiment,
    expand_any_cells,
    is_experiment,
    load_any_experiment,
)
from countermark_lab.tables.non_classifier_reports import format_hostless, outline_hostless
from countermark_lab.tables.outlines import ALIGNED, FIGURES, outline_experiment
from countermark_lab.tables.tables import (
    TABLES,
    format_cell,
    format_counts,
    format_table,
    load_table,
    render_table,
    sort_by_number,
)

HEAD = [
    "Rendered from `results/` by `make tables`; every file there holds one cell with its",
    "specification, seed, versions, device and commit; `-dirty` behind that says that files of",
    "the tree, results as a rule, were not committed yet. Accuracy is in percent of the test",
    "images, *wrong* the number of wrong bits, E_R (L2) the cross-entropy per bit in nats.",
    "Figures over several seeds are means, with the least and the most in brackets; (paper …)",
    "is what the source prints. Keys of benchmarks are judged as if dated.",
]


def render_page(
    title: str, figures: Mapping[str, str], tables: Sequence[Path], experiments: Sequence[Path],
    results: Path,
) -> str:  # fmt: skip
    """Render a documentation page in Markdown.

    Args:
        title: heading of the page.
        figures: captions by address of the image.
        tables: table files; the page names each table that has not been computed yet.
        experiments: experiment files; the page names each experiment with missing cells.
        results: folder of the results.
    """
    lines = [f"# {title}", "", *HEAD, ""]
    for address, caption in figures.items():
        lines += [f"![{caption}]({address})", "", f"*{caption}.*", ""]
    for path in sorted(tables, key=sort_by_number):
        lines += _render_table_or_notice(path, results)
    for path in sorted(experiments):
        lines += render_section(load_any_experiment(path), results)
    return "\n".join(lines)


def _render_table_or_notice(path: Path, results: Path) -> list[str]:
    """Render a table, or one line that says it is not computed yet."""
    table = load_table(path)
    try:
        return format_table(render_table(table, results))
    # Pages are rendered while experiments still run.
    except DataError:
        return [f"## {table.title}", "", f"`{table.name}`: not run to the end yet.", ""]


def render_named_table(name: str, results: Path) -> tuple[dict[str, Any], str]:
    """Return a table, or an experiment, by its name or file: as JSON values, and as text.

    Raises:
        ConfigError: there is no such file, or its content is wrong.
        DataError: a cell has no result yet.
    """
    # A table goes first: a table and an experiment may share their name.
    path = locate_experiment(name, TABLES)
    if not path.exists():
        path = locate_experiment(name)
    if is_experiment(path):
        experiment = load_any_experiment(path)
        rows = outline_experiment(experiment, results)
        return {"rows": rows}, "\n".join(render_section(experiment, results))
    shown = render_table(load_table(path), results)
    return shown, "\n".join(format_table(shown))


def render_section(experiment: AnyExperiment, results: Path) -> list[str]:
    """Render one experiment as lines of Markdown."""
    seeds = ", ".join(str(seed) for seed in experiment.seeds)
    head = [
        f"## {experiment.title}",
        "",
        f"`{experiment.name}`. Track: {experiment.track}. Seeds: {seeds}.",
        "",
    ]
    cells = list(expand_any_cells(experiment))
    missing = [cell for cell in cells if not get_result_path(cell, results).exists()]
    if missing:
        head += [f"Not run to the end yet: {len(missing)} cells are missing.", ""]
    if not isinstance(experiment, Experiment):
        # Experiments without a host show each row that is complete; the others wait for all cells.
        whole = {cell.label for cell in cells} - {cell.label for cell in missing}
        rows = outline_hostless(experiment, results, whole)
        return [*head, *(format_hostless(experiment, rows) if rows else []), ""]
    if missing:
        return head
    rows = outline_experiment(experiment, results)
    lines = [
        *head,
        "| | accuracy % | wrong bits | E_R (L2) | log10 p | verdict |",
        "|---|---|---|---|---|---|",
        *(_render_row(row["label"], row) for row in rows),
    ]
    return [*lines, *_render_pruning(rows), *_render_attacks(rows), *_render_suspects(rows), ""]


def _render_row(label: str, row: Mapping[str, Any]) -> str:
    """Render one row of the main table: all figures, and the counts of the verdicts."""
    shown = " | ".join(_render_figure(row, column) for column in FIGURES)
    return f"| {label} | {shown} | {format_counts(row['outcomes']) or '–'} |"


def _render_attacks(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Render the figures after each attack.

    Columns for the cost of the attack, and for the reading after alignment, appear if any attack
    has these figures.
    """
    attacks = [
        (f"{row['label']}, {each['label']}", each) for row in rows for each in row["attacked"]
    ]
    if not attacks:
        return []
    # Optional columns must not appear as dashes throughout.
    shows_cost = any("cost" in each for _, each in attacks)
    is_aligned = any(each.get("aligned_outcomes") for _, each in attacks)
    head = ["accuracy %", "wrong bits", "E_R (L2)", "log10 p", "verdict"]
    head += ["cost, % of training"] if shows_cost else []
    head += ["aligned: wrong bits", "log10 p", "verdict"] if is_aligned else []
    lines = [
        "",
        "After an attack:",
        "",
        f"| | {' | '.join(head)} |",
        "|---" * (len(head) + 1) + "|",
    ]
    for label, each in attacks:
        line = _render_row(label, each)
        if shows_cost:
            line += f" {_render_figure(each, 'cost')} |"
        if is_aligned:
            # A copy that could not be aligned has no aligned figures.
            read = " | ".join(
                format_cell(column, each[f"aligned_{column}"])
                if f"aligned_{column}" in each
                else "–"
                for column in ALIGNED
            )
            line += f" {read} | {format_counts(each['aligned_outcomes']) or '–'} |"
        lines.append(line)
    return lines


def _render_suspects(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Render the readings of the keys in unmarked models."""
    if not any(row["suspects"] for row in rows):
        return []
    return [
        "",
        "Models that never saw the mark. *All bits*: how many give every bit of the message, which",
        "the published criterion takes for the mark. *Rank*: how many have a rank of L2 among",
        "permutations of their hidden units (at most 100,000) of p ≤ .01 and p ≤ 1e-4. *Claims*:",
        "how many verdicts at these levels say owned. For a learnt reader that takes the sibling",
        "threshold as well, and a rank among permutations of its own: 100 for p ≤ .01, so that it",
        "may reach a level that the finer rank before it does not.",
        "*KS*: largest distance of the randomised p from uniform; 5 % of uniform samples exceed",
        "the figure in brackets.",
        "",
        "| key | suspects | all bits | median bits | least L2 | median L2 | rank | claims | KS |",
        "|---|---|---|---|---|---|---|---|---|",
        *(_render_suspects_row(row["label"], each) for row in rows for each in row["suspects"]),
    ]


def _render_suspects_row(label: str, group: Mapping[str, Any]) -> str:
    """Render the readings of one group of unmarked models as a table row."""
    # Linear and trigger keys have no L2 and no rank, so that these columns hold a dash.
    learnt = group["KS"] is not None
    shown = [
        label,
        group["label"],
        f"{group['all_bits']} of {group['hosts']}",
        f"{group['matched']:g}",
        f"{group['least_L2']:.2g}" if learnt else "–",
        f"{group['L2']:.2g}" if learnt else "–",
        ", ".join(map(str, group["reached"].values())) if learnt else "–",
        ", ".join(map(str, group["claims"].values())),
        f"{group['KS']:.3f} ({group['KS_critical']:.3f})" if learnt else "–",
    ]
    return f"| {' | '.join(shown)} |"


def _render_pruning(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Render readings and accuracy against the pruned share of the marked layer."""
    lines = []
    # All rows of an experiment are pruned alike, so that the first row lists every order.
    for order in dict.fromkeys(each["order"] for each in rows[0]["pruned"]):
        thinned = {
            row["label"]: [each for each in row["pruned"] if each["order"] == order] for row in rows
        }
        fractions = [each["fraction"] for each in thinned[rows[0]["label"]]]
        lines += [
            "",
            f"After pruning the marked layer, {_ORDERS[order]}:",
            "",
            "| | " + " | ".join(f"{100 * fraction:g} %" for fraction in fractions) + " |",
            "|---" * (len(fractions) + 1) + "|",
        ]
        for column, says in _AFTER_PRUNING.items():
            lines += [
                f"| {label}, {says} | {' | '.join(_render_figure(each, column) for each in measured)} |"
                for label, measured in thinned.items()
                # An unmarked row has an accuracy but no wrong bits.
                if column in measured[0]
            ]
        lines += [
            f"| {label}, verdict | {' | '.join(format_counts(each['outcomes']) for each in measured)} |"
            for label, measured in thinned.items()
            if measured[0]["outcomes"]
        ]
    return lines


_AFTER_PRUNING = {"wrong": "wrong bits", "E_R": "E_R (L2)", "accuracy": "accuracy %"}


_ORDERS = {
    "ascending": "smallest weights first",
    "random": "in random order",
    "descending": "largest weights first",
}


def _render_figure(row: Mapping[str, Any], column: str) -> str:
    """Render one figure of a row, or a dash if it was not measured."""
    return format_cell(column, row[column]) if column in row else "–"
