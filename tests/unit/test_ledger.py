"""A ledger takes claims, keeps their order, proves them, and refuses what does not belong in it."""

from __future__ import annotations

import sqlite3
import traceback
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from keys import one_line

from authority import LocalAuthority, some_claim
from countermark._internal import merkle
from countermark.claims import database
from countermark.claims import ledger as ledger_module
from countermark.claims.ledger import Ledger
from countermark.claims.signed import Claim, TreeHead
from countermark.claims.signing import compute_key_id
from countermark.claims.tree import is_consistent
from countermark.cli import run
from countermark.errors import ClaimError, ConfigError, CountermarkError, LedgerError
from countermark.verification.dispute import audit_ledger_at
from countermark.web.settings import ServerSettings
from countermark.web.site import AppState

OWNER, OPERATOR = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
NAME = compute_key_id(OPERATOR.public_key())


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with Ledger.create(str(tmp_path / "l.db"), NAME) as made:
        yield made


def filled(ledger: Ledger, count: int) -> list[Claim]:
    claims = [some_claim(OWNER) for _ in range(count)]
    assert [ledger.add(each) for each in claims] == list(range(count))
    return claims


def test_claims_keep_their_order_and_are_found(ledger: Ledger) -> None:
    claims = filled(ledger, 5)
    third = claims[3]
    for wanted in ({"digest": third.digest}, {"commitment": third.commitment.upper()}):
        (entry,) = ledger.find(**wanted)
        assert (entry.place, entry.claim) == (3, third)
    assert [each.place for each in ledger.find(model="cd" * 32)] == [0, 1, 2, 3, 4]
    assert ledger.find(digest="00" * 32) == []
    for wanted in ({}, {"owner": "x"}):
        with pytest.raises(ConfigError):
            ledger.find(**wanted)


def test_a_claim_added_again_keeps_its_place(ledger: Ledger, authority: LocalAuthority) -> None:
    claims = filled(ledger, 3)
    assert ledger.add(claims[1]) == 1
    with pytest.warns(UserWarning, match="without some of its stamps"):
        assert ledger.add(authority.stamp(claims[1])) == 1
    assert len(ledger.find(model="cd" * 32)) == 3


def test_every_claim_is_proven_at_every_size(ledger: Ledger) -> None:
    leaves = [each.to_bytes() for each in filled(ledger, 9)]
    for size in range(1, 10):
        for place in range(size):
            proof = ledger.prove(place, size)
            path = [bytes.fromhex(each) for each in proof.path]
            assert merkle.compute_path_root(leaves[place], place, size, path).hex() == proof.root
            assert proof.root == merkle.compute_root(leaves[:size]).hex()
    for place, size in ((9, None), (0, 0), (0, 10), (-1, 3), (3, 3)):
        with pytest.raises(ConfigError, match="there is no claim"):
            ledger.prove(place, size)


def test_an_older_head_is_shown_to_be_only_added_to(ledger: Ledger) -> None:
    heads = [ledger.make_head()]
    for _ in range(6):
        ledger.add(some_claim(OWNER))
        heads.append(ledger.make_head())
    for old in heads:
        for new in heads[old.size :]:
            path = [bytes.fromhex(each) for each in ledger.prove_growth(old, new.size)]
            assert is_consistent(
                (old.size, bytes.fromhex(old.root)), (new.size, bytes.fromhex(new.root)), path
            )
    for old, size in (
        (heads[3], 2),
        (heads[3], 7),
        (TreeHead.make_unsigned("00" * 32, 1, "00" * 32), 2),
    ):
        with pytest.raises(LedgerError):
            ledger.prove_growth(old, size)


def test_only_signed_claims_with_stamps_of_their_own_come_in(
    ledger: Ledger, authority: LocalAuthority
) -> None:
    for refused in (some_claim(), some_claim(OWNER).with_timestamp(b"junk")):
        with pytest.raises(ClaimError):
            ledger.add(refused)
    assert ledger.add(authority.stamp(some_claim(OWNER))) == 0


def test_heads_are_kept_when_they_are_of_this_ledger(
    ledger: Ledger, authority: LocalAuthority, other_authority: LocalAuthority, tmp_path: Path
) -> None:
    filled(ledger, 3)
    head = ledger.make_head().with_signature(OPERATOR)
    assert ledger.add(head) == 3
    stamped = authority.stamp(head)
    assert ledger.add(stamped) == 3
    assert ledger.load_heads() == [stamped]
    assert ledger.add(head) == 3  # the copy from before the stamp
    assert ledger.load_heads() == [stamped]
    twice = other_authority.stamp(head)
    assert ledger.add(twice) == 3
    (kept,) = ledger.load_heads()
    assert kept.timestamp_responses == (*stamped.timestamp_responses, *twice.timestamp_responses)
    full = kept
    while len(full.timestamp_responses) < 16:
        full = authority.stamp(full)
    assert ledger.add(full) == 3
    with pytest.raises(ClaimError, match="has 17 stamps"):
        ledger.add(authority.stamp(head))  # which would take the place of one of them
    assert ledger.load_heads() == [full]
    with Ledger.create(str(tmp_path / "other.db"), NAME) as other:
        other.add(some_claim(OWNER))
        foreign = other.make_head().with_signature(OPERATOR)
    for refused, says in (
        (ledger.make_head().with_signature(OWNER), "not signed by"),
        (foreign, "is of the ledger"),
        (
            TreeHead.make_unsigned(ledger.identity, 3, "00" * 32).with_signature(OPERATOR),
            "never had 3 claims",
        ),
        (
            TreeHead.make_unsigned(ledger.identity, 4, head.root).with_signature(OPERATOR),
            "never had 4 claims",
        ),
    ):
        with pytest.raises(LedgerError) as caught:
            ledger.add(refused)
        assert says in one_line(caught.value)


