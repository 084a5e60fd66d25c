"""What is read of a ledger's tables, by whoever wrote them: a SQLite file may hold anything."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

from countermark.claims.signed import LARGEST
from countermark.claims.tree import Node, Nodes
from countermark.errors import LedgerError, printable
from countermark.merkle import DIGEST_BYTES

if TYPE_CHECKING:
    import sqlalchemy as sa

_Made = TypeVar("_Made")
_ROWS = 200  # claims that are read at a time


class Rows:
    """The rows of a ledger, within a transaction of the caller's.

    Attributes:
        tables: the module `database`.
        name: what the ledger is called in messages.
    """

    def __init__(self, tables: Any, name: str) -> None:
        self.tables, self.name = tables, name

    def claims(self, connection: sa.Connection, *, after: int = -1) -> Iterator[Any]:
        """The rows of the table of claims behind a place, in their order, some at a time.

        Raises:
            LedgerError: one is larger than any claim.
        """
        table = self.tables.claims
        self.require_small(connection)
        while True:
            query = table.select().where(table.c.place > after).order_by("place").limit(_ROWS)
            rows = connection.execute(query).all()
            yield from rows
            if len(rows) < _ROWS:
                return
            after = rows[-1].place

    def nodes_of(self, connection: sa.Connection, level: int) -> dict[int, bytes]:
        """All nodes of one level that are kept, by their place."""
        table = self.tables.nodes
        query = table.select().where(table.c.level == level)
        rows = connection.execute(query)
        return {row.place if type(row.place) is int else -1: row.hash for row in rows}

    def counts(self, connection: sa.Connection) -> tuple[int, int]:
        """How many rows the tables of claims and of nodes have, those outside every order too."""
        tables = self.tables
        return tables.count(connection, tables.claims), tables.count(connection, tables.nodes)

    def require_small(self, connection: sa.Connection, *where: sa.ColumnElement[bool]) -> None:
        """Raise `LedgerError` where a row is larger than any claim, before it is read."""
        largest = self.tables.largest(connection, *where)
        if largest > LARGEST:
            raise LedgerError(f"{self.name} holds {largest:,} bytes as one claim: expected at most "
                              f"{LARGEST:,}, so it was changed from outside")  # fmt: skip

    def place_of(self, connection: sa.Connection, digest: str) -> int | None:
        """The place of the claim of this digest; None where there is none."""
        table = self.tables.claims
        query = table.select().where(table.c.digest == digest)
        row = connection.execute(query).one_or_none()
        return None if row is None else self.placed(row)

    def size(self, connection: sa.Connection) -> int:
        """How many claims there are."""
        table = self.tables.claims
        query = table.select().order_by(table.c.place.desc()).limit(1)
        row = connection.execute(query).one_or_none()
        return 0 if row is None else self.placed(row) + 1

    def placed(self, row: Any) -> int:
        """The place of a row.

        Raises:
            LedgerError: it is no place.
        """
        place: int = row.place
        if type(place) is not int or place < 0:  # SQLite keeps anything in any column
            raise LedgerError(
                f"{self.name} holds a claim at {printable(str(place), 40)!r}, which is no place: "
                "it was changed from outside"
            )
        return place

    def with_nodes(self, connection: sa.Connection, act: Callable[[Nodes], _Made]) -> _Made:
        """What `act` makes of the stored tree, whose nodes it asks for; they are read at once.

        Args:
            connection: the transaction.
            act: asks for the same nodes whatever they are. It is called twice: to learn which
                ones are needed, and with these.

        Raises:
            LedgerError: one of them is not there.
        """
        wanted: set[Node] = set()

        def asked(level: int, place: int) -> bytes:
            wanted.add((level, place))
            return bytes(DIGEST_BYTES)

        act(asked)
        found = self.tables.nodes_at(connection, wanted) if wanted else {}
        if missing := wanted - found.keys():
            level, place = min(missing)
            raise LedgerError(
                f"{self.name} misses node {place} of level {level} of its tree: it was changed "
                "from outside; `countermark ledger verify` says more"
            )
        return act(lambda level, place: found[level, place])
