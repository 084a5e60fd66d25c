"""Between two owners: every pattern of marks and dates, and what cannot be told."""

from __future__ import annotations

from dataclasses import replace

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from keys import one_line

from authority import LocalAuthority, some_claim
from countermark.claims.audit import Audit
from countermark.claims.dispute import PLACES, SIDES, Party, Place, Resolution, Side, resolve
from countermark.claims.signed import Claim, TreeHead
from countermark.errors import ClaimError
from countermark.verdict import Verdict
from countermark.weights import ModelDigest

A, B = some_claim(Ed25519PrivateKey.generate()), some_claim(Ed25519PrivateKey.generate())
OPERATOR = Ed25519PrivateKey.generate()
FIRM, LEARNT = 200.0, 0.0  # forgery bits


def party(claim: Claim) -> Party:
    return Party(claim, claim.commitment, ModelDigest("cd" * 32, 4))


def readings(
    found: str, bits: tuple[float, float] = (FIRM, FIRM)
) -> dict[tuple[Side, Place], Verdict]:
    """Six letters, first's mark in suspect, first's and second's model, then second's likewise:
    y found, n not, ? no verdict."""
    outcomes = {"y": "owned", "n": "not_proven", "?": "no_verdict"}
    letters = iter(found.replace(" ", ""))
    made: dict[tuple[Side, Place], Verdict] = {}
    for side, strength in zip(SIDES, bits, strict=True):
        for place in PLACES:
            letter = next(letters)
            made[side, place] = Verdict(
                outcomes[letter], "why", "uchida", "00" * 32, "X", 256,  # type: ignore[arg-type]
                forgery_bits=strength if letter == "y" else 0.0, log10_p=-30.0,
            )  # fmt: skip
    return made


def listed(claims: list[Claim], heads: list[TreeHead]) -> Audit:
    """A ledger of these claims in this order, as an audit finds it."""
    return Audit(
        size=len(claims), root="", faults=(), checkpoint=None, stamps=(), heads=tuple(heads),
        places={claim.digest: n for n, claim in enumerate(claims)},
        commitments={claim.commitment: set(claim.signers) for claim in claims},
    )  # fmt: skip


def head(size: int, authority: LocalAuthority) -> TreeHead:
    return authority.stamp(TreeHead.new("ab" * 32, size, "cd" * 32).signed(OPERATOR))


def resolved(
    found: str,
    bits: tuple[float, float] = (FIRM, FIRM),
    order: tuple[Claim, ...] = (),
    authority: LocalAuthority | None = None,
) -> Resolution:
    """With claims of this order in a ledger, which a pinned authority stamped after the first."""
    audited = listed(list(order), [head(1, authority)]) if authority else None
    believed = [authority.pinned] if authority else []
    return resolve((party(A), party(B)), readings(found, bits), believed, audited)


@pytest.mark.parametrize(
    ("found", "outcome", "says"),
    [
        ("yyy yny", "first", "the second's model has both marks and so is a copy"),
        ("yyn yyy", "second", "the first's model has both marks"),
        ("yyy yyy", "undecidable", "both had access to each other's models"),
        ("yyn yny", "undecidable", "it may come from both"),
        ("yyn nny", "first", "only the first's was found"),
        ("nyn yny", "second", "only the second's was found"),
        ("nyy yny", "first", "it is a copy of the first's"),
        ("nyn nny", "neither", "neither mark was found in the suspect"),
        ("ynn nny", "undecidable", "the first's mark is not in the first's own model"),
        ("yy? yny", "undecidable", "a reading says nothing: the first's key in the second: why"),
    ],
)  # fmt: skip
def test_firm_marks_decide_without_dates(found: str, outcome: str, says: str) -> None:
    got = resolved(found)
    assert got.outcome == outcome
    assert says in got.reason
    assert got.exit_code == {"first": 0, "second": 1, "neither": 1, "undecidable": 3}[outcome]


def test_a_stolen_copy_that_was_marked_anew_is_the_owners(authority: LocalAuthority) -> None:
    """Also where the thief's claim is in the ledger first, and the owner's never."""
    assert resolved("yyy yny", order=(B,), authority=authority).outcome == "first"


