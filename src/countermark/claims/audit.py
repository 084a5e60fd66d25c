"""Check a ledger row by row: every claim, the tree over them, its heads, and an outside checkpoint.

Whoever can write to a ledger's database can rewrite all of it so that it is consistent again. Only
a document kept elsewhere reveals the change: a tree head that was exported, signed and timestamped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from countermark._internal.progress import show_progress
from countermark.claims.decision import EXIT_CODES, Outcome
from countermark.claims.ledger import Ledger
from countermark.claims.policy import find_earliest_timestamps
from countermark.claims.signed import Claim, TreeHead
from countermark.claims.timestamp import Authority, ConfirmedTimestamp
from countermark.claims.tree import GrowingTree
from countermark.errors import ClaimError, LedgerError

_MOST_FAULTS = 20  # listed one by one, so that a hostile ledger cannot flood the output

NO_CHECKPOINT = (
    "nothing from outside was compared: that somebody rewrote the whole ledger and hashed it anew, "
    "or took its last claims away, cannot be excluded; give --since FILE"
)
AFTER = "of the {more} claims after the checkpoint only their order and form were checked"
UNSTAMPED = (
    "no authority that you pinned stamped the checkpoint: how old it is, is the word of whoever "
    "kept it; give --authority PEM"
)


@dataclass(frozen=True)
class Audit:
    """The content of a ledger and its faults.

    Attributes:
        size, root: size and root (hexadecimal) of the tree over all claims, hashed again.
        faults: the inconsistencies that were found: at most 20 messages, and the number of others.
        places: place of each claim, by the claim's digest.
        commitments: for each commitment, the public keys that signed claims about it.
        heads: the stored tree heads whose roots and signatures hold, smallest first.
        checkpoint: the tree head from outside; None if none was given.
        stamps: the timestamps on the checkpoint that pinned authorities signed.
    """

    size: int
    root: str
    faults: tuple[str, ...]
    places: dict[str, int] = field(repr=False)
    commitments: dict[str, set[str]] = field(repr=False)
    heads: tuple[TreeHead, ...] = field(repr=False)
    checkpoint: TreeHead | None
    stamps: tuple[ConfirmedTimestamp, ...]

    @property
    def outcome(self) -> Outcome:
        """Outcome: "refused" for a ledger with faults; "accepted" only against a checkpoint."""
        if self.faults:
            return "refused"
        # Without a checkpoint an audit is never accepted: a ledger that was rewritten as a whole is
        # consistent, too.
        return "undecided" if self.checkpoint is None else "accepted"

    @property
    def exit_code(self) -> int:
        """Exit code: 0 unchanged, 1 changed, 3 consistent but not compared with a checkpoint."""
        return EXIT_CODES[self.outcome]

    @property
    def caveats(self) -> tuple[str, ...]:
        """The caveats: changes that this audit cannot exclude."""
        if self.checkpoint is None:
            return (NO_CHECKPOINT,)
        more = self.size - self.checkpoint.size
        limits = (AFTER.format(more=more),) if more > 0 else ()
        return limits if self.stamps else (*limits, UNSTAMPED)

    def count_commitments(self, signers: Sequence[str] = ()) -> int:
        """Count the commitments that these signers claimed together; without signers, count all.

        Args:
            signers: public keys in hexadecimal.
        """
        if not signers:
            return len(self.commitments)
        return sum(bool(each & set(signers)) for each in self.commitments.values())

    def to_json(self) -> dict[str, Any]:
        """Return the audit as JSON values, without the claims themselves."""
        checkpoint = self.checkpoint
        return {
            "outcome": self.outcome,
            "claims": self.size,
            "commitments": len(self.commitments),
            "root": self.root,
            "heads": [{"size": each.size, "digest": each.digest} for each in self.heads],
            "checkpoint": checkpoint and {"size": checkpoint.size, "digest": checkpoint.digest},
            "stamps": [each.to_json() for each in self.stamps],
            "faults": list(self.faults),
            "limits": list(self.caveats),
        }


def audit_ledger(
    ledger: Ledger, checkpoint: TreeHead | None = None, authorities: Sequence[Authority] = ()
) -> Audit:
    """Read a whole ledger and check it.

    Args:
        ledger: the ledger.
        checkpoint: a tree head that was kept outside the ledger.
        authorities: the authorities whose timestamps on the checkpoint count.

    Raises:
        LedgerError: the ledger cannot be read at all.
    """
    reading = _LedgerPass(ledger, checkpoint)
    # One transaction for claims and nodes: a claim that is added meanwhile must not look like a
    # fault. The heads were read before, so that none of them can be larger than the tree.
    with ledger.database.begin_reading() as connection, show_progress("claims", None) as advance:
        for row in ledger.rows.iterate_claims(connection):
            reading.check_claim_row(row)
            advance(1)
        reading.compare_nodes(connection)
    heads = reading.select_sound_heads()
    stamps = reading.compare_checkpoint(authorities)
    return Audit(
        size=reading.tree.size,
        root=reading.tree.current_root.hex(),
        faults=reading.list_faults(),
        places=reading.places,
        commitments=reading.commitments,
        heads=heads,
        checkpoint=checkpoint,
        stamps=stamps,
    )


class _LedgerPass:
    """One pass over a ledger, which collects the faults that it finds."""

    def __init__(self, ledger: Ledger, checkpoint: TreeHead | None) -> None:
        self.ledger, self.checkpoint = ledger, checkpoint
        self.tree = GrowingTree()
        self.faults: list[str] = []
        self.places: dict[str, int] = {}
        self.commitments: dict[str, set[str]] = {}
        self.levels: dict[int, dict[int, bytes]] = {}
        self.kept = self._load_heads()
        # Roots are kept only for the sizes that some head names. The empty tree has a root, too.
        wanted = {each.size for each in self.kept} | ({checkpoint.size} if checkpoint else set())
        self.wanted, self.roots = wanted, {0: self.tree.current_root}

    def _load_heads(self) -> list[TreeHead]:
        """Load the stored tree heads; record a fault if they cannot be read."""
        try:
            return self.ledger.load_heads()
        except LedgerError as error:
            self.faults.append(str(error))
            return []

    def check_claim_row(self, row: Any) -> None:
        """Check one row of the table of claims and add it to the tree.

        Args:
            row: the columns place, digest, commitment, model and content.
        """
        if row.place != self.tree.size:
            self.faults.append(f"claim {self.tree.size} is missing: claim {row.place} comes next")
        content: bytes = row.content
        # The tree is over the bytes of a row, whether or not they are a claim: a damaged row is one
        # fault and does not move the leaves behind it.
        for (level, place), digest in self.tree.add_leaf(content).items():
            self.levels.setdefault(level, {})[place] = digest
        if self.tree.size in self.wanted:
            self.roots[self.tree.size] = self.tree.current_root
        try:
            claim = Claim.from_bytes(content, f"claim {row.place}")
            claim.check_signatures()
        except ClaimError as error:
            self.faults.append(f"claim {row.place} was changed: {error}")
            return
        # The columns only serve `Ledger.find`. Wrong columns would hide a claim from a search.
        columns = (row.digest, row.commitment, row.model)
        if columns != (claim.digest, claim.commitment, claim.model_root):
            self.faults.append(f"the columns of claim {row.place} are not those of the claim in it")
        if claim.digest in self.places:
            self.faults.append(f"claim {row.place} is there twice")
        self.places.setdefault(claim.digest, row.place)
        self.commitments.setdefault(claim.commitment, set()).update(claim.signers)

    def compare_nodes(self, connection: Any) -> None:
        """Compare the stored tree nodes with the nodes that follow from the claims."""
        # One level above the top, where no stored node may be.
        for level in range(max(self.levels, default=-1) + 2):
            stored, made = (
                self.ledger.rows.read_level(connection, level),
                self.levels.get(level, {}),
            )
            wrong = [each for each in made.keys() | stored.keys()
                     if stored.get(each) != made.get(each)]  # fmt: skip
            if wrong:
                self.faults.append(
                    f"{len(wrong)} nodes of level {level} of the stored tree do not follow from "
                    f"the claims, the first over claim {min(wrong) << level}"
                )

        # Rows with a negative or non-integer place are outside the order in which claims are read.
        # Only the row counts reveal them.
        claims, nodes = self.ledger.rows.count_claims_and_nodes(connection)
        more = claims - self.tree.size, nodes - sum(map(len, self.levels.values()))
        if any(more):
            self.faults.append(
                f"{more[0]} claims and {more[1]} nodes more than the ledger's order has places for"
            )

    def select_sound_heads(self) -> tuple[TreeHead, ...]:
        """Return the stored tree heads that hold; record a fault for each other head."""
        sound = []
        for head in self.kept:
            if why := self._find_head_fault(head):
                self.faults.append(f"the kept tree head over {head.size} claims {why}")
            else:
                sound.append(head)
        return tuple(sound)

    def compare_checkpoint(
        self, authorities: Sequence[Authority]
    ) -> tuple[ConfirmedTimestamp, ...]:
        """Compare the checkpoint with the tree.

        Args:
            authorities: the authorities whose timestamps count.

        Returns:
            The timestamps on the checkpoint that these authorities signed, earliest first.
        """
        if self.checkpoint is None:
            return ()
        if why := self._find_head_fault(self.checkpoint):
            self.faults.append(f"the checkpoint over {self.checkpoint.size} claims {why}")
        try:
            return tuple(find_earliest_timestamps([self.checkpoint], authorities))
        except ClaimError as error:
            self.faults.append(f"the checkpoint: {error}")
            return ()

    def _find_head_fault(self, head: TreeHead) -> str | None:
        """Return why a tree head does not belong to this ledger; None if it does."""
        try:
            head.check_signatures()
        except ClaimError as error:
            return f"is not signed: {error}"
        if head.statement.predicate.ledger != self.ledger.identity:
            return f"is of another ledger, {head.statement.predicate.ledger}"
        if self.ledger.operator not in head.signers:
            return f"is not signed by the ledger's key {self.ledger.operator}"
        if head.size > self.tree.size:
            return f"is of more claims than the {self.tree.size} that are left: some were removed"
        # A size of which no root was kept gives b"", which no root equals.
        if self.roots.get(head.size, b"").hex() != head.root:
            return "has another root: a claim before it was edited, removed or put in"
        return None

    def list_faults(self) -> tuple[str, ...]:
        """Return the first faults, and the number of the others as a last message."""
        shown = self.faults[:_MOST_FAULTS]
        more = len(self.faults) - len(shown)
        return tuple([*shown, f"and {more} more"] if more else shown)
