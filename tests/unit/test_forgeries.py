"""Keys made to fit a victim's model: whole, claimed and stamped, and refused for their reason.

Claims that were back-dated, replayed or exchanged are in `tests/e2e/test_evidence.py`, changed
ledgers in `test_audit.py`.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from keys import InMemory, one_line
from readers import SHAPES, fitted_key, material
from safetensors.numpy import load_file, save_file

from authority import LocalAuthority, some_claim
from clock import AFTER_STAMPS, BEFORE_STAMPS
from countermark.claims.audit import Audit, audit_ledger
from countermark.claims.dating import ExaminerTrust, date_key
from countermark.claims.ledger import Ledger
from countermark.claims.signed import Claim
from countermark.claims.signing import compute_key_id
from countermark.errors import KeyFileError
from countermark.keys.key import Key
from countermark.results.verdict import Verdict, VerificationOptions
from countermark.schemes.uchida.scheme import Uchida
from countermark.verification.verify import examine

THIEF, OPERATOR = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
VICTIM = {"a": np.random.default_rng(5).normal(size=SHAPES["a"]).astype(np.float32)}


def stamped_ledger(folder: Path, claims: list[Claim], authority: LocalAuthority) -> Audit:
    with Ledger.create(str(folder / "l.db"), compute_key_id(OPERATOR.public_key())) as ledger:
        for each in claims:
            ledger.add(each)
        ledger.add(authority.stamp(ledger.make_head().with_signature(OPERATOR)))
        return audit_ledger(ledger)


def judged(
    key: Key, folder: Path, authority: LocalAuthority, suspect_date: datetime, alpha: float
) -> Verdict:
    """What an examiner finds, who is shown a claim of this key in a ledger stamped today."""
    claim = some_claim(THIEF, commitment=key.commitment)
    believed = ExaminerTrust(suspect_date, [authority.pinned], [compute_key_id(THIEF.public_key())])
    found = date_key(claim, believed, stamped_ledger(folder, [claim], authority))
    return examine(InMemory(VICTIM), key, VerificationOptions(alpha, dating=found))


def test_a_reader_learnt_on_the_victim(tmp_path: Path, authority: LocalAuthority) -> None:
    """It finds all of its bits, at the floor of its null; it is younger than the suspect."""
    key = fitted_key(VICTIM, 3)
    found = judged(key, tmp_path, authority, BEFORE_STAMPS, 1e-3)
    assert found.matched == found.bits
    assert (found.outcome, found.forgery_bits) == ("no_verdict", 0.0)
    assert "holds hidden units cannot be seen in the suspect's shapes" in found.reason


def drawn_keys(count: int) -> list[Key]:
    """Keys that a cheat draws, the same in every run; the one that reads most bits right last."""
    scheme = Uchida(layer="a", bits=128)
    keys = [scheme.generate_key(SHAPES, owner="Thief", material=material(n)) for n in range(count)]
    return sorted(keys, key=lambda key: scheme.extract(VICTIM, key).match_count)


def test_a_key_that_was_searched_for(tmp_path: Path, authority: LocalAuthority) -> None:
    """Inversion: secrets are drawn until one reads well. Good enough for alpha, not for 80 bits."""
    found = judged(drawn_keys(400)[-1], tmp_path, authority, BEFORE_STAMPS, 0.05)
    assert found.log10_p is not None
    assert found.log10_p < math.log10(0.05)
    assert found.outcome == "no_verdict"
    assert "a key that fits could be found by trying" in found.reason


def test_a_key_that_was_picked_out_of_many_that_were_claimed(
    tmp_path: Path, authority: LocalAuthority
) -> None:
    """1,000 keys were claimed in time, before the victim's model was made: p is times 1,000."""
    keys, name = drawn_keys(1000), compute_key_id(THIEF.public_key())
    best = keys[-1]
    claim = some_claim(THIEF, commitment=best.commitment)
    one = stamped_ledger(tmp_path, [claim], authority)
    thousand = replace(one, commitments={key.commitment: {name} for key in keys})
    for signers in ((name,), ()):
        believed = ExaminerTrust(AFTER_STAMPS, [authority.pinned], signers)
        found = date_key(claim, believed, thousand)
        assert (found.committed is not None, found.multiplier) == (True, 1000)
        alone = examine(InMemory(VICTIM), best, VerificationOptions(0.01, assume_dated=True))
        many = examine(InMemory(VICTIM), best, VerificationOptions(0.01, dating=found))
        assert (alone.outcome, many.outcome) == ("owned", "not_proven")


def test_a_key_whose_signs_were_flipped(tmp_path: Path) -> None:
    """Rows and message follow from secret and commitment: a key holds no signs to flip."""
    (key,) = drawn_keys(1)
    key.save(tmp_path / "k.key")
    tensors = load_file(tmp_path / "k.key" / "key.safetensors")
    assert set(tensors) == {"secret"}
    for changed in (
        tensors | {"frozen.rows": np.sign(VICTIM["a"])},
        tensors | {"rows": np.sign(VICTIM["a"])},
        tensors | {"secret": tensors["secret"] ^ 1},
    ):
        save_file(changed, tmp_path / "k.key" / "key.safetensors")
        header = (tmp_path / "k.key" / "key.json").read_text()
        (tmp_path / "k.key" / "key.json").write_text(_with_digest(header, tmp_path / "k.key"))
        with pytest.raises(KeyFileError) as caught:
            Key.load(tmp_path / "k.key")
        one_line(caught.value)


def _with_digest(header: str, folder: Path) -> str:
    document = json.loads(header)
    content = (folder / "key.safetensors").read_bytes()
    document["tensors_sha256"] = hashlib.sha256(content).hexdigest()
    return json.dumps(document)
