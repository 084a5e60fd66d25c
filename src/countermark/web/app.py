"""The ASGI application: routes behind the gate, and errors as one sentence."""

from __future__ import annotations

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Scope

from countermark._version import VERSION
from countermark.errors import CountermarkError, LedgerError, make_printable
from countermark.web.api import api
from countermark.web.asking import asking
from countermark.web.claims import UnknownClaimError
from countermark.web.gate import AccessMiddleware
from countermark.web.pages import pages
from countermark.web.runner import QueueFullError
from countermark.web.site import AppState


def make_application(site: AppState) -> FastAPI:
    """Return the ASGI application of a site. The caller opens and closes the site."""
    # FastAPI's own documentation pages load scripts from other servers, so they are off.
    made = FastAPI(
        title="countermark", version=VERSION, openapi_url="/api/openapi.json",
        docs_url=None, redoc_url=None,
        redirect_slashes=False,
    )  # fmt: skip
    made.state.site = site
    for router in (pages, asking, api):
        made.include_router(router)
    made.add_exception_handler(CountermarkError, _handle_error)
    made.add_exception_handler(HTTPException, _handle_error)
    made.add_exception_handler(RequestValidationError, _handle_error)

    def refuse_request(scope: Scope, status: int, why: str) -> Response:
        """Return the answer of the gate to a request that it refuses."""
        return _make_refusal(site, scope, status, why)

    made.add_middleware(
        AccessMiddleware, sessions=site.sessions, limits=site.settings.limits, told=refuse_request
    )
    return made


def _handle_error(request: Request, error: Exception) -> Response:
    """Return an error as an answer of one sentence, as a page or as JSON."""
    status, why = _classify_error(error)
    site: AppState = request.app.state.site
    return _make_refusal(site, request.scope, status, why)


def _classify_error(error: Exception) -> tuple[int, str]:
    """Return the HTTP status and the message for an error."""
    if isinstance(error, HTTPException):
        return error.status_code, str(error.detail)
    if isinstance(error, RequestValidationError):
        # Name the field, and never repeat the input: it may be the token.
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"][1:]) or "the request"
        return 422, make_printable(f"{where}: {first['msg']}", 300)
    if isinstance(error, QueueFullError):
        return 429, str(error)
    if isinstance(error, UnknownClaimError):
        return 404, str(error)
    # A ledger that fails is the server's fault; every other error of the library is the request's.
    return (503 if isinstance(error, LedgerError) else 400), str(error)


def _make_refusal(site: AppState, scope: Scope, status: int, why: str) -> Response:
    """Return a refusal: JSON for the API, else a page."""
    if scope["path"].startswith("/api/"):
        return JSONResponse({"detail": why}, status)
    return site.looks.render_refusal(scope.get("session"), status, why)
