"""Dates: none in the future is accepted anywhere, and no page or example has one."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from authority import LocalAuthority, some_claim
from clock import NEXT_YEAR
from countermark.claims import statement
from countermark.claims.dating import ExaminerTrust
from countermark.claims.policy import CommittedBefore
from countermark.claims.signed import Claim
from countermark.claims.statement import CLOCK_SKEW, parse_day_or_time, require_past
from countermark.claims.timestamp import read_response
from countermark.errors import ClaimError, ConfigError

ROOT = Path(__file__).parents[2]
DATE = re.compile(r"\b(20\d\d|2[1-9]\d\d)-(\d\d)-(\d\d)\b")
CALENDAR = re.compile(r"datetime\(\s*(\d{4})")


def later(**by: float) -> datetime:
    return statement.current_time() + timedelta(**by)


def test_a_time_that_has_not_come_is_refused() -> None:
    require_past(later(seconds=-1), "it")
    require_past(later(minutes=4), "it", tolerance=CLOCK_SKEW)
    for time, tolerance in ((later(seconds=9), timedelta()), (later(minutes=6), CLOCK_SKEW)):
        with pytest.raises(ConfigError, match=r"it, .* is in the future: it is .* now"):
            require_past(time, "it", tolerance=tolerance)
    with pytest.raises(ConfigError, match="has no zone"):
        require_past(datetime(2020, 1, 1), "it")


def test_a_suspect_date_in_the_future_is_refused_in_the_library(authority: LocalAuthority) -> None:
    date = parse_day_or_time(NEXT_YEAR, "--suspect-date")
    with pytest.raises(ConfigError, match=r"the suspect date, .* is in the future"):
        ExaminerTrust(date, [authority.pinned])
    with pytest.raises(ConfigError, match=r"must be committed to, .* is in the future"):
        CommittedBefore(date, [authority.pinned])


def test_a_claim_of_tomorrow_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    content = some_claim().to_bytes()
    assert Claim.from_bytes(content)
    yesterday = datetime.now(UTC) - timedelta(days=1)
    monkeypatch.setattr(statement, "current_time", lambda: yesterday)
    with pytest.raises(ClaimError, match=r"the date of the statement, .* is in the future"):
        Claim.from_bytes(content)


def test_a_stamp_of_tomorrow_is_refused(
    authority: LocalAuthority, monkeypatch: pytest.MonkeyPatch
) -> None:
    stamped = authority.stamp(some_claim())
    assert read_response(stamped.timestamp_responses[0], stamped)
    yesterday = datetime.now(UTC) - timedelta(days=1)
    monkeypatch.setattr(statement, "current_time", lambda: yesterday)
    with pytest.raises(ClaimError, match=r"the time of the time stamp, .* is in the future"):
        read_response(stamped.timestamp_responses[0], stamped)


def test_no_page_and_no_example_has_a_date_in_the_future() -> None:
    today = datetime.now(UTC).date().isoformat()
    pages = [ROOT / "README.md", *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/*.py")]
    pages += ROOT.glob("src/countermark/**/*.py")
    pages += ROOT.glob("src/countermark/**/*.j2")
    for page in pages:
        text = page.read_text()
        dates = ["-".join(each) for each in DATE.findall(text)] + CALENDAR.findall(text)
        assert [each for each in dates if each > today] == [], page
