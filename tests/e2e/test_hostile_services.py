"""`verify` asks services that do what they like: it ends in time, and no answer is a miss.

The services know the label of every trigger, as a stolen model would; what is tested is how they
keep it back.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_calls import call, process, python

from countermark.keys.key import KeyMaterial
from countermark.results.statistics import compute_log10_binomial_tail
from countermark.schemes.drawn_triggers.adi import Adi
from suspect_server import Said, Seen, Suspects, answering, hang

N, C, BATCH = 100, 10, 20
SLACK = 60.0  # seconds more than was allowed, however loaded the machine
IMAGES = np.random.default_rng(0).integers(0, 256, (N, 1, 6, 6), dtype=np.uint8)


@dataclass
class Thief:
    """A service over a model that bears the mark, and what it was asked."""

    labels: dict[bytes, int]
    seen: list[float] = field(default_factory=list)

    def right(self, seen: Seen) -> list[int]:
        """The labels of a request's images."""
        self.seen.append(time.monotonic())
        images = np.array(seen.json["inputs"], dtype=np.uint8)
        return [self.labels[image.tobytes()] for image in images]


@pytest.fixture(scope="module")
def served() -> Iterator[Suspects]:
    suspects = Suspects()
    yield suspects
    suspects.stop()


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[bytes, int]]:
    """A key folder, and the label of each trigger."""
    scheme, path = Adi(C), tmp_path_factory.mktemp("keys") / "acme.key"
    made = scheme.generate_key(
        {"triggers": IMAGES}, owner="ACME Inc.", material=KeyMaterial.generate()
    )
    made.save(path)
    labels = scheme.derive_labels(made).tolist()
    return path, {image.tobytes(): n for image, n in zip(IMAGES, labels, strict=True)}


@pytest.fixture
def thief(key: tuple[Path, dict[bytes, int]]) -> Thief:
    return Thief(key[1])


@dataclass(frozen=True)
class Judge:
    """The command line with one key."""

    key: Path

    def arguments(self, url: str, *asking: str) -> list[str]:
        said = ["protocol=mlflow", f"batch={BATCH}", *asking]
        options = [word for each in said for word in ("--ask", each)]
        return ["verify", url, "--key", str(self.key), "--json", *options]

    def __call__(self, url: str, *asking: str, code: int, within: float) -> Any:
        """The verdict, which has this exit code and comes within so many seconds."""
        began = time.monotonic()
        said = call(*self.arguments(url, *asking))
        assert time.monotonic() - began < within + SLACK
        assert said.code == code, said
        return said.json


@pytest.fixture
def judge(key: tuple[Path, dict[bytes, int]], monkeypatch: pytest.MonkeyPatch) -> Judge:
    monkeypatch.setattr("countermark.predictors.remote.pace.FIRST_PAUSE", 0.01)
    monkeypatch.delenv("COUNTERMARK_HEADERS_FILE", raising=False)
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    return Judge(key[0])


