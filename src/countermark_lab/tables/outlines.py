"""Experiments as JSON values: every figure of every row, summarised over the seeds."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from countermark_lab.experiments.experiment import Experiment, SchemeRow
from countermark_lab.experiments.experiment_types import AnyExperiment
from countermark_lab.experiments.suspect_groups import LEVELS, compute_kolmogorov_smirnov
from countermark_lab.tables.non_classifier_reports import outline_hostless
from countermark_lab.tables.tables import load_row_figures, summarise_values

FIGURES = ("accuracy", "wrong", "E_R", "log10_p")
ALIGNED = ("wrong", "log10_p")
_MEASURED = (*FIGURES, "cost")


def outline_experiment(experiment: AnyExperiment, results: Path) -> list[dict[str, Any]]:
    """Return the rows of one experiment as JSON values.

    Returns: per row its label, seeds and track, and per column `ours` (mean over seeds), `least`,
        `most`; `outcomes` counts the verdicts; `pruned`, `attacked` and `suspects` hold the same
        for pruned copies, attacked copies, and unmarked models. A column without measurements is
        missing from the row. For experiments that train no classifier see `hostless_outline`.

    Raises:
        DataError: a cell has no result yet.
    """
    if not isinstance(experiment, Experiment):
        return outline_hostless(experiment, results)
    return [_outline_row(experiment, row, results) for row in experiment.rows]


def _outline_row(experiment: Experiment, row: SchemeRow, results: Path) -> dict[str, Any]:
    """Summarise one row of an experiment over its seeds."""
    figures = load_row_figures(experiment, row.label, results)
    return {
        "label": row.label,
        "track": experiment.track,
        "seeds": len(figures),
        "bits": figures[0].get("bits"),
        **_summarise_columns(figures),
        "outcomes": _count_outcomes(figures),
        "pruned": [
            {"fraction": each[0]["fraction"], "order": each[0].get("order", "ascending")}
            | _summarise_columns(each)
            | {"outcomes": _count_outcomes(each)}
            # The k-th entry of every seed has the same fraction and order; strict refuses a
            # mismatch.
            for each in zip(*(each.get("pruned", []) for each in figures), strict=True)
        ],
        "attacked": [
            _outline_attack(each)
            for each in zip(*(each.get("attacked", []) for each in figures), strict=True)
        ],
        "suspects": [
            _outline_suspects(each)
            for each in zip(*(each.get("suspects", []) for each in figures), strict=True)
        ],
    }


def _outline_attack(figures: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Summarise one attack over all seeds.

    Keys that begin with `aligned_` come from copies that were also read after alignment.
    """
    aligned = [each["aligned"] for each in figures if "aligned" in each]
    read = _summarise_columns(aligned) if aligned else {}
    return {
        "label": figures[0]["label"],
        **_summarise_columns(figures),
        "outcomes": _count_outcomes(figures),
        "aligned_outcomes": _count_outcomes(aligned),
        **{f"aligned_{column}": read[column] for column in ALIGNED if column in read},
    }


def _count_outcomes(figures: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Count the verdicts by outcome; figures without a verdict are skipped."""
    return dict(Counter(each["outcome"] for each in figures if "outcome" in each))


def _outline_suspects(groups: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Summarise one group of unmarked suspects over all seeds."""
    # Values of single hosts are pooled over the seeds before median and KS are computed.
    joined = {name: [x for each in groups for x in each[name]] for name in ("matched", "L2", "p")}
    counted = {
        name: {level: sum(each[name][level] for each in groups) for level in map(str, LEVELS)}
        for name in ("reached", "claims")
    }
    # Only a learnt reader has p-values; other keys leave the KS columns empty.
    spread = compute_kolmogorov_smirnov(joined["p"]) if joined["p"] else (None, None)
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


def _summarise_columns(figures: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Summarise each column that has a value at every seed."""
    return {
        column: summarise_values([each[column] for each in figures])
        for column in _MEASURED
        if all(each.get(column) is not None for each in figures)
    }
