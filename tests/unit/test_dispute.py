"""Between two owners: every pattern of marks and dates, and what cannot be told."""

from __future__ import annotations

import time
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from keys import one_line
from safetensors.numpy import load_file, save_file

from authority import LocalAuthority, some_claim
from countermark.checkpoints import ModelDigest
from countermark.claims.audit import Audit
from countermark.claims.dispute import PLACES, SIDES, DisputeDecision, Party, Place, Side, resolve
from countermark.claims.signed import Claim, TreeHead
from countermark.errors import ClaimError
from countermark.keys.key import Key, KeyMaterial
from countermark.results.subject import Subject
from countermark.results.test_result import TestResult
from countermark.results.verdict import KeyIdentity, Verdict
from countermark.stamping import stamp
from countermark.stamping.making import StampPaths
from countermark.verification.dispute import (
    PartyExhibits,
    explain_doubt,
    find_copies,
    make_dispute_options,
    read_parties,
)

A, B = some_claim(Ed25519PrivateKey.generate()), some_claim(Ed25519PrivateKey.generate())
OPERATOR = Ed25519PrivateKey.generate()
FIRM, SHORT, LEARNT = 200.0, 40.0, 0.0  # forgery bits


def party(claim: Claim) -> Party:
    return Party(claim, claim.commitment, ModelDigest("cd" * 32, 4))


def readings(
    found: str, bits: tuple[float, float] = (FIRM, FIRM)
) -> dict[tuple[Side, Place], Verdict]:
    """Six letters, first's mark in suspect, first's and second's model, then second's likewise:
    y found, n not, ? no verdict."""
    outcomes = {"y": "owned", "n": "not_proven", "?": "no_verdict"}
    letters = iter(found.replace(" ", ""))
    made: dict[tuple[Side, Place], Verdict] = {}
    for side, strength in zip(SIDES, bits, strict=True):
        for place in PLACES:
            letter = next(letters)
            made[side, place] = Verdict(
                outcomes[letter], "why", KeyIdentity("uchida", "00" * 32, "X"), Subject("s"), 256,  # type: ignore[arg-type]
                forgery_bits=strength if letter == "y" else 0.0,
                result=TestResult("fair_coin", "", -30.0, -77.0),
            )  # fmt: skip
    return made


def listed(claims: list[Claim], heads: list[TreeHead]) -> Audit:
    """A ledger of these claims in this order, as an audit finds it."""
    return Audit(
        size=len(claims), root="", faults=(), checkpoint=None, stamps=(), heads=tuple(heads),
        places={claim.digest: n for n, claim in enumerate(claims)},
        commitments={claim.commitment: set(claim.signers) for claim in claims},
    )  # fmt: skip


def head(size: int, authority: LocalAuthority) -> TreeHead:
    return authority.stamp(
        TreeHead.make_unsigned("ab" * 32, size, "cd" * 32).with_signature(OPERATOR)
    )


def resolved(
    found: str,
    bits: tuple[float, float] = (FIRM, FIRM),
    order: tuple[Claim, ...] = (),
    authority: LocalAuthority | None = None,
) -> DisputeDecision:
    """With claims of this order in a ledger, which a pinned authority stamped after the first."""
    audited = listed(list(order), [head(1, authority)]) if authority else None
    believed = [authority.pinned] if authority else []
    return resolve((party(A), party(B)), readings(found, bits), believed, audited)


@cache
def heads(authority: LocalAuthority) -> list[TreeHead]:
    """Two heads, stamped so far apart that the authority's accuracy leaves no doubt."""
    first = head(1, authority)
    time.sleep(3.2)
    return [first, head(2, authority)]


def later(
    found: str, bits: tuple[float, float], authority: LocalAuthority, early: Claim = A
) -> str:
    """Both in the ledger, one under a stamped head before the other."""
    order = [A, B] if early is A else [B, A]
    audited = listed(order, heads(authority))
    marks = readings(found, bits)
    return resolve((party(A), party(B)), marks, [authority.pinned], audited).outcome


