"""The state of the application: all parts of a server, and the values that its routes take."""

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
from countermark.claims.statement import parse_day_or_time, require_past
from countermark.claims.timestamp import Authority
from countermark.errors import ConfigError
from countermark.web.access import RateLimiter, Session, SessionStore
from countermark.web.claims import Catalogue
from countermark.web.looks import PageTemplates
from countermark.web.orders import ChosenSuspect, DisputeRequest, Job, Order, VerifyRequest
from countermark.web.runner import JobRunner
from countermark.web.settings import ServerSettings


class AppState:
    """The parts of a running server; a context manager.

    Attributes:
        settings: the settings.
        authorities: the timestamping authorities that the server trusts.
        sessions: the open sessions.
        logins: the rate limit of log-ins.
        runner: the jobs.
        looks: the templates.

    Raises:
        CountermarkError: a folder or a certificate cannot be used.
    """

    def __init__(self, settings: ServerSettings) -> None:
        settings.require_folders()
        self.settings = settings
        self.authorities = [Authority.load(each) for each in settings.authorities]
        self.runner = JobRunner(settings.state.resolve(), settings.limits, self._make_task)
        self._opened: tuple[Ledger, Catalogue] | None = None
        self._opening = threading.Lock()
        self.sessions = SessionStore(settings.token_sha256)
        self.logins = RateLimiter(settings.limits.logins / 60, settings.limits.logins)
        self.looks = PageTemplates()

    @property
    def ledger(self) -> Ledger:
        """The ledger, opened on first use.

        Raises:
            LedgerError: there is no ledger, or it does not answer.
        """
        # The log-in page needs no ledger, and opening one loads a large library.
        return self._open_ledger()[0]

    @property
    def catalogue(self) -> Catalogue:
        """The searchable claims of the ledger; raises `LedgerError` as `ledger` does."""
        return self._open_ledger()[1]

    def _open_ledger(self) -> tuple[Ledger, Catalogue]:
        """Return ledger and catalogue, opened once."""
        # Routes run in several threads, so two of them may come here at the same time.
        with self._opening:
            if self._opened is None:
                # Messages say "the ledger": visitors need not know where it is stored.
                ledger = Ledger(self.settings.ledger, called="the ledger")
                self._opened = ledger, Catalogue(ledger)
            return self._opened

    def __enter__(self) -> AppState:
        self.runner.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the jobs, and close the ledger and the folder."""
        self.runner.close()
        if self._opened is not None:
            self._opened[0].close()

    def accept_request(self, order: Order, upload: BinaryIO | None) -> Job:
        """Check a request and start a job for it.

        Args:
            order: the request.
            upload: the uploaded suspect, or None.

        Raises:
            ConfigError: the server has no such key, suspect or claim, or a claim comes without a
                date, or the date lies in the future.
            FullError: too many jobs wait.
        """
        # Everything is checked here so that the visitor learns it now, and no failed job is left.
        if isinstance(order, VerifyRequest) and (order.claim is None) != (
            order.suspect_date is None
        ):
            raise ConfigError("a claim and the date of the suspect belong together: give both")
        if isinstance(order, VerifyRequest) and order.suspect_date is not None:
            require_past(parse_day_or_time(order.suspect_date, "suspect_date"), "suspect_date")
        for digest in _list_claim_digests(order):
            if not self.ledger.find(digest=digest):
                raise ConfigError(f"the ledger has no claim {digest}: expected the digest of one")
        self._locate_suspect(order.suspect, Path())
        self._locate_keys_and_models(order)
        return self.runner.add_job(order, upload)

    def _make_task(self, job: Job) -> Mapping[str, Any]:
        """Return the task for a job's process.

        It holds paths in place of names, and under `names` the way back: the process puts names
        for paths in everything it tells the visitor.
        """
        order, folder = job.order, self.settings.state.resolve() / "jobs" / job.id
        suspect = self._locate_suspect(order.suspect, folder)
        keys, models = self._locate_keys_and_models(order)
        url = self._make_ledger_url()
        names = {str(path): name for name, path in (*keys, *models)}
        told = order.model_dump(exclude={"suspect", "key", "keys", "models"}) | {
            "suspect": str(suspect), "ledger": url,
            "names": names | {url: "the ledger", str(suspect): order.suspect.name},
            "authorities": [str(each.resolve()) for each in self.settings.authorities],
        }  # fmt: skip
        if isinstance(order, VerifyRequest):
            return told | {"key": str(keys[0][1])}
        return told | {
            "keys": [str(path) for _, path in keys], "models": [str(path) for _, path in models]
        }  # fmt: skip

    def _locate_suspect(self, chosen: ChosenSuspect, folder: Path) -> Path:
        """Return the path of a suspect; an upload lies in its job's folder."""
        if chosen.uploaded:
            return folder / chosen.upload_name
        return self.settings.suspect_choices.find_path(chosen.name).resolve()

    def _locate_keys_and_models(
        self, order: Order
    ) -> tuple[list[tuple[str, Path]], list[tuple[str, Path]]]:
        """Return names and paths of the keys and of the models in a request.

        Raises:
            ConfigError: the server has no key or model of a name.
        """
        keys: tuple[str, ...] = order.keys if isinstance(order, DisputeRequest) else (order.key,)
        models = order.models if isinstance(order, DisputeRequest) else ()
        key_shelf, shelf = self.settings.key_choices, self.settings.suspect_choices
        return (
            [(each, key_shelf.find_path(each).resolve()) for each in keys],
            [(each, shelf.find_path(each).resolve()) for each in models],
        )

    def _make_ledger_url(self) -> str:
        """Return the ledger's URL for a job's process, with an absolute path or the password."""
        # A job's process has another working folder, and opens the ledger by itself.
        database = self.ledger.database
        if database.is_sqlite:
            return str(Path(database.url.database or "").resolve())
        return database.url.render_as_string(hide_password=False).replace("+psycopg", "", 1)


def _list_claim_digests(order: Order) -> tuple[str, ...]:
    """Return the digests of the claims that a request names."""
    if isinstance(order, DisputeRequest):
        return order.claims
    return () if order.claim is None else (order.claim,)


def parse_request(
    kind: type[VerifyRequest] | type[DisputeRequest], fields: Mapping[str, Any]
) -> Order:
    """Return a request made of the fields that a visitor sent.

    Raises:
        ConfigError: a field is wrong; the message names the first one.
    """
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        # Without the input, which may be long and hostile.
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"{where}: {first['msg']}") from None


def _get_app_state(request: Request) -> AppState:
    """Return the state of the application that a request belongs to."""
    found: AppState = request.app.state.site
    return found


def _get_session(request: Request) -> Session | None:
    """Return the session that the gate found for a request."""
    found: Session | None = request.scope.get("session")
    return found


Here = Annotated[AppState, Depends(_get_app_state)]
Visitor = Annotated[Session | None, Depends(_get_session)]


def require_own_form(session: Session | None, csrf: str) -> None:
    """Raise 403 unless a form was made for this session."""
    # `compare_digest` raises TypeError for text outside ASCII, which no token is.
    with suppress(TypeError):
        if session is not None and hmac.compare_digest(session.csrf, csrf):
            return
    raise HTTPException(403, "this form is not of your session: go back, reload, send it again")
