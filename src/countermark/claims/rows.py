"""Read rows of a ledger's tables as hostile input.

A SQLite file may come from anybody and may hold any value in any column.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

from countermark._internal.merkle import DIGEST_BYTES
from countermark.claims.signed import LARGEST
from countermark.claims.tree import Node, Nodes
from countermark.errors import LedgerError, make_printable

if TYPE_CHECKING:
    import sqlalchemy as sa

_Made = TypeVar("_Made")
_ROWS = 200  # claims in a batch: at most 200 MiB, since a claim has at most 1 MiB


class LedgerRows:
    """A reader of a ledger's rows; every method works within a transaction of its caller.

    Attributes:
        tables: the module `database`.
        name: the ledger's name in messages.
    """

    def __init__(self, tables: Any, name: str) -> None:
        self.tables, self.name = tables, name

    def iterate_claims(self, connection: sa.Connection, *, after: int = -1) -> Iterator[Any]:
        """Yield the rows of the table of claims after a place, in their order, in batches.

        Args:
            connection: the transaction.
            after: the place after which to begin; −1 for all claims.

        Raises:
            LedgerError: a row is larger than any claim.
        """
        table = self.tables.claims
        self.require_small(connection)
        # Seek by place, not by OFFSET: a batch then costs the same at the end of a large ledger.
        while True:
            query = table.select().where(table.c.place > after).order_by("place").limit(_ROWS)
            rows = connection.execute(query).all()
            yield from rows
            if len(rows) < _ROWS:
                return
            after = rows[-1].place

    def read_level(self, connection: sa.Connection, level: int) -> dict[int, bytes]:
        """Return the hashes of all stored nodes of one level, by their place."""
        table = self.tables.nodes
        query = table.select().where(table.c.level == level)
        rows = connection.execute(query)
        # −1 is no node's place: a row with a damaged place shows up as a surplus node.
        return {row.place if type(row.place) is int else -1: row.hash for row in rows}

    def count_claims_and_nodes(self, connection: sa.Connection) -> tuple[int, int]:
        """Return the numbers of all rows of the tables of claims and of nodes."""
        tables = self.tables
        return tables.count_rows(connection, tables.claims), tables.count_rows(
            connection, tables.nodes
        )

    def require_small(self, connection: sa.Connection, *where: sa.ColumnElement[bool]) -> None:
        """Raise `LedgerError` if a row is larger than any claim, before the row is read."""
        # The database measures the sizes, so that no huge value reaches this process.
        largest = self.tables.measure_largest_claim(connection, *where)
        if largest > LARGEST:
            raise LedgerError(f"{self.name} holds {largest:,} bytes as one claim: expected at most "
                              f"{LARGEST:,}, so it was changed from outside")  # fmt: skip

    def find_place(self, connection: sa.Connection, digest: str) -> int | None:
        """Return the place of the claim with this digest; None if there is none."""
        table = self.tables.claims
        query = table.select().where(table.c.digest == digest)
        row = connection.execute(query).one_or_none()
        return None if row is None else self.parse_place(row)

    def read_size(self, connection: sa.Connection) -> int:
        """Return the number of claims: the last place plus one."""
        table = self.tables.claims
        query = table.select().order_by(table.c.place.desc()).limit(1)
        row = connection.execute(query).one_or_none()
        return 0 if row is None else self.parse_place(row) + 1

    def parse_place(self, row: Any) -> int:
        """Return the place of a row.

        Raises:
            LedgerError: the value is no place.
        """
        place: int = row.place
        if type(place) is not int or place < 0:  # SQLite stores any type in any column
            raise LedgerError(
                f"{self.name} holds a claim at {make_printable(str(place), 40)!r}, which is no place: "
                "it was changed from outside"
            )
        return place

    def compute_with_nodes(self, connection: sa.Connection, act: Callable[[Nodes], _Made]) -> _Made:
        """Compute something from the stored tree, and read all nodes for it in one query.

        Args:
            connection: the transaction.
            act: a function of the stored nodes that asks for the same nodes whatever their hashes
                are. It is called twice: to learn which nodes it needs, and with their hashes.

        Returns:
            The result of the second call.

        Raises:
            LedgerError: a node is missing.
        """
        wanted: set[Node] = set()

        def note_wanted(level: int, place: int) -> bytes:
            """Note a node that is needed, and return zeros for its hash."""
            wanted.add((level, place))
            return bytes(DIGEST_BYTES)

        # The result of the first call is meaningless and is dropped.
        act(note_wanted)
        found = self.tables.read_nodes(connection, wanted) if wanted else {}
        if missing := wanted - found.keys():
            level, place = min(missing)
            raise LedgerError(
                f"{self.name} misses node {place} of level {level} of its tree: it was changed "
                "from outside; `countermark ledger verify` says more"
            )
        return act(lambda level, place: found[level, place])
