"""The server: one process that answers, and one more for each job."""

from __future__ import annotations

import socket
import sys
import threading

import uvicorn

from countermark.errors import ConfigError, CountermarkError
from countermark.web.app import application
from countermark.web.settings import Settings
from countermark.web.site import Site

_FIRST_PAGE = 0.3  # seconds that whoever comes first has before the ledger's library is loaded


def bound(host: str, port: int) -> socket.socket:
    """A socket that listens there.

    Raises:
        ConfigError: the port is taken, or is not ours to take.
    """
    try:
        return socket.create_server((host, port), backlog=128)
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f"nothing can listen on {host}:{port} ({error}): expected a free port"
        ) from None


def serve(settings: Settings, listening: socket.socket, said: str) -> None:
    """Serve until the process is asked to end.

    Args:
        settings: what is served.
        listening: where.
        said: what is told on standard error once it listens.

    Raises:
        CountermarkError: a folder, a ledger or a certificate that cannot be used.
    """
    with Site(settings) as site:
        options = uvicorn.Config(
            application(site), log_level="warning", access_log=False, server_header=False,
            date_header=False, timeout_keep_alive=10, limit_concurrency=200, lifespan="off",
            ws="none", proxy_headers=True,
        )  # fmt: skip
        server = uvicorn.Server(options)
        stopped: list[CountermarkError] = []

        def open_ledger() -> None:
            """While the first page is shown already."""
            try:
                _ = site.ledger
            except CountermarkError as error:
                stopped.append(error)
                server.should_exit = True

        sys.stderr.write(said)
        sys.stderr.flush()
        opening = threading.Timer(_FIRST_PAGE, open_ledger)
        opening.start()
        server.run(sockets=[listening])
        opening.cancel()
        opening.join()
        if stopped:
            raise stopped[0]
