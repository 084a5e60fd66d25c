"""The tables of a ledger on SQLite or PostgreSQL, read and written in transactions.

A writer waits for the writer before it: on SQLite through `BEGIN IMMEDIATE`, on PostgreSQL through
a lock on the table. When a transaction ends, its rows are on disk (synchronous = FULL, a
write-ahead log); if the process is killed before, none of them is. Readers never wait.
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

from countermark.errors import LedgerError, MissingExtraError, make_printable

REVISION = "1"
_PATIENCE = 120  # seconds that a writer waits for the writers before it

# Matches a secret given as an option: in the query of a URL, in a connection string, or behind a
# misplaced "?". `passfile` is allowed: it names a file, and the name is no secret.
_SECRET_OPTION = re.compile(r"(?i)(passw|passphrase|passwd|pwd|secret|token|scram_\w*key)[\w ]*=")
_USER_AND_PASSWORD = re.compile(r"(?![A-Za-z]:\\)[^/?]*:[^/?]*@")  # but no URL and no drive
_MISSPELT_URL = re.compile(r"(?i)(postgres|psql|pgsql|sqlite|mysql|mariadb)[\w+]*:")
# Options of libpq whose values messages may show. Any other option may hold a secret.
_SHOWN_OPTIONS = frozenset({"host", "hostaddr", "port", "user", "dbname", "sslmode", "service"})


class LenientBytes(sa.types.TypeDecorator[bytes]):
    """A column type for bytes that tolerates other values.

    A SQLite file may hold any type in any column: text is read as its UTF-8 bytes, other values as
    empty bytes.
    """

    impl = sa.LargeBinary
    cache_ok = True

    def result_processor(self, dialect: Any, coltype: Any) -> Any:  # noqa: ARG002
        """Return the function that converts a column's value to bytes."""
        return _convert_to_bytes