def test_the_tables_are_those_that_the_code_knows(ledger: Ledger) -> None:
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext

    with ledger.database.begin_reading() as connection:
        context = MigrationContext.configure(connection)
        differences = compare_metadata(context, database.metadata)
    assert differences == []


# --- places that are no ledger


def test_a_ledger_is_made_over_nothing(tmp_path: Path) -> None:
    path = tmp_path / "l.db"
    Ledger.create(f"sqlite:///{path}", NAME).close()
    path.with_name("mine").write_text("mine")
    for name in ("l.db", "mine", "."):
        with pytest.raises(LedgerError, match="never made over anything"):
            Ledger.create(str(tmp_path / name), NAME)
    assert path.with_name("mine").read_text() == "mine"
    assert sorted(each.name for each in tmp_path.iterdir()) == ["l.db", "mine"]


def test_what_is_no_ledger_is_one_line_and_untouched(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no database" * 1000)
    sqlite3.connect(tmp_path / "empty.db").execute("CREATE TABLE t (x)").connection.close()
    made = sqlite3.connect(tmp_path / "newer.db")
    made.execute("CREATE TABLE alembic_version (version_num TEXT)")
    made.execute("INSERT INTO alembic_version VALUES ('2')")
    made.commit()
    made.close()
    for url, says in (
        ("absent.db", "there is no ledger at"),
        ("sqlite:///absent.db", "there is no ledger at"),
        ("text", "does not answer"),
        ("empty.db", "there is no ledger at"),
        ("newer.db", "has the form '2'"),
        ("mysql://h/x", "of no known kind"),
        ("sqlite://", "of no known kind"),
        ("sqlite:///:memory:", "of no known kind"),
        ("://", "of no known kind"),
        ("postgresql://nobody:hunter2@127.0.0.1:1/x", "has a password"),
        ("postgresql://nobody@127.0.0.1:1/x", "does not answer"),
    ):
        place = url if ":" in url else str(tmp_path / url)
        with pytest.raises(CountermarkError) as caught:
            Ledger(place)
        assert says in one_line(caught.value)
        assert "hunter2" not in str(caught.value)
    assert not (tmp_path / "absent.db").exists()


def test_a_giant_claim_is_not_read(ledger: Ledger, tmp_path: Path) -> None:
    claim = filled(ledger, 2)[1]
    with sqlite3.connect(tmp_path / "l.db") as connection:
        connection.execute("UPDATE claims SET content = zeroblob(1 << 26) WHERE place = 1")
    connection.close()
    with pytest.raises(LedgerError) as caught:
        ledger.find(digest=claim.digest)
    assert "67,108,864 bytes as one claim" in one_line(caught.value)


@pytest.mark.parametrize("place", ["'x'", "-5", "2.5"])
def test_a_place_that_is_none_is_one_line(ledger: Ledger, tmp_path: Path, place: str) -> None:
    claim = filled(ledger, 1)[0]
    with sqlite3.connect(tmp_path / "l.db") as connection:
        connection.execute(f"UPDATE claims SET place = {place}")  # noqa: S608
    connection.close()
    for act in (
        lambda: ledger.find(digest=claim.digest), ledger.make_head, lambda: ledger.add(claim),
        lambda: ledger.add(some_claim(OWNER)),
    ):  # fmt: skip
        with pytest.raises(LedgerError) as caught:
            act()
        assert "which is no place" in one_line(caught.value)


def test_a_ledger_whose_tree_was_torn_says_so(ledger: Ledger, tmp_path: Path) -> None:
    filled(ledger, 3)
    with sqlite3.connect(tmp_path / "l.db") as connection:
        connection.execute("DELETE FROM nodes WHERE level = 1")
    connection.close()
    with pytest.raises(LedgerError, match="misses node 0 of level 1"):
        ledger.make_head()


def test_a_ledger_that_appears_meanwhile_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two who make a ledger in one place at the same time: the second must not take the first's."""
    place, make = tmp_path / "claims.db", ledger_module._make
    made: list[str] = []

    def made_meanwhile(database: database.Database, operator: str) -> None:
        make(database, operator)
        if not made:
            made.append("")
            with Ledger.create(str(place), operator) as first:
                made[0] = first.identity

    monkeypatch.setattr(ledger_module, "_make", made_meanwhile)
    with pytest.raises(LedgerError, match="never made over anything"):
        Ledger.create(str(place), compute_key_id(OPERATOR.public_key()))
    with Ledger(str(place)) as kept:
        assert kept.identity == made[0]
    assert [each.name for each in tmp_path.iterdir()] == ["claims.db"]


SECRET = "hunter2%/x"
"""A password that is written in another way in each place of a URL."""

QUOTED = quote(SECRET, safe="")
URLS_WITH_A_SECRET = [
    f"postgresql://nobody:{QUOTED}@127.0.0.1:1/x",
    f"postgresql://nobody%3A{QUOTED}@127.0.0.1:1/x",
    f"postgresql://127.0.0.1:1/x?user=nobody&password={QUOTED}",
    f"postgresql://127.0.0.1:1/x?user=nobody&p%61ssword={QUOTED}",
    f"postgresql://127.0.0.1:1/x?user=nobody&p%2561ssword={QUOTED}",
    f"postgresql://127.0.0.1:1/x?PASSWORD={QUOTED}",
    f"postgresql://127.0.0.1:1/x?sslpassword={QUOTED}",
    f"postgresql://127.0.0.1:1/x?oauth_client_secret={QUOTED}",
    f"postgresql://127.0.0.1:1/x?scram_client_key={QUOTED}",
    f"postgresql://127.0.0.1:1/x?sslmode=require?password={QUOTED}",
    f"postgresql://127.0.0.1:1/x;password={QUOTED}",
    f"postgresql://127.0.0.1:1/x#password={QUOTED}",
    f"postgresql://127.0.0.1:1/host=y%20password={QUOTED}",
    f"postgresql://nobody:{QUOTED}@127.0.0.1:port/x",
    f"postgresql://127.0.0.1:port/x?password={QUOTED}",
    f"postgresql:nobody:{QUOTED}@127.0.0.1/x",
    f"postgresql:/127.0.0.1/x?password={QUOTED}",
    f"nobody:{QUOTED}@127.0.0.1/x",
    f"host=127.0.0.1 user=nobody password={SECRET}",
    f"host=127.0.0.1 user=nobody password = '{SECRET}'",
    f"mysql://nobody:{QUOTED}@127.0.0.1/x",
    f"unknown://nobody:{QUOTED}@127.0.0.1/x",
    f"://nobody:{QUOTED}@127.0.0.1/x",
    f"sqlite+pysqlcipher://:{QUOTED}@/x.db",
    f"sqlite:///x.db?password={QUOTED}",
    f"postgresql://127.0.0.1:1/x?plugin={QUOTED}",
    f"postgresql://127.0.0.1:1/x?passfile=/{QUOTED}",
    f"postgresql://127.0.0.1:1/x?connect_timeout={QUOTED}",
    f"postgresql://127.0.0.1:1/x?options={QUOTED}",
    f"postgresql://127.0.0.1:1/x?unheard_of={QUOTED}",
]


@pytest.mark.parametrize("url", URLS_WITH_A_SECRET)
def test_a_secret_in_a_url_is_never_shown(
    url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COUNTERMARK_DEBUG", "1")
    settings = ServerSettings(url, tmp_path / "state", bytes(32))
    said = [repr(settings)]
    operator = compute_key_id(OPERATOR.public_key())
    for act in (
        lambda: Ledger(url),
        lambda: Ledger.create(url, operator),
        lambda: audit_ledger_at(url),
    ):
        with pytest.raises(LedgerError) as caught:
            act()
        said += [one_line(caught.value), repr(caught.value)]
        said += traceback.format_exception(caught.value)
    with AppState(settings) as site, pytest.raises(LedgerError) as caught:
        _ = site.ledger
    said += [one_line(caught.value), *traceback.format_exception(caught.value)]
    for words in (
        ["ledger", "find", "--ledger", url, "--digest", "0" * 64, "--json"],
        ["ledger", "verify", "--ledger", url],
        ["serve", "--ledger", url, "--check"],
    ):
        assert run(words) == 2
    out, err = capsys.readouterr()
    for each in (*said, out, err):
        assert "hunter2" not in each


def test_a_url_is_shown_with_what_no_secret_is_in() -> None:
    url = "postgresql://nobody@h:5/x?host=/tmp/a&passfile=/home/b/.pgpass&sslmode=require"
    made = database.Database(url)
    assert made.name == "postgresql+psycopg://nobody@h:5/x?host=%2Ftmp%2Fa&sslmode=require"
    assert made.url.query["passfile"] == "/home/b/.pgpass"
    assert "/home/b" not in database._redact_message("no file /home/b/.pgpass", made.url)
    made.close()
