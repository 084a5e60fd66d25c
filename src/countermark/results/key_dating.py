"""KeyDating: the age of a key as shown by a claim, and the assumptions behind it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field

from countermark.results.subject import STORED

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
    """The age of a key according to a claim, under the examiner's trust and statements.

    Attributes:
        claim: digest of the claim.
        suspect_date: date that the suspect is not older than, by the examiner's statement; the key
            must have been committed to before it.
        committed: time by which pinned authorities timestamped the commitment; None if uncertain.
        authorities: the pinned authorities that timestamped the commitment in time.
        commitments: number of commitments, including this one, that p is multiplied by; None if
            nobody can count them.
        signer: "pinned" if the examiner knows the claim's signer and counts only that signer's
            commitments, else "unknown".
        why: why the key stays undated; None if it is dated.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STORED

    claim: str
    suspect_date: str
    committed: str | None
    authorities: tuple[str, ...]
    # An owner with many commitments could show the key that fits, so p is corrected for all.
    commitments: Annotated[int, Field(ge=0, le=1 << 40)] | None
    signer: Literal["pinned", "unknown"]
    why: str | None

    @property
    def is_dated(self) -> bool:
        """Whether the claim shows that the key is older than the suspect."""
        return self.committed is not None

    def to_json(self) -> dict[str, Any]:
        """Return all fields as JSON values."""
        return asdict(self) | {"authorities": list(self.authorities)}

    @property
    def multiplier(self) -> int:
        """Factor that p is multiplied by; 1 for an undated claim, which excludes no cheat."""
        # Zero or unknown commitments must not make p smaller.
        return max(1, self.commitments or 1) if self.is_dated else 1


def describe_dating(dating: KeyDating) -> str:
    """Describe the dating for people, in one sentence."""
    if dating.committed is None:
        return f"no: {dating.why}"
    whose = "its pinned signer" if dating.signer == "pinned" else "everybody in the ledger"
    return (
        f"committed to by {dating.committed}, stamped by {', '.join(dating.authorities)}; one of "
        f"{dating.multiplier} commitments of {whose}, by which p is multiplied"
    )


def list_dating_caveats(dating: KeyDating) -> list[str]:
    """List the caveats of a dating: the statements and authorities that it rests on."""
    # The date of the suspect is a statement even if the claim dates nothing.
    stated = f"that the suspect is not older than {dating.suspect_date} is the examiner's statement"
    if dating.committed is None:
        return [stated]
    return [
        stated,
        DATE_RESTS_ON,
        COUNTED_IN,
    ]
