"""The bar appears after two seconds, at a terminal, on standard error, and always goes away."""

from __future__ import annotations

import pytest

from countermark._internal.progress import show_progress


@pytest.mark.parametrize(("terminal", "tick"), [(True, 3), (True, 0), (False, 3)])
def test_progress_appears_after_two_seconds_at_a_terminal(
    terminal: bool,
    tick: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    clock = iter(range(0, 1000 * tick, tick)) if tick else None
    monkeypatch.setattr(
        "countermark._internal.progress.time.monotonic", lambda: next(clock) if clock else 0
    )
    monkeypatch.setattr("rich.console.Console.is_terminal", terminal)
    with show_progress("counting sheep", 10) as advance:
        for _ in range(3):
            advance(1)
    captured = capsys.readouterr()
    assert ("counting sheep" in captured.err) == (terminal and tick > 0)
    assert captured.out == ""


def test_a_crash_takes_the_bar_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("countermark._internal.progress._PATIENCE", -1.0)
    monkeypatch.setattr("rich.console.Console.is_terminal", True)
    with pytest.raises(ZeroDivisionError), show_progress("counting sheep", None) as advance:
        advance(1 / 0)
    with show_progress("again", None) as advance:  # a second live bar would be refused by rich
        advance(1)
