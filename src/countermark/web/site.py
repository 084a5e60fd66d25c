"""All parts of a server together, and what its routes take of them."""

from __future__ import annotations

import hmac
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, BinaryIO

from fastapi import Depends, Request
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from countermark.claims.ledger import Ledger
from countermark.claims.statement import day_or_moment, require_past
from countermark.claims.timestamp import Authority
from countermark.errors import ConfigError
from countermark.web.access import Pace, Session, Sessions
from countermark.web.claims import Catalogue
from countermark.web.looks import Looks
from countermark.web.orders import Chosen, Job, Order, ResolveOrder, VerifyOrder
from countermark.web.results import Results
from countermark.web.runner import Runner
from countermark.web.settings import Settings


class Site:
    """A server's parts; a context manager.

    Attributes:
        settings: what is served.
        authorities: whose time stamps are believed.
        sessions, logins: who came in, and how often somebody tried.
        runner: the jobs.
        results: the benchmark pages.
        looks: the templates.

    Raises:
        CountermarkError: a folder or a certificate that cannot be used.
    """

    def __init__(self, settings: Settings) -> None:
        settings.require()
        self.settings = settings
        self.authorities = [Authority.load(each) for each in settings.authorities]
        self.runner = Runner(settings.state.resolve(), settings.limits, self._task)
        self._opened: tuple[Ledger, Catalogue] | None = None
        self._opening = threading.Lock()
        self.sessions = Sessions(settings.token_sha256)
        self.logins = Pace(settings.limits.logins / 60, settings.limits.logins)
        self.results = Results(settings.results, settings.state.resolve() / "results")
        self.looks = Looks()

    @property
    def ledger(self) -> Ledger:
        """The ledger, opened when it is needed first: the page that asks for a token needs none.

        Raises:
            LedgerError: there is none.
        """
        return self._open()[0]

    @property
    def catalogue(self) -> Catalogue:
        """Who owns which claim; raises as `ledger`."""
        return self._open()[1]

    def _open(self) -> tuple[Ledger, Catalogue]:
        with self._opening:
            if self._opened is None:
                # Users of the page need not know where it is.
                ledger = Ledger(self.settings.ledger, called="the ledger")
                self._opened = ledger, Catalogue(ledger)
            return self._opened

    def __enter__(self) -> Site:
        self.runner.start()
        self.results.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the jobs, and let go of ledger and folder."""
        self.results.close()
        self.runner.close()
        if self._opened is not None:
            self._opened[0].close()

    def take(self, order: Order, upload: BinaryIO | None) -> Job:
        """A new job, once every name in it is known to be one of this server.

        Raises:
            ConfigError: a name that is not, a claim without a date, or a date in the future.
            FullError: too many jobs wait.
        """
        if isinstance(order, VerifyOrder) and (order.claim is None) != (order.suspect_date is None):
            raise ConfigError("a claim and the date of the suspect belong together: give both")
        if isinstance(order, VerifyOrder) and order.suspect_date is not None:
            require_past(day_or_moment(order.suspect_date, "suspect_date"), "suspect_date")
        for digest in _claims(order):
            if not self.ledger.find(digest=digest):
                raise ConfigError(f"the ledger has no claim {digest}: expected the digest of one")
        self._suspect(order.suspect, Path())
        self._named(order)
        return self.runner.add(order, upload)

    def _task(self, job: Job) -> Mapping[str, Any]:
        """What the process of a job is told: paths in place of names, and how to undo that."""
        order, folder = job.order, self.settings.state.resolve() / "jobs" / job.id
        suspect = self._suspect(order.suspect, folder)
        keys, models = self._named(order)
        url = self._ledger_url()
        names = {str(path): name for name, path in (*keys, *models)}
        told = order.model_dump(exclude={"suspect", "key", "keys", "models"}) | {
            "suspect": str(suspect), "ledger": url,
            "names": names | {url: "the ledger", str(suspect): order.suspect.name},
            "authorities": [str(each.resolve()) for each in self.settings.authorities],
        }  # fmt: skip
        if isinstance(order, VerifyOrder):
            return told | {"key": str(keys[0][1])}
        return told | {
            "keys": [str(path) for _, path in keys], "models": [str(path) for _, path in models]
        }  # fmt: skip

    def _suspect(self, chosen: Chosen, folder: Path) -> Path:
        """Where a suspect lies; an upload in its job's folder."""
        if chosen.uploaded:
            return folder / chosen.file
        return self.settings.suspect_shelf.path(chosen.name).resolve()

    def _named(self, order: Order) -> tuple[list[tuple[str, Path]], list[tuple[str, Path]]]:
        """The keys and the models that an order names, and where they lie."""
        keys: tuple[str, ...] = order.keys if isinstance(order, ResolveOrder) else (order.key,)
        models = order.models if isinstance(order, ResolveOrder) else ()
        key_shelf, shelf = self.settings.key_shelf, self.settings.suspect_shelf
        return (
            [(each, key_shelf.path(each).resolve()) for each in keys],
            [(each, shelf.path(each).resolve()) for each in models],
        )

    def _ledger_url(self) -> str:
        database = self.ledger.database
        if database.is_sqlite:
            return str(Path(database.url.database or "").resolve())
        return database.url.render_as_string(hide_password=False).replace("+psycopg", "", 1)


def _claims(order: Order) -> tuple[str, ...]:
    if isinstance(order, ResolveOrder):
        return order.claims
    return () if order.claim is None else (order.claim,)


def order_of(kind: type[VerifyOrder] | type[ResolveOrder], fields: Mapping[str, Any]) -> Order:
    """An order out of what somebody sent.

    Raises:
        ConfigError: names the first field that is wrong.
    """
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"{where}: {first['msg']}") from None


def _site(request: Request) -> Site:
    found: Site = request.app.state.site
    return found


def _session(request: Request) -> Session | None:
    found: Session | None = request.scope.get("session")
    return found


Here = Annotated[Site, Depends(_site)]
Visitor = Annotated[Session | None, Depends(_session)]


def require_own(session: Session | None, csrf: str) -> None:
    """Raise 403 unless a form was made for this session."""
    with suppress(TypeError):  # what is no ASCII is no token
        if session is not None and hmac.compare_digest(session.csrf, csrf):
            return
    raise HTTPException(403, "this form is not of your session: go back, reload, send it again")
