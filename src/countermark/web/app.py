"""The ASGI application: routes behind the gate, and errors as one sentence."""

from __future__ import annotations

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Scope

from countermark._version import VERSION
from countermark.errors import CountermarkError, LedgerError, printable
from countermark.web.api import api
from countermark.web.asking import asking
from countermark.web.claims import UnknownClaimError
from countermark.web.gate import Gate
from countermark.web.pages import pages
from countermark.web.runner import FullError
from countermark.web.site import Site


def application(site: Site) -> FastAPI:
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
    made.add_exception_handler(CountermarkError, _refused)
    made.add_exception_handler(HTTPException, _refused)
    made.add_exception_handler(RequestValidationError, _refused)

    def told(scope: Scope, status: int, why: str) -> Response:
        """Return the answer of the gate to a request that it refuses."""
        return _told(site, scope, status, why)

    made.add_middleware(Gate, sessions=site.sessions, limits=site.settings.limits, told=told)
    return made


def _refused(request: Request, error: Exception) -> Response:
    """Return an error as an answer of one sentence, as a page or as JSON."""
    status, why = _status(error)
    site: Site = request.app.state.site
    return _told(site, request.scope, status, why)


def _status(error: Exception) -> tuple[int, str]:
    """Return the HTTP status and the message for an error."""
    if isinstance(error, HTTPException):
        return error.status_code, str(error.detail)
    if isinstance(error, RequestValidationError):
        # Name the field, and never repeat the input: it may be the token.
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"][1:]) or "the request"
        return 422, printable(f"{where}: {first['msg']}", 300)
    if isinstance(error, FullError):
        return 429, str(error)
    if isinstance(error, UnknownClaimError):
        return 404, str(error)
    # A ledger that fails is the server's fault; every other error of the library is the request's.
    return (503 if isinstance(error, LedgerError) else 400), str(error)


def _told(site: Site, scope: Scope, status: int, why: str) -> Response:
    """Return a refusal: JSON for the API, else a page."""
    if scope["path"].startswith("/api/"):
        return JSONResponse({"detail": why}, status)
    return site.looks.refusal(scope.get("session"), status, why)
