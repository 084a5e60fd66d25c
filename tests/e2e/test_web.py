"""The web page and the API: claims, verdicts, disputes, and names in place of paths."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from rooms import Visitor, digest_of, settings_of, visited

import barriers
from authority import some_claim
from clock import NEXT_YEAR, wait_for_stamps
from countermark._internal.files import write_bytes
from countermark.errors import ConfigError
from countermark.images.image_files import encode_png
from countermark.web.settings import NamedFolder

# --- claims


def test_claims_are_found_and_checked_anew(visitor: Visitor) -> None:
    digest = digest_of(visitor, "beta")
    for words in ("beta", "BETA LTD", digest):
        found = visitor.program.get("/api/claims", params={"q": words}).json()
        assert [each["owner"] for each in found["claims"]] == ["Beta Ltd."]
    assert "No claim of" in visitor.http.get("/claims?q=nobody").text
    part = visitor.http.get("/claims?q=beta", headers={"hx-request": "true"}).text
    assert "Beta Ltd." in part
    assert "<html" not in part
    page = visitor.http.get(f"/claims/{digest}").text
    for said in ("Whole", "an authority that this server believes", "as was computed just now"):
        assert said in page
    told = visitor.program.get(f"/api/claims/{digest}").json()
    assert told["holds"]
    assert told["included"]
    assert told["stamps"][0]["believed"]
    file = visitor.http.get(f"/claims/{digest}/claim.json")
    assert json.loads(file.content)["type"] == "countermark/claim/v1"


def test_a_claim_that_was_changed_in_the_database_is_shown_as_such(
    room: Path, tmp_path: Path
) -> None:
    import sqlite3

    shutil.copytree(room, tmp_path / "room", ignore=shutil.ignore_patterns("state"))
    with visited(settings_of(tmp_path / "room")) as found:
        digest = digest_of(found, "acme")
        connection = sqlite3.connect(tmp_path / "room" / "claims.db")
        with connection:
            connection.execute("UPDATE nodes SET hash = zeroblob(32) WHERE level = 1")
        assert not found.program.get(f"/api/claims/{digest}").json()["included"]
        found.log_in()
        assert "does not lead to the ledger" in found.http.get(f"/claims/{digest}").text
        with connection:
            connection.execute("DELETE FROM nodes")
        connection.close()
        said = found.program.get(f"/api/claims/{digest}")
        assert said.status_code == 503
        assert "the ledger misses" in said.json()["detail"]
        assert str(tmp_path) not in said.text


def test_a_claim_is_added_and_shown_and_junk_is_not(visitor: Visitor) -> None:
    claim = some_claim(Ed25519PrivateKey.generate())
    files = {"file": ("claim.json", claim.to_bytes())}
    said = visitor.http.post("/claims", data={"csrf": visitor.csrf}, files=files)
    assert said.status_code == 200
    assert claim.digest in said.text
    told = visitor.program.post("/api/claims", files=files)
    assert told.status_code == 201
    assert told.json()["digest"] == claim.digest
    for content in (b"", b"{}", b"\x80\x04", claim.to_bytes()[:-9], some_claim().to_bytes()):
        said = visitor.program.post("/api/claims", files={"file": ("x", content)})
        assert said.status_code == 400
        assert "\n" not in said.json()["detail"]


# --- verdicts


def test_an_upload_is_read_and_its_page_is_the_report(visitor: Visitor, room: Path) -> None:
    content = (room / "suspects" / "acme.safetensors").read_bytes()
    said = visitor.http.post(
        "/verify", data={"csrf": visitor.csrf, "key": "acme.key", "suspect": "", "claim": ""},
        files={"file": ("../../found it.safetensors", content)}, follow_redirects=False,
    )  # fmt: skip
    assert said.status_code == 303
    identity = said.headers["location"].rpartition("/")[2]
    told = visitor.ended(identity)
    assert told["job"]["outcome"] == "owned"
    page = visitor.http.get(said.headers["location"]).text
    for part in ("OWNED", "found it.safetensors", "The question", "Which bits agree is not shown"):
        assert part in page
    report = visitor.http.get(f"/jobs/{identity}/report")
    assert "attachment" in report.headers["content-disposition"]
    assert "sandbox" in report.headers["content-security-policy"]
    folder = room / "state" / "jobs" / identity
    assert not list(folder.glob("upload*")), "an upload is deleted when its job has ended"
    for shown in (page, report.text, json.dumps(told)):
        assert str(room) not in shown
        assert 'class="agrees"' not in shown
        assert '"read"' not in shown


def test_a_suspect_date_in_the_future_is_refused_when_it_is_sent(visitor: Visitor) -> None:
    data = {
        "suspect": "acme.safetensors", "key": "acme.key", "suspect_date": NEXT_YEAR,
        "claim": digest_of(visitor, "acme"),
    }  # fmt: skip
    refused = visitor.program.post("/api/verify", data=data)
    assert refused.status_code == 400
    assert "is in the future" in refused.text


def test_a_claim_of_the_ledger_dates_the_key(visitor: Visitor) -> None:
    data = {
        "suspect": "acme.safetensors", "key": "acme.key", "suspect_date": wait_for_stamps(),
        "claim": digest_of(visitor, "acme"),
    }  # fmt: skip
    said = visitor.program.post("/api/verify", data=data).json()
    told = visitor.ended(said["job"]["id"])
    assert told["answer"]["dating"]["committed"] is not None
    assert told["answer"]["dating"]["commitments"] >= 4
    page = visitor.http.get(f"/jobs/{said['job']['id']}").text
    assert "stamped over the claim" in page


def test_a_folder_of_pictures_is_owned_where_the_choice_is_stated_to_be_blind(
    room: Path, tmp_path: Path
) -> None:
    shutil.copytree(room, tmp_path / "room", ignore=shutil.ignore_patterns("state"))
    key = barriers.key()
    key.save(tmp_path / "room" / "keys" / "images.key")
    marked = barriers.scheme().mark_outputs(barriers.images(), key)
    for number, picture in enumerate(marked):
        write_bytes(tmp_path / "room" / "suspects" / "shown" / f"{number}.png", encode_png(picture))
    with visited(settings_of(tmp_path / "room")) as found:
        found.log_in()
        asked = {"csrf": found.csrf, "suspect": "shown", "key": "images.key"}
        for stated, outcome in (({}, "no_verdict"), ({"blind_choice": "true"}, "owned")):
            said = found.http.post(
                "/verify", data=asked | stated, files={"file": ("", b"")}, follow_redirects=False
            )
            told = found.ended(said.headers["location"].rpartition("/")[2])
            assert told["job"]["outcome"] == outcome, told
            assert told["job"]["order"]["blind_choice"] == (outcome == "owned")
        page = found.http.get(said.headers["location"]).text
        assert "did not know what is read in them" in page


def test_a_dispute_is_resolved(visitor: Visitor) -> None:
    data = {"csrf": visitor.csrf, "suspect": "beta.safetensors"}
    for side, owner in (("first", "beta"), ("second", "acme")):
        data |= {
            f"{side}_key": f"{owner}.key", f"{side}_model": f"{owner}.safetensors",
            f"{side}_claim": digest_of(visitor, owner),
        }  # fmt: skip
    said = visitor.http.post(
        "/dispute", data=data, files={"file": ("", b"")}, follow_redirects=False
    )
    assert said.status_code == 303, said.text
    identity = said.headers["location"].rpartition("/")[2]
    assert visitor.ended(identity)["job"]["outcome"] == "second"
    page = visitor.http.get(f"/jobs/{identity}").text
    assert "For ACME Inc." in page
    assert page.count("<tr><td>") == 6
    assert "jobs/" not in visitor.ended(identity)["answer"]["reason"]


# --- names, never paths


@pytest.mark.parametrize(
    "name",
    ["../keys/acme.key", "/etc/passwd", "..", ".", "acme.key/key.json", "http://localhost/x",
     "file:///etc/passwd", "x\x00y", "leading out", ".hidden", ""],
)  # fmt: skip
def test_what_is_no_name_of_the_folder_is_refused(visitor: Visitor, room: Path, name: str) -> None:
    link = room / "suspects" / "leading out"
    if not link.is_symlink():
        link.symlink_to("/etc/passwd")
    (room / "suspects" / ".hidden").touch()
    said = visitor.program.post("/api/verify", data={"suspect": name, "key": "acme.key"})
    assert said.status_code == 400
    said = visitor.program.post("/api/verify", data={"suspect": "acme.safetensors", "key": name})
    assert said.status_code in (400, 422)
    assert "\n" not in said.json()["detail"]
    assert name not in visitor.program.get("/api/names").json()["suspects"]


@pytest.mark.parametrize(
    "path",
    ["/static/../app.py", "/static/%2e%2e/app.py", "/static/..%2fapp.py", "/jobs/..%2f..%2f",
     "/jobs/../../etc/report", "/figures/..%2f..%2f/claims.png", "/claims/..%2fx/claim.json",
     "/static/LICENSE-HTMX.txt"],
)  # fmt: skip
def test_no_address_leads_out_of_its_folder(visitor: Visitor, path: str) -> None:
    assert visitor.http.get(path).status_code in (400, 404)


def test_a_shelf_knows_its_own_entries_alone(tmp_path: Path) -> None:
    (tmp_path / "shelf" / "a.key").mkdir(parents=True)
    (tmp_path / "shelf" / "a.key" / "key.json").touch()
    (tmp_path / "shelf" / "b").touch()
    (tmp_path / "outside").touch()
    (tmp_path / "shelf" / "c").symlink_to(tmp_path / "outside")
    (tmp_path / "shelf" / "d").symlink_to(tmp_path / "shelf" / "b")
    assert list(NamedFolder(tmp_path / "shelf", "file").list_entries()) == ["a.key", "b", "d"]
    assert list(NamedFolder(tmp_path / "shelf", "key", "key.json").list_entries()) == ["a.key"]
    assert (
        NamedFolder(None, "file").list_entries()
        == NamedFolder(tmp_path / "gone", "file").list_entries()
        == {}
    )
    with pytest.raises(ConfigError, match="has no file 'e'"):
        NamedFolder(tmp_path / "shelf", "file").find_path("e")
