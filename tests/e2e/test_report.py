"""The report: one page for people, and a bundle that comes to the same figures again, offline."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from cli_calls import ROOT, Said, call, embed, listing, python, refused
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from numpy.typing import NDArray

from authority import LocalAuthority, some_claim
from clock import AFTER_STAMPS_TEXT, NEXT_YEAR
from countermark.checkpoints import compute_model_digest, open_weights, save_weights
from countermark.claims.ledger import Ledger
from countermark.claims.signed import Claim
from countermark.claims.signing import load_private_key, write_key_pair
from countermark.claims.statement import Commitment
from countermark.cli.report import _make_trigger_images
from countermark.errors import CountermarkError
from countermark.keys.key import Key, KeyMaterial
from countermark.report.bundle import replay_bundle
from countermark.report.measured import find_measured_form
from countermark.report.page import PageDetails, render_page
from countermark.report.record import Record, is_recomputed, make_record
from countermark.results.null_hypotheses import (
    FairCoin,
    FreshKeys,
    NullHypothesis,
    PermutedUnits,
    UnmarkedModels,
)
from countermark.results.reading import ReaderFacts, Reading
from countermark.results.subject import Subject
from countermark.results.verdict import KeyIdentity, VerificationOptions, judge
from countermark.schemes.drawn_triggers.adi import Adi
from countermark.training.models import build


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, authority: LocalAuthority) -> Path:
    """A folder with a dated key of 64 bits, and a report on the model that it marked."""
    folder = tmp_path_factory.mktemp("report")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert call(*embed(bits="64", epochs="3", out="m.safetensors", key="acme.key")).code == 0
        name = write_key_pair(Path("acme"))
        with open_weights("m.safetensors") as weights:
            digest = compute_model_digest(weights)
        key = Key.load("acme.key")
        commitment = Commitment(kind="C0", sha256=key.commitment)
        private = load_private_key(Path("acme.pem"))
        claim = Claim.make_unsigned(
            commitment, key.owner, digest.root, digest.tensors
        ).with_signature(private)
        claim.save("claim.json")
        with Ledger.create("claims.db", name) as ledger:
            ledger.add(some_claim(Ed25519PrivateKey.generate()))
            ledger.add(claim)
            ledger.add(authority.stamp(ledger.make_head().with_signature(private)))
        shutil.copy(authority.root, "root.pem")
        assert reported("report.html", "bundle").code == 0
    return folder


def reported(out: str, bundle: str, *more: str) -> Said:
    return call(
        "report", "m.safetensors", "--key", "acme.key", "--out", out, "--bundle", bundle,
        "--claim", "claim.json", "--authority", "root.pem", "--suspect-date", AFTER_STAMPS_TEXT,
        "--ledger", "claims.db", *more,
    )  # fmt: skip


@pytest.fixture
def case(whole: Path, here: Path) -> Path:
    shutil.copytree(whole, here, dirs_exist_ok=True)
    return here


class Seen(HTMLParser):
    """The tags, attributes and text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.words = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in {"src", "href"}]
        assert not [name for name, _ in attrs if name.startswith("on")]

    def handle_data(self, data: str) -> None:
        self.words += data


def test_the_page_quotes_what_was_measured_of_the_form_and_says_where(case: Path) -> None:
    words = Seen(Path("report.html").read_text()).words
    form = find_measured_form("uchida", Key.load("acme.key").fields)
    assert form is not None
    (first, *_) = form.unmarked
    for level, claims in first.claims.items():
        assert f"{claims} of {first.judged} at alpha {level} (95 % interval" in words
    for part in (first.source, first.track, first.group, form.robustness, form.robustness_source):
        assert part in words, part
    assert "no property of this one" in words


def test_of_a_form_that_was_not_measured_the_page_says_that(case: Path) -> None:
    replayed = replay_bundle(Path("bundle"))
    fields = Key.load("acme.key").fields | {"key_type": "direct"}
    about = PageDetails("P", 0.1, fields)
    words = Seen(render_page(replayed.record, replayed.verdict, {}, about).decode()).words
    assert "not measured for this form of the scheme" in words
    assert "What attacks leave of a mark was not measured" in words
    assert "of 100 at alpha" not in words


# --- triggers


