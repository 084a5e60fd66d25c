"""The way from a mark to a dated verdict on the command line, and what is refused on it."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from cli_calls import ROOT, Said, call, embed, python, refused
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from safetensors.numpy import load_file, save_file

from authority import LocalAuthority, some_claim
from clock import AFTER_STAMPS_TEXT, NEXT_YEAR
from countermark.claims.signed import Claim
from countermark.claims.signing import load_private_key, write_key_pair

AHEAD, PAST = AFTER_STAMPS_TEXT, "2020-01-01"


@dataclass(frozen=True)
class Made:
    """A folder in which an owner and a registry did all that they should.

    `m.safetensors` with `acme.key` (64 bits), `claim.json`, `acme.pem`, `registry.pem`,
    `claims.db` with a stamped head, `head.json`, and `root.pem`, the authority's certificate.
    """

    folder: Path
    authority: LocalAuthority


@pytest.fixture(scope="module")
def dated(tmp_path_factory: pytest.TempPathFactory, authority: LocalAuthority) -> Made:
    folder = tmp_path_factory.mktemp("dated")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert call(*embed(bits="64", epochs="3", out="m.safetensors", key="acme.key")).code == 0
        said(
            "claim keygen acme", "claim keygen registry",
            ["claim", "new", "--key", "acme.key", "--model-file", "m.safetensors", "--owner",
             "ACME Inc.", "--out", "claim.json"],
            "claim sign claim.json --private-key acme.pem",
            "ledger init claims.db --operator registry.pub",
        )  # fmt: skip
        stamped(authority, "claim.json")
        said(
            "ledger add claim.json --ledger claims.db",
            "ledger export --ledger claims.db --out head.json --private-key registry.pem",
        )
        stamped(authority, "head.json")
        said("ledger add head.json --ledger claims.db")
        shutil.copy(authority.root, "root.pem")
    return Made(folder, authority)


@pytest.fixture
def case(dated: Made, here: Path) -> Path:
    """A copy of it to work in."""
    shutil.copytree(dated.folder, here, dirs_exist_ok=True)
    return here


def said(*lines: str | list[str]) -> list[Said]:
    found = [call(*(line.split() if isinstance(line, str) else line)) for line in lines]
    assert [each.code for each in found] == [0] * len(lines), found
    return found


def stamped(authority: LocalAuthority, name: str) -> None:
    """Through files, as an authority without a network would be asked."""
    said(f"claim timestamp {name} --request {name}.tsq")
    Path(f"{name}.tsr").write_bytes(authority.reply(Path(f"{name}.tsq").read_bytes()))
    said(f"claim timestamp {name} --response {name}.tsr")


def verify(*more: str, claim: str = "claim.json", suspect_date: str = AHEAD) -> Said:
    return call(
        "verify", "m.safetensors", "--key", "acme.key", "--claim", claim, "--authority",
        "root.pem", "--suspect-date", suspect_date, "--json", *more,
    )  # fmt: skip


# --- the way


def test_a_dated_claim_makes_a_short_mark_evidence(case: Path) -> None:
    assert call("verify", "m.safetensors", "--key", "acme.key").code == 3
    found = verify("--signer", "acme.pub", "--ledger", "claims.db")
    assert (found.code, found.err) == (0, "")
    dating = found.json["dating"]
    assert (dating["commitments"], dating["signer"], dating["why"]) == (1, "pinned", None)
    assert dating["authorities"] == ["CN=Pinned root"]
    assert dating["claim"] == Claim.load("claim.json").digest
    limits = " ".join(found.json["limits"])
    assert f"is not older than {AHEAD} is the examiner's statement" in limits


def test_a_suspect_older_than_the_claim_is_no_verdict(case: Path) -> None:
    found = verify("--ledger", "claims.db", suspect_date=PAST)
    assert found.code == 3
    assert "before 2020-01-01T00:00:00Z, 1 must" in found.json["reason"]


def test_a_claim_is_checked_under_a_policy(case: Path) -> None:
    all_of = ["--signer", "acme.pub", "--authority", "root.pem", "--before", AHEAD, "--key",
              "acme.key", "--model-file", "m.safetensors"]  # fmt: skip
    found = call("claim", "check", "claim.json", *all_of, "--json")
    assert (found.code, found.json["outcome"]) == (0, "accepted")
    assert [each["check"] for each in found.json["findings"]] == [
        "intact", "of the model", "of the key", "signed by", "committed before"
    ]  # fmt: skip
    assert call("claim", "check", "claim.json").code == 3
    assert call("claim", "check", "claim.json", "--signer", "acme.pub").code == 3
    assert call("claim", "check", "claim.json", "--signer", "registry.pub").code == 1
    late = [PAST if each == AHEAD else each for each in all_of]
    assert call("claim", "check", "claim.json", *late).code == 1


def test_a_ledger_is_searched_verified_and_exported(case: Path) -> None:
    (found,) = said("ledger find --ledger claims.db --model-file m.safetensors --out found --json")
    (row,) = found.json["found"]
    assert (row["place"], row["digest"]) == (0, Claim.load("claim.json").digest)
    assert Claim.load("found/claim-0.json") == Claim.load("claim.json")
    assert call("ledger", "find", "--ledger", "claims.db", "--digest", "00" * 32).code == 1
    checked = call(
        "ledger", "verify", "--ledger", "claims.db", "--since", "head.json", "--authority",
        "root.pem", "--json",
    )  # fmt: skip
    assert (checked.code, checked.json["limits"]) == (0, [])
    assert call("ledger", "verify", "--ledger", "claims.db").code == 3


def test_whoever_keeps_heads_sees_without_the_ledger_that_it_only_grew(case: Path) -> None:
    export = "ledger export --ledger claims.db --private-key registry.pem --out later.json"
    said(f"{export} --since head.json --proof proof.json")
    asked = ["ledger", "grown", "head.json", "later.json", "--proof", "proof.json", "--operator"]
    assert call(*asked, "registry.pub", "--json").json["only_adds"]
    assert "not signed by the ledger's key" in call(*asked, "acme.pub").out
    assert call(*asked, "acme.pub").code == 1
    back = ["ledger", "grown", "later.json", "head.json", *asked[4:], "registry.pub"]
    assert call(*back).code == 0  # the same claims
    whole = json.loads(Path("proof.json").read_text())
    Path("proof.json").write_text(json.dumps(whole | {"path": ["00" * 32]}))
    changed = call(*asked, "registry.pub")
    assert (changed.code, "does not show" in changed.out) == (1, True)
    for wrong in (whole | {"path": ["zz"]}, whole | {"path": 3}, whole | {"colour": 1}, []):
        Path("proof.json").write_text(json.dumps(wrong))
        refused([*asked, "registry.pub"], "expected a proof that a ledger only grew", case)
    refused([*export.split(), "--proof", "new.json"], "--since an older head", case)


def test_private_keys_can_be_encrypted(case: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("pass").write_text("correct horse\n")
    monkeypatch.setenv("COUNTERMARK_PASSPHRASE_FILE", "pass")
    said("claim keygen sealed --encrypt", "claim sign head.json --help")
    some_claim().save("fresh.json")
    said("claim sign fresh.json --private-key sealed.pem")
    monkeypatch.delenv("COUNTERMARK_PASSPHRASE_FILE")
    refused(
        ["claim", "sign", "fresh.json", "--private-key", "sealed.pem"], "is encrypted or is not",
        case,
    )  # fmt: skip


def test_evidence_is_checked_without_torch_and_scipy(case: Path) -> None:
    blocked = "import sys; sys.modules['torch'] = sys.modules['scipy'] = None\n"
    blocked += "import clock; clock.put_clock_ahead()\n"
    blocked += "from countermark.cli import main; main()"
    believing = "--authority root.pem --signer acme.pub"
    for line in (
        f"claim check claim.json {believing} --before {AHEAD} --model-file m.safetensors --key acme.key",
        "ledger verify --ledger claims.db --since head.json",
        f"{BELIEVING} {AHEAD} --signer acme.pub --ledger claims.db",
    ):
        found = python(blocked, *line.split(), folder=case, paths=[ROOT / "tests"])
        assert found == call(*line.split())


# --- forgeries, each refused for its reason


def test_a_key_made_after_the_claim(case: Path) -> None:
    """A second key, learnt or drawn later, has another commitment than the claim."""
    said(embed(bits="64", epochs="3", out="late.safetensors", key="late.key"))
    refused(
        "verify m.safetensors --key late.key --claim claim.json --authority root.pem "
        f"--suspect-date {AHEAD} --ledger claims.db".split(),
        "the key was made after the claim, or is another one",
        case,
    )


def test_a_claim_of_the_key_by_somebody_else(case: Path) -> None:
    """A commitment is no secret: whoever read it can claim it under a name of his own."""
    document = json.loads(Claim.load("claim.json").payload)
    document["predicate"]["owner"] = "Mallory"
    with_payload(document)
    write_key_pair(Path("mallory"))
    Claim.load("back.json").with_signature(load_private_key(Path("mallory.pem"))).save(
        "theirs.json"
    )
    line = BELIEVING.replace("claim.json", "theirs.json")
    refused(f"{line} {AHEAD}".split(), "is a claim of 'Mallory', the key's owner is", case)


def test_a_back_dated_claim(case: Path, dated: Made) -> None:
    """The date in a claim is the claimant's word; signed and stamped later, it stays late."""
    document = json.loads(Claim.load("claim.json").payload)
    document["predicate"]["date"] = "2001-01-01T00:00:00Z"
    forged = with_payload(document)
    assert "was changed after it was signed" in check_of(forged, 1)
    again = Claim.load("back.json").with_signature(load_private_key(Path("acme.pem")))
    again = dated.authority.stamp(again)
    again.save("again.json")
    said("ledger add again.json --ledger claims.db")
    found = verify("--ledger", "claims.db", claim="again.json")
    assert found.code == 3
    assert "0 pinned authorities stamped a tree head with this claim" in found.json["reason"]


