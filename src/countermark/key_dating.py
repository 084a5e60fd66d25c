"""KeyDating: how old a key is, as far as a claim shows it, and what that rests on."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field

from countermark.subject import STORED

DATE_RESTS_ON = (
    "the date rests on the authorities that the examiner pinned, and whether their certificates "
    "were withdrawn was not asked"
)
COUNTED_IN = (
    "p is multiplied by the commitments in the ledger that the examiner named: keys that were "
    "committed to elsewhere are not counted"
)


@dataclass(frozen=True)
class KeyDating:
    """What a claim says about the age of a key, under what an examiner believes and states.

    Attributes:
        claim: digest of the claim.
        suspect_date: before which the key must have been committed to: the examiner's statement.
        committed: by when it was, as pinned authorities stamped; None where that is not certain.
        authorities: the pinned authorities that stamped it in time.
        commitments: among how many it was, by which p is multiplied; None where nobody can count.
        signer: "pinned" where the examiner knows the claim's signer and counts his commitments
            alone, else "unknown".
        why: why the key stays undated; None where it is dated.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STORED

    claim: str
    suspect_date: str
    committed: str | None
    authorities: tuple[str, ...]
    commitments: Annotated[int, Field(ge=0, le=1 << 40)] | None
    signer: Literal["pinned", "unknown"]
    why: str | None

    @property
    def dated(self) -> bool:
        """Whether the key is older than the suspect, as far as the claim shows it."""
        return self.committed is not None

    def to_json(self) -> dict[str, Any]:
        """All fields as JSON values."""
        return asdict(self) | {"authorities": list(self.authorities)}

    @property
    def multiplier(self) -> int:
        """By what p is multiplied: an undated claim dates nothing and is one of nothing."""
        return max(1, self.commitments or 1) if self.dated else 1


def explained(dating: KeyDating) -> str:
    """What a claim says, for people."""
    if dating.committed is None:
        return f"no: {dating.why}"
    whose = "its pinned signer" if dating.signer == "pinned" else "everybody in the ledger"
    return (
        f"committed to by {dating.committed}, stamped by {', '.join(dating.authorities)}; one of "
        f"{dating.multiplier} commitments of {whose}, by which p is multiplied"
    )


def limits_of(dating: KeyDating) -> list[str]:
    """What a claim rests on."""
    stated = f"that the suspect is not older than {dating.suspect_date} is the examiner's statement"
    if dating.committed is None:
        return [stated]
    return [
        stated,
        DATE_RESTS_ON,
        COUNTED_IN,
    ]
