"""What a claim adds to a verdict: a date that somebody pinned stands for, and a count."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from authority import LocalAuthority, some_claim
from clock import AFTER_STAMPS, BEFORE_STAMPS
from countermark.claims.audit import Audit, audit_ledger
from countermark.claims.dating import ExaminerTrust, date_key
from countermark.claims.decision import PolicyCase
from countermark.claims.ledger import Ledger
from countermark.claims.policy import AllOf, CommittedBefore, OwnedAt, SignedBy
from countermark.claims.signed import Claim
from countermark.claims.signing import compute_key_id
from countermark.errors import ClaimError, ConfigError
from countermark.results.key_dating import KeyDating
from countermark.results.null_hypotheses import FairCoin
from countermark.results.reading import Reading
from countermark.results.subject import Subject
from countermark.results.verdict import KeyIdentity, Verdict, VerificationOptions, judge

OWNER, MALLORY, OPERATOR = (Ed25519PrivateKey.generate() for _ in range(3))
OWNER_NAME = compute_key_id(OWNER.public_key())
CLAIM = some_claim(OWNER)


def audited(
    folder: Path, claims: list[Claim], stamped_by: list[LocalAuthority], more: int = 0
) -> Audit:
    """A ledger with these claims under a stamped head, and some more claims behind it."""
    with Ledger.create(str(folder / "l.db"), compute_key_id(OPERATOR.public_key())) as ledger:
        for each in claims:
            ledger.add(each)
        head = ledger.make_head().with_signature(OPERATOR)
        for authority in stamped_by:
            head = authority.stamp(head)
        ledger.add(head)
        for _ in range(more):
            ledger.add(some_claim(MALLORY))
        return audit_ledger(ledger)


def believing(authority: LocalAuthority, **changed: object) -> ExaminerTrust:
    return replace(ExaminerTrust(AFTER_STAMPS, [authority.pinned]), **changed)  # type: ignore[arg-type]


def test_a_stamped_head_dates_and_counts_everybody(
    tmp_path: Path, authority: LocalAuthority
) -> None:
    others = [some_claim(MALLORY) for _ in range(3)]
    found = date_key(
        CLAIM, believing(authority), audited(tmp_path, [CLAIM, *others], [authority], 2)
    )
    assert (found.why, found.signer, found.commitments, found.multiplier) == (
        None, "unknown", 6, 6
    )  # fmt: skip
    assert found.authorities == ("CN=Pinned root",)


def test_a_pinned_signer_counts_his_own(tmp_path: Path, authority: LocalAuthority) -> None:
    claims = [CLAIM, some_claim(OWNER), *(some_claim(MALLORY) for _ in range(3))]
    believed = believing(authority, signers=(OWNER_NAME,))
    found = date_key(CLAIM, believed, audited(tmp_path, claims, [authority]))
    assert (found.signer, found.multiplier) == ("pinned", 2)
    both = believing(authority, signers=(OWNER_NAME, compute_key_id(MALLORY.public_key())))
    (tmp_path / "again").mkdir()
    found = date_key(CLAIM, both, audited(tmp_path / "again", claims, [authority]))
    assert found.multiplier == 5, "whichever of his keys he claims with, all of them count"


def undated(found: KeyDating, says: str) -> None:
    assert found.committed is None
    assert found.why is not None
    assert says in found.why
    assert found.multiplier == 1


def test_without_a_ledger_a_stamp_dates_nothing(authority: LocalAuthority) -> None:
    """A thousand keys can be stamped in silence, and the one that fits be shown."""
    stamped = authority.stamp(CLAIM)
    undated(date_key(stamped, believing(authority), None), "nobody can count how many keys")


def test_a_claim_that_is_added_late_is_undated(tmp_path: Path, authority: LocalAuthority) -> None:
    stamped = authority.stamp(CLAIM)
    with Ledger.create(str(tmp_path / "l.db"), compute_key_id(OPERATOR.public_key())) as ledger:
        ledger.add(some_claim(MALLORY))
        ledger.add(authority.stamp(ledger.make_head().with_signature(OPERATOR)))
        ledger.add(stamped)
        found = audit_ledger(ledger)
    undated(date_key(stamped, believing(authority), found), "0 pinned authorities stamped")


def test_what_else_leaves_it_undated(
    tmp_path: Path, authority: LocalAuthority, other_authority: LocalAuthority
) -> None:
    own = audited(tmp_path, [CLAIM], [other_authority])
    undated(date_key(CLAIM, believing(authority), own), "0 pinned authorities")
    both = [authority.pinned, other_authority.pinned]
    believed = believing(authority, authorities=both, least=2)
    undated(date_key(CLAIM, believed, own), "1 pinned authorities stamped")
    late = believing(other_authority, suspect_date=BEFORE_STAMPS)
    undated(date_key(CLAIM, late, own), "0 pinned authorities stamped a tree head")
    undated(date_key(some_claim(OWNER), believing(other_authority), own), "is not in the ledger")
    undated(
        date_key(CLAIM, believing(other_authority), replace(own, faults=("x",))), "was changed: x"
    )
    assert date_key(CLAIM, believing(other_authority), own).committed


def test_what_is_no_claim_of_the_pinned_signer_stops_the_answer(authority: LocalAuthority) -> None:
    for claim, believed in (
        (some_claim(), believing(authority)),
        (some_claim(MALLORY), believing(authority, signers=(OWNER_NAME,))),
        (
            CLAIM.with_timestamp(authority.stamp(some_claim(OWNER)).timestamp_responses[0]),
            believing(authority),
        ),
    ):
        with pytest.raises(ClaimError):
            date_key(claim, believed, None)
    with pytest.raises(ConfigError):
        date_key(CLAIM, believing(authority, authorities=[]), None)


# --- and what that makes of a verdict


def judged(matched: int, bits: int, terms: VerificationOptions, committed: bool = True) -> Verdict:
    read, expected = np.zeros(bits, np.uint8), np.zeros(bits, np.uint8)
    read[matched:] = 1
    key = KeyIdentity("uchida", CLAIM.commitment, "ACME Inc.")
    evidence = Reading(read, expected, committed=committed)
    return judge(evidence, FairCoin(), subject=Subject("s"), key=key, terms=terms)


def dated(commitments: int | None = 1, why: str | None = None) -> KeyDating:
    return KeyDating(
        "ab" * 32, "2026-06-01T00:00:00Z", None if why else "2026-05-01T00:00:00Z", ("CN=A",),
        commitments, "unknown", why,
    )  # fmt: skip


def test_a_dated_key_needs_fewer_forgery_bits() -> None:
    short = judged(64, 64, VerificationOptions())
    assert short.outcome == "no_verdict"
    found = judged(64, 64, VerificationOptions(dating=dated()))
    assert found.outcome == "owned"
    assert any("is the examiner's statement" in each for each in found.limits)
    assert "committed to by 2026-05-01T00:00:00Z, stamped by CN=A" in found.explain()
    assert found.to_json()["dating"]["commitments"] == 1
    undated_ = judged(64, 64, VerificationOptions(dating=dated(None, "nobody can count")))
    assert undated_.outcome == "no_verdict"
    assert "the claim does not date the key, since nobody can count" in undated_.reason


def test_a_date_does_not_keep_out_a_key_that_was_picked_before_it() -> None:
    """Answers to photographs, and fine-tunes of a public base, can be foreseen."""
    for matched, outcome in ((40, "owned"), (39, "no_verdict"), (20, "no_verdict")):
        found = judged(matched, matched, VerificationOptions(dating=dated()))
        assert found.outcome == outcome
        assert judged(matched, matched, VerificationOptions(assume_dated=True)).outcome == "owned"
    assert "could have been picked before the claim among 2^20, fewer than 2^40" in found.reason
    assert judged(64, 64, VerificationOptions(dating=dated()), committed=False).outcome == "owned"


def test_p_is_multiplied_by_the_commitments() -> None:
    alone = judged(60, 64, VerificationOptions(dating=dated(1)))
    assert alone.outcome == "owned"
    assert alone.log10_p is not None
    for count in (10, 10**9):
        found = judged(60, 64, VerificationOptions(dating=dated(count)))
        assert found.log10_p == pytest.approx(alone.log10_p + math.log10(count))
    assert judged(60, 64, VerificationOptions(dating=dated(10**9))).outcome == "not_proven"
    floor = judged(20, 20, VerificationOptions(dating=dated(10)))
    assert floor.outcome == "no_verdict"
    assert "cannot prove anything here" in floor.reason


def test_an_undated_claim_takes_nothing_from_a_key_that_nobody_can_forge() -> None:
    assert judged(256, 256, VerificationOptions(dating=dated(None, "no ledger"))).outcome == "owned"


def test_a_policy_holds_claim_and_verdict_together(
    tmp_path: Path, authority: LocalAuthority
) -> None:
    ledger, pinned = audited(tmp_path, [CLAIM], [authority]), [authority.pinned]
    verdict = judged(
        64, 64, VerificationOptions(dating=date_key(CLAIM, believing(authority), ledger))
    )
    for claim, date, outcome in (
        (CLAIM, AFTER_STAMPS, "accepted"),
        (CLAIM, BEFORE_STAMPS, "refused"),
        (some_claim(MALLORY), AFTER_STAMPS, "refused"),
    ):
        policy = AllOf([SignedBy([OWNER_NAME]), CommittedBefore(date, pinned), OwnedAt(1e-6)])
        assert policy.judge(PolicyCase(claim, ledger.heads, verdict)).outcome == outcome
