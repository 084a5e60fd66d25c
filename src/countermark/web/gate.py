"""Access checks before a request's body is read, and security headers on every answer."""

from __future__ import annotations

from collections.abc import Callable
from http.cookies import CookieError, SimpleCookie
from urllib.parse import quote, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from countermark.web.access import RateLimiter, Session, SessionStore
from countermark.web.settings import ServerLimits

COOKIE = "countermark"
OPEN_TO_ALL = ("/login", "/static/", "/api/openapi.json")
# Paths that take an uploaded suspect.
LARGE = ("/verify", "/dispute", "/api/verify", "/api/resolve")
# Bytes of any other body; the largest is a claim in base64.
_SMALL = 2 << 20
# Bytes of a form beside its suspect.
_FORM = 1 << 16
_SAFE = ("GET", "HEAD", "OPTIONS")
# Pages load nothing from other servers, run no inline script, and stand in no frame.
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


class AccessMiddleware:
    """ASGI middleware that checks rate, session or token, origin and size of each request.

    It also adds security headers to each answer.

    Args:
        app: the application behind the middleware.
        sessions: the open sessions.
        limits: the rate and the sizes that are allowed.
        told: makes the answer to a refused request, from scope, status and reason.
    """

    def __init__(
        self, app: ASGIApp, sessions: SessionStore, limits: ServerLimits, told: Told
    ) -> None:
        self._app, self._sessions, self._told = app, sessions, told
        self._pace = RateLimiter(limits.requests, limits.burst)
        self._upload = limits.upload

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on to the application, or answer it with a refusal."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        sends = _add_security_headers(send)
        headers = Headers(scope=scope)
        most = self._upload + _FORM if scope["path"] in LARGE else _SMALL
        refused = self._find_refusal(scope, headers, most)
        if refused is not None:
            await refused(scope, receive, sends)
            return
        await self._app(scope, _limit_body(receive, most), sends)

    def _find_refusal(self, scope: Scope, headers: Headers, most: int) -> Response | None:
        """Return the answer to a refused request, or None if the request may go on.

        Adds the entries `session` and `session_name` to `scope`.

        Args:
            scope: of the request.
            headers: of the request.
            most: bytes that the body may have.
        """
        # The rate comes first, so that guesses of a token are limited as well.
        if not self._pace.admit_attempt(find_client_address(scope)):
            return self._told(scope, 429, "too many requests: wait a moment")
        name = read_session_cookie(headers)
        session = scope["session"] = self._sessions.find_session(name)
        scope["session_name"] = name
        path = scope["path"]
        if not path.startswith(OPEN_TO_ALL) and not self._is_authorised(path, headers, session):
            return _redirect_to_login(scope, headers)
        if scope["method"] not in _SAFE and not _is_same_origin(headers):
            return self._told(scope, 403, "this form was sent from another site")
        # Bound the digits before `int`: a number of thousands of digits is slow to convert.
        length = headers.get("content-length", "0")
        if not length.isdecimal() or len(length) > 18 or int(length) > most:
            return self._told(scope, 413, f"more than {most:,} bytes were sent")
        return None

    def _is_authorised(self, path: str, headers: Headers, session: Session | None) -> bool:
        """Return true if the request has a session, or for the API the token."""
        # Browsers send a cookie by themselves, whoever made the page, so it never opens the API.
        if not path.startswith("/api/"):
            return session is not None
        kind, _, token = headers.get("authorization", "").partition(" ")
        return kind.lower() == "bearer" and self._sessions.is_token(token)


def find_client_address(scope: Scope) -> str:
    """Return the client's address, or an empty text if it is unknown."""
    client = scope.get("client")
    return str(client[0]) if client else ""


def read_session_cookie(headers: Headers) -> str | None:
    """Return the session's name from the cookie, or None without a cookie."""
    try:
        found = SimpleCookie(headers.get("cookie", "")).get(COOKIE)
    except CookieError:
        return None
    return found.value if found else None


def _redirect_to_login(scope: Scope, headers: Headers) -> Response:
    """Return the answer to a request without a session: a redirect, or 401 for the API."""
    if scope["path"].startswith("/api/"):
        return JSONResponse(
            {"detail": "a token is needed: send the header Authorization: Bearer …"}, 401,
            {"www-authenticate": "Bearer"},
        )  # fmt: skip
    back = scope["path"] if scope["method"] in _SAFE else "/"
    where = f"/login?next={quote(back)}"
    # htmx would put the log-in page into a part of the page; this header makes it load the page.
    if "hx-request" in headers:
        return Response(status_code=204, headers={"hx-redirect": where})
    return RedirectResponse(where, 303)


def _is_same_origin(headers: Headers) -> bool:
    """Return true if the request comes from a page of this server, or from a program."""
    # Browsers state the sending site in one of two headers. Programs send neither header.
    if headers.get("sec-fetch-site", "none") not in ("same-origin", "none"):
        return False
    origin = headers.get("origin")
    return origin is None or urlsplit(origin).netloc == headers.get("host")


def _add_security_headers(send: Send) -> Send:
    """Return a `send` that adds the security headers to each answer."""

    async def send_with_headers(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            # Routes may set a header of their own, for example to let a browser cache a file.
            for name, value in BORNE.items():
                headers.setdefault(name, value)
        await send(message)

    return send_with_headers


def _limit_body(receive: Receive, most: int) -> Receive:
    """Return a `receive` that raises 413 once a body is longer than `most` bytes."""
    # A body that is sent in chunks states no length, so count while it arrives.
    seen = 0

    async def receive_limited() -> Message:
        nonlocal seen
        message = await receive()
        seen += len(message.get("body", b""))
        if seen > most:
            raise HTTPException(413, f"more than {most:,} bytes were sent")
        return message

    return receive_limited
