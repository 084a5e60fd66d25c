"""One request and its answer over HTTP, with a far end that may do anything.

httpx2's transport is used without its client: nothing follows redirects, keeps cookies, unpacks
answers or writes urls into logs. Requests run on an event loop in a thread of its own, because only
a cancelled task ends a server that drips bytes, or headers, one before each time-out.
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
from countermark.remote.lookup import Loop

if TYPE_CHECKING:
    import httpx2

_AGAIN = {429, 502, 503, 504}


@dataclass(frozen=True)
class Reply:
    """What became of a request.

    Attributes:
        status: of HTTP; None when no answer began or it did not end.
        body: the answer's whole body; None when it did not come whole.
        why: why there is nothing to read in it; None when there is.
        again: whether another attempt may go better.
        wait: seconds that the server asks to wait before it.
    """

    status: int | None = None
    body: bytes | None = None
    why: str | None = None
    again: bool = False
    wait: float | None = None


class Wire:
    """A connection to one url.

    Args:
        url: complete, with its query.
        headers: sent with each request; never shown.
        largest: bytes of an answer's body.

    Raises:
        ConfigError: the url, or a proxy that the environment names, cannot be used.
    """

    def __init__(self, url: str, headers: Mapping[str, str], largest: int) -> None:
        import httpx2

        self._largest = largest
        self._headers = {"accept-encoding": "identity", "user-agent": "countermark", **headers}
        try:
            self._url = httpx2.URL(url)
            self._transport = httpx2.AsyncHTTPTransport(proxy=_proxy(url))
        except (httpx2.InvalidURL, ValueError, ImportError, OSError) as error:
            raise ConfigError(
                f"no connection can be made ({type(error).__name__}): expected a url, and a proxy "
                "and certificates in the environment, that httpx2 takes"
            ) from None
        self._loop = Loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    def post(self, body: bytes, seconds: float) -> Reply:
        """Send one request; whatever goes wrong within `seconds` is in the reply."""
        if self._loop.is_closed():
            raise ConfigError("the endpoint is closed: ask within its `with` block")
        future = asyncio.run_coroutine_threadsafe(self._bounded(body, seconds), self._loop)
        try:
            return future.result()
        except BaseException:  # Ctrl-C, which ends the request as well
            future.cancel()
            raise

    def close(self) -> None:
        """Close the connection; a second time does nothing."""
        if self._loop.is_closed():
            return
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _end(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await self._transport.aclose()

    async def _bounded(self, body: bytes, seconds: float) -> Reply:
        try:
            async with asyncio.timeout(seconds):
                return await self._exchange(body)
        except TimeoutError:
            return Reply(why=f"no whole answer within {seconds:.3g} s", again=True)
        except Exception as error:  # what garbage makes libraries raise has no end
            return _failed(error)

    async def _exchange(self, body: bytes) -> Reply:
        import httpx2

        request = httpx2.Request("POST", self._url, headers=self._headers, content=body)
        response = await self._transport.handle_async_request(request)
        try:
            reply = _judged(response)
            coding = response.headers.get("content-encoding", "identity")
            if coding.lower() != "identity":
                return replace(reply, why=reply.why or f"the answer is compressed, as {coding!r}")
            return await self._with_body(reply, response)
        finally:
            await response.aclose()

    async def _with_body(self, reply: Reply, response: httpx2.Response) -> Reply:
        whole = bytearray()
        async for part in response.aiter_raw():
            whole += part
            if len(whole) > self._largest:
                return replace(reply, why=f"the answer has more than {self._largest:,} bytes")
        return replace(reply, body=bytes(whole))


def _judged(response: httpx2.Response) -> Reply:
    """What status and headers say."""
    status = response.status_code
    if 200 <= status < 300:
        return Reply(status)
    if status in _AGAIN:
        wait = _seconds(response.headers.get("retry-after", ""))
        return Reply(status, why=f"answered {status}", again=True, wait=wait)
    redirect = ", a redirect, which is never followed" if 300 <= status < 400 else ""
    return Reply(status, why=f"answered {status}{redirect}")


def _seconds(retry_after: str) -> float | None:
    """Retry-After in seconds, given as such or as a date; None when it is neither."""
    if retry_after.isascii() and retry_after.isdecimal():
        return float(retry_after[:12])
    try:
        date = parsedate_to_datetime(retry_after)
        return max(
            0.0, (date.replace(tzinfo=date.tzinfo or UTC) - datetime.now(UTC)).total_seconds()
        )
    except (ValueError, OverflowError, TypeError):
        return None


def _failed(error: Exception) -> Reply:
    """The reply when there was none. A library's own words are left out: they quote both ends."""
    import httpx2

    if any(isinstance(each, ssl.SSLCertVerificationError) for each in _causes(error)):
        return Reply(why="its TLS certificate could not be verified")
    match error:
        case httpx2.ConnectError() | httpx2.ProxyError():
            return Reply(why="no connection could be made", again=True)
        case httpx2.TransportError():
            return Reply(why="the connection ended before a whole answer came", again=True)
        case _:
            return Reply(why=f"the exchange failed ({type(error).__name__})")


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _proxy(url: str) -> str | None:
    """The proxy that the environment names for a url, as for other programs."""
    parts = urlsplit(url)
    proxies: Mapping[str, Any] = getproxies()
    named = proxies.get(parts.scheme) or proxies.get("all")
    if not named or proxy_bypass(parts.hostname or ""):
        return None
    return named if "://" in named else f"http://{named}"
