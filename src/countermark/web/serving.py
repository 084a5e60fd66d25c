"""The server: one process that answers requests, and one more for each job."""

from __future__ import annotations

import socket
import sys
import threading

import uvicorn

from countermark.errors import ConfigError, CountermarkError
from countermark.web.app import make_application
from countermark.web.settings import ServerSettings
from countermark.web.site import AppState

# Seconds before the ledger is opened. Loading its library would delay the first page.
_FIRST_PAGE = 0.3


def bind_socket(host: str, port: int) -> socket.socket:
    """Return a socket that listens on a host and a port.

    Raises:
        ConfigError: the port is in use, is invalid, or needs more rights.
    """
    try:
        return socket.create_server((host, port), backlog=128)
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f"nothing can listen on {host}:{port} ({error}): expected a free port"
        ) from None


def serve(settings: ServerSettings, listening: socket.socket, said: str) -> None:
    """Serve until the process is asked to end.

    Args:
        settings: what is served.
        listening: the socket to answer on.
        said: text for standard error at the start, such as the server's address.

    Raises:
        CountermarkError: a folder, a ledger or a certificate cannot be used.
    """
    with AppState(settings) as site:
        options = uvicorn.Config(
            make_application(site), log_level="warning", access_log=False, server_header=False,
            date_header=False, timeout_keep_alive=10, limit_concurrency=200, lifespan="off",
            ws="none", proxy_headers=True,
        )  # fmt: skip
        server = uvicorn.Server(options)
        stopped: list[CountermarkError] = []

        def open_ledger() -> None:
            """Open the ledger after the first page was shown; stop the server on an error."""
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
        # An error in the timer's thread would be lost there.
        if stopped:
            raise stopped[0]
