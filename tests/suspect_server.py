"""Remote suspects for tests: ASGI apps on loopback, and servers that hardly speak HTTP."""

from __future__ import annotations

import json
import re
import socket
import socketserver
import ssl
import threading
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Message = MutableMapping[str, Any]
App = Callable[
    [Message, Callable[[], Awaitable[Message]], Callable[[Message], Awaitable[None]]],
    Awaitable[None],
]

CLASSES = 10


def label_of(image: NDArray[Any]) -> int:
    """What the suspects of these tests see in an image of 0 to 255."""
    return int(np.asarray(image, dtype=np.int64).sum()) % CLASSES


def scores_of(image: NDArray[Any]) -> list[float]:
    """The same as scores, whose largest is that of the label."""
    scores = np.linspace(0.01, 0.02, CLASSES)
    scores[label_of(image)] = 0.9
    return [round(float(each), 4) for each in scores]


def some_images(count: int, channels: int = 3, seed: int = 0) -> NDArray[np.uint8]:
    """Images (count, channels, 4, 5), all different."""
    drawn = np.random.default_rng(seed)
    return drawn.integers(0, 256, (count, channels, 4, 5), dtype=np.uint8)


def labels_of(images: NDArray[np.uint8]) -> list[int]:
    """The labels of images."""
    return [label_of(image) for image in images]


@dataclass(frozen=True)
class Seen:
    """A request that a suspect received."""

    path: str
    query: str
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass(frozen=True)
class Said:
    """An answer of a suspect."""

    body: bytes | Any
    status: int = 200
    headers: tuple[tuple[str, str], ...] = ()

    @property
    def content(self) -> bytes:
        return self.body if isinstance(self.body, bytes) else json.dumps(self.body).encode()


def answering(answer: Callable[[Seen], Any]) -> App:
    """An app that answers with what a function returns: a `Said`, or a document for status 200."""

    async def app(scope: Message, receive: Any, send: Any) -> None:
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
        headers = {name.decode(): value.decode() for name, value in scope["headers"]}
        said = answer(Seen(scope["path"], scope["query_string"].decode(), headers, body))
        said = said if isinstance(said, Said) else Said(said)
        await start(send, said.status, *said.headers)
        await send({"type": "http.response.body", "body": said.content})

    return app


async def start(send: Any, status: int = 200, *headers: tuple[str, str]) -> None:
    """Begin an answer."""
    encoded = [(name.encode(), value.encode()) for name, value in headers]
    await send({"type": "http.response.start", "status": status, "headers": encoded})


async def hang(scope: Message, receive: Any, send: Any) -> None:
    """An app that never answers."""
    while (await receive())["type"] != "http.disconnect":
        pass


class Suspects:
    """One server of many apps, each under a path of its own."""

    def __init__(self) -> None:
        import uvicorn

        self._apps: list[App] = []
        # Named as TCP, or asyncio leaves Nagle's algorithm on and each answer takes 40 ms.
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        self._socket.bind(("127.0.0.1", 0))
        self._socket.listen()
        config = uvicorn.Config(
            self._dispatch, interface="asgi3", http="h11", ws="none", lifespan="off",
            log_level="error", access_log=False, timeout_graceful_shutdown=1,
        )  # fmt: skip
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(
            target=self._server.run, kwargs={"sockets": [self._socket]}, daemon=True
        )
        self._thread.start()

    def serve(self, app: App) -> str:
        """The url of an app, without a slash at its end."""
        self._apps.append(app)
        return f"http://127.0.0.1:{self._socket.getsockname()[1]}/{len(self._apps) - 1}"

    def answer(self, answer: Callable[[Seen], Any]) -> str:
        """The url of `answering(answer)`."""
        return self.serve(answering(answer))

    async def _dispatch(self, scope: Message, receive: Any, send: Any) -> None:
        number, _, path = scope["path"].lstrip("/").partition("/")
        await self._apps[int(number)](scope | {"path": f"/{path}"}, receive, send)

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join(timeout=20)
        self._socket.close()


def read_request(connection: Any) -> None:
    """Head and body, whose length the head says."""
    read = b""
    while (end := read.find(b"\r\n\r\n")) < 0 or len(read) < end + 4 + _length(read[:end]):
        if not (more := connection.recv(1 << 16)):
            return
        read += more


def _length(head: bytes) -> int:
    said = re.search(rb"(?i)content-length: *(\d+)", head)
    return int(said[1]) if said else 0


@contextmanager
def talking(talk: Callable[[Any], None], context: ssl.SSLContext | None = None) -> Iterator[str]:
    """The url of a server that does what it likes with each connection, after the request.

    The whole of it: a socket that is closed before all was read resets the connection, and what it
    sent last may be lost.
    """

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            with suppress(OSError):  # the asking side has hung up
                raw = self.request
                with context.wrap_socket(raw, server_side=True) if context else raw as connection:
                    read_request(connection)
                    talk(connection)

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads = True
        allow_reuse_address = True

    with Server(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield f"{'https' if context else 'http'}://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()
