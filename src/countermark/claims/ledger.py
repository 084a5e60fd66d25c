"""A ledger: claims in the order in which they were added, under a Merkle tree that only grows.

Whoever keeps a tree head outside the ledger, signed by the ledger's key and timestamped, can show
later that nothing under it was changed, removed or inserted. `audit_ledger` does this check.
"""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from countermark._internal import files
from countermark._internal.output_paths import require_writable_place
from countermark.claims import timestamp
from countermark.claims.rows import LedgerRows
from countermark.claims.signed import Claim, TreeHead
from countermark.claims.tree import (
    compute_new_nodes,
    compute_root_at,
    make_consistency_path,
    make_inclusion_path,
)
from countermark.errors import (
    ClaimError,
    ConfigError,
    LedgerError,
    MissingExtraError,
)

if TYPE_CHECKING:
    import sqlalchemy as sa

    from countermark.claims import database

TYPE = "countermark/ledger/v1"
_MOST_FOUND = 1000  # claims that one search returns


@dataclass(frozen=True)
class LedgerEntry:
    """A claim in a ledger.

    Attributes:
        place: its place, from 0.
        claim: the claim as it was added.
    """

    place: int
    claim: Claim


@dataclass(frozen=True)
class InclusionProof:
    """A proof that a claim is in the tree of a ledger.

    Attributes:
        place: the place of the claim's leaf, from 0.
        size: the number of leaves of the tree.
        root: the root of the tree, in hexadecimal.
        path: digests from leaf to root, lowest first, in hexadecimal.
    """

    place: int
    size: int
    root: str
    path: tuple[str, ...]