def triggers_of(key: Key, folder: Path, name: str) -> str:
    """The page of a report on a host without a mark, the key opened."""
    save_weights(build("mlp", {}).state_dict(), folder / "m.safetensors")
    key.save(folder / f"{name}.key")
    words = ["report", "m.safetensors", "--model", "mlp", "--key", f"{name}.key"]
    closed = call(*words, "--out", f"{name}.html", "--bundle", name)
    assert closed.code in (1, 3), closed
    hidden = Path(f"{name}.html").read_text()
    assert "<img" not in hidden
    assert "The triggers are secret and not shown" in hidden
    opened = call(*words, "--out", f"{name}-open.html", "--bundle", f"{name}-open", "--open-key")
    assert opened.code == closed.code
    assert "the mark is burnt" in opened.err
    return Path(f"{name}-open.html").read_text()


def drawn(n: int) -> NDArray[np.uint8]:
    return np.random.default_rng(n).integers(0, 256, (n, 1, 28, 28), dtype=np.uint8)


def test_triggers_are_drawn_where_the_key_is_opened_and_only_there(here: Path) -> None:
    material = KeyMaterial.generate()
    key = Adi(10, 60).generate_key({"triggers": drawn(60)}, owner="ACME Inc.", material=material)
    text = triggers_of(key, here, "adi")
    assert (text.count('alt="trigger"'), text.count('alt="cover"')) == (12, 0)
    assert "keeps no pictures that they were made of" in text
    labels = key.draw_labels(60, 10)
    for label in labels[:12]:
        assert f"class {label} wanted, " in text


def test_triggers_are_drawn_beside_their_covers() -> None:
    """Of any key that keeps covers: what they are of is in the record alone."""
    key = replace(
        Adi(10, 4).generate_key(
            {"triggers": drawn(4)}, owner="ACME Inc.", material=KeyMaterial.from_test_seed(1)
        ),
        learnt={},
    )
    key = replace(key, frozen={**key.frozen, "covers": drawn(4)[::-1]})
    reading = SimpleNamespace(expected=(3, 1, 4, 1), read=(3, -1, 4, 2))
    shown = _make_trigger_images(key, cast(Record, SimpleNamespace(reading=reading)))
    assert [each.says for each in shown] == [
        "class 3 wanted, 3 answered", "class 1 wanted, no answer", "class 4 wanted, 4 answered",
        "class 1 wanted, 2 answered",
    ]  # fmt: skip
    assert shown[0].cover == shown[3].trigger
    assert shown[0].trigger == shown[3].cover


def test_the_page_says_all_of_it_and_loads_nothing(case: Path) -> None:
    text = Path("report.html").read_text()
    seen = Seen(text)
    assert not {"script", "link", "iframe", "object", "form"} & set(seen.tags)
    assert seen.links == []
    assert seen.tags.count("svg") == 3
    assert "http" not in text.replace("http-equiv", "").replace("http://www.w3.org/2000/svg", "")
    verdict = json.loads(Path("bundle/record.json").read_bytes())["verdict"]
    for part in (
        "OWNED", verdict["reason"], verdict["commitment"], verdict["null_says"],
        verdict["suspect"]["file_sha256"], "64 of 64 bits", f"{verdict['log10_p']:.2f}",
        "was made without any knowledge of that key's secret", "forgery bits", "likelihood ratio",
        "p is multiplied by 2: 2 claims counted", "divided by 2, by which p is multiplied",
        "with a probability of at most 1e-06", *verdict["limits"],
    ):  # fmt: skip
        assert part in seen.words, part
    for name in ("record.json", "claim.json", "tree-head.json", "authority-0.pem"):
        assert name in seen.words
    secret = Key.load("acme.key").material.secret
    everything = text + "".join(each.read_text() for each in Path("bundle").iterdir())
    assert secret.hex() not in everything


