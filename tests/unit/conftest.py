"""What several unit tests start from."""

from __future__ import annotations

from pathlib import Path

import pytest
from small import SMALL

from countermark.bench.experiment import Experiment, load_experiment


@pytest.fixture
def small(tmp_path: Path) -> Experiment:
    """`SMALL`, which also lies in the temporary folder as small.toml."""
    path = tmp_path / "small.toml"
    path.write_text(SMALL)
    return load_experiment(path)
