"""What several unit tests start from."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from small import SMALL

from countermark_lab.experiments.experiment import Experiment, load_experiment
from suspect_server import Suspects


@pytest.fixture
def small(tmp_path: Path) -> Experiment:
    """`SMALL`, which also lies in the temporary folder as small.toml."""
    path = tmp_path / "small.toml"
    path.write_text(SMALL)
    return load_experiment(path)


@pytest.fixture(scope="session")
def suspects() -> Iterator[Suspects]:
    """Remote suspects on loopback."""
    served = Suspects()
    yield served
    served.stop()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short pauses between attempts, and nothing of the machine's proxies and headers."""
    monkeypatch.setattr("countermark.predictors.remote.pace.FIRST_PAUSE", 0.01)
    monkeypatch.delenv("COUNTERMARK_HEADERS_FILE", raising=False)
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
