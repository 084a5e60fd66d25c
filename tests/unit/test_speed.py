"""How many unmarked hosts are best trained at a time: measured, and shown on the page."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from countermark_lab.speed import file_speed, speed, trigger_speed, web_speed
from countermark_lab.speed import peers as neighbours
from countermark_lab.speed.speed import Ratio, SpeedUp, find_best_speed_up, render_page, speed_ups
from countermark_lab.speed.web_speed import PageLoad, load

MEASURED = [SpeedUp(1, 1.3, 1.2, 1.4, 3), SpeedUp(16, 2.9, 2.6, 3.3, 3), SpeedUp(64, 2.7, 2, 3, 3)]
OTHER = Ratio("SSIM", "another package", 0.5, 0.4, 0.6, 7, 1.0)
LOAD = PageLoad(50, 1000, 1000, 20.0, 0.01, 0.02, 0.1)
RATIO = Ratio("a step with a mark", "one without", 1.25, 1.2, 1.3, 15, 1.4)


def test_every_batch_is_measured_against_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "_DIGITS", (0, 320))
    found = speed_ups(hosts=6, rounds=2)
    assert [each.at_a_time for each in found] == [1, 4, 8, 16, 32, 64]
    assert all(0 < each.least <= each.median <= each.most for each in found)
    assert find_best_speed_up(found).median == max(each.median for each in found)


def test_the_page_names_the_best() -> None:
    shown = render_page([RATIO], [OTHER], MEASURED, LOAD)
    assert "| a step with a mark | one without | 1.250 | 1.200 to 1.300 | 15 | 1.4 |" in shown
    assert "| SSIM | another package | 0.500 | 0.400 to 0.600 | 7 | 1.0 |" in shown
    assert "## Unmarked hosts" in shown
    assert "| 16 | 2.90 | 2.60 to 3.30 | 3 |" in shown
    assert "| 1,000 | 1,000 | 50.0 | 0.010 s | 0.020 s | 0.100 s |" in shown
    assert "Best: 16 at a time, 2.90 (limit: 2.0 or" in shown


@pytest.mark.parametrize(("quickest", "code"), [(2.0, 0), (1.9, 1)])
def test_batches_that_are_worth_little_fail_the_benchmark(
    quickest: float, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speed, "measure", lambda: [RATIO])
    monkeypatch.setattr(speed, "speed_ups", lambda: [SpeedUp(8, quickest, 1, 3, 3)])
    monkeypatch.setattr(speed, "load", lambda: LOAD)
    monkeypatch.setattr(speed, "neighbour_ratios", lambda: [OTHER])
    assert speed.measure_all(tmp_path / "page.md") == code
    assert "## Unmarked hosts" in (tmp_path / "page.md").read_text()


def test_the_making_of_triggers_is_compared_with_classifying_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(trigger_speed, "_PAIRS", 3)
    found = trigger_speed.measure_trigger_making(covers=64)
    assert 0 < found.least <= found.median <= found.most
    assert (found.pairs, found.limit) == (3, 1.0)
    assert found.what == "deepstego, 64 triggers of 32 × 32 in colour"


def test_a_mixed_step_is_compared_with_one_of_as_many_rows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(trigger_speed, "_PAIRS", 2)
    monkeypatch.setattr(trigger_speed, "_COVERS", 64)
    host = trigger_speed.TimedHost("an MLP", "mlp", (), (1, 28, 28), batch=8, steps=2)
    found = trigger_speed.measure_mixing(host, 3.0)
    assert (found.pairs, found.limit) == (2, 3.0)
    assert found.what.endswith("8 rows and as many more")
    assert found.least > 0


def test_stamps_and_many_keys_are_timed_on_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(file_speed, "_PAIRS", 1)
    for found in (file_speed.measure_stamping(64, 2), file_speed.measure_many_keys(2, 4)):
        assert 0 < found.least <= found.median
    assert not list(tmp_path.iterdir())


def test_other_packages_do_the_same_work_in_the_same_run() -> None:
    for found in (neighbours.measure_ssim(2, 1), neighbours.measure_trigger_hiding(2)):
        assert 0 < found.least <= found.median
        assert found.limit == 1.0


@pytest.mark.parametrize(
    "changed", [{"answered": 999}, {"seconds": 22.0}, {"p99": 1.1}], ids=["lost", "late", "slow"]
)
def test_pages_that_are_lost_or_late_fail_the_benchmark(changed: dict[str, float]) -> None:
    assert LOAD.is_within_limit
    assert not replace(LOAD, **changed).is_within_limit


def test_claim_pages_are_asked_for_at_a_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web_speed, "_CLAIMS", 3)
    found = load(20, 1, connections=2)
    assert (found.wanted, found.asked, found.answered) == (20, 20, 20)
    assert 0 < found.median <= found.p99 <= found.most