def test_a_bundle_comes_to_the_same_in_another_folder_without_anything_else(
    case: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    shutil.copytree("bundle", elsewhere / "b")
    code = "import sys; sys.modules['torch'] = None\n"
    code += "import clock; clock.put_clock_ahead()\n"
    code += "from countermark.cli import main; main(['report', '--replay', 'b', '--json'])"
    said = python(code, folder=elsewhere, paths=[ROOT / "tests"])
    assert (said.code, said.err) == (3, "")
    recorded = json.loads(Path("bundle/record.json").read_bytes())["verdict"]
    assert recorded["outcome"] == "owned"
    assert said.json["recorded_verdict"] == recorded
    assert said.json["outcome"] == "no_verdict"
    assert "the figures follow from this record" in said.json["reason"]
    assert len(said.json["checked"]) == 3
    assert "nobody has signed this bundle" in " ".join(said.json["limits"])


AGAIN = ("report", "--replay", "bundle")


def test_the_reading_is_repeated_with_suspect_and_key(case: Path) -> None:
    again = call(*AGAIN, "m.safetensors", "--key", "acme.key", "--json")
    assert again.code == 0
    assert again.json["outcome"] == "owned"
    assert "read again from m.safetensors, it is the same" in again.json["checked"]
    assert call(*embed(scheme="none", out="other.safetensors", key=None)).code == 0
    for line, says in (
        (f"{' '.join(AGAIN)} other.safetensors --key acme.key", "it is another suspect"),
        (f"{' '.join(AGAIN)} m.safetensors", "to read SUSPECT again, give --key: the bundle"),
        ("report --replay bundle --key acme.key", "--key and --unmarked need SUSPECT"),
        ("report --replay bundle --out x.html", "without --out: give SUSPECT"),
        ("report m.safetensors --key acme.key", "a report needs SUSPECT, --key, --out"),
    ):
        refused(line.split(), says, case)


def test_an_opened_key_burns_the_mark_and_says_so(case: Path) -> None:
    said = reported("open.html", "open", "--open-key")
    assert said.code == 0
    (note,) = said.notes
    assert "the mark is burnt" in note
    assert "This report holds the key" in Path("open.html").read_text()
    again = call("report", "m.safetensors", "--replay", "open")
    assert again.code == 0


def test_what_is_not_found_is_reported_as_well(case: Path) -> None:
    assert call(*embed(scheme="none", out="other.safetensors", key=None)).code == 0
    words = [
        "report",
        "other.safetensors",
        "--key",
        "acme.key",
        "--out",
        "other.html",
        "--bundle",
        "other",
    ]
    assert call(*words).code == 1
    assert "NOT PROVEN" in Path("other.html").read_text()
    assert call("report", "--replay", "other").code == 3
    assert call("report", "other.safetensors", "--replay", "other", "--key", "acme.key").code == 1


def test_a_bundle_counts_by_the_signature_of_whom_the_examiner_pins(case: Path) -> None:
    assert reported("signed.html", "signed", "--private-key", "acme.pem").code == 0
    unpinned = call("report", "--replay", "signed", "--json")
    assert unpinned.code == 3
    assert "none of whom you pinned" in unpinned.json["limits"][0]
    pinned = call("report", "--replay", "signed", "--signer", "acme.pub", "--json")
    assert (pinned.code, pinned.json["outcome"]) == (0, "owned")
    assert "is the word of the signer" in pinned.json["limits"][0]
    write_key_pair(Path("mallory"))
    refused(
        ["report", "--replay", "signed", "--signer", "mallory.pub"], "by none of the pinned", case
    )
    refused(["report", "--replay", "bundle", "--signer", "acme.pub"], "is signed by nobody", case)


def test_a_signed_bundle_is_whole(case: Path) -> None:
    assert reported("signed.html", "signed", "--private-key", "acme.pem").code == 0
    line = ["report", "--replay", "signed", "--signer", "acme.pub"]
    record = Path("signed/record.json")
    whole = record.read_bytes()
    record.write_bytes(whole + b" ")
    refused(line, "record.json is not as it was signed", case)
    record.write_bytes(whole)
    Path("signed/more.txt").write_text("x")
    refused(line, "more.txt is not as it was signed", case)
    Path("signed/more.txt").unlink()
    Path("signed/authority-0.pem").unlink()
    refused(line, "lacks authority-0.pem", case)


def test_a_forged_reading_is_never_more_than_a_record(case: Path) -> None:
    """Whoever knows the format writes a perfect reading that was never made."""
    found = evidence(payload=True)
    key = KeyIdentity("uchida", "ab" * 32, "Mallory Ltd.")
    verdict = judge(
        found, FairCoin(), subject=Subject("yours"), key=key, terms=VerificationOptions()
    )
    record = make_record(verdict)
    assert record is not None
    Path("forged").mkdir()
    Path("forged/record.json").write_text(record.model_dump_json())
    said = call("report", "--replay", "forged")
    assert said.code == 3
    assert said.out.startswith("NO VERDICT: the figures follow from this record")


Change = Callable[[dict[str, Any]], object]
CHANGES: list[tuple[str, Change, str]] = [
    ("record.json", lambda d: d["verdict"].update(outcome="not_proven"), "outcome was changed"),
    ("record.json", lambda d: d["verdict"].update(log10_p=-99.0), "log10_p was changed"),
    ("record.json", lambda d: d["reading"]["read"].__setitem__(0, 7), "was changed"),
    ("record.json", lambda d: d["reading"]["read"].pop(), "as many bits"),
    ("record.json", lambda d: d["terms"].update(alpha=0.5), "was changed"),
    (
        "record.json",
        lambda d: d["terms"]["dating"].update(commitments=1),
        "the recorded corrections do",
    ),
    (
        "record.json",
        lambda d: [d[part]["dating"].update(signer="pinned") for part in ("terms", "verdict")],
        "the claim's signer is not among the public keys",
    ),
    ("record.json", lambda d: d["terms"]["dating"].update(colour=1), "dating.colour: "),
    ("record.json", lambda d: d["terms"]["dating"].update(commitments="x"), "commitments: "),
    ("record.json", lambda d: d["result"].update(null="coin"), "there is no null 'coin'"),
    ("record.json", lambda d: d["key"].clear(), "key.scheme: "),
    ("record.json", lambda d: d.update(colour=1), "colour: Extra inputs"),
    ("record.json", lambda d: d.update(type="countermark/record/v3"), "type: "),
    (
        "record.json",
        lambda d: [d[part].update(owner="Mallory Ltd.") for part in ("key", "verdict")],
        "the owner in the claim is not the one",
    ),
    (
        "record.json",
        lambda d: [d[part]["dating"]["authorities"].append("A") for part in ("terms", "verdict")],
        "of which the bundle has no certificate",
    ),
    (
        "record.json",
        lambda d: [d.update(subject={"reference": {}}), d["verdict"].clear()],
        "expected a bundle as",
    ),
    ("record.json", lambda d: d["result"].update(corrections=[]), "the recorded corrections do"),
    (
        "record.json",
        lambda d: d["result"]["corrections"][0].update(factor=1),
        "the recorded corrections do",
    ),
    (
        "record.json",
        lambda d: d["result"]["corrections"][0].update(name="readings"),
        "corrections.0.name: ",
    ),
    ("record.json", lambda d: d["subject"].update(class_names=10), "the recorded corrections do"),
    ("record.json", lambda d: d["subject"].update(class_names=1 << 39), "at most 14"),
    ("record.json", lambda d: d["terms"].update(blind_choice=True), "was changed"),
    ("record.json", lambda d: d["made"].update(date="2100-01-01T00:00:00Z"), "is in the future"),
    (
        "record.json",
        lambda d: d["terms"]["dating"].update(suspect_date="2100-01-01T00:00:00Z"),
        "the recorded suspect date, 2100-01-01T00:00:00Z, is in the future",
    ),
    ("inclusion.json", lambda d: d.update(place=0), "is not under the tree head"),
    ("inclusion.json", lambda d: d["path"].clear(), "is not under the tree head"),
    ("inclusion.json", lambda d: d.update(path=["zz"]), "is not under the tree head"),
    ("claim.json", lambda d: d["envelope"].update(signatures=[]), "nobody signed"),
]


@pytest.mark.parametrize(("name", "change", "says"), CHANGES, ids=range(len(CHANGES)))
def test_a_changed_bundle_is_refused(case: Path, name: str, change: Change, says: str) -> None:
    import rfc8785

    document = json.loads(Path("bundle", name).read_bytes())
    change(document)
    Path("bundle", name).write_bytes(rfc8785.dumps(document))
    refused(["report", "--replay", "bundle"], says, case)


def test_damage_to_a_bundle_is_refused_or_changes_nothing(case: Path) -> None:
    drawn = random.Random(4)  # noqa: S311
    names = ["record.json", "claim.json", "tree-head.json", "inclusion.json", "authority-0.pem"]
    whole = {name: Path("bundle", name).read_bytes() for name in names}
    expected = replay_bundle(Path("bundle")).verdict.to_json()
    before = listing(case)
    for changes in range(200):
        name = names[changes % len(names)]
        damaged = bytearray(whole[name])
        for _ in range(1 + changes % 3):
            damaged[drawn.randrange(len(damaged))] ^= 1 << drawn.randrange(8)
        Path("bundle", name).write_bytes(damaged)
        try:
            found = replay_bundle(Path("bundle"))
        except CountermarkError:
            pass
        else:
            assert found.verdict.to_json() == expected
        Path("bundle", name).write_bytes(whole[name])
    assert listing(case) == before


def test_a_bundle_has_of_a_pinned_file_what_it_was_pinned_for(case: Path) -> None:
    secret = Path("acme.pem").read_bytes()
    assert b"PRIVATE KEY" in secret
    for name in ("root.pem", "acme.pub"):
        Path(name).write_bytes(Path(name).read_bytes() + secret)
    assert reported("again.html", "again", "--signer", "acme.pub").code == 0
    for each in Path("again").iterdir():
        assert b"PRIVATE" not in each.read_bytes(), each
    assert call("report", "--replay", "again").code == 3


def test_a_bundle_of_other_parts_is_refused(case: Path, other_authority: LocalAuthority) -> None:
    shutil.copy(other_authority.root, "bundle/authority-0.pem")
    refused(["report", "--replay", "bundle"], "is not stamped as the verdict says", case)
    Path("bundle/tree-head.json").unlink()
    refused(["report", "--replay", "bundle"], "lacks the tree head", case)
    other = some_claim(Ed25519PrivateKey.generate())
    Path("bundle/claim.json").write_bytes(other.to_bytes())
    refused(["report", "--replay", "bundle"], "is not the one that the verdict is dated by", case)
    Path("bundle/record.json").unlink()
    refused(["report", "--replay", "bundle"], "expected a bundle as", case)


DATED_NEXT_YEAR = (
    f"--claim claim.json --authority root.pem --ledger claims.db --suspect-date {NEXT_YEAR}"
)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("report m.safetensors --key acme.key --out new.html", "a report needs SUSPECT"),
        ("report m.safetensors --key acme.key --out report.html --bundle n", "report.html exists"),
        ("report m.safetensors --key acme.key --out n.html --bundle bundle", "bundle exists"),
        ("report m.safetensors --key acme.key --out n.html --bundle n --error-rate 1", "between"),
        ("report absent --key acme.key --out n.html --bundle n", "absent cannot be read"),
        ("report m.safetensors --key acme.key --out m.safetensors/r --bundle n", "is no folder"),
        ("report --replay absent", "absent/record.json"),
        ("report --replay bundle --alpha 0.5", "without --alpha"),
        ("report --replay bundle --authority absent.pem", "without --authority"),
        ("report --replay bundle --private-key acme.pem", "without --private-key"),
        (
            f"report m.safetensors --key acme.key --out n.html --bundle n {DATED_NEXT_YEAR}",
            "is in the future",
        ),
        ("report --replay bundle --assume-dated", "without --assume-dated"),
    ],
)
def test_what_cannot_be_right_is_refused(case: Path, line: str, says: str) -> None:
    refused(line.split(), says, case)


