"""Tables of results: rendered from `results/`, never typed. Ours, the paper's, the difference."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from countermark.bench.experiment import Experiment, Row, cells, load_experiment, result_path
from countermark.bench.suspects import LEVELS, kolmogorov_smirnov
from countermark.errors import DataError

COLUMNS = ("accuracy", "wrong", "E_R", "log10_p")
_DECIMALS = {"accuracy": 2, "wrong": 1, "E_R": 4, "log10_p": 1}


def table(experiment: Experiment, results: Path) -> list[dict[str, Any]]:
    """The rows of one experiment as JSON values.

    Returns: per row its label and seeds, and per column `ours` (mean over seeds), `least`, `most`,
        `paper` and `difference`; pruned fractions in `pruned`. A row that measured nothing in a
        column has no such column; what the paper does not print is None. `outcomes` counts the
        verdicts; `attacked` and `suspects` hold the same for attacks and unmarked models.

    Raises:
        DataError: a cell has no result yet.
    """
    return [_row(experiment, row, results) for row in experiment.rows]


def _row(experiment: Experiment, row: Row, results: Path) -> dict[str, Any]:
    figures = [
        _figures(result_path(cell, results))
        for cell in cells(experiment)
        if cell.label == row.label
    ]
    pruned = [
        {"fraction": thinned[0]["fraction"]}
        | _columns(thinned, {"wrong": row.paper_pruned.get(str(thinned[0]["fraction"]))})
        for thinned in zip(*(each.get("pruned", []) for each in figures), strict=True)
    ]
    return {
        "label": row.label,
        "seeds": len(figures),
        "bits": figures[0].get("bits"),
        **_columns(figures, row.paper),
        "outcomes": _outcomes(figures),
        "pruned": pruned,
        "attacked": [
            {"label": each[0]["label"], **_columns(each, {}), "outcomes": _outcomes(each)}
            for each in zip(*(each.get("attacked", []) for each in figures), strict=True)
        ],
        "suspects": [
            _judged(each)
            for each in zip(*(each.get("suspects", []) for each in figures), strict=True)
        ],
    }


def _outcomes(figures: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    return dict(Counter(each["outcome"] for each in figures if "outcome" in each))


def _judged(groups: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One group of unmarked suspects, over all seeds."""
    joined = {name: [x for each in groups for x in each[name]] for name in ("matched", "L2", "p")}
    counted = {
        name: {level: sum(each[name][level] for each in groups) for level in map(str, LEVELS)}
        for name in ("reached", "claims")
    }
    spread = kolmogorov_smirnov(joined["p"]) if joined["p"] else (None, None)
    return {
        "label": groups[0]["label"],
        "hosts": len(joined["matched"]),
        "all_bits": sum(each["all_bits"] for each in groups),
        "matched": statistics.median(joined["matched"]),
        "least_L2": min(joined["L2"], default=None),
        "L2": statistics.median(joined["L2"]) if joined["L2"] else None,
        **counted,
        "KS": spread[0],
        "KS_critical": spread[1],
    }


