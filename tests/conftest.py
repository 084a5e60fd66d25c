"""One thread a worker, whoever starts the tests: workers of two threads only get in the way."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from clock import put_clock_ahead

if TYPE_CHECKING:
    from authority import LocalAuthority

for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[_name] = "1"  # before torch is imported, and for the processes that are started


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Threads that wait for each other are slow beside other work, and change the last digits."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


put_clock_ahead()


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> LocalAuthority:
    """A time-stamping authority that tests pin."""
    return new_authority(tmp_path_factory, "Pinned")


@pytest.fixture(scope="session")
def other_authority(tmp_path_factory: pytest.TempPathFactory) -> LocalAuthority:
    """Another one."""
    return new_authority(tmp_path_factory, "Other")


def new_authority(folders: pytest.TempPathFactory, name: str) -> LocalAuthority:
    if shutil.which("openssl") is None:
        pytest.skip("there is no openssl to stand for a time-stamping authority")
    from authority import LocalAuthority

    return LocalAuthority(folders.mktemp("authority") / name, name)
