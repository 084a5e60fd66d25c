"""A policy accepts what every one of its checks holds for, and nothing by default."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from keys import one_line

from authority import LocalAuthority, some_claim
from clock import AFTER_STAMPS, BEFORE_STAMPS
from countermark.checkpoints import ModelDigest
from countermark.claims.decision import Decision, PolicyCase
from countermark.claims.policy import (
    AllOf,
    AtLeast,
    CommittedBefore,
    IntegrityCheck,
    KeyCheck,
    ModelCheck,
    OpenCheck,
    OwnedAt,
    SignedBy,
)
from countermark.claims.signed import Claim, TreeHead
from countermark.claims.signing import compute_key_id
from countermark.errors import ConfigError
from countermark.results.key_dating import KeyDating
from countermark.results.subject import Subject
from countermark.results.verdict import KeyIdentity, Verdict

OWNER, SECOND, THIRD = (Ed25519PrivateKey.generate() for _ in range(3))
NAMES = [compute_key_id(each.public_key()) for each in (OWNER, SECOND, THIRD)]
CLAIM = some_claim(OWNER, SECOND)


def only(decision: Decision) -> tuple[bool | None, str]:
    (finding,) = decision.findings
    return finding.holds, finding.reason


def test_an_empty_policy_accepts_nothing() -> None:
    decision = AllOf([]).judge(PolicyCase(CLAIM))
    assert decision.outcome == "refused"
    assert decision.exit_code == 1
    assert "an empty policy accepts nothing" in decision.explain()
    assert Decision(()).outcome == "refused"


def test_one_failing_check_refuses_and_an_open_one_leaves_it_open() -> None:
    good, bad = SignedBy(NAMES[:1]), SignedBy(NAMES[2:])
    left = OpenCheck("x", "y")
    for checks, outcome, code in (
        ([good], "accepted", 0),
        ([good, bad], "refused", 1),
        ([good, left], "undecided", 3),
        ([bad, left], "refused", 1),
    ):
        decision = AllOf(checks).judge(PolicyCase(CLAIM))
        assert (decision.outcome, decision.exit_code) == (outcome, code)
    assert AllOf([AllOf([good]), AllOf([])]).judge(PolicyCase(CLAIM)).outcome == "refused"


def test_k_of_n_signers() -> None:
    assert only(SignedBy(NAMES, 2).judge(PolicyCase(CLAIM)))[0] is True
    assert only(SignedBy(NAMES, 3).judge(PolicyCase(CLAIM)))[0] is False
    assert only(SignedBy([*NAMES[:1], *NAMES[2:]], 2).judge(PolicyCase(CLAIM)))[0] is False
    holds, reason = only(SignedBy(NAMES[2:]).judge(PolicyCase(CLAIM)))
    assert holds is False
    assert "which nobody pinned" in reason
    unsigned = some_claim()
    assert only(SignedBy(NAMES).judge(PolicyCase(unsigned))) == (
        False, "nobody signed this claim: expected it from `claim sign`"
    )  # fmt: skip
    for least in (0, 4, -1):
        with pytest.raises(ConfigError) as caught:
            SignedBy(NAMES, least)
        assert f"{least} of 3 signers" in one_line(caught.value)
    with pytest.raises(ConfigError):  # the same key twice is one
        SignedBy([NAMES[0]] * 2, 2)


def test_k_of_n_checks() -> None:
    held, failed = SignedBy(NAMES[:1]), SignedBy(NAMES[2:])
    assert only(AtLeast(1, [held, failed]).judge(PolicyCase(CLAIM)))[0] is True
    holds, reason = only(AtLeast(2, [held, failed]).judge(PolicyCase(CLAIM)))
    assert holds is False
    assert "1 of 2 hold, 2 must: 0 of 1 pinned keys signed" in reason
    assert only(AtLeast(1, [OpenCheck("x", "y")]).judge(PolicyCase(CLAIM)))[0] is False
    with pytest.raises(ConfigError):
        AtLeast(1, [])


def test_dated_by_a_pinned_authority_only(
    authority: LocalAuthority, other_authority: LocalAuthority
) -> None:
    stamped = authority.stamp(CLAIM)
    pinned, other = [authority.pinned], [other_authority.pinned]
    holds, reason = only(CommittedBefore(AFTER_STAMPS, pinned).judge(PolicyCase(stamped)))
    assert holds is True
    assert "at the latest by CN=Pinned root" in reason
    for check, case, says in (
        (CommittedBefore(AFTER_STAMPS, other), stamped, "undated: 1 time stamps, none of them by"),
        (CommittedBefore(AFTER_STAMPS, pinned), CLAIM, "undated: 0 time stamps"),
        (CommittedBefore(BEFORE_STAMPS, pinned), stamped, "which is not before"),
        (CommittedBefore(AFTER_STAMPS, pinned + other, 2), stamped, "by the word of 2"),
    ):
        holds, reason = only(check.judge(PolicyCase(case)))
        assert holds is False
        assert says in reason
    both = other_authority.stamp(stamped)
    assert only(CommittedBefore(AFTER_STAMPS, pinned + other, 2).judge(PolicyCase(both)))[0] is True
    with pytest.raises(ConfigError, match="1 of 0 authorities"):
        CommittedBefore(AFTER_STAMPS, [])


def test_the_accuracy_that_an_authority_states_counts_against_the_claim(
    authority: LocalAuthority,
) -> None:
    stamped = authority.stamp(CLAIM)
    within = datetime.now(UTC) + timedelta(seconds=0.5)
    assert only(CommittedBefore(within, [authority.pinned]).judge(PolicyCase(stamped)))[0] is False


def test_a_head_of_a_ledger_dates_what_is_under_it(authority: LocalAuthority) -> None:
    head = authority.stamp(TreeHead.make_unsigned("ab" * 32, 3, "cd" * 32).with_signature(OWNER))
    check = CommittedBefore(AFTER_STAMPS, [authority.pinned])
    assert only(check.judge(PolicyCase(CLAIM, (head,))))[0] is True


def test_a_stamp_of_another_claim_refuses(authority: LocalAuthority) -> None:
    replayed = CLAIM.with_timestamp(authority.stamp(some_claim(OWNER)).timestamp_responses[0])
    for check in (IntegrityCheck(), CommittedBefore(AFTER_STAMPS, [authority.pinned])):
        holds, reason = only(check.judge(PolicyCase(replayed)))
        assert holds is False
        assert "is of something else" in reason
    assert only(IntegrityCheck().judge(PolicyCase(CLAIM)))[0] is True
    assert only(IntegrityCheck().judge(PolicyCase(some_claim())))[0] is False


def verdict(**changed: object) -> Verdict:
    key = KeyIdentity("uchida", CLAIM.commitment, "ACME Inc.")
    found = Verdict("owned", "found", key, Subject("s"), 256, alpha=1e-6)
    return replace(found, **changed)  # type: ignore[arg-type]


def dating(claim: Claim) -> KeyDating:
    return KeyDating(
        claim.digest, "2026-02-01", "2026-01-01T00:00:00Z", ("TSA",), 1, "pinned", None
    )


def test_a_verdict_counts_at_its_threshold_and_about_its_key() -> None:
    for alpha, found, holds, says in (
        (1e-6, verdict(), True, "found"),
        (1e-3, verdict(), True, "found"),
        (1e-9, verdict(), False, "judged at alpha 1e-06, 1e-09 is asked for"),
        (
            1e-6,
            verdict(key=KeyIdentity("uchida", "00" * 32, "ACME Inc.")),
            False,
            "the key was made after the claim",
        ),
        (1e-6, verdict(outcome="not_proven", reason="no"), False, "no"),
        (1e-6, verdict(outcome="no_verdict", reason="unsure"), False, "unsure"),
        (1e-6, verdict(assume_dated=True), False, "the owner's own word"),
        (1e-6, verdict(assume_dated=True, forgery_bits=80.0), True, "found"),
        (1e-6, verdict(assume_dated=True, dating=dating(CLAIM)), False, "the owner's own word"),
        (1e-6, verdict(dating=dating(CLAIM)), True, "found"),
        (1e-6, verdict(dating=dating(some_claim())), False, "judged with the claim"),
        (1e-6, None, None, "no suspect was read"),
    ):
        got, reason = only(OwnedAt(alpha).judge(PolicyCase(CLAIM, (), found)))
        assert got is holds
        assert says in reason


def test_a_claim_is_about_one_key_and_one_model() -> None:
    assert only(KeyCheck(CLAIM.commitment).judge(PolicyCase(CLAIM)))[0] is True
    assert only(KeyCheck("00" * 32).judge(PolicyCase(CLAIM)))[0] is False
    assert only(ModelCheck(ModelDigest("cd" * 32, 4)).judge(PolicyCase(CLAIM)))[0] is True
    for other in (ModelDigest("cd" * 32, 5), ModelDigest("ce" * 32, 4)):
        assert only(ModelCheck(other).judge(PolicyCase(CLAIM)))[0] is False