@pytest.mark.parametrize(
    ("found", "outcome", "says"),
    [
        ("yyy yny", "first", "the second's model has both marks and so is a copy"),
        ("yyn yyy", "second", "the first's model has both marks"),
        ("yyy yyy", "undecidable", "both had access to each other's models"),
        ("yyn yny", "undecidable", "it may come from both"),
        ("yyn nny", "first", "only the first's was found"),
        ("nyn yny", "second", "only the second's was found"),
        ("nyy yny", "first", "it is a copy of the first's"),
        ("nyn nny", "neither", "neither mark was found in the suspect"),
        ("ynn nny", "undecidable", "the first's mark is not in the first's own model"),
        ("yy? yny", "undecidable", "a reading says nothing: the first's key in the second: why"),
    ],
)  # fmt: skip
def test_firm_marks_decide_without_dates(found: str, outcome: str, says: str) -> None:
    got = resolved(found)
    assert got.outcome == outcome
    assert says in got.reason
    assert got.exit_code == {"first": 0, "second": 1, "neither": 1, "undecidable": 3}[outcome]


def test_a_stolen_copy_that_was_marked_anew_is_the_owners(authority: LocalAuthority) -> None:
    """Also where the thief's claim is in the ledger first, and the owner's never."""
    assert resolved("yyy yny", order=(B,), authority=authority).outcome == "first"


def test_a_reader_that_was_learnt_on_the_victim_decides_nothing_undated(
    authority: LocalAuthority,
) -> None:
    """The thief trains a reader that finds his bits in everybody's model, the owner's too."""
    forged = "yyy yyy"
    got = resolved(forged, (FIRM, LEARNT))
    assert got.outcome == "first"
    assert "could have been made to fit afterwards" in got.reason
    assert later(forged, (FIRM, LEARNT), authority, B) == "first"
    assert resolved("nyn yyy", (FIRM, LEARNT)).outcome == "undecidable"
    assert resolved(forged, (LEARNT, LEARNT)).outcome == "undecidable"


def test_short_marks_are_decided_by_whose_claim_was_in_the_ledger_first(
    authority: LocalAuthority,
) -> None:
    copied, short = "yyy yny", (SHORT, SHORT)
    got = resolved(copied, short)
    assert got.outcome == "undecidable"
    assert "no stamped ledger shows" in got.reason
    assert later(copied, short, authority) == "first"
    assert later("yyn nny", short, authority) == "first"
    assert later("nyn yyy", short, authority) == "undecidable"
    assert resolved("yyn nny", short).outcome == "undecidable"


@pytest.mark.parametrize("bits", [LEARNT, 20.0])
def test_no_date_makes_up_for_a_key_that_is_found_in_minutes(
    bits: float, authority: LocalAuthority
) -> None:
    """What was published before it was claimed, a key can be made to fit in between."""
    for found in ("yyy yny", "yyn nny"):
        assert later(found, (bits, bits), authority) == "undecidable"


def test_a_claim_in_the_ledger_is_not_older_than_what_nobody_dated(
    authority: LocalAuthority,
) -> None:
    """Against a model whose owner never claimed it in time a key can be picked at leisure."""
    picked = (FIRM, SHORT)
    assert resolved("yyn yyy", picked, (B,), authority).outcome == "undecidable"
    assert resolved("yyn nny", (SHORT, FIRM), (A,), authority).outcome == "undecidable"


