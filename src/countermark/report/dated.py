"""The options of `verify` about a key's age: claim, trusted parties, and ledger for counting."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from countermark.errors import ClaimError, ConfigError, make_printable

if TYPE_CHECKING:
    from countermark.claims.ledger import Ledger
    from countermark.claims.signed import Claim, TreeHead
    from countermark.keys.key import Key
    from countermark.report.bundle import DatingDocuments as Evidence
    from countermark.results.key_dating import KeyDating
    from countermark.verification.disclosure import TriggerDisclosure


@dataclass(frozen=True)
class ClaimOptions:
    """The options of `verify` about a claim.

    Attributes:
        claim: the claim's file; None if no claim was given.
        authorities: PEM files of the authorities that the examiner trusts.
        signers: PEM files of the claimant's public keys, as far as the examiner knows them.
        suspect_date: the time before which the key must have been committed to, as they state.
        ledger: the URL of the ledger in which claims are counted.
    """

    claim: Path | None
    authorities: list[Path]
    signers: list[Path]
    suspect_date: str | None
    ledger: str | None = field(repr=False)

    def date_key(self, key: Key | TriggerDisclosure) -> KeyDating | None:
        """Return the key's age as the claim shows it; None if no claim was given."""
        found = self.date_with_documents(key)
        return None if found is None else found[0]

    def date_with_documents(
        self, key: Key | TriggerDisclosure
    ) -> tuple[KeyDating, Evidence] | None:
        """Return the key's age with the documents that show it: claim, tree head and proof.

        Returns:
            None if no claim was given.

        Raises:
            ConfigError: an option is missing, or an option about a claim was given without a claim.
            ClaimError: the claim is about another key or owner, or was changed.
        """
        others = (self.authorities, self.signers, self.suspect_date, self.ledger)
        if self.claim is None:
            if any(others):
                raise ConfigError(
                    "--authority, --signer, --suspect-date and --ledger say how old a claim is: "
                    "give --claim FILE"
                )
            return None
        if not self.authorities or self.suspect_date is None:
            raise ConfigError(
                "--claim needs --authority PEM, whose time stamps you believe, and --suspect-date "
                "DATE, before which the key must have been committed to"
            )
        return self._date_by_claim(self.claim, key)

    def _date_by_claim(
        self, path: Path, key: Key | TriggerDisclosure
    ) -> tuple[KeyDating, Evidence]:
        """Date a key by the claim in a file; see `date_with_documents`."""
        from countermark.claims.audit import audit_ledger
        from countermark.claims.dating import ExaminerTrust, date_key
        from countermark.claims.ledger import Ledger
        from countermark.claims.policy import find_earliest_timestamps
        from countermark.claims.signed import Claim
        from countermark.claims.signing import compute_key_id, load_public_key
        from countermark.claims.statement import format_time, parse_day_or_time
        from countermark.claims.timestamp import Authority
        from countermark.report.bundle import DatingDocuments as Evidence

        claim = Claim.load(path)
        # The name in a claim is free text: whoever saw a commitment could claim it under another
        # name.
        if claim.commitment == key.commitment and claim.owner != key.owner:
            raise ClaimError(
                f"{path} is a claim of {make_printable(claim.owner, 80)!r}, the key's owner is "
                f"{make_printable(key.owner, 80)!r}: expected a claim of the same"
            )
        if claim.commitment != key.commitment:
            raise ClaimError(
                f"{path} is a claim of the key {claim.commitment}, this is {key.commitment}: the "
                "key was made after the claim, or is another one; expected a claim of this key"
            )
        believed = ExaminerTrust(
            suspect_date=parse_day_or_time(str(self.suspect_date), "--suspect-date"),
            authorities=[Authority.load(each) for each in self.authorities],
            signers=[compute_key_id(load_public_key(each)) for each in self.signers],
        )
        pinned = tuple(self.authorities), tuple(self.signers)
        if self.ledger is None:
            return date_key(claim, believed, None), Evidence(claim, *pinned)
        with Ledger(self.ledger) as opened:
            audited = audit_ledger(opened)
            found = date_key(claim, believed, audited)
            if found.committed is None:
                return found, Evidence(claim, *pinned)
            # Several heads may have been timestamped: find the one whose timestamp gives this time.
            for head in audited.heads:
                stamps = find_earliest_timestamps([head], believed.authorities)
                if found.committed in [format_time(each.stamp.latest_time) for each in stamps]:
                    return found, _collect_documents(opened, claim, head, pinned)
        raise ClaimError("no tree head of the ledger is stamped as it was a moment ago: try again")


def _collect_documents(
    ledger: Ledger, claim: Claim, head: TreeHead, pinned: tuple[tuple[Path, ...], ...]
) -> Evidence:
    """Collect the documents that date a key: the ledger's claim, tree head and inclusion proof.

    Args:
        ledger: the ledger.
        claim: the claim, which is in the ledger.
        head: the tree head that dates it.
        pinned: PEM files of authorities, and of signers.
    """
    from countermark.report.bundle import BundleInclusion
    from countermark.report.bundle import DatingDocuments as Evidence

    # The leaf is over the bytes of the ledger's copy, whose timestamps may differ from the file's.
    (entry,) = ledger.find(digest=claim.digest)
    proof = ledger.prove(entry.place, head.size)
    inclusion = BundleInclusion(type="countermark/inclusion/v1", place=proof.place, path=proof.path)
    authorities, signers = pinned
    return Evidence(entry.claim, authorities, signers, head, inclusion)