def with_payload(document: object) -> str:
    """The claim with another statement, under its signatures (forged.json) and none (back.json)."""
    import base64

    import rfc8785

    claim = json.loads(Path("claim.json").read_bytes())
    claim["envelope"]["payload"] = base64.b64encode(rfc8785.dumps(document)).decode()
    claim["timestamps"] = []
    Path("forged.json").write_bytes(rfc8785.dumps(claim))
    claim["envelope"]["signatures"] = []
    Path("back.json").write_bytes(rfc8785.dumps(claim))
    return "forged.json"


def check_of(claim: str, code: int, *more: str) -> str:
    """What the findings of `claim check` say that do not hold."""
    found = call("claim", "check", claim, "--json", *more)
    assert found.code == code, found
    return " ".join(each["reason"] for each in found.json["findings"] if each["holds"] is False)


def test_a_replayed_signature_and_a_replayed_stamp(case: Path) -> None:
    theirs, mine = json.loads(Path("claim.json").read_bytes()), some_claim()
    document = json.loads(mine.to_bytes())
    document["envelope"]["signatures"] = theirs["envelope"]["signatures"]
    Path("replayed.json").write_bytes(Claim.model_validate_json(json.dumps(document)).to_bytes())
    assert "the signature belongs to another one" in check_of("replayed.json", 1)
    signed = some_claim(Ed25519PrivateKey.generate())
    signed.with_timestamp(Claim.load("claim.json").timestamp_responses[0]).save("stamped.json")
    assert "is of something else" in check_of("stamped.json", 1)


