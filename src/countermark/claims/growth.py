"""A proof, checked without the ledger, that a newer tree head only adds claims to an older one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field

from countermark._internal import files
from countermark._internal.files import Hex32, StoredDocument
from countermark.claims.signed import TreeHead
from countermark.claims.statement import make_format_error
from countermark.claims.tree import is_consistent
from countermark.errors import ClaimError

_LARGEST = 1 << 16  # bytes
_MOST = 100  # digests; a tree of 2^40 claims, the largest that a head may state, needs fewer


class ConsistencyProof(StoredDocument):
    """A consistency proof: the digests of RFC 9162, section 2.1.4.1, as a file.

    Attributes:
        path: digests in hexadecimal.
    """

    type: Literal["countermark/growth/v1"]
    path: Annotated[tuple[Hex32, ...], Field(max_length=_MOST)]

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a proof that `ledger export --since` wrote.

        Raises:
            ClaimError: the file holds something else.
        """
        try:
            return files.parse_document(cls, files.read_regular(Path(path), _LARGEST))
        except ValueError as error:
            raise make_format_error(
                "a proof that a ledger only grew", str(path), str(error)
            ) from None

    def save(self, path: str | Path) -> None:
        """Write the proof to a file."""
        files.write_bytes(Path(path), self.model_dump_json().encode() + b"\n")


def find_growth_fault(
    old: TreeHead, new: TreeHead, proof: ConsistencyProof, operator: str
) -> str | None:
    """Return why a newer tree head does not only add claims to an older one; None if it does.

    Args:
        old: the tree head that was kept.
        new: a later tree head of the same ledger.
        proof: the digests between them, as the operator exported them.
        operator: the public key of the ledger, as `signing.compute_key_id` names it.
    """
    # Both heads must be signed: an old head without the operator's signature proves nothing against
    # the operator.
    for name, head in (("old", old), ("new", new)):
        try:
            head.check_signatures()
        except ClaimError as error:
            return f"the {name} head is not signed: {error}"
        if operator not in head.signers:
            return f"the {name} head is not signed by the ledger's key {operator}"
    if old.statement.predicate.ledger != new.statement.predicate.ledger:
        return "they are heads of two ledgers"
    if old.size > new.size:
        return f"the new head is over {new.size} claims, the old one over {old.size}"
    # `fromhex` cannot fail here: the documents were validated as hexadecimal when they were read.
    roots = [(each.size, bytes.fromhex(each.root)) for each in (old, new)]
    try:
        shown = is_consistent(roots[0], roots[1], [bytes.fromhex(each) for each in proof.path])
    except ClaimError as error:
        return str(error)
    return None if shown else "the proof does not show that what the old head covers is still there"
