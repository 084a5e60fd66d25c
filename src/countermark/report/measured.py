"""What was measured of each form of a scheme, for reports: rendered from the results, never typed.

`measured.json` beside this file is written by `tools/render_results.py`; a stale one is an error of
`make check`. It speaks of other models and other keys than those of a report, and says of which.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from countermark import files
from countermark.files import Stored

FILE = Path(__file__).with_name("measured.json")


class Unmarked(Stored):
    """How often a key was found where it never was: in one group of models without a mark.

    Attributes:
        group: what the models are.
        judged: how many verdicts there were; with several seeds, a key of each on every model.
        claims: how many would have said *owned*, by alpha.
        source: experiment and row; `track` says how far it is from the paper's scale.
        seeds: of the marked models.
        made: library versions and days, as the results have them.
    """

    group: str
    judged: Annotated[int, Field(ge=1)]
    claims: dict[str, int]
    source: str
    track: str
    seeds: tuple[int, ...]
    made: tuple[str, ...]


class Form(Stored):
    """One form of a scheme.

    Attributes:
        name: for people.
        scheme: its name, and `fields` the values that a key of this form has.
        unmarked: false claims, a group each; none where nothing was measured.
        robustness: a sentence with figures; empty where nothing was measured.
        robustness_source: the table that it quotes.
    """

    name: str
    scheme: str
    fields: dict[str, str | bool]
    unmarked: tuple[Unmarked, ...]
    robustness: str
    robustness_source: str


class Measured(Stored):
    """All forms that something was measured of."""

    type: Literal["countermark/measured/v1"]
    forms: tuple[Form, ...]


def measured_of(scheme: str, fields: Mapping[str, Any]) -> Form | None:
    """What was measured of the form that a key has; None where nothing was."""
    for form in _measured().forms:
        if form.scheme == scheme and form.fields.items() <= fields.items():
            return form
    return None


@cache
def _measured() -> Measured:
    return files.parse_as(Measured, FILE.read_bytes())
