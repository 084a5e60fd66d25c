"""The pages that ask: a suspect to verify, a dispute to resolve."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from starlette.responses import RedirectResponse, Response

from countermark.web.forms import Resolve, Verify
from countermark.web.site import Here, Site, Visitor, require_own

asking = APIRouter(include_in_schema=False)


def _choices(site: Site) -> dict[str, Any]:
    settings = site.settings
    return {
        "keys": list(settings.key_shelf.entries()),
        "suspects": list(settings.suspect_shelf.entries()),
        "most": settings.limits.upload,
        "dates": bool(site.authorities),
    }


@asking.get("/verify")
def verify(site: Here, visitor: Visitor, claim: str = "") -> Response:
    """Ask for a suspect and a key."""
    return site.looks.page("verify", visitor, {**_choices(site), "claim": claim[:64]})


@asking.post("/verify")
def verify_it(site: Here, visitor: Visitor, form: Verify) -> Response:
    """Begin to read a suspect."""
    require_own(visitor, form.csrf)
    job = form.sent_to(site)
    return RedirectResponse(f"/jobs/{job.id}", 303)


@asking.get("/dispute")
def dispute(site: Here, visitor: Visitor) -> Response:
    """Ask for a suspect and what two parties show."""
    return site.looks.page("dispute", visitor, _choices(site))


@asking.post("/dispute")
def resolve_it(site: Here, visitor: Visitor, form: Resolve) -> Response:
    """Begin to read both keys from three models."""
    require_own(visitor, form.csrf)
    job = form.sent_to(site)
    return RedirectResponse(f"/jobs/{job.id}", 303)