def test_a_swapped_model_digest(case: Path) -> None:
    document = json.loads(Claim.load("claim.json").payload)
    document["subject"][0]["digest"]["merkleSha256"] = "00" * 32
    assert "was changed after it was signed" in check_of(with_payload(document), 1)
    said(embed(scheme="none", out="other.safetensors", key=None))
    assert "the model is" in check_of("claim.json", 1, "--model-file", "other.safetensors")


def test_a_thousand_commitments_by_one_claimant(case: Path, dated: Made) -> None:
    """Sixty here: p is multiplied by them, whoever signed, and by the signer's where he is known.

    `test_dating` has the thousand.
    """
    from countermark.claims.ledger import Ledger

    thief, acme = Ed25519PrivateKey.generate(), load_private_key(Path("acme.pem"))
    with Ledger("claims.db") as ledger:
        for signer in [thief] * 50 + [acme] * 9:
            ledger.add(some_claim(signer))
    unknown = verify("--ledger", "claims.db").json
    pinned = verify("--ledger", "claims.db", "--signer", "acme.pub").json
    alone = call("verify", "m.safetensors", "--key", "acme.key", "--assume-dated", "--json").json
    assert (unknown["dating"]["commitments"], pinned["dating"]["commitments"]) == (60, 10)
    assert unknown["log10_p"] == pytest.approx(alone["log10_p"] + 1.778, abs=1e-3)
    assert pinned["log10_p"] == pytest.approx(alone["log10_p"] + 1, abs=1e-9)


