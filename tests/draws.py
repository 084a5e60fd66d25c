"""What tests draw at random follows from a text, so that no test passes or fails by luck.

Four sources are seeded: `random`, the global generators of numpy and torch, and the secrets and
nonces of `KeyMaterial.generate`. `conftest` seeds them anew before each module is imported, before
each fixture is set up and before each test is called. Child processes call `draw_from` themselves.
"""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, wraps
from typing import Any, ParamSpec, TypeVar, cast

import numpy as np

from countermark.keys.key import NONCE_BYTES, SECRET_BYTES, KeyMaterial

VARIABLE = "COUNTERMARK_TESTS_SEED"
"""Environment variable that holds N of `--seed N`, for this process and its children."""

_Given, _Result = ParamSpec("_Given"), TypeVar("_Result")

_fresh_of_the_system = KeyMaterial.generate
_secrets: random.Random | None = None


def name_draw(*parts: object) -> str:
    """Return the text for a named draw of this run, which starts with N of `--seed N`."""
    return "/".join([os.environ.get(VARIABLE, "0"), *map(str, parts)])


def draw_from(text: str, secrets: str | None = None) -> None:
    """Let this process draw all random numbers and secrets from a text, from now on.

    Args:
        text: what everything is drawn from.
        secrets: what secrets and nonces are drawn from instead, where the caller fixes them.
    """
    global _secrets  # noqa: PLW0603
    drawn = random.Random(text)  # noqa: S311 - nobody's secrets
    random.seed(drawn.getrandbits(64))
    np.random.seed(drawn.getrandbits(32))
    torch = sys.modules.get("torch")
    if torch is not None:  # importing it takes seconds, and some children may not have it
        torch.manual_seed(drawn.getrandbits(63))
    _secrets = random.Random(f"secrets/{secrets or text}")  # noqa: S311 - nobody's secrets
    KeyMaterial.generate = classmethod(_draw_material)  # type: ignore[assignment, method-assign]


@contextmanager
def drawing_from(text: str, secrets: str | None = None) -> Iterator[None]:
    """Draw as `draw_from` inside the block; afterwards all sources go on where they stood."""
    global _secrets
    torch = sys.modules.get("torch")
    going_on, fresh = _secrets, KeyMaterial.__dict__["generate"]
    before: tuple[Any, ...] = (random.getstate(), np.random.get_state())
    numbers = None if torch is None else torch.get_rng_state()
    draw_from(text, secrets)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        if torch is not None:
            torch.set_rng_state(numbers)
        _secrets, KeyMaterial.generate = going_on, fresh  # type: ignore[method-assign]


def remember(function: Callable[_Given, _Result]) -> Callable[_Given, _Result]:
    """Compute once what several tests share, from draws that follow from the function's name alone.

    Neither the test that asks first nor N of `--seed N` matters, so that it may train.
    """

    @cache
    @wraps(function)
    def remembered(*given: Any, **named: Any) -> _Result:
        text = f"{function.__module__}.{function.__qualname__}/{given}/{named}"
        with drawing_from(text):
            return function(*given, **named)

    return cast("Callable[_Given, _Result]", remembered)


@contextmanager
def drawing_secrets_from_the_system() -> Iterator[None]:
    """Let `KeyMaterial.generate` ask the operating system inside the block, as in the product."""
    replaced = KeyMaterial.__dict__["generate"]
    KeyMaterial.generate = _fresh_of_the_system  # type: ignore[method-assign]
    try:
        yield
    finally:
        KeyMaterial.generate = replaced


def _draw_material(cls: type[KeyMaterial]) -> KeyMaterial:
    assert _secrets is not None
    return cls(_secrets.randbytes(SECRET_BYTES), _secrets.randbytes(NONCE_BYTES))
