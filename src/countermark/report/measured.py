"""Measured false claims and robustness of each form of a scheme, which reports quote.

`measured.json` beside this file is generated from the results by `tools/render_results.py`; `make
check` fails if the file is stale. The figures are about other models and keys than a report's, and
each figure says which.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from countermark._internal import files
from countermark._internal.files import StoredDocument

FILE = Path(__file__).with_name("measured.json")


class UnmarkedCount(StoredDocument):
    """How often keys were found in one group of unmarked models.

    Attributes:
        group: description of the models.
        judged: the number of verdicts; with several seeds, a key of each seed on every model.
        claims: how many verdicts would have been *owned*, by alpha.
        source: experiment and row in the results.
        track: how far the experiment is from the paper's scale.
        seeds: seeds of the marked models.
        made: library versions and days, as recorded in the results.
    """

    group: str
    judged: Annotated[int, Field(ge=1)]
    # The alphas are text, since JSON has no other keys.
    claims: dict[str, int]
    source: str
    track: str
    seeds: tuple[int, ...]
    made: tuple[str, ...]


class MeasuredForm(StoredDocument):
    """One form of a scheme, with its measurements.

    Attributes:
        name: the form's name for people.
        scheme: name of the scheme.
        fields: the values of scheme fields by which a key of this form is recognised.
        unmarked: false claims, one entry for each group of models; empty if not measured.
        robustness: a sentence with figures; empty if not measured.
        robustness_source: the table that the sentence quotes.
    """

    name: str
    scheme: str
    fields: dict[str, str | bool]
    unmarked: tuple[UnmarkedCount, ...]
    robustness: str
    robustness_source: str


class Measurements(StoredDocument):
    """The measurements of all forms, as stored in `measured.json`."""

    type: Literal["countermark/measured/v1"]
    forms: tuple[MeasuredForm, ...]


def find_measured_form(scheme: str, fields: Mapping[str, Any]) -> MeasuredForm | None:
    """Find the measurements of a scheme with these fields; None if it was never measured."""
    for form in _load_measurements().forms:
        # A form names only the fields that matter; other fields of a key may have any value.
        if form.scheme == scheme and form.fields.items() <= fields.items():
            return form
    return None


@cache
def _load_measurements() -> Measurements:
    """Load `measured.json`, once."""
    return files.parse_document(Measurements, FILE.read_bytes())