class Ledger:
    """An append-only list of claims in a database; a context manager.

    Args:
        url: the ledger's URL, as for `create`.
        called: its name in messages; None for the URL without a password.

    Attributes:
        name: its name in messages.
        identity: 32 random bytes that were drawn when the ledger was created, in hexadecimal.
        operator: the public key that signs its tree heads, in hexadecimal.

    Raises:
        LedgerError: there is no ledger at this URL, or one of another type.
    """

    def __init__(self, url: str, *, called: str | None = None) -> None:
        self.database = _open_database(url, called)
        self._tables = _load_database_module()
        self.name = self.database.name
        self.rows = LedgerRows(self._tables, self.name)
        try:
            if not self.database.has_ledger():
                raise LedgerError(
                    f"there is no ledger at {self.name}: make one with `countermark ledger init`"
                )
            with self.database.begin_reading() as connection:
                rows = connection.execute(self._tables.about.select()).all()
        # Nobody else can close the connections of a ledger whose constructor failed.
        except BaseException:
            self.close()
            raise
        stated = {str(row.name): str(row.value) for row in rows}
        if stated.get("type") != TYPE:
            self.close()
            raise LedgerError(f"{self.name} is no ledger of type {TYPE}: expected one")
        self.identity, self.operator = stated.get("identity", ""), stated.get("operator", "")

    @classmethod
    def create(cls, url: str, operator: str) -> Ledger:
        """Create a new, empty ledger and open it.

        Args:
            url: a file, `sqlite:///FILE`, or `postgresql://…` of an empty database.
            operator: the public key that will sign its tree heads, as `signing.compute_key_id` names it.

        Raises:
            LedgerError: a ledger or another file is already there.
        """
        made = _open_database(url)
        try:
            _require_free(made)
            if made.is_sqlite:
                require_writable_place(made.url.database or "")
                # A new file gets its name only when its tables are complete, so that a killed
                # process leaves no half-made ledger.
                with files.create_file(Path(made.url.database or "")) as temporary:
                    place = _open_database(str(temporary))
                    place.enable_write_ahead_log()
                    _make(place, operator)
            else:
                _make(made, operator)
        except FileExistsError:  # another process created it in the meantime
            raise _make_exists_error(made) from None
        finally:
            made.close()
        return cls(url)

    def add(self, document: Claim | TreeHead) -> int:
        """Add a claim, or store a tree head of this ledger with its timestamps.

        The document is on disk when this returns.

        Returns:
            The claim's place, from 0, also if it was there before; for a tree head, its size.

        Raises:
            ClaimError: the document is unsigned or was changed since, or a timestamp is over
                something else.
            LedgerError: a tree head of another ledger.
        """
        document.check_signatures()
        # A ledger takes nothing back, so a timestamp over something else is refused here.
        for stamp in document.timestamp_responses:
            timestamp.read_response(stamp, document)
        if isinstance(document, TreeHead):
            return self._store_head(document)
        with self.database.begin_writing() as connection:
            # A claim that is already there keeps its place: the unique index allows no second copy.
            known = self.rows.find_place(connection, document.digest)
            if known is None:
                return self._append_claim(connection, document)
        # Outside the transaction: `find` opens its own.
        (entry, *_) = self.find(digest=document.digest)
        if set(document.timestamp_responses) - set(entry.claim.timestamp_responses):
            warnings.warn(
                "the ledger has this claim without some of its stamps, and cannot take them, since "
                "its tree is over the claim as it was added: keep the file",
                stacklevel=2,
            )
        return known

    def find(self, **wanted: str) -> list[LedgerEntry]:
        """Find the claims whose columns have the given values; at most the first thousand.

        Args:
            wanted: one or more of `digest`, `commitment` and `model`, in hexadecimal.

        Raises:
            ConfigError: no column or an unknown column is given.
        """
        columns = {"digest", "commitment", "model"}
        if not wanted or wanted.keys() - columns:
            raise ConfigError(f"claims are found by {', '.join(sorted(columns))}: give one of them")
        with self.database.begin_reading() as connection:
            table = self._tables.claims
            where = [table.c[name] == value.lower() for name, value in wanted.items()]
            # Checked before the rows are read: a hostile file could hold gigabytes in one column.
            self.rows.require_small(connection, *where)
            query = table.select().where(*where).order_by("place").limit(_MOST_FOUND)
            rows = connection.execute(query).all()
        placed = [(self.rows.parse_place(row), row.content) for row in rows]
        return [
            LedgerEntry(place, _parse_claim(content, self.name, place)) for place, content in placed
        ]

    def prove(self, place: int, size: int | None = None) -> InclusionProof:
        """Prove that the claim at a place is in the tree of the first `size` claims.

        Args:
            place: the claim's place, from 0.
            size: how many claims the tree covers; None for all claims.

        Raises:
            ConfigError: there is no such place.
        """
        with self.database.begin_reading() as connection:
            whole = self.rows.read_size(connection)
            among = whole if size is None else size
            if not 0 <= place < among <= whole:
                raise ConfigError(
                    f"there is no claim {place} among {among}: the ledger has {whole}"
                )
            path, root = self.rows.compute_with_nodes(
                connection,
                lambda nodes: (
                    make_inclusion_path(place, among, nodes),
                    compute_root_at(among, nodes),
                ),
            )
        return InclusionProof(place, among, root.hex(), tuple(each.hex() for each in path))

    def make_head(self) -> TreeHead:
        """Make the current tree head, for the operator to sign."""
        with self.database.begin_reading() as connection:
            size = self.rows.read_size(connection)
            root = self._compute_root(connection, size)
        return TreeHead.make_unsigned(self.identity, size, root.hex())

    def prove_growth(self, old: TreeHead, size: int) -> list[str]:
        """Prove that the tree of `size` claims only adds claims to the tree of an older head.

        Returns:
            The digests of the consistency proof, in hexadecimal.

        Raises:
            LedgerError: the head is of another ledger, or covers more claims than the tree.
        """
        self._require_own_head(old)
        with self.database.begin_reading() as connection:
            whole = self.rows.read_size(connection)
            if not old.size <= size <= whole:
                raise LedgerError(
                    f"the tree head is over {old.size} claims, {size} were asked for, and the "
                    f"ledger has {whole}: expected an older head"
                )
            path = self.rows.compute_with_nodes(
                connection, lambda nodes: make_consistency_path(old.size, size, nodes)
            )
        return [each.hex() for each in path]

    def load_heads(self) -> list[TreeHead]:
        """Load the stored tree heads, smallest first.

        Raises:
            LedgerError: a head cannot be read.
        """
        table = self._tables.heads
        with self.database.begin_reading() as connection:
            query = table.select().order_by("size", "digest")
            rows = connection.execute(query).all()
        try:
            return [TreeHead.from_bytes(row.content) for row in rows]
        except ClaimError as error:
            raise LedgerError(f"{self.name}: a tree head was changed: {error}") from None

    def close(self) -> None:
        """Close the database."""
        self.database.close()

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _append_claim(self, connection: sa.Connection, claim: Claim) -> int:
        """Insert a claim at the next place, with the tree nodes that it completes."""
        place, content = self.rows.read_size(connection), claim.to_bytes()
        row = {
            "place": place, "digest": claim.digest, "commitment": claim.commitment,
            "model": claim.model_root, "content": content,
        }  # fmt: skip
        # The claim and its nodes are written in one transaction, so that they cannot disagree.
        made = self.rows.compute_with_nodes(
            connection, lambda nodes: compute_new_nodes(content, place, nodes)
        )
        connection.execute(self._tables.claims.insert(), row)
        connection.execute(
            self._tables.nodes.insert(),
            [{"level": n, "place": at, "hash": digest} for (n, at), digest in made.items()],
        )
        return place

    def _store_head(self, head: TreeHead) -> int:
        """Store a tree head, merging its timestamps into the stored copy; return its size."""
        self._require_own_head(head)
        if self.operator not in head.signers:
            raise LedgerError(
                f"the tree head is not signed by {self.operator}, the key of this ledger"
            )
        table = self._tables.heads
        with self.database.begin_writing() as connection:
            # The operator's signature is not enough: the key could have signed a head of a copy.
            if head.size > self.rows.read_size(connection) or (
                self._compute_root(connection, head.size).hex() != head.root
            ):
                raise LedgerError(
                    f"this ledger never had {head.size} claims under the root {head.root}: the "
                    "tree head is of a copy, or the ledger was changed"
                )
            # The same head may come again with other timestamps: keep all of them.
            where = table.c.digest == head.digest
            for kept in connection.execute(table.select().where(where)):
                try:
                    before = TreeHead.from_bytes(kept.content)
                except ClaimError:
                    continue  # a damaged row has no timestamps to merge
                head = before.with_timestamps_of(head)  # raises if they are too many
            row = {"size": head.size, "content": head.to_bytes()}
            connection.execute(table.delete().where(where))
            connection.execute(table.insert(), row | {"digest": head.digest})
        return head.size

    def _compute_root(self, connection: sa.Connection, size: int) -> bytes:
        """Compute the root (32 bytes) over the first `size` claims from the stored nodes."""
        return self.rows.compute_with_nodes(connection, lambda nodes: compute_root_at(size, nodes))

    def _require_own_head(self, head: TreeHead) -> None:
        """Raise `LedgerError` unless a tree head names this ledger."""
        if head.statement.predicate.ledger != self.identity:
            raise LedgerError(
                f"the tree head is of the ledger {head.statement.predicate.ledger}, this is "
                f"{self.identity}: expected one of the same"
            )