def test_a_time_authority_of_the_claimants_own(case: Path, other_authority: LocalAuthority) -> None:
    claim = some_claim(load_private_key(Path("acme.pem")))
    other_authority.stamp(claim).save("own.json")
    reason = check_of("own.json", 1, "--authority", "root.pem", "--before", AHEAD)
    assert "undated: 1 time stamps, none of them by an authority that was pinned" in reason


def test_a_changed_ledger_dates_nothing(case: Path) -> None:
    import sqlite3

    with sqlite3.connect("claims.db") as connection:
        connection.execute("UPDATE nodes SET hash = zeroblob(32)")
    connection.close()
    found = verify("--ledger", "claims.db")
    assert found.code == 3
    assert "the ledger was changed" in found.json["reason"]


# --- the released file, signed by OpenSSF model signing


def released(claim: str = "claim.json", model: str = "m.safetensors", signer: str = "release.pub",
             signature: str = "m.sig") -> Said:  # fmt: skip
    return call(
        "claim", "check", claim, "--model-file", model, "--model-signature", signature,
        "--model-signer", signer, "--signer", "acme.pub", "--authority", "root.pem", "--before",
        AHEAD, "--json",
    )  # fmt: skip


def test_a_released_file_is_signed_beside_its_claim(case: Path) -> None:
    said("claim keygen release --for-files", "claim keygen other --for-files")
    said(f"{SIGN_MODEL} release.pem")
    found = released()
    assert (found.code, found.err) == (0, "")
    assert "model signed by" in [each["check"] for each in found.json["findings"]]
    shutil.copy("m.safetensors", "renamed.safetensors")
    Path("link.safetensors").symlink_to("m.safetensors")
    said("claim sign-model link.safetensors --private-key release.pem --out link.sig")
    for model, signature in (("renamed", "m"), ("link", "m"), ("m", "link")):
        found = released(model=f"{model}.safetensors", signature=f"{signature}.sig")
        assert found.code == 0, found
    assert "it is no signature by this key" in failed(released(signer="other.pub"))
    save_file(load_file("m.safetensors"), "renamed.safetensors", metadata={"format": "pt"})
    reason = failed(released(model="renamed.safetensors"))
    assert "is another file than the one that was signed" in reason


def failed(found: Said) -> str:
    """Why the file is not accepted, which is all that fails: the claim is about its tensors."""
    assert found.code == 1, found
    (finding,) = (each for each in found.json["findings"] if each["holds"] is False)
    assert finding["check"] == "model signed by"
    return str(finding["reason"])


def test_a_signature_of_other_content_is_told_from_a_changed_one(case: Path) -> None:
    said("claim keygen release --for-files")
    said(f"{SIGN_MODEL} release.pem")
    whole = json.loads(Path("m.sig").read_bytes())
    drawn = random.Random(8)  # noqa: S311
    for _ in range(30):
        content = bytearray(json.dumps(whole).encode())
        content[drawn.randrange(len(content))] ^= 1 << drawn.randrange(7)
        Path("m.sig").write_bytes(content)
        found = released()
        assert found.code in (0, 1, 2), found
        assert "internal error" not in found.err
        if found.code == 0:  # what the signature does not cover: names of fields that are optional
            assert (
                json.loads(content)["dsseEnvelope"]["payload"] == (whole["dsseEnvelope"]["payload"])
            )
    whole["dsseEnvelope"]["signatures"][0]["sig"] = "AAAA"
    Path("m.sig").write_text(json.dumps(whole))
    assert "not by this key, or was changed" in failed(released())


