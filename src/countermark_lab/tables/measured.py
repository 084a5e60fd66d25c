"""Measurements of each form of a scheme, gathered from the results for use in reports."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from countermark.errors import ConfigError, DataError, suggest_nearest
from countermark.report.measured import MeasuredForm, Measurements, UnmarkedCount
from countermark_lab.experiments.experiment import (
    EXPERIMENTS,
    get_result_path,
    locate_experiment,
    read_toml,
)
from countermark_lab.experiments.experiment_types import expand_any_cells, load_any_experiment
from countermark_lab.experiments.spec import SpecModel
from countermark_lab.tables.scorecard import Scorecard, quote_figures

# A Markdown link. Reports keep its text: the pages it points to are not part of a report.
_LINK = re.compile(r"\[([^\]]+)\]\([^)]*\)")


class UnmarkedRow(SpecModel):
    """A row of an experiment whose suspects are unmarked."""

    experiment: str
    row: str


class FormSource(SpecModel):
    """The sources of the figures of one form of a scheme.

    Attributes:
        name, scheme, fields: as in `report.measured.MeasuredForm`.
        unmarked: rows of experiments with unmarked suspects.
        scorecard: name of the form's entry in the scorecard; empty where it has none.
    """

    name: str
    scheme: str
    fields: dict[str, str | bool]
    unmarked: tuple[UnmarkedRow, ...] = ()
    scorecard: str = ""


class Sources(SpecModel):
    """The TOML file that lists the sources of every form."""

    forms: tuple[FormSource, ...]


def render_measurements(path: Path, card: Path, results: Path) -> str:
    """Return the text of the JSON file that reports read.

    Args:
        path: the TOML file of `Sources`.
        card: the file of the scorecard.
        results: the folder of results; figures without a result are left out.

    Raises:
        ConfigError: a file is wrong, or names a row or scorecard entry that does not exist.
    """
    scorecard = read_toml(card, Scorecard)
    forms = [_make_form(each, scorecard, results) for each in read_toml(path, Sources).forms]
    found = Measurements(type="countermark/measured/v1", forms=tuple(forms))
    return json.dumps(found.model_dump(), indent=1, ensure_ascii=False) + "\n"


def _make_form(source: FormSource, card: Scorecard, results: Path) -> MeasuredForm:
    """Gather the measurements of one form."""
    says, table = _quote_robustness(source.scorecard, card, results)
    return MeasuredForm(
        name=source.name,
        scheme=source.scheme,
        fields=source.fields,
        unmarked=tuple(
            group for each in source.unmarked for group in _count_unmarked(each, results)
        ),
        robustness=says,
        robustness_source=table,
    )


def _quote_robustness(name: str, card: Scorecard, results: Path) -> tuple[str, str]:
    """Return the scorecard's sentence on robustness, without links, and the table it quotes.

    Both are empty for a form without an entry, or before the quoted results exist.
    """
    if not name:
        return "", ""
    for scheme in card.schemes:
        if scheme.name == name:
            score = scheme.scores["robustness"]
            try:
                return _LINK.sub(r"\1", quote_figures(score, results)), score.table
            except DataError:
                return "", ""
    raise ConfigError(
        f"the scorecard has no {name!r}: {suggest_nearest(name, [each.name for each in card.schemes])}"
    )


def _count_unmarked(judged: UnmarkedRow, results: Path) -> Iterator[UnmarkedCount]:
    """Yield the groups of unmarked suspects of one row, each summed over all seeds.

    Nothing is yielded before all seeds of the row have results.
    """
    experiment = load_any_experiment(locate_experiment(judged.experiment, EXPERIMENTS))
    cells = [each for each in expand_any_cells(experiment) if each.label == judged.row]
    if not cells:
        raise ConfigError(f"{judged.experiment} has no row {judged.row!r}")
    # Some seeds alone would understate the number of models behind a claimed rate.
    paths = [get_result_path(each, results) for each in cells]
    if not all(each.exists() for each in paths):
        return
    documents = [json.loads(each.read_text()) for each in paths]
    for groups in zip(*(each["cell"]["figures"]["suspects"] for each in documents), strict=True):
        yield UnmarkedCount(
            group=groups[0]["label"],
            judged=sum(each["hosts"] for each in groups),
            claims={
                level: sum(each["claims"][level] for each in groups)
                for level in groups[0]["claims"]
            },
            source=f"{judged.experiment}, {judged.row}",
            track=experiment.track,
            seeds=tuple(each["cell"]["seed"] for each in documents),
            made=_list_versions(documents),
        )


def _list_versions(documents: list[Any]) -> tuple[str, ...]:
    """Return version and date of the results, each pair once."""
    made = [each["provenance"] for each in documents]
    return tuple(sorted({f"countermark {each['countermark']}, {each['date']}" for each in made}))
