"""What `verify` is told of a key's age: a claim, whom to believe, and where claims are counted."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from countermark.errors import ClaimError, ConfigError

if TYPE_CHECKING:
    from countermark.key import Key
    from countermark.openings import Openings
    from countermark.verdict import Dating


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
    ledger: str | None

    def of(self, key: Key | Openings) -> Dating | None:
        """What the claim says of a key's age; None where no claim was given.

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

    def _judged(self, path: Path, key: Key | Openings) -> Dating:
        from countermark.claims.audit import audit
        from countermark.claims.dating import Believed, dating
        from countermark.claims.ledger import Ledger
        from countermark.claims.signed import Claim
        from countermark.claims.signing import key_id, load_public
        from countermark.claims.statement import day_or_moment
        from countermark.claims.timestamp import Authority

        claim = Claim.load(path)
        if claim.commitment != key.commitment or claim.owner != key.owner:
            raise ClaimError(
                f"{path} is a claim of the key {claim.commitment}, this is {key.commitment}: the "
                "key was made after the claim, or is another one; expected a claim of this key"
            )
        believed = Believed(
            suspect_date=day_or_moment(str(self.suspect_date), "--suspect-date"),
            authorities=[Authority.load(each) for each in self.authorities],
            signers=[key_id(load_public(each)) for each in self.signers],
        )
        if self.ledger is None:
            return dating(claim, believed, None)
        with Ledger(self.ledger) as opened:
            return dating(claim, believed, audit(opened))