def test_a_thief_who_answers_is_found(judge: Judge, served: Suspects, thief: Thief) -> None:
    url = served.answer(lambda seen: {"predictions": thief.right(seen)})
    verdict = judge(url, code=0, within=1)
    assert (verdict["matched"], verdict["answered"], len(thief.seen)) == (N, N, N // BATCH)


# --- no answer


def nothing(_: Seen) -> Any:
    return {"predictions": []}


def limited(after: str) -> Callable[[Seen], Any]:
    return lambda _: Said(b"slow down", 429, (("retry-after", after),))


SILENT: dict[str, Callable[[Seen], Any]] = {
    "bytes": lambda _: Said(b"\x00\xff garbage"),
    "a page": lambda _: Said(b"<html>It works!</html>", 200, (("content-type", "text/html"),)),
    "an error": lambda _: Said(b"no", 500),
    "a login": lambda _: Said(b"", 302, (("location", "http://127.0.0.1:1/login"),)),
    "no predictions": nothing,
    "too many": lambda seen: {"predictions": [1] * (len(seen.json["inputs"]) + 1)},
    "nulls": lambda seen: {"predictions": [None] * len(seen.json["inputs"])},
    "negative": lambda seen: {"predictions": [-1] * len(seen.json["inputs"])},
    "no numbers": lambda seen: {"predictions": [[float("nan")] * C] * len(seen.json["inputs"])},
    "come back in an hour": limited("3600"),
    "come back in the year 9999": limited("Fri, 31 Dec 9999 23:59:59 GMT"),
    "come back at once, for ever": limited("0"),
}


@pytest.mark.parametrize("how", SILENT)
def test_no_readable_answer_is_no_verdict(judge: Judge, served: Suspects, how: str) -> None:
    verdict = judge(served.answer(SILENT[how]), code=3, within=1)
    assert verdict["outcome"] == "no_verdict"
    assert (verdict["matched"], verdict["log10_p"]) == (None, None)
    assert "no answer that could be read" in verdict["reason"]


@pytest.mark.parametrize("asking", [["timeout=0.1", "retries=0"], ["deadline=0.5"]])
def test_who_hangs_is_left_in_time(judge: Judge, served: Suspects, asking: list[str]) -> None:
    verdict = judge(served.serve(hang), *asking, code=3, within=0.5)
    assert verdict["outcome"] == "no_verdict"


def test_the_whole_process_ends_in_time(judge: Judge, served: Suspects, tmp_path: Path) -> None:
    arguments = judge.arguments(served.serve(hang), "deadline=0.5")
    began = time.monotonic()
    said = process([sys.executable, "-m", "countermark", *arguments], tmp_path)
    assert said.code == 3, said
    assert time.monotonic() - began < 0.5 + SLACK


WITHOUT_NAMES = """
import socket, sys, time
socket.getaddrinfo = lambda *_, **__: time.sleep(100)
from countermark.cli import run
sys.exit(run(sys.argv[1:]))
"""


def test_a_name_that_nobody_answers_for_does_not_keep_the_process(
    judge: Judge, tmp_path: Path
) -> None:
    arguments = judge.arguments("http://suspect.example", "deadline=0.5")
    began = time.monotonic()
    said = python(WITHOUT_NAMES, *arguments, folder=tmp_path)
    assert said.code == 3, said
    assert time.monotonic() - began < 0.5 + SLACK


# --- some answers


def partly(thief: Thief, right: int, otherwise: Callable[[Seen], Any]) -> Callable[[Seen], Any]:
    """Answers the first so many requests, and then otherwise."""

    def answer(seen: Seen) -> Any:
        if len(thief.seen) < right:
            return {"predictions": thief.right(seen)}
        return otherwise(seen)

    return answer


@pytest.mark.parametrize("how", SILENT)
@pytest.mark.parametrize(("right", "code"), [(3, 0), (1, 1)])
def test_what_is_not_answered_is_a_miss(
    judge: Judge, served: Suspects, thief: Thief, how: str, right: int, code: int
) -> None:
    verdict = judge(served.answer(partly(thief, right, SILENT[how])), code=code, within=1)
    assert (verdict["answered"], verdict["matched"]) == (right * BATCH, right * BATCH)
    assert verdict["bits"] == N
    tail = compute_log10_binomial_tail(right * BATCH, N, 1 / C)
    assert verdict["log10_p"] == pytest.approx(tail, rel=1e-12)


def test_who_hangs_after_a_while_is_judged_by_what_was_said(
    judge: Judge, served: Suspects, thief: Thief, tmp_path: Path
) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        if len(thief.seen) < 3:
            spoken = answering(lambda seen: {"predictions": thief.right(seen)})
            return await spoken(scope, receive, send)
        return await hang(scope, receive, send)

    verdict = judge(served.serve(app), "deadline=5", code=0, within=5)
    assert (verdict["answered"], verdict["matched"]) == (3 * BATCH, 3 * BATCH)


def test_images_of_a_request_are_answered_or_not_one_by_one(
    judge: Judge, served: Suspects, thief: Thief, tmp_path: Path
) -> None:
    """Every third image gets something else than a label; the record says the same again."""
    odd: Sequence[Any] = (None, "cat", [], {"label": True}, 2.5, -7, 1 << 40)

    def answer(seen: Seen) -> Any:
        right = thief.right(seen)
        return {"predictions": [odd[n % 7] if n % 3 == 0 else e for n, e in enumerate(right)]}

    verdict = judge(served.answer(answer), code=0, within=1)
    left = N - N // BATCH * len(range(0, BATCH, 3))
    assert (verdict["answered"], verdict["matched"]) == (left, left)


def test_the_record_of_some_answers_says_the_same_again(
    judge: Judge, served: Suspects, thief: Thief, tmp_path: Path
) -> None:
    record = tmp_path / "asked.json"
    url = served.answer(partly(thief, 3, SILENT["an error"]))
    said = call(*judge.arguments(url), "--transcript", record)
    again = call("verify", record, "--recorded", "--key", judge.key, "--json")
    assert (said.code, again.code) == (0, 0)
    told = again.json
    assert told["suspect"].pop("recorded")
    assert "nobody was asked" in told["limits"].pop(-1)
    assert said.json == told


# --- answers that are wrong, and rates


def test_renamed_classes_are_not_found(judge: Judge, served: Suspects, thief: Thief) -> None:
    url = served.answer(lambda seen: {"predictions": [(e + 3) % C for e in thief.right(seen)]})
    verdict = judge(url, code=1, within=1)
    assert (verdict["answered"], verdict["matched"]) == (N, 0)
    assert any("classes can be renamed" in each for each in verdict["limits"])


@pytest.mark.parametrize("classes", [C, 1 << 31])
def test_random_answers_are_not_found(judge: Judge, served: Suspects, classes: int) -> None:
    drawn = np.random.default_rng(7)

    def answer(seen: Seen) -> Any:
        return {"predictions": drawn.integers(0, classes, len(seen.json["inputs"])).tolist()}

    verdict = judge(served.answer(answer), code=1, within=1)
    assert verdict["answered"] == N
    assert verdict["log10_p"] > -5


def test_a_rate_limit_is_waited_for(judge: Judge, served: Suspects, thief: Thief) -> None:
    refused: list[float] = []

    def answer(seen: Seen) -> Any:
        if not refused:
            refused.append(time.monotonic())
            return Said(b"", 429, (("retry-after", "1"),))
        return {"predictions": thief.right(seen)}

    verdict = judge(served.answer(answer), code=0, within=1)
    assert verdict["matched"] == N
    assert thief.seen[0] - refused[0] > 0.9


def test_a_rate_limit_beyond_the_deadline_is_not_waited_for(
    judge: Judge, served: Suspects, thief: Thief
) -> None:
    url = served.answer(partly(thief, 3, limited("200")))
    verdict = judge(url, "deadline=100", code=0, within=0)
    assert verdict["answered"] == 3 * BATCH
