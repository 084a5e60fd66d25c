"""What `verify` is told of a key's age: a claim, whom to believe, and where claims are counted."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from countermark.errors import ClaimError, ConfigError, printable

if TYPE_CHECKING:
    from countermark.claims.ledger import Ledger
    from countermark.claims.signed import Claim, TreeHead
    from countermark.key import Key
    from countermark.key_dating import KeyDating
    from countermark.openings import Openings
    from countermark.report.bundle import Dated as Evidence


@dataclass(frozen=True)
class Dated:
    """The options of `verify` about a claim.

    Attributes:
        claim: the file.
        authorities, signers: PEM files of whom the examiner believes.
        suspect_date: his statement.
        ledger: the URL of the ledger that he counts in.
    """

    claim: Path | None
    authorities: list[Path]
    signers: list[Path]
    suspect_date: str | None
    ledger: str | None = field(repr=False)

    def of(self, key: Key | Openings) -> KeyDating | None:
        """What the claim says of a key's age; None where no claim was given."""
        found = self.shown(key)
        return None if found is None else found[0]

    def shown(self, key: Key | Openings) -> tuple[KeyDating, Evidence] | None:
        """The same, and what shows it: the claim, and the tree head that dates it.

        Raises:
            ConfigError: an option that is missing, or goes with a claim and there is none.
            ClaimError: the claim is about another key, or was changed.
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
        return self._judged(self.claim, key)

    def _judged(self, path: Path, key: Key | Openings) -> tuple[KeyDating, Evidence]:
        from countermark.claims.audit import audit
        from countermark.claims.dating import Believed, dating
        from countermark.claims.ledger import Ledger
        from countermark.claims.policy import earliest
        from countermark.claims.signed import Claim
        from countermark.claims.signing import key_id, load_public
        from countermark.claims.statement import day_or_moment, instant
        from countermark.claims.timestamp import Authority
        from countermark.report.bundle import Dated as Evidence

        claim = Claim.load(path)
        if claim.commitment == key.commitment and claim.owner != key.owner:
            raise ClaimError(
                f"{path} is a claim of {printable(claim.owner, 80)!r}, the key's owner is "
                f"{printable(key.owner, 80)!r}: expected a claim of the same"
            )
        if claim.commitment != key.commitment:
            raise ClaimError(
                f"{path} is a claim of the key {claim.commitment}, this is {key.commitment}: the "
                "key was made after the claim, or is another one; expected a claim of this key"
            )
        believed = Believed(
            suspect_date=day_or_moment(str(self.suspect_date), "--suspect-date"),
            authorities=[Authority.load(each) for each in self.authorities],
            signers=[key_id(load_public(each)) for each in self.signers],
        )
        pinned = tuple(self.authorities), tuple(self.signers)
        if self.ledger is None:
            return dating(claim, believed, None), Evidence(claim, *pinned)
        with Ledger(self.ledger) as opened:
            audited = audit(opened)
            found = dating(claim, believed, audited)
            if found.committed is None:
                return found, Evidence(claim, *pinned)
            for head in audited.heads:
                stamps = earliest([head], believed.authorities)
                if found.committed in [instant(each.stamp.latest) for each in stamps]:
                    return found, _under(opened, claim, head, pinned)
        raise ClaimError("no tree head of the ledger is stamped as it was a moment ago: try again")


def _under(
    ledger: Ledger, claim: Claim, head: TreeHead, pinned: tuple[tuple[Path, ...], ...]
) -> Evidence:
    """The claim as the ledger has it, under the tree head that dates it."""
    from countermark.report.bundle import Dated as Evidence
    from countermark.report.bundle import Inclusion

    (entry,) = ledger.find(digest=claim.digest)
    proof = ledger.prove(entry.place, head.size)
    inclusion = Inclusion(type="countermark/inclusion/v1", place=proof.place, path=proof.path)
    authorities, signers = pinned
    return Evidence(entry.claim, authorities, signers, head, inclusion)
