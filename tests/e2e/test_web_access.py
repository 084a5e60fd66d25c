"""Who may come in to the web page, how often, and what every answer bears."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from rooms import TOKEN, Visitor, settings_of, visited

from countermark.errors import ConfigError
from countermark.web.access import RateLimiter, SessionStore, digest_token, find_token

PAGES = ("/", "/claims", "/verify", "/dispute", "/jobs")


@pytest.fixture
def stranger(visitor: Visitor) -> Visitor:
    """Somebody else at the same site, who has not logged in."""
    return Visitor(visitor.site)


# --- who may come in


@pytest.mark.parametrize("path", [*PAGES, "/jobs/00", "/claims/00", "/nowhere"])
def test_without_a_session_every_page_asks_for_the_token(stranger: Visitor, path: str) -> None:
    said = stranger.http.get(path, follow_redirects=False)
    assert (said.status_code, said.headers["location"]) == (303, f"/login?next={path}")
    said = stranger.http.get(path, headers={"hx-request": "true"})
    assert (said.status_code, said.text) == (204, "")


def test_the_api_asks_for_the_token(stranger: Visitor) -> None:
    for headers in ({}, {"authorization": "Bearer x"}, {"authorization": f"Basic {TOKEN}"}):
        said = stranger.http.get("/api/head", headers=headers)
        assert said.status_code == 401
        assert "token" in said.json()["detail"]
    stranger.log_in()
    assert stranger.http.get("/api/head").status_code == 401, "a cookie is for pages"


def test_a_wrong_token_opens_nothing_and_the_right_one_goes_where_it_was_asked(
    stranger: Visitor,
) -> None:
    for token in ("", "x", TOKEN + "x", TOKEN[:-1], "ü" * 30):
        said = stranger.http.post("/login", data={"token": token})
        assert said.status_code == 401
        assert "not the token" in said.text
        assert not stranger.http.cookies
    said = stranger.http.post(
        "/login", data={"token": TOKEN, "next": "/claims"}, follow_redirects=False
    )
    assert said.headers["location"] == "/claims"
    cookie = said.headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=strict" in cookie
    assert TOKEN not in cookie


@pytest.mark.parametrize("to", ["//evil.example", "https://evil.example", "/\\evil.example", "x"])
def test_logging_in_leads_nowhere_else(stranger: Visitor, to: str) -> None:
    data = {"token": TOKEN, "next": to}
    said = stranger.http.post("/login", data=data, follow_redirects=False)
    assert said.headers["location"] == "/"


def test_logging_out_ends_the_session_everywhere(stranger: Visitor) -> None:
    stranger.log_in()
    elsewhere = Visitor(stranger.site)
    elsewhere.http.cookies.update(stranger.http.cookies)
    assert elsewhere.http.get("/", follow_redirects=False).status_code == 200
    stranger.http.post("/logout", data={"csrf": stranger.csrf})
    assert elsewhere.http.get("/", follow_redirects=False).status_code == 303


def test_logins_and_requests_have_a_pace(room: Path) -> None:
    hasty = settings_of(room, logins=3, burst=30, requests=0.001)
    with visited(replace(hasty, state=room / "hasty")) as found:
        codes = [found.http.post("/login", data={"token": "x"}).status_code for _ in range(5)]
        assert codes == [401, 401, 401, 429, 429]
        said = [found.http.get("/login").status_code for _ in range(40)]
        assert said[-1] == 429
        assert found.program.get("/api/head").json()["detail"].startswith("too many requests")


def test_pace_counts_each_address_and_refills() -> None:
    now = [0.0]
    pace = RateLimiter(2, 3, lambda: now[0])
    assert [pace.admit_attempt("a") for _ in range(4)] == [True, True, True, False]
    assert pace.admit_attempt("b")
    now[0] = 0.5
    assert [pace.admit_attempt("a"), pace.admit_attempt("a")] == [True, False]


def test_a_session_ends_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("countermark.web.access.time.monotonic", lambda: now[0])
    sessions = SessionStore(digest_token(TOKEN))
    name = sessions.open_session()
    assert sessions.find_session(name) is not None
    now[0] = 12 * 3600 + 1
    assert sessions.find_session(name) is None


def test_the_token_comes_from_file_or_environment_and_else_is_new(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text(TOKEN + "\n")
    file.chmod(0o600)
    assert find_token(file, {}) == (TOKEN, False)
    assert find_token(None, {"COUNTERMARK_TOKEN": TOKEN}) == (TOKEN, False)
    first, told = find_token(None, {})
    assert told
    assert first != find_token(None, {})[0]
    file.chmod(0o644)
    for where, environment, why in (
        (file, {}, "others can read"),
        (tmp_path / "absent", {}, "cannot be read"),
        (None, {"COUNTERMARK_TOKEN": "short"}, "20 printable"),
    ):
        with pytest.raises(ConfigError, match=why):
            find_token(where, environment)


# --- forms of others


def test_a_form_of_another_session_or_site_does_nothing(visitor: Visitor, room: Path) -> None:
    content = (room / "suspects" / "unmarked.safetensors").read_bytes()
    before = len(visitor.site.runner.list_jobs())
    for csrf, headers in (
        ("", {}),
        ("x", {}),
        ("ü", {}),
        (visitor.csrf, {"origin": "https://evil.example"}),
        (visitor.csrf, {"origin": "null"}),
        (visitor.csrf, {"sec-fetch-site": "cross-site"}),
    ):
        said = visitor.http.post(
            "/verify", data={"csrf": csrf, "key": "acme.key"}, files={"file": ("x", content)},
            headers=headers,
        )  # fmt: skip
        assert said.status_code == 403
    assert len(visitor.site.runner.list_jobs()) == before


def test_every_answer_bears_the_headers(visitor: Visitor) -> None:
    for path in (*PAGES, "/login", "/static/style.css", "/nowhere", "/api/head"):
        said = visitor.http.get(path)
        policy = said.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert said.headers["x-content-type-options"] == "nosniff"
        assert said.headers["x-frame-options"] == "DENY"
        if "static" not in path:
            assert said.headers["cache-control"] == "no-store"


def test_pages_ask_no_other_server_and_hold_no_script_or_style(visitor: Visitor) -> None:
    for path in (*PAGES, "/login"):
        page = visitor.http.get(path).text
        assert not re.findall(r"https?://", page)
        assert not re.findall(
            r"<script(?! src=\"/static/htmx.min.js\" defer>)|<style| on\w+=", page
        )
        assert " style=" not in page