def test_a_mark_that_reordered_neurons_hide_leaves_it_open(tmp_path: Path) -> None:
    """Rows and columns in another order, which costs nothing, and a mark of the thief on top.

    Secrets are fixed: one in a million reads an order that hides its mark.
    """
    first, second, third = (KeyMaterial(bytes([n]) * 32, bytes(16)) for n in (1, 2, 3))
    drawn, order = np.random.default_rng(1), np.random.default_rng(2).permutation(256)
    files = {name: tmp_path / f"{name}.safetensors" for name in ("base", "own", "taken", "copy")}

    def fresh() -> None:
        made = (drawn.normal(0, 0.05, (256, 256)).astype(np.float32) for _ in range(2))
        save_file(dict(zip(("0.weight", "2.weight"), made, strict=True)), files["base"])

    fresh()
    stamp(
        files["base"],
        StampPaths(files["own"], tmp_path / "own.key"),
        owner="ACME Inc.",
        material=first,
    )
    own = load_file(files["own"])
    taken = {"0.weight": own["0.weight"][order], "2.weight": own["2.weight"][:, order]}
    save_file({name: np.ascontiguousarray(each) for name, each in taken.items()}, files["taken"])
    stamp(
        files["taken"],
        StampPaths(files["copy"], tmp_path / "copy.key"),
        owner="Beta Ltd.",
        material=second,
    )
    shown = [
        PartyExhibits(Key.load(tmp_path / f"{name}.key"), claim, files[name])
        for name, claim in (("own", A), ("copy", B))
    ]
    terms = make_dispute_options(1e-6, None)
    _, marks = read_parties(files["copy"], shown, terms, lambda file, _: nullcontext(file))
    found = "".join("y" if each.owned else "n" for each in marks.values())
    assert found == "nynyny"
    assert resolve((party(A), party(B)), marks).outcome == "second"
    why = explain_doubt(files["copy"], shown, marks)
    assert why == "in the order of the first's own model it has the first's, too"
    got = resolve((party(A), party(B)), marks, doubt=why)
    assert got.outcome == "undecidable"
    assert why in got.reason
    fresh()
    assert explain_doubt(files["base"], shown, marks) is None  # a stranger of the same shapes
    unknown = {"a": drawn.normal(0, 0.05, (256, 256)), "b": drawn.normal(0, 0.05, (64, 64))}
    save_file({name: each.astype(np.float32) for name, each in unknown.items()}, files["taken"])
    stamp(
        files["taken"],
        StampPaths(tmp_path / "odd.safetensors", tmp_path / "odd.key"),
        owner="ACME Inc.",
        material=third,
    )
    shown[0] = PartyExhibits(Key.load(tmp_path / "odd.key"), A, tmp_path / "odd.safetensors")
    assert "which cannot be undone" in (explain_doubt(files["taken"], shown, marks) or "")


LIKE = "400 of 512 neurons are the same"


@pytest.mark.parametrize(
    ("found", "copies", "early", "outcome"),
    [
        ("nyn yny", {"first": LIKE}, A, "undecidable"),  # poisoned and stamped by the second
        ("nyn yny", {"first": LIKE}, B, "second"),  # whose claim is the older one
        ("nyn yny", {}, A, "second"),  # and which is no copy of the first's
        ("yyn nny", {"second": LIKE}, B, "undecidable"),
        ("yyn nny", {"second": LIKE}, A, "first"),
        ("yyn nny", {"first": LIKE}, A, "first"),  # the first's mark is there
        ("nyn nny", {"first": LIKE}, A, "undecidable"),
        ("nyn nny", {"first": LIKE}, B, "neither"),
        ("nyn yyy", {"second": LIKE}, A, "second"),
    ],
)
def test_nothing_is_decided_against_the_older_owner_of_a_copy_without_its_mark(
    found: str, copies: dict[Side, str], early: Claim, outcome: str, authority: LocalAuthority
) -> None:
    order = [A, B] if early is A else [B, A]
    audited = listed(order, heads(authority))
    got = resolve((party(A), party(B)), readings(found), [authority.pinned], audited, copies=copies)
    assert got.outcome == outcome
    if outcome == "undecidable":
        (side,) = copies
        assert f"the suspect is a copy of the {side}'s own model" in got.reason
        assert "mark may have been removed" in got.reason
        assert LIKE in got.reason
        assert f"the suspect is like the {side}'s model: {LIKE}" in got.explain()
        assert got.to_json()["copies"] == copies


