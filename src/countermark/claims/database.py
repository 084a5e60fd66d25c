"""The tables of a ledger, on SQLite or PostgreSQL: what is read and written, one transaction each.

A writer waits for the one before it: on SQLite by `BEGIN IMMEDIATE`, on PostgreSQL by a lock on the
table. What a transaction wrote is on disk when it ends (synchronous = FULL, a write-ahead log), or
it is not there at all, whenever the process is killed. Readers wait for nobody.
"""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import unquote_plus

import sqlalchemy as sa

from countermark.errors import LedgerError, MissingExtraError, printable

REVISION = "1"
_PATIENCE = 120  # seconds that a writer waits for those before it

# A secret as an option, wherever it stands: in the query of a URL, in a connection string, behind a
# misplaced "?". The file that `passfile` names holds a password, the name of the file is none.
_SECRET_OPTION = re.compile(r"(?i)(passw|passphrase|passwd|pwd|secret|token|scram_\w*key)[\w ]*=")
_USER_AND_PASSWORD = re.compile(r"(?![A-Za-z]:\\)[^/?]*:[^/?]*@")  # of no URL, and no drive
_MISSPELT_URL = re.compile(r"(?i)(postgres|psql|pgsql|sqlite|mysql|mariadb)[\w+]*:")
# Options of libpq whose values people may see; of any other one nobody knows what it holds.
_SHOWN_OPTIONS = frozenset({"host", "hostaddr", "port", "user", "dbname", "sslmode", "service"})


class Stored(sa.types.TypeDecorator[bytes]):
    """Bytes. A SQLite file may hold anything in any column: what is no bytes is read as some."""

    impl = sa.LargeBinary
    cache_ok = True

    def result_processor(self, dialect: Any, coltype: Any) -> Any:  # noqa: ARG002
        """Text as its UTF-8, other values as nothing."""
        return _as_bytes


def _as_bytes(value: object) -> bytes:
    if isinstance(value, str):
        return value.encode("utf-8", "surrogatepass")
    return bytes(value) if isinstance(value, bytes | memoryview) else b""


