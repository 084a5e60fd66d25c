"""Pages with forms that start a job: a suspect to verify, a dispute to decide."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from starlette.responses import RedirectResponse, Response

from countermark.web.forms import Resolve, Verify
from countermark.web.site import Here, Site, Visitor, require_own

asking = APIRouter(include_in_schema=False)


def _choices(site: Site) -> dict[str, Any]:
    """Return the values that both forms offer: keys, suspects, and limits."""
    settings = site.settings
    return {
        "keys": list(settings.key_shelf.entries()),
        "suspects": list(settings.suspect_shelf.entries()),
        "most": settings.limits.upload,
        # Without trusted authorities no claim can date a key, so the form does not ask for one.
        "dates": bool(site.authorities),
    }


@asking.get("/verify")
def verify(site: Here, visitor: Visitor, claim: str = "") -> Response:
    """Show the form for a suspect and a key."""
    return site.looks.page("verify", visitor, {**_choices(site), "claim": claim[:64]})


@asking.post("/verify")
def verify_it(site: Here, visitor: Visitor, form: Verify) -> Response:
    """Start a job that reads a suspect, and go to the job's page."""
    # 303 makes the browser load the page with GET, so that a reload sends no second job.
    require_own(visitor, form.csrf)
    job = form.sent_to(site)
    return RedirectResponse(f"/jobs/{job.id}", 303)


@asking.get("/dispute")
def dispute(site: Here, visitor: Visitor) -> Response:
    """Show the form for a suspect and what two parties present."""
    return site.looks.page("dispute", visitor, _choices(site))


@asking.post("/dispute")
def resolve_it(site: Here, visitor: Visitor, form: Resolve) -> Response:
    """Start a job that decides a dispute, and go to the job's page."""
    require_own(visitor, form.csrf)
    job = form.sent_to(site)
    return RedirectResponse(f"/jobs/{job.id}", 303)
