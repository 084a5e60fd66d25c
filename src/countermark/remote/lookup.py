"""The event loop of a connection, which no look-up of a name can keep from ending."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any


class Loop(asyncio.SelectorEventLoop):
    """Looks names up in daemon threads.

    Those of a pool are waited for when the process ends, and whoever answers for a suspect's name
    may take half a minute: a time-out would end the asking and not the program.
    """

    async def getaddrinfo(
        self, host: Any, port: Any, *, family: int = 0, type: int = 0, proto: int = 0,  # noqa: A002
        flags: int = 0,
    ) -> Any:  # fmt: skip
        """The addresses of a name, as `socket.getaddrinfo` gives them."""
        found: asyncio.Future[Any] = self.create_future()
        look_up = partial(socket.getaddrinfo, host, port, family, type, proto, flags)
        threading.Thread(target=self._answer, args=(found, look_up), daemon=True).start()
        return await found

    def _answer(self, found: asyncio.Future[Any], look_up: Callable[[], Any]) -> None:
        try:
            settle: Callable[[], None] = partial(found.set_result, look_up())
        except Exception as error:  # it is raised where it is waited for
            settle = partial(found.set_exception, error)
        with suppress(RuntimeError):  # the loop is closed, and nobody waits
            self.call_soon_threadsafe(lambda: None if found.done() else settle())