def test_a_party_without_a_date_and_a_mark_has_no_such_say(authority: LocalAuthority) -> None:
    """Whoever copies a model and says that it was his, without having dated it, changes nothing."""
    copies: dict[Side, str] = {"first": LIKE}
    both = party(A), party(B)
    assert resolve(both, readings("nyn yny"), copies=copies).outcome == "second"
    for order, claim in (([B], A), ([B], authority.stamp(A))):  # a stamp alone dates nothing
        audited = listed(order, [head(1, authority)])
        got = resolve((party(claim), party(B)), readings("nyn yny"), [authority.pinned], audited,
                      copies=copies)  # fmt: skip
        assert got.outcome == "second"
    audited = listed([A, B], heads(authority))
    unmarked = resolve(both, readings("nnn yny"), [authority.pinned], audited, copies=copies)
    before = resolve(both, readings("nnn yny"), [authority.pinned], audited)
    assert (unmarked.outcome, unmarked.reason) == (before.outcome, before.reason)
    # A thief who stamps nothing is not the older one for that.
    audited = listed([A], [head(1, authority)])
    got = resolve(both, readings("nyn yny"), [authority.pinned], audited, copies=copies)
    assert got.outcome == "undecidable"


def poisoned(file: Path, out: Path, share: float = 0.05) -> None:
    """What a thief makes of a model: columns behind dead units full of noise."""
    drawn, found = np.random.default_rng(5), load_file(file)
    for name, tensor in found.items():
        columns = drawn.permutation(tensor.shape[1])[: round(share * tensor.shape[1])]
        # Twenty standard deviations: with more a stamp would grow as large as the weights.
        tensor[:, columns] = drawn.normal(0, 1, (len(tensor), len(columns)))
        found[name] = tensor
    save_file(found, out)


