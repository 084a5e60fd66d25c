"""The command `serve`: run the web page and its JSON API."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from countermark.cli.options import Authorities, LedgerUrl
from countermark.errors import MissingExtraError

if TYPE_CHECKING:
    from countermark.web.settings import ServerSettings


def serve(
    ledger: LedgerUrl,
    *,
    port: Annotated[
        int, typer.Option(metavar="N", min=0, max=65535, help="0: any that is free.")
    ] = 8000,
    host: Annotated[str, typer.Option(metavar="ADDRESS", help="Where to listen.")] = "127.0.0.1",
    state: Annotated[
        Path, typer.Option(metavar="DIR", help="Where jobs lie; made where it is missing.")
    ] = Path("served"),
    keys: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Keys that users choose from, by name.")
    ] = None,
    suspects: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Suspects that users choose from, by name.")
    ] = None,
    documentation: Annotated[
        str | None,
        typer.Option(
            metavar="URL", help="Where the documentation is served; the overview links its results."
        ),
    ] = None,
    authority: Authorities = None,
    token_file: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="A file with the token; or set COUNTERMARK_TOKEN."),
    ] = None,
    most_mib: Annotated[
        int, typer.Option(metavar="N", min=1, help="MiB that an upload may have.")
    ] = 1024,
    most_gib: Annotated[
        float, typer.Option(metavar="N", min=0.5, help="GiB of address space of a job.")
    ] = 16,
    most_seconds: Annotated[
        float, typer.Option(metavar="N", min=1, help="Seconds that a job may run.")
    ] = 3600,
    most_requests: Annotated[
        float, typer.Option(metavar="N", min=0.1, help="Requests a second and address.")
    ] = 20,
    check: Annotated[
        bool, typer.Option("--check", help="Open everything, say what is served, and exit.")
    ] = False,
) -> int:
    """Serve a web page and a JSON API: claims, verdicts, disputes.

    Anybody who has the token may log in. Without --token-file or COUNTERMARK_TOKEN a new token is
    drawn and printed once. The server speaks plain HTTP and listens on this machine only; put a
    proxy with TLS before it to serve other machines.

    \b
    Example:
        countermark serve --ledger claims.db --check
    """
    from countermark.claims.ledger import Ledger

    try:
        from countermark.web.access import digest_token, find_token
        from countermark.web.serving import bind_socket
        from countermark.web.serving import serve as run
        from countermark.web.settings import ServerLimits, ServerSettings
        from countermark.web.site import AppState
    except ImportError:
        raise MissingExtraError("the web page", "web") from None

    # The settings get only the digest of the token. A new token is printed once and kept nowhere.
    token, is_new = find_token(token_file, os.environ)
    limits = ServerLimits(
        upload=most_mib << 20, memory=int(most_gib * (1 << 30)), seconds=most_seconds,
        requests=most_requests,
    )  # fmt: skip
    settings = ServerSettings(
        ledger,
        state,
        digest_token(token),
        keys,
        suspects,
        documentation,
        tuple(authority or ()),
        limits,
    )
    # Building the site opens every folder and certificate, so --check finds what `serve` would.
    if check:
        with Ledger(ledger) as opened:
            size = opened.make_head().size
        AppState(settings).close()
        typer.echo(f"{size} claims, {_summarise_settings(settings)}")
        return 0
    # Bind first: with port 0 the system chooses a port, and the address to print needs it.
    with bind_socket(host, port) as listening:
        address = f"http://{host}:{listening.getsockname()[1]}"
        said = f"token, shown once: {token}\n" if is_new else ""
        run(settings, listening, f"{said}{_summarise_settings(settings)}\nlistening on {address}\n")
    return 0


def _summarise_settings(settings: ServerSettings) -> str:
    """Return one line about what is served, without any secret."""
    keys, suspects = settings.key_choices.list_entries(), settings.suspect_choices.list_entries()
    return f"{len(keys)} keys, {len(suspects)} suspects; jobs in {settings.state}"