def _figures(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise DataError(f"{path} is missing: run the experiment first (countermark bench run)")
    figures: dict[str, Any] = json.loads(path.read_text())["cell"]["figures"]
    return figures


def _columns(
    figures: Sequence[Mapping[str, Any]], paper: Mapping[str, float | None]
) -> dict[str, Any]:
    columns = {}
    for column in COLUMNS:
        values = [each[column] for each in figures if each.get(column) is not None]
        if not values:
            continue
        ours, printed = statistics.mean(values), paper.get(column)
        columns[column] = {
            "ours": ours,
            "least": min(values),
            "most": max(values),
            "paper": printed,
            "difference": None if printed is None else ours - printed,
        }
    return columns


def page(experiments: Sequence[Path], results: Path) -> str:
    """The documentation page of all experiments, in Markdown."""
    head = [
        "# Results",
        "",
        "Rendered from `results/` by `make tables`; every file there holds one cell with its",
        "specification, seed, versions, device and commit. Accuracy is in percent of the test",
        "images, *wrong* the number of wrong bits, E_R (L2) the cross-entropy per bit in nats.",
        "Figures over several seeds are means, with the least and the most in brackets; (paper …)",
        "is what the source in the heading prints. Keys of benchmarks are judged as if dated.",
    ]
    parts = [_section(load_experiment(path), results) for path in sorted(experiments)]
    return "\n".join([*head, *(line for part in parts for line in part), ""])


def _section(experiment: Experiment, results: Path) -> list[str]:
    seeds = ", ".join(str(seed) for seed in experiment.seeds)
    head = [
        "",
        f"## {experiment.title}",
        "",
        f"`{experiment.name}`. Track: {experiment.track}.",
        f"Printed figures: {experiment.source}. Seeds: {seeds}.",
        "",
    ]
    missing = [c for c in cells(experiment) if not result_path(c, results).exists()]
    if missing:
        return [*head, f"Not run to the end yet: {len(missing)} cells are missing."]
    rows = table(experiment, results)
    lines = [
        *head,
        "| | accuracy % | wrong bits | E_R (L2) | log10 p | verdict |",
        "|---|---|---|---|---|---|",
        *(_line(row["label"], row) for row in rows),
    ]
    return lines + _pruned(rows) + _attacked(rows) + _suspects(rows)


def _line(label: str, row: Mapping[str, Any]) -> str:
    shown = " | ".join(_shown(row, column) for column in COLUMNS)
    verdicts = ", ".join(f"{n} {o.replace('_', ' ')}" for o, n in row["outcomes"].items())
    return f"| {label} | {shown} | {verdicts or '–'} |"


def _attacked(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What is left after each attack."""
    if not rows[0]["attacked"]:
        return []
    return [
        "",
        "After an attack:",
        "",
        "| | accuracy % | wrong bits | E_R (L2) | log10 p | verdict |",
        "|---|---|---|---|---|---|",
        *(
            _line(f"{row['label']}, {each['label']}", each)
            for row in rows
            for each in row["attacked"]
        ),
    ]


def _suspects(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the keys read in models that never saw their mark."""
    if not any(row["suspects"] for row in rows):
        return []
    return [
        "",
        "Models that never saw the mark. *All bits*: how many give every bit of the message, which",
        "the published criterion takes for the mark. *Rank*: how many have a rank of L2 among",
        "permutations of their hidden units (at most 100,000) of p ≤ .01 and p ≤ 1e-4. *Claims*:",
        "how many of these the sibling threshold lets pass, or, for a linear key, have such a p.",
        "*KS*: largest distance of the randomised p from uniform; 5 % of uniform samples exceed",
        "the figure in brackets.",
        "",
        "| key | suspects | all bits | median bits | least L2 | median L2 | rank | claims | KS |",
        "|---|---|---|---|---|---|---|---|---|",
        *(_suspects_line(row["label"], each) for row in rows for each in row["suspects"]),
    ]


def _suspects_line(label: str, group: Mapping[str, Any]) -> str:
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


def _pruned(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Wrong bits and accuracy against the pruned share of the marked layer."""
    fractions = [each["fraction"] for each in rows[0]["pruned"]]
    if not fractions:
        return []
    lines = [
        "",
        "Wrong bits after pruning the smallest weights of the marked layer (accuracy below):",
        "",
        "| | " + " | ".join(f"{100 * fraction:g} %" for fraction in fractions) + " |",
        "|---" * (len(fractions) + 1) + "|",
    ]
    for column, needed in (("wrong", "wrong"), ("accuracy", "accuracy")):
        lines += [
            f"| {row['label']}, {needed} | "
            + " | ".join(_shown(each, column) for each in row["pruned"])
            + " |"
            for row in rows
            if column in row["pruned"][0]
        ]
    return lines


def _shown(row: Mapping[str, Any], column: str) -> str:
    if column not in row:
        return "–"
    figures = row[column]
    least, ours, most = (_number(column, figures[name]) for name in ("least", "ours", "most"))
    text = ours if least == most else f"{ours} [{least}, {most}]"
    if figures["paper"] is not None:
        text += f" (paper {figures['paper']:g})"
    return text


def _number(column: str, value: float) -> str:
    if column == "E_R" and 0 < value < 1e-3:
        return f"{value:.1e}"
    return f"{value:.{_DECIMALS[column]}f}"
