"""Pages with forms that start a job: a suspect to verify, a dispute to decide."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from starlette.responses import RedirectResponse, Response

from countermark.web.forms import Resolve, Verify
from countermark.web.site import AppState, Here, Visitor, require_own_form

asking = APIRouter(include_in_schema=False)


def _list_choices(site: AppState) -> dict[str, Any]:
    """Return the values that both forms offer: keys, suspects, and limits."""
    settings = site.settings
    return {
        "keys": list(settings.key_choices.list_entries()),
        "suspects": list(settings.suspect_choices.list_entries()),
        "most": settings.limits.upload,
        # Without trusted authorities no claim can date a key, so the form does not ask for one.
        "dates": bool(site.authorities),
    }


@asking.get("/verify")
def show_verify_form(site: Here, visitor: Visitor, claim: str = "") -> Response:
    """Show the form for a suspect and a key."""
    return site.looks.render_page("verify", visitor, {**_list_choices(site), "claim": claim[:64]})


@asking.post("/verify")
def start_verification(site: Here, visitor: Visitor, form: Verify) -> Response:
    """Start a job that reads a suspect, and go to the job's page."""
    # 303 makes the browser load the page with GET, so that a reload sends no second job.
    require_own_form(visitor, form.csrf)
    job = form.submit_to(site)
    return RedirectResponse(f"/jobs/{job.id}", 303)


@asking.get("/dispute")
def show_dispute_form(site: Here, visitor: Visitor) -> Response:
    """Show the form for a suspect and what two parties present."""
    return site.looks.render_page("dispute", visitor, _list_choices(site))


@asking.post("/dispute")
def start_dispute(site: Here, visitor: Visitor, form: Resolve) -> Response:
    """Start a job that decides a dispute, and go to the job's page."""
    require_own_form(visitor, form.csrf)
    job = form.submit_to(site)
    return RedirectResponse(f"/jobs/{job.id}", 303)