@dataclass
class Workshop:
    """Where models are made, stamped and stolen."""

    folder: Path
    drawn: np.random.Generator

    def file(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"

    def begin(self, name: str, like: str = "", change: float = 0.3) -> Path:
        """A network of its own, or one that was trained on from another."""
        made = {each: self.drawn.normal(0, 0.05, (256, 256)) for each in ("0.weight", "2.weight")}
        if like:
            begun = load_file(self.file(like))
            made = {each: begun[each] + change * made[each] for each in made}
        save_file({each: made[each].astype(np.float32) for each in made}, self.file(name))
        return self.file(name)

    def stamp(self, source: str, out: str, secret: int) -> None:
        places = StampPaths(self.file(out), self.folder / f"{out}.key")
        material = KeyMaterial(bytes([secret]) * 32, bytes(16))
        stamp(self.file(source), places, owner="ACME Inc.", material=material)

    def shown(self, first: str, second: str) -> list[PartyExhibits]:
        return [
            PartyExhibits(Key.load(self.folder / f"{name}.key"), claim, self.file(name))
            for name, claim in ((first, A), (second, B))
        ]

    def settled(
        self, suspect: str, shown: list[PartyExhibits], authority: LocalAuthority, base: str = ""
    ) -> DisputeDecision:
        """With the first's claim in the ledger before the second's."""
        _, marks = read_parties(
            self.file(suspect),
            shown,
            make_dispute_options(1e-6, None),
            lambda file, _: nullcontext(file),
        )
        copies = find_copies(self.file(suspect), shown, marks, self.file(base) if base else None)
        audited = listed([A, B], heads(authority))
        parties = party(A), party(B)
        return resolve(parties, marks, [authority.pinned], audited, copies=copies)


def test_a_poisoned_copy_that_the_thief_stamps_is_not_the_thiefs(
    tmp_path: Path, authority: LocalAuthority
) -> None:
    shop = Workshop(tmp_path, np.random.default_rng(1))
    shop.begin("base")
    shop.stamp("base", "own", 1)
    poisoned(shop.file("own"), shop.file("dead"))
    shop.stamp("dead", "taken", 2)
    shown = shop.shown("own", "taken")
    got = shop.settled("taken", shown, authority)
    found = "".join("y" if each.owned else "n" for each in got.readings.values())
    assert found in {"nynyny", "yyyyny"}  # a reading that is bounded finds the first's, too
    assert got.outcome in {"undecidable", "first"}
    assert (got.outcome == "undecidable") == (found == "nynyny")
    if found == "nynyny":
        assert "as in fewer than one of a billion models" in got.reason
    # Another model of the second's own, and the first's claim is the older one all the same.
    shop.begin("other")
    shop.stamp("other", "others", 2)
    got = shop.settled("others", shop.shown("own", "others"), authority)
    assert (got.outcome, got.copies) == ("second", {})


def test_what_two_parties_have_from_one_base_is_told_from_a_copy_by_the_base(
    tmp_path: Path, authority: LocalAuthority
) -> None:
    """The base is older than both, so that likeness alone decides nothing; named, it is off."""
    shop = Workshop(tmp_path, np.random.default_rng(2))
    shop.begin("base")
    for name, secret in (("first", 1), ("second", 2)):
        shop.begin(f"{name}-tuned", like="base")
        shop.stamp(f"{name}-tuned", name, secret)
    shown = shop.shown("first", "second")
    got = shop.settled("second", shown, authority)
    assert got.outcome == "undecidable"
    assert "unless both models come of one older base, which the examiner can name" in got.reason
    got = shop.settled("second", shown, authority, base="base")
    assert (got.outcome, got.copies) == ("second", {})
    poisoned(shop.file("first"), shop.file("dead"))
    shop.stamp("dead", "taken", 3)
    got = shop.settled("taken", shop.shown("first", "taken"), authority, base="base")
    assert got.outcome != "second"  # a copy of the first's changes to the base


def test_a_stamp_alone_and_stamps_of_nobody_believed_count_nothing(
    authority: LocalAuthority, other_authority: LocalAuthority
) -> None:
    stamped, marks = authority.stamp(A), readings("yyy yny", (SHORT, SHORT))
    got = resolve((party(stamped), party(B)), marks, [authority.pinned])
    assert (got.outcome, got.counted) == ("undecidable", (None, None))
    assert got.stamped[0] is not None
    assert resolve((party(stamped), party(B)), marks, []).stamped == (None, None)
    older = authority.stamp(B)
    assert resolve((party(A), party(older)), marks, [authority.pinned],
                   listed([A], [head(1, authority)])).outcome == "undecidable"  # fmt: skip
    strange = listed([A], [head(1, other_authority)])
    got = resolve((party(A), party(B)), marks, [authority.pinned], strange)
    assert (got.outcome, got.counted) == ("undecidable", (None, None))
    hasty = listed([A, B], [head(1, authority), head(2, authority)])
    got = resolve((party(A), party(B)), marks, [authority.pinned], hasty)
    assert got.outcome == "undecidable"  # two stamps within the authority's accuracy
    both = listed([A, B], [head(2, authority)])
    got = resolve((party(A), party(B)), marks, [authority.pinned], both)
    assert got.outcome == "undecidable"  # under the same head neither is older


def test_the_claims_must_be_about_the_keys_and_models_that_are_shown() -> None:
    marks = readings("yyy yny")
    forged = A.envelope.model_copy(update={"signatures": B.envelope.signatures})
    for parties, says in (
        ((party(A), replace(party(B), commitment="00" * 32)), "the second claim is about the key"),
        ((replace(party(A), model=ModelDigest("00" * 32, 4)), party(B)), "first claim is about"),
        ((replace(party(A), model=ModelDigest("cd" * 32, 5)), party(B)), "first claim is about"),
        ((party(A), party(A)), "both parties show one key"),
        ((party(some_claim()), party(B)), "nobody signed"),
        ((party(A.model_copy(update={"envelope": forged})), party(B)), "another one"),
    ):
        with pytest.raises(ClaimError) as caught:
            resolve(parties, marks)
        assert says in one_line(caught.value)


def test_people_and_programs_are_told_the_same() -> None:
    got = resolved("yyy yny")
    told = got.to_json()
    assert told["owners"] == ["ACME Inc.", "ACME Inc."]
    assert [each["found"] for each in told["readings"]] == [True, True, True, True, False, True]
    said = got.explain()
    assert "reading second's mark in the first's model: not proven, log10 p -30.0" in said
    assert all(limit in said for limit in told["limits"])
