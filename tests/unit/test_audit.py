"""What was done to a ledger's database is found, and what could have been is said."""

from __future__ import annotations

import random
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from keys import mutated, one_line

from authority import LocalAuthority, some_claim
from countermark.claims.audit import NO_CHECKPOINT, Audit, audit_ledger
from countermark.claims.ledger import Ledger
from countermark.claims.signed import Claim, TreeHead
from countermark.claims.signing import compute_key_id
from countermark.claims.tree import GrowingTree
from countermark.errors import CountermarkError, make_printable

OWNER, OTHER, OPERATOR = (Ed25519PrivateKey.generate() for _ in range(3))
COUNT = 6


class Kept:
    """A ledger of six claims, and the head that was exported then."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with Ledger.create(str(path), compute_key_id(OPERATOR.public_key())) as ledger:
            self.claims = [some_claim(OWNER) for _ in range(COUNT)]
            for each in self.claims:
                ledger.add(each)
            self.head = ledger.make_head().with_signature(OPERATOR)
            ledger.add(self.head)

    def sql(self, text: str, *values: object) -> None:
        connection = sqlite3.connect(self.path)
        with connection:
            connection.execute(text, values)
        connection.close()

    def audit(self, checkpoint: TreeHead | None = None) -> Audit:
        with Ledger(str(self.path)) as ledger:
            return audit_ledger(ledger, checkpoint)

    def put(self, place: int, claim: Claim) -> None:
        """Another claim in a row, its columns included."""
        columns = (claim.digest, claim.commitment, claim.model_root, claim.to_bytes(), place)
        self.sql(
            "UPDATE claims SET digest = ?, commitment = ?, model = ?, content = ? WHERE place = ?",
            *columns,
        )

    def rehash(self) -> None:
        """The whole tree anew over what the rows are now, as somebody who covers his traces."""
        connection = sqlite3.connect(self.path)
        with connection:
            rows = connection.execute("SELECT content FROM claims ORDER BY place").fetchall()
            connection.execute("DELETE FROM nodes")
            tree = GrowingTree()
            for (content,) in rows:
                for (level, place), digest in tree.add_leaf(content).items():
                    connection.execute("INSERT INTO nodes VALUES (?, ?, ?)", (level, place, digest))
        connection.close()


@pytest.fixture
def kept(tmp_path: Path) -> Kept:
    return Kept(tmp_path / "l.db")


def test_an_untouched_ledger_is_accepted_against_its_checkpoint(
    kept: Kept, authority: LocalAuthority
) -> None:
    found = kept.audit()
    assert (found.outcome, found.exit_code, found.faults) == ("undecided", 3, ())
    assert found.caveats == (NO_CHECKPOINT,)
    found = kept.audit(kept.head)
    assert (found.outcome, found.exit_code, found.size, found.root) == (
        "accepted", 0, COUNT, kept.head.root
    )  # fmt: skip
    (limit,) = found.caveats
    assert "how old it is, is the word of whoever kept it" in limit
    with Ledger(str(kept.path)) as ledger:
        stamped = audit_ledger(ledger, authority.stamp(kept.head), [authority.pinned])
        assert (stamped.outcome, stamped.caveats, len(stamped.stamps)) == ("accepted", (), 1)
        ledger.add(some_claim(OWNER))
        (limit,) = audit_ledger(ledger, authority.stamp(kept.head), [authority.pinned]).caveats
        assert "of the 1 claims after the checkpoint" in limit


def test_commitments_are_counted_by_signer_and_once(kept: Kept) -> None:
    with Ledger(str(kept.path)) as ledger:
        again = some_claim(OWNER, commitment=kept.claims[0].commitment)
        for claim in (again, some_claim(OTHER), some_claim(OTHER, OWNER)):
            ledger.add(claim)
        found = audit_ledger(ledger)
    owner, other = (compute_key_id(each.public_key()) for each in (OWNER, OTHER))
    assert found.count_commitments() == COUNT + 2
    assert (found.count_commitments([owner]), found.count_commitments([other])) == (COUNT + 1, 2)
    assert found.count_commitments([owner, other]) == COUNT + 2
    assert found.count_commitments(["00" * 32]) == 0


Harm = Callable[[Kept], None]


def edited(kept: Kept) -> None:
    content = kept.claims[2].to_bytes().replace(b'"timestamps":[]', b'"timestamps":[""]')
    kept.sql("UPDATE claims SET content = ? WHERE place = 2", content)


def exchanged(kept: Kept) -> None:
    kept.put(2, some_claim(OWNER))


def removed_in_the_middle(kept: Kept) -> None:
    kept.sql("DELETE FROM claims WHERE place = 2")


def removed_and_closed_up(kept: Kept) -> None:
    removed_in_the_middle(kept)
    kept.sql("UPDATE claims SET place = place - 1 WHERE place > 2")


def removed_at_the_end(kept: Kept) -> None:
    kept.sql("DELETE FROM claims WHERE place = 5")


def swapped(kept: Kept) -> None:
    kept.put(0, some_claim(OWNER))
    kept.put(1, kept.claims[0])
    kept.put(0, kept.claims[1])


def doubled(kept: Kept) -> None:
    kept.sql("DROP INDEX ix_claims_digest")
    kept.put(2, kept.claims[1])


def emptied(kept: Kept) -> None:
    kept.sql("DELETE FROM claims")


HARM: list[Harm] = [
    edited, exchanged, removed_in_the_middle, removed_and_closed_up, removed_at_the_end, swapped,
    doubled, emptied,
]  # fmt: skip


@pytest.mark.parametrize("harm", HARM)
def test_changed_rows_are_found_by_the_tree_and_the_checkpoint(kept: Kept, harm: Harm) -> None:
    harm(kept)
    assert kept.audit().outcome == "refused"
    found = kept.audit(kept.head)
    assert (found.outcome, found.exit_code) == ("refused", 1)


@pytest.mark.parametrize("harm", HARM)
def test_rehashed_rows_are_found_by_the_checkpoint(kept: Kept, harm: Harm) -> None:
    """With the tree made anew and the kept heads gone, only what lies elsewhere shows it."""
    harm(kept)
    kept.rehash()
    assert "the kept tree head over 6 claims" in " ".join(kept.audit().faults)
    kept.sql("DELETE FROM heads")
    found = kept.audit(kept.head)
    assert found.outcome == "refused"
    assert any(each.startswith("the checkpoint over 6 claims") for each in found.faults)


def test_without_a_checkpoint_a_rewritten_ledger_looks_sound_and_the_limit_says_so(
    kept: Kept,
) -> None:
    exchanged(kept)
    kept.rehash()
    kept.sql("DELETE FROM heads")
    found = kept.audit()
    assert (found.outcome, found.faults) == ("undecided", ())
    assert "rewrote the whole ledger and hashed it anew" in found.caveats[0]


@pytest.mark.parametrize(
    ("sql", "says"),
    [
        ("UPDATE claims SET commitment = digest WHERE place = 1", "columns of claim 1"),
        ("UPDATE claims SET model = digest WHERE place = 1", "columns of claim 1"),
        ("UPDATE nodes SET hash = zeroblob(32) WHERE level = 1 AND place = 1", "over claim 2"),
        ("DELETE FROM nodes WHERE level = 2", "1 nodes of level 2"),
        ("INSERT INTO nodes VALUES (0, 9, zeroblob(32))", "over claim 9"),
        ("UPDATE claims SET content = 'text' WHERE place = 1", "claim 1 was changed"),
        ("UPDATE claims SET content = 1.5 WHERE place = 1", "claim 1 was changed"),
        ("UPDATE claims SET place = 'x' WHERE place = 5", "claim 5 is missing: claim x"),
        ("UPDATE claims SET place = -1 WHERE place = 5", "1 claims and"),
        ("UPDATE claims SET digest = 7 WHERE place = 5", "columns of claim 5"),
        ("UPDATE nodes SET place = 'x' WHERE place = 5", "nodes of level 0"),
        ("UPDATE nodes SET hash = 'x' WHERE place = 5", "over claim 5"),
        ("INSERT INTO nodes VALUES (40, 0, zeroblob(32))", "1 nodes more"),
        ("UPDATE heads SET content = x'00'", "a tree head was changed"),
        ("UPDATE claims SET content = zeroblob(100) WHERE place = 4", "claim 4 was changed"),
    ],
)
def test_what_was_changed_is_named(kept: Kept, sql: str, says: str) -> None:
    kept.sql(sql)
    found = kept.audit()
    assert found.outcome == "refused"
    assert says in " ".join(found.faults)


def test_a_checkpoint_of_another_ledger_or_signer_is_refused(kept: Kept, tmp_path: Path) -> None:
    other = Kept(tmp_path / "other.db").head
    unsigned = TreeHead.make_unsigned(kept.head.statement.predicate.ledger, COUNT, kept.head.root)
    later = TreeHead.make_unsigned(kept.head.statement.predicate.ledger, COUNT + 1, kept.head.root)
    for checkpoint, says in (
        (other, "is of another ledger"),
        (unsigned, "is not signed"),
        (unsigned.with_signature(OWNER), "is not signed by the ledger's key"),
        (later.with_signature(OPERATOR), "some were removed"),
    ):
        found = kept.audit(checkpoint)
        assert found.outcome == "refused"
        assert says in found.faults[0]


def test_damaged_files_and_checkpoints_are_refused_or_without_effect(
    kept: Kept, tmp_path: Path
) -> None:
    drawn, whole = random.Random(11), kept.path.read_bytes()  # noqa: S311
    kept.path = tmp_path / "damaged.db"
    for changes in range(80):
        damaged = bytearray(whole)
        for _ in range(1 + changes % 4):
            at = drawn.randrange(len(damaged))
            damaged[at : at + 4] = drawn.randbytes(len(damaged[at : at + 4]))
        kept.path.write_bytes(damaged)
        try:
            found = kept.audit(kept.head)
        except CountermarkError as error:
            one_line(error)
        else:
            assert found.outcome == "refused" or found.root == kept.head.root
            assert all(each.isprintable() for each in map(make_printable, found.faults))
    kept.path.write_bytes(whole)
    for changes in range(200):
        damaged = mutated(kept.head.to_bytes(), drawn, 1 + changes % 4)
        try:
            checkpoint = TreeHead.from_bytes(bytes(damaged))
        except CountermarkError as error:
            one_line(error)
        else:
            same = checkpoint.envelope == kept.head.envelope
            assert (kept.audit(checkpoint).outcome == "refused") != same
    assert sorted(each.name for each in tmp_path.iterdir()) == ["damaged.db", "l.db"]


def test_many_faults_are_told_in_few_lines(kept: Kept) -> None:
    with Ledger(str(kept.path)) as ledger:
        for _ in range(25):
            ledger.add(some_claim(OWNER))
    kept.sql("UPDATE claims SET commitment = digest")
    faults = kept.audit().faults
    assert len(faults) == 21
    assert faults[-1] == "and 11 more"
