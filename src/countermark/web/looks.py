"""Templates of the pages, and the values that all of them get."""

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


class PageTemplates:
    """The page templates. Every value in a page is escaped."""

    def __init__(self) -> None:
        # StrictUndefined: a misspelt name raises, where the default would print nothing.
        self._templates = Environment(
            loader=PackageLoader("countermark", "web/templates"),
            autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
            auto_reload=False,
        )  # fmt: skip
        self._templates.globals["version"] = VERSION
        self._templates.filters["words"] = _replace_underscores
        self._templates.filters["when"] = _format_instant

    def render_page(
        self, name: str, session: Session | None, given: Mapping[str, Any], *, status: int = 200
    ) -> HTMLResponse:
        """Render a page.

        Args:
            name: the template's name.
            session: the visitor's session; None before the log-in.
            given: the values of the template.
            status: the HTTP status.
        """
        csrf = session.csrf if session else ""
        told = self._templates.get_template(f"{name}.html.j2").render(csrf=csrf, **given)
        return HTMLResponse(told, status)

    def render_refusal(self, session: Session | None, status: int, why: str) -> HTMLResponse:
        """Render the page that refuses a request."""
        return self.render_page("refusal", session, {"why": why, "status": status}, status=status)


def _replace_underscores(name: str) -> str:
    """Return a name such as `no_verdict` with spaces for underscores."""
    return name.replace("_", " ")


def _format_instant(instant: str | None) -> str:
    """Return 2026-05-31T12:00:00.5Z as `2026-05-31 12:00:00 UTC`; any other text unchanged."""
    return re.sub(r"^([\d-]{10})T([\d:]{8})(\.\d+)?Z$", r"\1 \2 UTC", instant or "")
