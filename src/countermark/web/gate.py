"""What every request has to pass, before anything of its body is read; what every answer bears."""

from __future__ import annotations

from collections.abc import Callable
from http.cookies import CookieError, SimpleCookie
from urllib.parse import quote, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from countermark.web.access import Pace, Session, Sessions
from countermark.web.settings import Limits

COOKIE = "countermark"
OPEN_TO_ALL = ("/login", "/static/", "/api/openapi.json")
LARGE = ("/verify", "/dispute", "/api/verify", "/api/resolve")  # which take suspects
_SMALL = 2 << 20  # bytes of any other body; a claim in base64 is the largest
_FORM = 1 << 16  # bytes of a form beside its suspect
_SAFE = ("GET", "HEAD", "OPTIONS")
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
BORNE = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
    "cache-control": "no-store",
}
Told = Callable[[Scope, int, str], Response]


class Gate:
    """ASGI middleware: rate, session or token, origin, size; security headers.

    Args:
        app: what is behind it.
        sessions: who came in.
        limits: how much may be asked for.
        told: makes the page of a refusal.
    """

    def __init__(self, app: ASGIApp, sessions: Sessions, limits: Limits, told: Told) -> None:
        self._app, self._sessions, self._told = app, sessions, told
        self._pace = Pace(limits.requests, limits.burst)
        self._upload = limits.upload

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it here."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        sends = _bearing(send)
        headers = Headers(scope=scope)
        most = self._upload + _FORM if scope["path"] in LARGE else _SMALL
        refused = self._refused(scope, headers, most)
        if refused is not None:
            await refused(scope, receive, sends)
            return
        await self._app(scope, _counted(receive, most), sends)

    def _refused(self, scope: Scope, headers: Headers, most: int) -> Response | None:
        """The answer to a request that may not go on; who asks is noted in `scope`."""
        if not self._pace.allows(address_of(scope)):
            return self._told(scope, 429, "too many requests: wait a moment")
        name = cookie_of(headers)
        session = scope["session"] = self._sessions.of(name)
        scope["session_name"] = name
        path = scope["path"]
        if not path.startswith(OPEN_TO_ALL) and not self._may(path, headers, session):
            return _sent_to_login(scope, headers)
        if scope["method"] not in _SAFE and not _from_here(headers):
            return self._told(scope, 403, "this form was sent from another site")
        length = headers.get("content-length", "0")
        if not length.isdecimal() or len(length) > 18 or int(length) > most:
            return self._told(scope, 413, f"more than {most:,} bytes were sent")
        return None

    def _may(self, path: str, headers: Headers, session: Session | None) -> bool:
        if not path.startswith("/api/"):
            return session is not None
        kind, _, token = headers.get("authorization", "").partition(" ")
        return kind.lower() == "bearer" and self._sessions.knows(token)


def address_of(scope: Scope) -> str:
    """From where somebody asks."""
    client = scope.get("client")
    return str(client[0]) if client else ""


def cookie_of(headers: Headers) -> str | None:
    """The secret of the session's cookie; None without one."""
    try:
        found = SimpleCookie(headers.get("cookie", "")).get(COOKIE)
    except CookieError:
        return None
    return found.value if found else None


def _sent_to_login(scope: Scope, headers: Headers) -> Response:
    if scope["path"].startswith("/api/"):
        return JSONResponse(
            {"detail": "a token is needed: send the header Authorization: Bearer …"}, 401,
            {"www-authenticate": "Bearer"},
        )  # fmt: skip
    back = scope["path"] if scope["method"] in _SAFE else "/"
    where = f"/login?next={quote(back)}"
    if "hx-request" in headers:
        return Response(status_code=204, headers={"hx-redirect": where})
    return RedirectResponse(where, 303)


def _from_here(headers: Headers) -> bool:
    """Whether a page of this server sent it, or a program; browsers say from where they send."""
    if headers.get("sec-fetch-site", "none") not in ("same-origin", "none"):
        return False
    origin = headers.get("origin")
    return origin is None or urlsplit(origin).netloc == headers.get("host")


def _bearing(send: Send) -> Send:
    async def bearing(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            for name, value in BORNE.items():
                headers.setdefault(name, value)
        await send(message)

    return bearing


def _counted(receive: Receive, most: int) -> Receive:
    """Stop a body that is longer than it said it would be."""
    seen = 0

    async def counted() -> Message:
        nonlocal seen
        message = await receive()
        seen += len(message.get("body", b""))
        if seen > most:
            raise HTTPException(413, f"more than {most:,} bytes were sent")
        return message

    return counted
