"""One thread a worker, and the same draws for each test whatever ran before it.

`--seed N` chooses all random numbers and secrets, `--shuffle` the order of files and of the tests
in each. The seed of a test follows from N and its id, the seed of a fixture from N, the file and
name of its function and its parameter. A test passes for every N, in every order.

Secrets do not follow from N in the folders of `TRAINED`: marks are trained there through the
command line, and no bound is known on how many secrets would not train.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import random
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from authority import LocalAuthority

for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[_name] = "1"  # before torch is imported, and for the processes that are started

import draws  # noqa: E402 - it imports numpy
from clock import AFTER_STAMPS_TEXT, put_clock_ahead  # noqa: E402

ROOT = Path(__file__).parents[1]
TRAINED = ("tests/e2e", "tests/papers")
LONGEST = (
    "test_docs_others.py", "test_docs.py", "test_unmarked_answers.py",
    "test_published_deepstego.py", "test_demo.py", "test_help.py", "test_box_free.py",
    "test_run.py", "test_makers.py", "test_opponents.py", "test_deepstego.py",
    "test_contract.py", "test_web.py", "test_resume.py",
)  # fmt: skip

# Nothing is remembered from earlier runs, and a slow machine fails no test.
settings.register_profile(
    "seeded", deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("seeded")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seed", type=int, default=0, help="choose what all tests draw (default: 0)")
    parser.addoption("--shuffle", action="store_true", help="shuffle files and tests by --seed")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Tell child processes and hypothesis the seed; an own --hypothesis-seed wins."""
    os.environ[draws.VARIABLE] = str(config.getoption("seed"))
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False  # workers take files in the order of collection
    if config.getoption("hypothesis_seed", None) is None:
        config.option.hypothesis_seed = str(config.getoption("seed"))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Shuffle files, and tests in each; pytest regroups them by parameters of wide fixtures.

    Otherwise the longest files come first, so that no worker waits for another one at the end.
    """
    with_time = [item.nodeid for item in items if AFTER_STAMPS_TEXT in item.nodeid]
    if with_time:
        raise pytest.UsageError(f"an id that changes with the time: {with_time[0]}; write its name")
    if not config.getoption("shuffle"):
        place = {name: number for number, name in enumerate(LONGEST)}
        items.sort(key=lambda item: place.get(item.path.name, len(LONGEST)))
        return
    drawn = random.Random(draws.name_draw("order"))  # noqa: S311 - the same on all workers
    files: dict[Path, list[pytest.Item]] = {}
    for item in items:
        files.setdefault(item.path, []).append(item)
    order = sorted(files)
    drawn.shuffle(order)
    for each in order:
        drawn.shuffle(files[each])
    items[:] = [item for each in order for item in files[each]]


def _drawing_for(name: str) -> AbstractContextManager[None]:
    """Draw for a test, fixture or module, whose name starts with its path below the root."""
    return draws.drawing_from(draws.name_draw(name), name if name.startswith(TRAINED) else None)


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Iterator[None]:
    """Seed what a module draws while it is imported."""
    import torch  # noqa: F401 - here, because only a generator that is there can be seeded

    with _drawing_for(collector.nodeid):
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(
    fixturedef: pytest.FixtureDef[Any], request: pytest.FixtureRequest
) -> Iterator[None]:
    """Seed a fixture by what defines it, so that it does not matter which test asks first."""
    code = fixturedef.func.__code__ if hasattr(fixturedef.func, "__code__") else None
    where = Path(code.co_filename) if code else Path(fixturedef.baseid)
    place = where.relative_to(ROOT).as_posix() if where.is_relative_to(ROOT) else where.name
    index = getattr(request, "param_index", 0)
    with _drawing_for(f"{place}/{fixturedef.argname}/{index}"):
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Seed a test; one marked `real_secrets` draws its secrets from the operating system."""
    with _drawing_for(item.nodeid):
        if item.get_closest_marker("real_secrets") is None:
            return (yield)
        with draws.drawing_secrets_from_the_system():
            return (yield)


@pytest.fixture(scope="session", autouse=True)
def _stego_networks_are_trained_once() -> Iterator[None]:
    """Training one is a function of its arguments, and many tests want the same."""
    from countermark.schemes.deepstego import stego_generators

    whole, made = stego_generators.train_keyed_network, dict[str, bytes]()

    def remembered(covers: Any, tile: Any, course: Any) -> Any:
        given = pickle.dumps((covers, tile.numpy(), course))
        case = hashlib.sha256(given).hexdigest()
        if case not in made:
            made[case] = pickle.dumps(whole(covers, tile, course))
        return pickle.loads(made[case])  # noqa: S301 - a copy of our own

    stego_generators.train_keyed_network = remembered
    yield
    stego_generators.train_keyed_network = whole


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