def test_a_reader_that_was_learnt_on_the_victim_decides_nothing_undated(
    authority: LocalAuthority,
) -> None:
    """The thief trains a reader that finds his bits in everybody's model, the owner's too."""
    forged = "yyy yyy"
    got = resolved(forged, (FIRM, LEARNT))
    assert got.outcome == "first"
    assert "could have been made to fit afterwards" in got.reason
    assert resolved(forged, (FIRM, LEARNT), (A, B), authority).outcome == "first"
    assert resolved("nyn yyy", (FIRM, LEARNT)).outcome == "undecidable"
    assert resolved(forged, (LEARNT, LEARNT)).outcome == "undecidable"


def test_learnt_marks_are_decided_by_whose_claim_was_in_the_ledger_first(
    authority: LocalAuthority,
) -> None:
    copied = "yyy yny"
    got = resolved(copied, (LEARNT, LEARNT))
    assert got.outcome == "undecidable"
    assert "no stamped ledger shows" in got.reason
    assert resolved(copied, (LEARNT, LEARNT), (A, B), authority).outcome == "first"
    assert resolved(copied, (LEARNT, LEARNT), (A,), authority).outcome == "first"
    assert resolved(copied, (LEARNT, LEARNT), (B, A), authority).outcome == "undecidable"
    assert resolved("yyn nny", (LEARNT, LEARNT)).outcome == "undecidable"
    assert resolved("yyn nny", (LEARNT, LEARNT), (A, B), authority).outcome == "first"


def test_a_stamp_alone_and_stamps_of_nobody_believed_count_nothing(
    authority: LocalAuthority, other_authority: LocalAuthority
) -> None:
    stamped, marks = authority.stamp(A), readings("yyy yny", (LEARNT, LEARNT))
    got = resolve((party(stamped), party(B)), marks, [authority.pinned])
    assert (got.outcome, got.counted) == ("undecidable", (None, None))
    assert got.stamped[0] is not None
    assert resolve((party(stamped), party(B)), marks, []).stamped == (None, None)
    older = authority.stamp(B)
    assert resolve((party(A), party(older)), marks, [authority.pinned],
                   listed([A], [head(1, authority)])).outcome == "undecidable"  # fmt: skip
    strange = listed([A], [head(1, other_authority)])
    got = resolve((party(A), party(B)), marks, [authority.pinned], strange)
    assert (got.outcome, got.counted) == ("undecidable", (None, None))
    both = listed([A, B], [head(2, authority)])
    got = resolve((party(A), party(B)), marks, [authority.pinned], both)
    assert got.outcome == "undecidable"  # under the same head neither is older


def test_the_claims_must_be_about_the_keys_and_models_that_are_shown() -> None:
    marks = readings("yyy yny")
    forged = A.envelope.model_copy(update={"signatures": B.envelope.signatures})
    for parties, says in (
        ((party(A), replace(party(B), commitment="00" * 32)), "the second claim is about the key"),
        ((replace(party(A), model=ModelDigest("00" * 32, 4)), party(B)), "first claim is about"),
        ((replace(party(A), model=ModelDigest("cd" * 32, 5)), party(B)), "first claim is about"),
        ((party(A), party(A)), "both parties show one key"),
        ((party(some_claim()), party(B)), "nobody signed"),
        ((party(A.model_copy(update={"envelope": forged})), party(B)), "another one"),
    ):
        with pytest.raises(ClaimError) as caught:
            resolve(parties, marks)
        assert says in one_line(caught.value)


def test_people_and_programs_are_told_the_same() -> None:
    got = resolved("yyy yny")
    told = got.to_json()
    assert told["owners"] == ["ACME Inc.", "ACME Inc."]
    assert [each["found"] for each in told["readings"]] == [True, True, True, True, False, True]
    said = got.explain()
    assert "reading second's mark in the first's model: not proven, log10 p -30.0" in said
    assert all(limit in said for limit in told["limits"])
