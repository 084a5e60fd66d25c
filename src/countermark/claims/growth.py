"""Two tree heads, and a proof that the newer one only adds claims: without the ledger."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field

from countermark import files
from countermark.claims.signed import TreeHead
from countermark.claims.statement import not_a
from countermark.claims.tree import consistent
from countermark.errors import ClaimError
from countermark.files import Hex32, Stored

_LARGEST = 1 << 16  # bytes
_MOST = 100  # digests: enough for any tree


class Growth(Stored):
    """That a tree only adds to an older one: the digests of RFC 9162, section 2.1.4.1."""

    type: Literal["countermark/growth/v1"]
    path: Annotated[tuple[Hex32, ...], Field(max_length=_MOST)]

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `ledger export --since` wrote.

        Raises:
            ClaimError: it is something else.
        """
        try:
            return files.parse_as(cls, files.read_regular(Path(path), _LARGEST))
        except ValueError as error:
            raise not_a("a proof that a ledger only grew", str(path), str(error)) from None

    def save(self, path: str | Path) -> None:
        """Write it."""
        files.write_bytes(Path(path), self.model_dump_json().encode() + b"\n")


def broken(old: TreeHead, new: TreeHead, proof: Growth, operator: str) -> str | None:
    """Why a newer tree head does not only add claims to an older one; None where it does.

    Args:
        old: the head that was kept.
        new: a later one of the same ledger.
        proof: the digests between them, as the operator exported them.
        operator: the public key of the ledger, as `signing.key_id` names it.
    """
    for name, head in (("old", old), ("new", new)):
        try:
            head.check()
        except ClaimError as error:
            return f"the {name} head is not signed: {error}"
        if operator not in head.signers:
            return f"the {name} head is not signed by the ledger's key {operator}"
    if old.statement.predicate.ledger != new.statement.predicate.ledger:
        return "they are heads of two ledgers"
    if old.size > new.size:
        return f"the new head is over {new.size} claims, the old one over {old.size}"
    roots = [(each.size, bytes.fromhex(each.root)) for each in (old, new)]
    try:
        shown = consistent(roots[0], roots[1], [bytes.fromhex(each) for each in proof.path])
    except ClaimError as error:
        return str(error)
    return None if shown else "the proof does not show that what the old head covers is still there"
