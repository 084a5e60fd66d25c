"""Templates, and what all of them are given."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from starlette.responses import HTMLResponse

from countermark._version import VERSION
from countermark.web.access import Session

STATIC = Path(__file__).parent / "static"


class Looks:
    """Makes pages out of templates; everything in them is escaped."""

    def __init__(self) -> None:
        self._templates = Environment(
            loader=PackageLoader("countermark", "web/templates"),
            autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
            auto_reload=False,
        )  # fmt: skip
        self._templates.globals["version"] = VERSION
        self._templates.filters["words"] = _words
        self._templates.filters["when"] = _when

    def page(
        self, name: str, session: Session | None, given: Mapping[str, Any], *, status: int = 200
    ) -> HTMLResponse:
        """A page.

        Args:
            name: of the template.
            session: of the visitor; None before he came in.
            given: what the template needs beside it.
            status: of HTTP.
        """
        csrf = session.csrf if session else ""
        told = self._templates.get_template(f"{name}.html.j2").render(csrf=csrf, **given)
        return HTMLResponse(told, status)

    def refusal(self, session: Session | None, status: int, why: str) -> HTMLResponse:
        """The page of a request that was not served."""
        return self.page("refusal", session, {"why": why, "status": status}, status=status)


def _words(name: str) -> str:
    """no_verdict as people write it."""
    return name.replace("_", " ")


def _when(instant: str | None) -> str:
    """2026-05-31T12:00:00.5Z as people read it, to the second; what is none, as it is."""
    return re.sub(r"^([\d-]{10})T([\d:]{8})(\.\d+)?Z$", r"\1 \2 UTC", instant or "")