OF_FILE = "check claim.json --model-file m.safetensors --model-signature"
SIGN_MODEL = "claim sign-model m.safetensors --out m.sig --private-key"


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("sign-model m.safetensors --private-key acme.pem --out m.sig", "another kind of key"),
        ("sign-model m.safetensors --private-key k1.pem --out m.sig", "another kind of key"),
        ("sign-model m.safetensors --private-key acme.pub --out m.sig", "no key that opens"),
        ("sign-model m.safetensors --private-key release.pem --out claim.json", "exists"),
        ("sign-model acme.key --private-key release.pem --out m.sig", "acme.key is no file"),
        ("check claim.json --model-signature claim.json", "go together"),
        (f"{OF_FILE} m.safetensors --model-signer release.pub", "expected an OpenSSF model signa"),
        (f"{OF_FILE} claim.json --model-signer acme.pub", "another kind of key"),
    ],
)
def test_what_no_released_file_is_signed_with(case: Path, line: str, says: str) -> None:
    said("claim keygen release --for-files")
    curve = "ecparam -name secp256k1 -genkey -noout -out k1.pem"
    subprocess.run(["openssl", *curve.split()], check=True, capture_output=True)
    refused(["claim", *line.split()], says, case)


def test_model_signing_is_an_extra(case: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said("claim keygen release --for-files")
    monkeypatch.setitem(sys.modules, "model_signing", None)
    refused(
        f"{SIGN_MODEL} release.pem".split(),
        "OpenSSF model signing needs an extra: pip install 'countermark[evidence]'", case,
    )  # fmt: skip


def test_an_encrypted_release_key(case: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("pass").write_text("correct horse\n")
    monkeypatch.setenv("COUNTERMARK_PASSPHRASE_FILE", "pass")
    said("claim keygen release --for-files --encrypt")
    monkeypatch.delenv("COUNTERMARK_PASSPHRASE_FILE")
    refused(f"{SIGN_MODEL} release.pem".split(), "no key that opens", case)
    monkeypatch.setenv("COUNTERMARK_PASSPHRASE_FILE", "pass")
    said(f"{SIGN_MODEL} release.pem")
    assert released().code == 0


# --- what cannot be right

OF = "verify m.safetensors --key acme.key --claim claim.json"
BELIEVING = f"{OF} --authority root.pem --suspect-date"
BAD: list[tuple[str, str]] = [
    ("verify m.safetensors --key acme.key --ledger claims.db", "give --claim FILE"),
    (OF, "--claim needs --authority PEM"),
    (f"{OF} --authority acme.pub --suspect-date AHEAD", "acme.pub holds no certificate"),
    (f"{BELIEVING} soon", "expected a day such as 2026-05-31"),
    (f"{BELIEVING} NEXT_YEAR --ledger claims.db", "the suspect date, "),
    (f"{BELIEVING} NEXT_YEAR --ledger claims.db", "is in the future: it is "),
    (
        "claim check claim.json --signer acme.pub --authority root.pem --before NEXT_YEAR",
        "is in the future",
    ),
    (f"{BELIEVING} AHEAD --ledger none.db", "there is no ledger at"),
    (f"{BELIEVING} AHEAD --signer registry.pub", "by none of the pinned keys"),
    (
        "claim new --key acme.key --model-file m.safetensors --owner Mallory --out new.json",
        "the key's owner is 'ACME Inc.'",
    ),
    ("claim sign claim.json --private-key registry.pem", "a stamp is over the signatures"),
    ("claim sign claim.json --private-key acme.pub", "holds no private key that opens"),
    ("claim sign m.safetensors --private-key acme.pem", "expected a claim or a tree head"),
    ("claim timestamp claim.json", "one of --request, --response and --url"),
    ("claim timestamp claim.json --request claim.json", "claim.json exists"),
    ("claim timestamp claim.json --response head.json.tsr", "is of something else"),
    ("claim timestamp claim.json --response m.safetensors", "more than 65,536 bytes"),
    ("claim timestamp claim.json --url http://127.0.0.1:9/", "does not answer"),
    ("claim check claim.json --authority root.pem", "--authority and --before go together"),
    ("claim check head.json", "expected a file of type countermark/claim/v1"),
    ("claim keygen acme", "never overwritten"),
    ("ledger init claims.db --operator registry.pub", "never made over anything"),
    ("ledger add m.safetensors --ledger claims.db", "expected a claim or a tree head"),
    ("ledger add claim.json --ledger none.db", "there is no ledger at"),
    ("ledger find --ledger claims.db", "claims are found by"),
    ("ledger find --ledger claims.db --commitment f602e1fa", "expected 64 digits"),
    ("ledger init m.safetensors/claims.db --operator acme.pub", "is no folder"),
    ("ledger verify --ledger claims.db --since claim.json", "countermark/tree-head/v1"),
    ("ledger export --ledger claims.db --out x.json --private-key acme.pem", "is not the key of"),
    (
        "ledger export --ledger claims.db --out head.json --private-key registry.pem",
        "head.json exists",
    ),
]


@pytest.mark.parametrize(("line", "says"), BAD, ids=[line for line, _ in BAD])
def test_what_cannot_be_right_is_refused(case: Path, line: str, says: str) -> None:
    dates = {"AHEAD": AHEAD, "NEXT_YEAR": NEXT_YEAR}
    refused([dates.get(word, word) for word in line.split()], says, case)


def test_a_model_without_the_mark_is_not_claimed(case: Path) -> None:
    said(embed(scheme="none", out="other.safetensors", key=None, seed="4"))
    refused(
        ["claim", "new", "--key", "acme.key", "--model-file", "other.safetensors", "--owner",
         "ACME Inc.", "--out", "new.json"],
        "the mark of this key is not in it",
        case,
    )  # fmt: skip


# --- two owners


def test_a_stolen_copy_that_the_thief_marked_anew(case: Path, authority: LocalAuthority) -> None:
    """Decided for the owner, though only the thief has his claim stamped."""
    said(
        # The thief's training costs the owner a tenth of his bits: enough are left of 256.
        embed(bits="256", epochs="4", owner="Beta", out="b.safetensors", key="b.key"),
        embed(
            bits="128",
            epochs="3",
            start="b.safetensors",
            owner="Thief",
            out="s.safetensors",
            key="s.key",
        ),
    )
    for name, owner, key in (("b", "Beta", "registry"), ("s", "Thief", "acme")):
        said(
            ["claim", "new", "--key", f"{name}.key", "--model-file", f"{name}.safetensors", "--owner",
             owner, "--out", f"{name}.json"],
            f"claim sign {name}.json --private-key {key}.pem",
        )  # fmt: skip
    stamped(authority, "s.json")
    owner = "--key b.key --claim b.json --model-file b.safetensors"
    copy = "--key s.key --claim s.json --model-file s.safetensors --authority root.pem"
    for line, code, outcome in (
        (f"dispute s.safetensors {owner} {copy} --json", 0, "first"),
        (f"dispute s.safetensors {copy} {owner} --json", 1, "second"),
        (f"dispute b.safetensors {owner} {copy} --json", 0, "first"),
    ):
        found = call(*line.split())
        assert (found.code, found.json["outcome"]) == (code, outcome), found
        readings = {(each["key"], each["model"]): each["found"] for each in found.json["readings"]}
        assert sum(readings.values()) == (5 if "dispute s" in line else 4)
    wrong = copy.replace("s.safetensors", "m.safetensors")
    for line, says in (
        (f"dispute s.safetensors {owner} {wrong}", "the second claim is about the model"),
        (f"dispute s.safetensors {owner}", "give --key, --claim and --model-file twice"),
        (f"dispute s.safetensors {owner} {owner}", "both parties show one key"),
    ):
        refused(line.split(), says, case)