# --- records of every kind of reading


def evidence(**changed: Any) -> Reading:
    bits = np.zeros(128, np.uint8)
    return Reading(**({"read": bits, "expected": bits} | changed))


LEARNT = evidence(
    committed=False, scores=np.full(128, -3.0), reader=ReaderFacts(8, 0.3, 20, 0, 0.001)
)


@pytest.mark.parametrize(
    ("found", "null"),
    [
        (evidence(payload=True), FreshKeys(lambda: 3)),
        (LEARNT, PermutedUnits(lambda n: [np.full(n, 1.0)], 0.04, 1_000_000)),
        (LEARNT, UnmarkedModels(np.linspace(0.5, 0.7, 9))),
        (evidence(unit="triggers", choices=10), UnmarkedModels(np.linspace(50, 70, 9))),
    ],
)
def test_a_record_of_any_null_comes_to_the_same(found: Reading, null: NullHypothesis) -> None:
    key = KeyIdentity("s", "00" * 32, "o")
    terms = VerificationOptions(alpha=1e-3, assume_dated=True)
    verdict = judge(found, null, subject=Subject("x", readings=3), key=key, terms=terms)
    record = make_record(verdict)
    assert record is not None
    again = Record.model_validate_json(record.model_dump_json())
    assert again.judge_again().to_json() == json.loads(json.dumps(verdict.to_json()))
    assert is_recomputed(again.result) == isinstance(null, UnmarkedModels)


def test_a_hostile_name_is_text(case: Path) -> None:
    """An owner's name and a suspect's file name may hold markup."""
    name = "<script>alert(1)<.safetensors"
    shutil.copy("m.safetensors", name)
    words = ["--key", "acme.key", "--out", "x.html", "--bundle", "x"]
    assert call("report", name, *words).code == 3
    text = Path("x.html").read_text()
    assert "<script" not in text
    assert "&lt;script&gt;" in text
