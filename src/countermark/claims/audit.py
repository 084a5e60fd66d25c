"""A ledger checked row by row: every claim, the tree over them, its heads, and one from outside.

Whoever can write to a ledger's database can rewrite all of it so that it fits itself again. Only
what lies elsewhere shows that: a tree head that was exported, signed and time-stamped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from countermark.claims.decision import EXIT_CODES, Outcome
from countermark.claims.ledger import Ledger
from countermark.claims.policy import earliest
from countermark.claims.signed import Claim, TreeHead
from countermark.claims.timestamp import Authority, Confirmed
from countermark.claims.tree import Growing
from countermark.errors import ClaimError, LedgerError
from countermark.progress import progress

_MOST_FAULTS = 20  # that are told one by one

NO_CHECKPOINT = (
    "nothing from outside was compared: that somebody rewrote the whole ledger and hashed it anew, "
    "or took its last claims away, cannot be excluded; give --checkpoint FILE"
)
AFTER = "of the {more} claims after the checkpoint only their order and form were checked"
UNSTAMPED = (
    "no authority that you pinned stamped the checkpoint: how old it is, is the word of whoever "
    "kept it; give --authority PEM"
)


@dataclass(frozen=True)
class Audit:
    """What a ledger holds, and what is wrong with it.

    Attributes:
        size, root: of the tree over all its claims, hashed anew.
        faults: what does not agree, at most 20 and how many more.
        places: each claim's place by its digest.
        commitments: each commitment by the keys that signed claims of it.
        heads: the heads in the ledger whose roots and signatures hold, smallest first.
        checkpoint: the head from outside; None where there was none.
        stamps: those of it that pinned authorities signed.
    """

    size: int
    root: str
    faults: tuple[str, ...]
    places: dict[str, int] = field(repr=False)
    commitments: dict[str, set[str]] = field(repr=False)
    heads: tuple[TreeHead, ...] = field(repr=False)
    checkpoint: TreeHead | None
    stamps: tuple[Confirmed, ...]

    @property
    def outcome(self) -> Outcome:
        """Refused when something was changed; accepted only against a checkpoint."""
        if self.faults:
            return "refused"
        return "undecided" if self.checkpoint is None else "accepted"

    @property
    def exit_code(self) -> int:
        """0 unchanged, 1 changed, 3 agrees with itself and with nothing else."""
        return EXIT_CODES[self.outcome]

    @property
    def limits(self) -> tuple[str, ...]:
        """What it cannot exclude."""
        if self.checkpoint is None:
            return (NO_CHECKPOINT,)
        more = self.size - self.checkpoint.size
        limits = (AFTER.format(more=more),) if more > 0 else ()
        return limits if self.stamps else (*limits, UNSTAMPED)

    def count(self, signers: Sequence[str] = ()) -> int:
        """How many commitments these signers claimed together; of nobody named, all."""
        if not signers:
            return len(self.commitments)
        return sum(bool(each & set(signers)) for each in self.commitments.values())

    def to_json(self) -> dict[str, Any]:
        """What people and programs are told."""
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
            "limits": list(self.limits),
        }


def audit(
    ledger: Ledger, checkpoint: TreeHead | None = None, authorities: Sequence[Authority] = ()
) -> Audit:
    """Read all of a ledger and check it.

    Args:
        ledger: the ledger.
        checkpoint: a tree head that was kept elsewhere.
        authorities: whose stamps on the checkpoint are believed.

    Raises:
        LedgerError: it cannot be read at all.
    """
    reading = _Reading(ledger, checkpoint)
    with ledger.database.reading() as connection, progress("claims", None) as advance:
        for row in ledger.rows.claims(connection):
            reading.take(row)
            advance(1)
        reading.compare_nodes(connection)
    heads = reading.sound_heads()
    stamps = reading.compare_checkpoint(authorities)
    return Audit(
        size=reading.tree.size,
        root=reading.tree.root.hex(),
        faults=reading.told(),
        places=reading.places,
        commitments=reading.commitments,
        heads=heads,
        checkpoint=checkpoint,
        stamps=stamps,
    )


class _Reading:
    """One pass over a ledger."""

    def __init__(self, ledger: Ledger, checkpoint: TreeHead | None) -> None:
        self.ledger, self.checkpoint = ledger, checkpoint
        self.tree = Growing()
        self.faults: list[str] = []
        self.places: dict[str, int] = {}
        self.commitments: dict[str, set[str]] = {}
        self.levels: dict[int, dict[int, bytes]] = {}
        self.kept = self._kept()
        wanted = {each.size for each in self.kept} | ({checkpoint.size} if checkpoint else set())
        self.wanted, self.roots = wanted, {0: self.tree.root}

    def _kept(self) -> list[TreeHead]:
        try:
            return self.ledger.heads()
        except LedgerError as error:
            self.faults.append(str(error))
            return []

    def take(self, row: Any) -> None:
        """One row of the table of claims."""
        if row.place != self.tree.size:
            self.faults.append(f"claim {self.tree.size} is missing: claim {row.place} comes next")
        content: bytes = row.content
        for (level, place), digest in self.tree.add(content).items():
            self.levels.setdefault(level, {})[place] = digest
        if self.tree.size in self.wanted:
            self.roots[self.tree.size] = self.tree.root
        try:
            claim = Claim.from_bytes(content, f"claim {row.place}")
            claim.check()
        except ClaimError as error:
            self.faults.append(f"claim {row.place} was changed: {error}")
            return
        columns = (row.digest, row.commitment, row.model)
        if columns != (claim.digest, claim.commitment, claim.model_root):
            self.faults.append(f"the columns of claim {row.place} are not those of the claim in it")
        if claim.digest in self.places:
            self.faults.append(f"claim {row.place} is there twice")
        self.places.setdefault(claim.digest, row.place)
        self.commitments.setdefault(claim.commitment, set()).update(claim.signers)

    def compare_nodes(self, connection: Any) -> None:
        """The stored tree against the one over the rows."""
        for level in range(max(self.levels, default=-1) + 2):
            stored, made = self.ledger.rows.nodes_of(connection, level), self.levels.get(level, {})
            wrong = [each for each in made.keys() | stored.keys()
                     if stored.get(each) != made.get(each)]  # fmt: skip
            if wrong:
                self.faults.append(
                    f"{len(wrong)} nodes of level {level} of the stored tree do not follow from "
                    f"the claims, the first over claim {min(wrong) << level}"
                )

        claims, nodes = self.ledger.rows.counts(connection)
        more = claims - self.tree.size, nodes - sum(map(len, self.levels.values()))
        if any(more):
            self.faults.append(
                f"{more[0]} claims and {more[1]} nodes more than the ledger's order has places for"
            )

    def sound_heads(self) -> tuple[TreeHead, ...]:
        """The kept heads that hold; the others are faults."""
        sound = []
        for head in self.kept:
            if why := self._broken(head):
                self.faults.append(f"the kept tree head over {head.size} claims {why}")
            else:
                sound.append(head)
        return tuple(sound)

    def compare_checkpoint(self, authorities: Sequence[Authority]) -> tuple[Confirmed, ...]:
        """The head from outside, and the stamps on it that are believed."""
        if self.checkpoint is None:
            return ()
        if why := self._broken(self.checkpoint):
            self.faults.append(f"the checkpoint over {self.checkpoint.size} claims {why}")
        try:
            return tuple(earliest([self.checkpoint], authorities))
        except ClaimError as error:
            self.faults.append(f"the checkpoint: {error}")
            return ()

    def _broken(self, head: TreeHead) -> str | None:
        """Why a head is not one of this ledger."""
        try:
            head.check()
        except ClaimError as error:
            return f"is not signed: {error}"
        if head.statement.predicate.ledger != self.ledger.identity:
            return f"is of another ledger, {head.statement.predicate.ledger}"
        if self.ledger.operator not in head.signers:
            return f"is not signed by the ledger's key {self.ledger.operator}"
        if head.size > self.tree.size:
            return f"is of more claims than the {self.tree.size} that are left: some were removed"
        if self.roots.get(head.size, b"").hex() != head.root:
            return "has another root: a claim before it was edited, removed or put in"
        return None

    def told(self) -> tuple[str, ...]:
        """The faults, not too many of them."""
        shown = self.faults[:_MOST_FAULTS]
        more = len(self.faults) - len(shown)
        return tuple([*shown, f"and {more} more"] if more else shown)
