"""Pages: log-in, claims and jobs."""

from __future__ import annotations

from typing import Annotated, Any
from urllib.parse import quote

from fastapi import APIRouter, Query, Request
from markupsafe import Markup
from starlette.exceptions import HTTPException
from starlette.responses import FileResponse, RedirectResponse, Response

from countermark.claims.signed import LARGEST, Claim
from countermark.web.claims import check_claim
from countermark.web.forms import Leaving, Login, NewClaim
from countermark.web.gate import COOKIE, find_client_address
from countermark.web.looks import STATIC
from countermark.web.orders import Job
from countermark.web.runner import BODY, REPORT
from countermark.web.site import AppState, Here, Visitor, require_own_form

pages = APIRouter(include_in_schema=False)
_STATIC = {"style.css": "text/css", "htmx.min.js": "text/javascript", "icon.svg": "image/svg+xml"}
# Jobs that the list of jobs shows.
_LISTED = 50
Words = Annotated[str, Query(max_length=200)]
Before = Annotated[int | None, Query(ge=0, le=1 << 40)]


@pages.get("/static/{name}")
def serve_static_file(name: str) -> Response:
    """Return the style sheet, the script or the icon."""
    # Only names in the table are served, so no path can lead out of the folder.
    if name not in _STATIC:
        raise HTTPException(404, "there is no such page")
    headers = {"cache-control": "public, max-age=3600"}
    return FileResponse(STATIC / name, media_type=_STATIC[name], headers=headers)


@pages.get("/login")
def show_login_form(site: Here, visitor: Visitor, next: Words = "/") -> Response:  # noqa: A002
    """Show the form for the token."""
    return site.looks.render_page("login", visitor, {"next": next, "wrong": False})


@pages.post("/login")
def log_in(request: Request, site: Here, form: Login) -> Response:
    """Open a session if the form holds the token, and go to the page that was wanted."""
    if not site.logins.admit_attempt(find_client_address(request.scope)):
        raise HTTPException(429, "too many log-ins: wait a minute")
    if not site.sessions.is_token(form.token.strip()):
        given = {"next": form.next, "wrong": True}
        return site.looks.render_page("login", None, given, status=401)
    # Redirect to this server only. Browsers read // and /\ as the start of another host's name.
    here = form.next.startswith("/") and not form.next.startswith(("//", "/\\"))
    answer = RedirectResponse(quote(form.next, safe="/") if here else "/", 303)
    answer.set_cookie(
        COOKIE, site.sessions.open_session(), httponly=True, samesite="strict",
        secure=request.url.scheme == "https",
    )  # fmt: skip
    return answer


@pages.post("/logout")
def log_out(request: Request, site: Here, visitor: Visitor, form: Leaving) -> Response:
    """End the session."""
    require_own_form(visitor, form.csrf)
    site.sessions.close_session(request.scope.get("session_name"))
    answer = RedirectResponse("/login", 303)
    answer.delete_cookie(COOKIE)
    return answer


@pages.get("/")
def show_home(site: Here, visitor: Visitor) -> Response:
    """Show the home page: the ledger's size and root, and the newest jobs."""
    head = site.ledger.make_head()
    shown = {
        "size": head.size, "root": head.root, "ledger": site.ledger.identity,
        "jobs": site.runner.list_jobs()[:5], "documentation": site.settings.documentation,
    }  # fmt: skip
    return site.looks.render_page("home", visitor, shown)


@pages.get("/claims")
def show_claims(
    request: Request, site: Here, visitor: Visitor, q: Words = "", before: Before = None
) -> Response:
    """Show claims, the newest first; return the list alone if htmx asks for it."""
    given = {"found": site.catalogue.find_claims(q, before), "q": q}
    part = "hx-request" in request.headers
    return site.looks.render_page("claims_list" if part else "claims", visitor, given)


@pages.post("/claims")
def add_claim(site: Here, visitor: Visitor, form: NewClaim) -> Response:
    """Add a signed claim to the ledger, and go to its page when it is on disk."""
    require_own_form(visitor, form.csrf)
    claim = Claim.from_bytes(form.file.file.read(LARGEST + 1), "the file")
    site.ledger.add(claim)
    return RedirectResponse(f"/claims/{claim.digest}", 303)


@pages.get("/claims/{digest}")
def show_claim(site: Here, visitor: Visitor, digest: str) -> Response:
    """Show one claim, checked for this request."""
    found = check_claim(site.ledger, digest[:64], site.authorities)
    given = {"found": found, "believed": [each.name for each in site.authorities]}
    return site.looks.render_page("claim", visitor, given)


@pages.get("/claims/{digest}/claim.json")
def download_claim(site: Here, digest: str) -> Response:
    """Return the claim's document, for `countermark claim check`."""
    found = check_claim(site.ledger, digest[:64], ())
    headers = {"content-disposition": 'attachment; filename="claim.json"'}
    return Response(found.claim.to_bytes(), media_type="application/json", headers=headers)


@pages.get("/jobs")
def show_jobs(site: Here, visitor: Visitor) -> Response:
    """List the newest jobs."""
    return site.looks.render_page("jobs", visitor, {"jobs": site.runner.list_jobs()[:_LISTED]})


@pages.get("/jobs/{identity}")
def show_job(site: Here, visitor: Visitor, identity: str) -> Response:
    """Show a job's current step, or its answer."""
    found = _find_job(site, identity)
    given: dict[str, Any] = {"job": found, "step": site.runner.describe_step(found)}
    if found.state == "done":
        told = site.runner.read_output(found, BODY)
        # A job's process wrote this HTML with the report's template, which escapes every value.
        body = None if told is None else Markup(told.decode())  # noqa: S704
        given |= {"answer": site.runner.read_answer(found), "body": body}
        name = "resolution" if found.order.kind == "resolve" else "verdict"
        return site.looks.render_page(name, visitor, given)
    return site.looks.render_page("job", visitor, given)


@pages.get("/jobs/{identity}/progress")
def show_progress(site: Here, visitor: Visitor, identity: str, seen: Words = "") -> Response:
    """Return the part of a job's page that changes, or no content if it still shows this step."""
    found = _find_job(site, identity)
    # A job that ended has another page, so htmx loads it as a whole.
    if found.over:
        return Response(status_code=204, headers={"hx-refresh": "true"})
    step = site.runner.describe_step(found)
    if step == seen:
        return Response(status_code=204)
    return site.looks.render_page("progress", visitor, {"job": found, "step": step})


@pages.get("/jobs/{identity}/report")
def download_report(site: Here, identity: str) -> Response:
    """Return the report as a file to download."""
    found = site.runner.read_output(_find_job(site, identity), REPORT)
    if found is None:
        raise HTTPException(404, "this job made no report")
    # The report brings its own style inline. `sandbox` keeps it away from this server's session.
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; sandbox"
    headers = {
        "content-security-policy": policy,
        "content-disposition": 'attachment; filename="report.html"',
    }
    return Response(found, media_type="text/html", headers=headers)


def _find_job(site: AppState, identity: str) -> Job:
    """Return the job with this identity, or raise 404."""
    found = site.runner.find_job(identity)
    if found is None:
        raise HTTPException(404, "there is no such job")
    return found