metadata = sa.MetaData()
about = sa.Table(
    "about", metadata,
    sa.Column("name", sa.String(40), primary_key=True),
    sa.Column("value", sa.String(200), nullable=False),
)  # fmt: skip
claims = sa.Table(
    "claims", metadata,
    sa.Column("place", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("digest", sa.String(64), nullable=False, unique=False),
    sa.Column("commitment", sa.String(64), nullable=False),
    sa.Column("model", sa.String(64), nullable=False),
    sa.Column("content", Stored, nullable=False),
    sa.Index("ix_claims_digest", "digest", unique=True),
    sa.Index("ix_claims_commitment", "commitment"),
    sa.Index("ix_claims_model", "model"),
)  # fmt: skip
nodes = sa.Table(
    "nodes", metadata,
    sa.Column("level", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("place", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("hash", Stored(32), nullable=False),
)  # fmt: skip
heads = sa.Table(
    "heads", metadata,
    sa.Column("digest", sa.String(64), primary_key=True),
    sa.Column("size", sa.BigInteger, nullable=False),
    sa.Column("content", Stored, nullable=False),
)  # fmt: skip


def count(connection: sa.Connection, table: sa.Table) -> int:
    """How many rows a table has."""
    return int(connection.scalar(sa.select(sa.func.count()).select_from(table)) or 0)


def nodes_at(
    connection: sa.Connection, wanted: Collection[tuple[int, int]]
) -> dict[tuple[int, int], bytes]:
    """Those of the wanted nodes, by level and place, that are there."""
    # Not by pairs in a list: SQLite would look at every row for that.
    each = [(nodes.c.level == level) & (nodes.c.place == place) for level, place in sorted(wanted)]
    rows = connection.execute(nodes.select().where(sa.or_(*each)))
    return {(row.level, row.place): row.hash for row in rows}


def largest(connection: sa.Connection, *where: sa.ColumnElement[bool]) -> int:
    """The bytes of the largest claim that is stored, among those that meet a condition."""
    query = sa.select(sa.func.max(sa.func.length(claims.c.content))).where(*where)
    return int(connection.scalar(query) or 0)


class Database:
    """A ledger's database by its URL: `sqlite:///FILE`, a file's name, or `postgresql://…`.

    Raises:
        LedgerError: a URL of another kind.
        MissingExtraError: PostgreSQL without its driver.
    """

    def __init__(self, url: str, called: str | None = None) -> None:
        self.url = _url(url)
        self.name = called or _redact_url(self.url)
        self.is_sqlite = self.url.get_backend_name() == "sqlite"
        self.engine = _engine(self.url)
        if self.is_sqlite:
            sa.event.listen(self.engine, "connect", _sqlite_opened)
            sa.event.listen(self.engine, "begin", _sqlite_begins)

    def exists(self) -> bool:
        """Whether a ledger of today's form is there.

        Raises:
            LedgerError: there is a ledger of another form, or no answer.
        """
        if self.is_sqlite and not Path(self.url.database or "").is_file():
            return False
        with self.reading() as connection:
            if not sa.inspect(connection).has_table("alembic_version"):
                return False
            found = connection.execute(sa.text("SELECT version_num FROM alembic_version")).scalar()
        if found != REVISION:
            raise LedgerError(
                f"{self.name} has the form {printable(str(found), 40)!r}, this version of "
                f"countermark reads {REVISION!r}: use the one that wrote it"
            )
        return True

    @contextmanager
    def reading(self) -> Iterator[sa.Connection]:
        """A transaction that sees one state of the ledger and changes nothing.

        Raises:
            LedgerError: the database does not answer.
        """
        level = {} if self.is_sqlite else {"isolation_level": "REPEATABLE READ"}
        with self._asked(), self.engine.connect().execution_options(**level) as connection:
            yield connection
            connection.rollback()

    @contextmanager
    def writing(self) -> Iterator[sa.Connection]:
        """A transaction that writes, alone; on disk when the block has ended.

        Raises:
            LedgerError: the database does not answer, or others write for two minutes.
        """
        with self._asked(), self.engine.connect() as connection:
            connection.execution_options(alone=True)
            with connection.begin():
                if not self.is_sqlite and sa.inspect(connection).has_table("claims"):
                    connection.execute(sa.text("LOCK TABLE claims IN EXCLUSIVE MODE"))
                yield connection

    def prepare(self) -> None:
        """Make a new SQLite file one whose readers never wait for a writer (a write-ahead log)."""
        connection = sqlite3.connect(self.url.database or "")
        try:
            connection.execute("PRAGMA journal_mode = WAL")
        finally:
            connection.close()

    def migrate(self, connection: sa.Connection) -> None:
        """Bring an empty database to today's form, within a transaction."""
        from alembic import command
        from alembic.config import Config

        config = Config()
        config.set_main_option("script_location", "countermark.claims:migrations")
        config.set_main_option("path_separator", "os")
        config.attributes["connection"] = connection
        command.upgrade(config, "head")

    def close(self) -> None:
        """Let go of every connection."""
        self.engine.dispose()

    @contextmanager
    def _asked(self) -> Iterator[None]:
        try:
            yield
        except sa.exc.SQLAlchemyError as error:
            said = str(getattr(error, "orig", None) or error)
            first = _without_hidden(said, self.url).strip().partition("\n")[0]
            raise LedgerError(
                f"the ledger {self.name} does not answer ({printable(first, 200)}): expected one "
                "that `countermark ledger init` made"
            ) from None


def _url(text: str) -> sa.URL:
    """A ledger's URL, which holds no secret.

    Whatever it holds can be read by others on this machine, in the list of processes, and is
    printed in messages. So a secret is refused, by a message that does not quote it.
    """
    _require_no_secret(text)
    if "://" not in text:
        if _MISSPELT_URL.match(text):
            raise _no_known_kind()
        return sa.URL.create("sqlite", database=text)
    try:
        url = sa.make_url(text)
        backend = url.get_backend_name()
    except (sa.exc.ArgumentError, ValueError):
        raise _no_known_kind() from None
    if url.password is not None or ":" in (url.username or ""):
        raise _with_secret()
    if backend == "postgresql":
        return url.set(drivername="postgresql+psycopg")
    if backend == "sqlite" and url.database and url.database != ":memory:":
        return sa.URL.create("sqlite", database=url.database)
    raise _no_known_kind()


def _require_no_secret(text: str) -> None:
    """Raise `LedgerError` for a secret among options or before an @, percent-encoded or not."""
    for _ in range(3):
        if _SECRET_OPTION.search(text) or ("://" not in text and _USER_AND_PASSWORD.match(text)):
            raise _with_secret()
        text = unquote_plus(text)


def _with_secret() -> LedgerError:
    return LedgerError(
        "the ledger's URL has a password, which others on this machine can read: put it into "
        "~/.pgpass, or a file that PGPASSFILE names"
    )


def _no_known_kind() -> LedgerError:
    return LedgerError(
        "the ledger's URL is of no known kind: expected a file, sqlite:///FILE or "
        "postgresql://USER@HOST/NAME"
    )


def _redact_url(url: sa.URL) -> str:
    """A URL as people may see it: without the options of which nobody knows what they hold."""
    query = {name: value for name, value in url.query.items() if name in _SHOWN_OPTIONS}
    return url.set(query=query).render_as_string(hide_password=True)


def _without_hidden(said: str, url: sa.URL) -> str:
    """A driver's message without the values that `_redact_url` leaves out: drivers quote them."""
    for name, value in url.query.items():
        if name not in _SHOWN_OPTIONS:
            for each in (value,) if isinstance(value, str) else value:
                said = said.replace(each, "***") if each else said
    return said


def _engine(url: sa.URL) -> sa.Engine:
    arguments: dict[str, Any] = {"timeout": _PATIENCE}
    if url.get_backend_name() != "sqlite":
        arguments = {"connect_timeout": 10}
    try:
        return sa.create_engine(url, connect_args=arguments)
    except ImportError:
        raise MissingExtraError("a ledger on PostgreSQL", "postgresql") from None
    except (sa.exc.SQLAlchemyError, ValueError, TypeError):  # their texts quote the options
        raise LedgerError(
            f"the options of the ledger {_redact_url(url)} are not those of a PostgreSQL URL: "
            "expected postgresql://USER@HOST/NAME, with options as libpq names them"
        ) from None


def _sqlite_opened(connection: Any, _: object) -> None:
    """Transactions are begun here, not by the driver; a hostile file's own SQL is not trusted."""
    connection.isolation_level = None
    for setting in ("synchronous = FULL", "trusted_schema = OFF", "cell_size_check = ON"):
        connection.execute(f"PRAGMA {setting}")


def _sqlite_begins(connection: sa.Connection) -> None:
    alone = connection.get_execution_options().get("alone")
    connection.exec_driver_sql("BEGIN IMMEDIATE" if alone else "BEGIN")
