"""Runs every second page of the documentation, so that two workers share them."""

from __future__ import annotations

from pathlib import Path

import pytest
from pages import PAGES, run_page
from test_docs import each_of


@each_of(PAGES[1::2])
def test_page_runs(page: Path, tmp_path: Path) -> None:
    failure = run_page(page, tmp_path)
    if failure:
        pytest.fail(failure, pytrace=False)
