"""One HTTP request and its answer, with a server that may do anything.

The code uses httpx2's transport without its client: nothing follows redirects, keeps cookies,
unpacks answers or writes urls into logs. Requests run on an event loop in a thread of their own.
A server can send one byte before each time-out, in the body or the headers, and only cancelling a
task ends such a request.
"""

from __future__ import annotations

import asyncio
import ssl
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from countermark.errors import ConfigError
from countermark.predictors.remote.lookup import LookupLoop

if TYPE_CHECKING:
    import httpx2

# Too many requests, and failures of a gateway: these pass, unlike a plain 500.
_AGAIN = {429, 502, 503, 504}


@dataclass(frozen=True)
class HttpReply:
    """The outcome of a request.

    Attributes:
        status: HTTP status; None if no answer began or it did not end.
        body: the answer's whole body; None if it did not come whole.
        why: the reason why there is nothing to read; None if there is something.
        again: true if another attempt may succeed.
        wait: seconds that the server asks to wait before another attempt.
    """

    status: int | None = None
    body: bytes | None = None
    why: str | None = None
    again: bool = False
    wait: float | None = None


class HttpConnection:
    """A connection to one url.

    Args:
        url: complete, with its query.
        headers: sent with each request; never shown.
        largest: the most bytes of an answer's body.

    Raises:
        ConfigError: the url, or a proxy that the environment names, cannot be used.
    """

    def __init__(self, url: str, headers: Mapping[str, str], largest: int) -> None:
        import httpx2

        self._largest = largest
        # No compression: a small compressed answer could unpack to gigabytes.
        self._headers = {"accept-encoding": "identity", "user-agent": "countermark", **headers}
        try:
            self._url = httpx2.URL(url)
            self._transport = httpx2.AsyncHTTPTransport(proxy=_find_proxy(url))
        except (httpx2.InvalidURL, ValueError, ImportError, OSError) as error:
            raise ConfigError(
                f"no connection can be made ({type(error).__name__}): expected a url, and a proxy "
                "and certificates in the environment, that httpx2 takes"
            ) from None
        self._loop = LookupLoop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    def post(self, body: bytes, seconds: float) -> HttpReply:
        """Send one request.

        Args:
            body: body of the request.
            seconds: time limit for the whole exchange.

        Returns: the reply, or the reason why there is none.

        Raises:
            ConfigError: the connection is closed.
        """
        if self._loop.is_closed():
            raise ConfigError("the endpoint is closed: ask within its `with` block")
        future = asyncio.run_coroutine_threadsafe(self._exchange_within(body, seconds), self._loop)
        try:
            return future.result()
        except BaseException:  # Ctrl-C must end the request as well
            future.cancel()
            raise

    def close(self) -> None:
        """Close the connection; closing twice is allowed."""
        if self._loop.is_closed():
            return
        asyncio.run_coroutine_threadsafe(self._close_transport(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _close_transport(self) -> None:
        """Cancel all requests and close the transport; runs on the event loop."""
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await self._transport.aclose()

    async def _exchange_within(self, body: bytes, seconds: float) -> HttpReply:
        """Exchange request and answer within `seconds`; every failure becomes a reply."""
        try:
            async with asyncio.timeout(seconds):
                return await self._exchange(body)
        except TimeoutError:
            return HttpReply(why=f"no whole answer within {seconds:.3g} s", again=True)
        except Exception as error:  # malformed answers make libraries raise any type
            return _describe_failure(error)

    async def _exchange(self, body: bytes) -> HttpReply:
        """Send the request and read the answer."""
        import httpx2

        request = httpx2.Request("POST", self._url, headers=self._headers, content=body)
        response = await self._transport.handle_async_request(request)
        try:
            reply = _judge_response(response)
            coding = response.headers.get("content-encoding", "identity")
            # The server compressed although it was asked not to. The body is not read.
            if coding.lower() != "identity":
                return replace(reply, why=reply.why or f"the answer is compressed, as {coding!r}")
            return await self._read_body(reply, response)
        finally:
            await response.aclose()

    async def _read_body(self, reply: HttpReply, response: httpx2.Response) -> HttpReply:
        """Read the body of an answer, up to the largest size."""
        whole = bytearray()
        async for part in response.aiter_raw():
            whole += part
            # Counted while reading, since Content-Length may be wrong or missing.
            if len(whole) > self._largest:
                return replace(reply, why=f"the answer has more than {self._largest:,} bytes")
        return replace(reply, body=bytes(whole))


def _judge_response(response: httpx2.Response) -> HttpReply:
    """Return the reply that follows from status and headers, still without a body."""
    status = response.status_code
    if 200 <= status < 300:
        return HttpReply(status)
    if status in _AGAIN:
        wait = _parse_retry_after(response.headers.get("retry-after", ""))
        return HttpReply(status, why=f"answered {status}", again=True, wait=wait)
    redirect = ", a redirect, which is never followed" if 300 <= status < 400 else ""
    return HttpReply(status, why=f"answered {status}{redirect}")


def _parse_retry_after(retry_after: str) -> float | None:
    """Parse Retry-After, in seconds or as a date, into seconds; None if it is neither."""
    if retry_after.isascii() and retry_after.isdecimal():
        # Twelve digits are 30,000 years: no deadline allows more, and float() stays finite.
        return float(retry_after[:12])
    try:
        date = parsedate_to_datetime(retry_after)
        return max(
            0.0, (date.replace(tzinfo=date.tzinfo or UTC) - datetime.now(UTC)).total_seconds()
        )
    except (ValueError, OverflowError, TypeError):
        return None


def _describe_failure(error: Exception) -> HttpReply:
    """Describe a failed exchange, without the library's message: it may quote both sides."""
    import httpx2

    if any(isinstance(each, ssl.SSLCertVerificationError) for each in _iterate_causes(error)):
        return HttpReply(why="its TLS certificate could not be verified")
    match error:
        case httpx2.ConnectError() | httpx2.ProxyError():
            return HttpReply(why="no connection could be made", again=True)
        case httpx2.TransportError():
            return HttpReply(why="the connection ended before a whole answer came", again=True)
        case _:
            return HttpReply(why=f"the exchange failed ({type(error).__name__})")


def _iterate_causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and the errors that led to it."""
    while error is not None:
        yield error
        # httpx2 wraps the errors of the ssl module, and a certificate that fails needs its own
        # words.
        error = error.__cause__ or error.__context__


def _find_proxy(url: str) -> str | None:
    """Return the proxy that the environment names for a url, as other programs use it."""
    parts = urlsplit(url)
    proxies: Mapping[str, Any] = getproxies()
    named = proxies.get(parts.scheme) or proxies.get("all")
    if not named or proxy_bypass(parts.hostname or ""):
        return None
    return named if "://" in named else f"http://{named}"