def _convert_to_bytes(value: object) -> bytes:
    """Convert a column's value to bytes: text to its UTF-8, other types to empty bytes."""
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
    sa.Column("content", LenientBytes, nullable=False),
    sa.Index("ix_claims_digest", "digest", unique=True),
    sa.Index("ix_claims_commitment", "commitment"),
    sa.Index("ix_claims_model", "model"),
)  # fmt: skip
nodes = sa.Table(
    "nodes", metadata,
    sa.Column("level", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("place", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("hash", LenientBytes(32), nullable=False),
)  # fmt: skip
heads = sa.Table(
    "heads", metadata,
    sa.Column("digest", sa.String(64), primary_key=True),
    sa.Column("size", sa.BigInteger, nullable=False),
    sa.Column("content", LenientBytes, nullable=False),
)  # fmt: skip


def count_rows(connection: sa.Connection, table: sa.Table) -> int:
    """Return the number of rows of a table."""
    return int(connection.scalar(sa.select(sa.func.count()).select_from(table)) or 0)


def read_nodes(
    connection: sa.Connection, wanted: Collection[tuple[int, int]]
) -> dict[tuple[int, int], bytes]:
    """Read the wanted tree nodes that are stored.

    Args:
        connection: the transaction.
        wanted: level and place of each node.

    Returns:
        The hash of each node that was found, by level and place.
    """
    # One condition a node: for `(level, place) IN (…)` SQLite would scan the whole table.
    each = [(nodes.c.level == level) & (nodes.c.place == place) for level, place in sorted(wanted)]
    rows = connection.execute(nodes.select().where(sa.or_(*each)))
    return {(row.level, row.place): row.hash for row in rows}


def measure_largest_claim(connection: sa.Connection, *where: sa.ColumnElement[bool]) -> int:
    """Return the size in bytes of the largest stored claim among those that meet conditions."""
    query = sa.select(sa.func.max(sa.func.length(claims.c.content))).where(*where)
    return int(connection.scalar(query) or 0)


class Database:
    """A ledger's database, named by its URL.

    Args:
        url: `sqlite:///FILE`, the name of a SQLite file, or `postgresql://…`.
        called: its name in messages; None for the URL without secrets.

    Raises:
        LedgerError: a URL of another kind, or one that holds a secret.
        MissingExtraError: PostgreSQL without its driver.
    """

    def __init__(self, url: str, called: str | None = None) -> None:
        self.url = _parse_url(url)
        self.name = called or _redact_url(self.url)
        self.is_sqlite = self.url.get_backend_name() == "sqlite"
        self.engine = _make_engine(self.url)
        if self.is_sqlite:
            sa.event.listen(self.engine, "connect", _configure_sqlite)
            sa.event.listen(self.engine, "begin", _begin_sqlite)

    def has_ledger(self) -> bool:
        """Return true if the database holds a ledger of the current schema.

        Raises:
            LedgerError: the database holds a ledger of another schema, or does not answer.
        """
        if self.is_sqlite and not Path(self.url.database or "").is_file():
            return False
        with self.begin_reading() as connection:
            if not sa.inspect(connection).has_table("alembic_version"):
                return False
            found = connection.execute(sa.text("SELECT version_num FROM alembic_version")).scalar()
        if found != REVISION:
            raise LedgerError(
                f"{self.name} has the form {make_printable(str(found), 40)!r}, this version of "
                f"countermark reads {REVISION!r}: use the one that wrote it"
            )
        return True

    @contextmanager
    def begin_reading(self) -> Iterator[sa.Connection]:
        """Open a transaction that sees one state of the ledger and changes nothing.

        Raises:
            LedgerError: the database does not answer.
        """
        # A SQLite transaction always sees one snapshot; PostgreSQL's does from REPEATABLE READ on.
        level = {} if self.is_sqlite else {"isolation_level": "REPEATABLE READ"}
        with (
            self._translate_errors(),
            self.engine.connect().execution_options(**level) as connection,
        ):
            yield connection
            connection.rollback()

    @contextmanager
    def begin_writing(self) -> Iterator[sa.Connection]:
        """Open a transaction that is the only writer; its rows are on disk when the block ends.

        Raises:
            LedgerError: the database does not answer, or other writers hold it for two minutes.
        """
        with self._translate_errors(), self.engine.connect() as connection:
            connection.execution_options(alone=True)
            with connection.begin():
                # EXCLUSIVE keeps other writers out and lets readers in. While the schema is being
                # created there is no table to lock.
                if not self.is_sqlite and sa.inspect(connection).has_table("claims"):
                    connection.execute(sa.text("LOCK TABLE claims IN EXCLUSIVE MODE"))
                yield connection

    def enable_write_ahead_log(self) -> None:
        """Switch a new SQLite file to a write-ahead log, so that readers never wait."""
        connection = sqlite3.connect(self.url.database or "")
        try:
            connection.execute("PRAGMA journal_mode = WAL")
        finally:
            connection.close()

    def migrate(self, connection: sa.Connection) -> None:
        """Create the current schema in an empty database, within a transaction."""
        from alembic import command
        from alembic.config import Config

        config = Config()
        config.set_main_option("script_location", "countermark.claims:migrations")
        config.set_main_option("path_separator", "os")
        config.attributes["connection"] = connection
        command.upgrade(config, "head")

    def close(self) -> None:
        """Close every connection."""
        self.engine.dispose()

    @contextmanager
    def _translate_errors(self) -> Iterator[None]:
        """Convert SQLAlchemy's errors to a `LedgerError` that quotes no secret."""
        try:
            yield
        except sa.exc.SQLAlchemyError as error:
            # `orig` is the driver's own error: SQLAlchemy's text would add the SQL statement.
            said = str(getattr(error, "orig", None) or error)
            first = _redact_message(said, self.url).strip().partition("\n")[0]
            raise LedgerError(
                f"the ledger {self.name} does not answer ({make_printable(first, 200)}): expected one "
                "that `countermark ledger init` made"
            ) from None


def _parse_url(text: str) -> sa.URL:
    """Parse a ledger's URL and refuse one that holds a secret.

    Others on this machine can read the URL in the list of processes, and messages print it. So a
    secret is refused, by a message that does not quote it.

    Raises:
        LedgerError: a URL that holds a secret, or is of no known kind.
    """
    _require_no_secret(text)
    if "://" not in text:
        if _MISSPELT_URL.match(text):
            raise _make_url_error()
        return sa.URL.create("sqlite", database=text)
    try:
        url = sa.make_url(text)
        backend = url.get_backend_name()
    except (sa.exc.ArgumentError, ValueError):
        raise _make_url_error() from None
    # A colon in the user name is a password that was percent-encoded.
    if url.password is not None or ":" in (url.username or ""):
        raise _make_secret_error()
    if backend == "postgresql":
        return url.set(drivername="postgresql+psycopg")
    # A database in memory would end with its connection.
    if backend == "sqlite" and url.database and url.database != ":memory:":
        return sa.URL.create("sqlite", database=url.database)
    raise _make_url_error()


def _require_no_secret(text: str) -> None:
    """Raise `LedgerError` for a secret among options or before an @, percent-encoded or not."""
    # Three rounds: as given, and percent-decoded once and twice.
    for _ in range(3):
        if _SECRET_OPTION.search(text) or ("://" not in text and _USER_AND_PASSWORD.match(text)):
            raise _make_secret_error()
        text = unquote_plus(text)


def _make_secret_error() -> LedgerError:
    """Make the error for a URL that holds a secret."""
    return LedgerError(
        "the ledger's URL has a password, which others on this machine can read: put it into "
        "~/.pgpass, or a file that PGPASSFILE names"
    )


def _make_url_error() -> LedgerError:
    """Make the error for a URL of an unknown kind."""
    return LedgerError(
        "the ledger's URL is of no known kind: expected a file, sqlite:///FILE or "
        "postgresql://USER@HOST/NAME"
    )


def _redact_url(url: sa.URL) -> str:
    """Return a URL for messages, without the options that may hold a secret."""
    query = {name: value for name, value in url.query.items() if name in _SHOWN_OPTIONS}
    return url.set(query=query).render_as_string(hide_password=True)


def _redact_message(said: str, url: sa.URL) -> str:
    """Return a driver's message without the option values that `_redact_url` leaves out."""
    for name, value in url.query.items():
        if name not in _SHOWN_OPTIONS:
            # An option that is given twice has a tuple of values. Drivers quote the values.
            for each in (value,) if isinstance(value, str) else value:
                said = said.replace(each, "***") if each else said
    return said


def _make_engine(url: sa.URL) -> sa.Engine:
    """Create the SQLAlchemy engine for a URL.

    Raises:
        MissingExtraError: PostgreSQL without its driver.
        LedgerError: options that the driver does not accept.
    """
    arguments: dict[str, Any] = {"timeout": _PATIENCE}
    if url.get_backend_name() != "sqlite":
        arguments = {"connect_timeout": 10}
    try:
        return sa.create_engine(url, connect_args=arguments)
    except ImportError:
        raise MissingExtraError("a ledger on PostgreSQL", "postgresql") from None
    except (sa.exc.SQLAlchemyError, ValueError, TypeError):  # whose texts quote the options
        raise LedgerError(
            f"the options of the ledger {_redact_url(url)} are not those of a PostgreSQL URL: "
            "expected postgresql://USER@HOST/NAME, with options as libpq names them"
        ) from None


def _configure_sqlite(connection: Any, _: object) -> None:
    """Configure a new SQLite connection: own transactions, full sync, an untrusted schema."""
    # Without this the driver would begin transactions itself, and only before the first write.
    connection.isolation_level = None
    # A hostile file's schema may name SQL functions: trusted_schema = OFF refuses all but innocuous
    # ones, and cell_size_check finds damaged pages early.
    for setting in ("synchronous = FULL", "trusted_schema = OFF", "cell_size_check = ON"):
        connection.execute(f"PRAGMA {setting}")


def _begin_sqlite(connection: sa.Connection) -> None:
    """Begin a SQLite transaction; a writer takes the write lock at once."""
    # Two writers that read first and then upgrade their locks would block each other. IMMEDIATE
    # takes the write lock before the first read.
    alone = connection.get_execution_options().get("alone")
    connection.exec_driver_sql("BEGIN IMMEDIATE" if alone else "BEGIN")
