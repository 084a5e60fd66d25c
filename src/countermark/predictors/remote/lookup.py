"""An event loop that never waits for the look-up of a host name when it ends."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any


class LookupLoop(asyncio.SelectorEventLoop):
    """An event loop that looks host names up in daemon threads.

    The default loop uses a thread pool, which Python joins when the process ends. Whoever answers
    for a suspect's name may take half a minute: a time-out would end the request, but the program
    would still wait.
    """

    async def getaddrinfo(
        self, host: Any, port: Any, *, family: int = 0, type: int = 0, proto: int = 0,  # noqa: A002
        flags: int = 0,
    ) -> Any:  # fmt: skip
        """Return the addresses of a host name, as `socket.getaddrinfo` does."""
        found: asyncio.Future[Any] = self.create_future()
        look_up = partial(socket.getaddrinfo, host, port, family, type, proto, flags)
        threading.Thread(target=self._resolve_future, args=(found, look_up), daemon=True).start()
        return await found

    def _resolve_future(self, found: asyncio.Future[Any], look_up: Callable[[], Any]) -> None:
        """Look a name up, and pass addresses or error to the loop; runs in a thread of its own."""
        try:
            settle: Callable[[], None] = partial(found.set_result, look_up())
        except Exception as error:  # raised again where the future is awaited
            settle = partial(found.set_exception, error)
        with suppress(RuntimeError):  # the loop is closed: nobody waits any more
            # A future may be touched in its loop only. It is done already if its request timed out.
            self.call_soon_threadsafe(lambda: None if found.done() else settle())