def _parse_claim(content: bytes, name: str, place: int) -> Claim:
    """Parse a claim from a row; raise `LedgerError` if the row is damaged."""
    try:
        return Claim.from_bytes(content)
    except ClaimError as error:
        raise LedgerError(f"{name}: claim {place} was changed: {error}") from None


def _make(place: database.Database, operator: str) -> None:
    """Create the tables of a new ledger and write its type, identity and operator."""
    # The random identity ties tree heads to this ledger, so that two ledgers of one operator cannot
    # be mixed up.
    stated = {"type": TYPE, "identity": os.urandom(32).hex(), "operator": operator}
    rows = [{"name": name, "value": value} for name, value in stated.items()]
    try:
        with place.begin_writing() as connection:
            place.migrate(connection)
            connection.execute(_load_database_module().about.insert(), rows)
    finally:
        place.close()


def _require_free(made: database.Database) -> None:
    """Raise `LedgerError` if a file or a ledger is already at this URL."""
    if made.is_sqlite and os.path.lexists(made.url.database or ""):
        raise _make_exists_error(made)
    if made.has_ledger():
        raise LedgerError(f"there is a ledger at {made.name} already: expected an empty database")


def _make_exists_error(made: database.Database) -> LedgerError:
    """Make the error for a file that is in the way of a new ledger."""
    return LedgerError(f"{made.name} exists, and a ledger is never made over anything")


def _open_database(url: str, called: str | None = None) -> database.Database:
    """Open a database by its URL."""
    made: database.Database = _load_database_module().Database(url, called)
    return made


def _load_database_module() -> Any:
    """Import the module `database`, or raise `MissingExtraError` without sqlalchemy."""
    try:
        from countermark.claims import database
    except ImportError:
        raise MissingExtraError("a ledger", "evidence") from None
    return database
