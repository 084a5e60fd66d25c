"""`make bench`: what marking and verifying cost, as ratios of CPU time paired in one run.

Absolute seconds say more about a machine than about a program, so none are printed. Each ratio is
the median over pairs that ran one after the other; the interval is the smallest and the largest.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from countermark._version import VERSION
from countermark.bench.models import build
from countermark.embedding import Embedding
from countermark.files import write_bytes
from countermark.key import KeyMaterial
from countermark.schemes.base import WeightScheme
from countermark.schemes.independent_network import IndependentNetwork
from countermark.schemes.uchida import Uchida
from countermark.weights import save_weights

_BIG_FILE = 25_000_000  # float32 weights, 100 MB


@dataclass(frozen=True)
class Ratio:
    """One measured ratio and the limit it has to keep."""

    what: str
    against: str
    median: float
    least: float
    most: float
    pairs: int
    limit: float

    @property
    def kept(self) -> bool:
        """Whether the median lies within the limit."""
        return self.median <= self.limit


def measure() -> list[Ratio]:
    """All ratios; takes a few minutes on two cores."""
    mlp, vgg = _Case("the MLP", "mlp", (784,), 32), _Case("VGG16", "vgg16", (3, 32, 32), 128)
    on_mlp, on_vgg = "2.weight", "features.0.weight"
    return [
        _step("uchida", Uchida(on_mlp), mlp, 1.4),
        _step("uchida", Uchida(on_vgg), vgg, 1.02),
        _step("published", IndependentNetwork(on_mlp, as_published=True), mlp, 3.0),
        _step("hardened", IndependentNetwork(on_mlp), mlp, 4.5),
        _step("hardened", IndependentNetwork(on_vgg), vgg, 1.05),
        *_commands(),
    ]


@dataclass(frozen=True)
class _Case:
    name: str
    model: str
    shape: tuple[int, ...]
    batch: int


def _step(form: str, scheme: WeightScheme, case: _Case, limit: float) -> Ratio:
    """CPU time of a training step with the penalty in the loss, against a plain one."""
    form = form if form == scheme.name else f"{scheme.name}, {form}"
    what = f"{form}, one step of {case.name}, batch {case.batch}"
    torch.set_num_threads(1)
    images = torch.randn(case.batch, *case.shape)
    labels = torch.randint(0, 10, (case.batch,))
    plain, marked = build(case.model, {}), build(case.model, {})
    marked.load_state_dict(plain.state_dict())
    repeats, pairs = (400, 15) if case.model == "mlp" else (1, 15)
    with scheme.embed(marked, owner="bench", material=KeyMaterial.for_tests(0)) as mark:
        without = _stepper(plain, images, labels, None)
        embedding = _stepper(marked, images, labels, mark)
        ratios = _paired(lambda: embedding(repeats), lambda: without(repeats), pairs)
    return _ratio(what, "the same step without a mark", ratios, limit)


def _stepper(
    model: nn.Module, images: Tensor, labels: Tensor, mark: Embedding | None
) -> Callable[[int], float]:
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)

    def steps(count: int) -> float:
        start = time.process_time()
        for _ in range(count):
            loss = F.cross_entropy(model(images), labels)
            if mark:
                loss = loss + mark.penalty()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()
        return time.process_time() - start

    return steps


def _commands() -> list[Ratio]:
    """CPU time of whole commands against that of importing torch."""
    with tempfile.TemporaryDirectory() as folder:
        suspect, key = Path(folder) / "suspect.safetensors", Path(folder) / "bench.key"
        layers = {"features.0.weight": torch.randn(64, 3, 3, 3), "rest": torch.randn(_BIG_FILE)}
        save_weights(layers, suspect)
        scheme = Uchida("features.0.weight", 256)
        scheme.generate_key({"features.0.weight": (64, 3, 3, 3)}, owner="bench").save(key)
        verify = ["-m", "countermark", "verify", str(suspect), "--key", str(key)]
        importing = ["-c", "import torch"]
        return [
            _ratio(what, "python -c 'import torch'", _paired_commands(command, importing), limit)
            for what, command, limit in (
                ("verify a linear key in a 100 MB file", verify, 0.6),
                ("countermark --help", ["-m", "countermark", "--help"], 0.3),
            )
        ]


def _paired_commands(command: Sequence[str], other: Sequence[str]) -> list[float]:
    return _paired(lambda: _cpu_time(command), lambda: _cpu_time(other), 7)


def _cpu_time(arguments: Sequence[str]) -> float:
    """User and system time of one Python process, in seconds."""
    before = os.times()
    subprocess.run(  # noqa: S603 - our own interpreter
        [sys.executable, *arguments], capture_output=True, check=False
    )
    after = os.times()
    return (after.children_user - before.children_user) + (
        after.children_system - before.children_system
    )


def _paired(first: Callable[[], float], second: Callable[[], float], pairs: int) -> list[float]:
    """Ratios first / second, the two in turn, after one warm-up of each."""
    first(), second()
    return [first() / second() for _ in range(pairs)]


def _ratio(what: str, against: str, ratios: list[float], limit: float) -> Ratio:
    median = statistics.median(ratios)
    return Ratio(what, against, median, min(ratios), max(ratios), len(ratios), limit)


def page(ratios: Sequence[Ratio]) -> str:
    """The documentation page of these ratios, in Markdown."""
    rows = [
        f"| {each.what} | {each.against} | {each.median:.3f} | {each.least:.3f} to {each.most:.3f} "
        f"| {each.pairs} | {each.limit} |"
        for each in ratios
    ]
    return "\n".join(
        [
            "# Performance",
            "",
            "Ratios of CPU time, the two sides run in turn in one process or as whole processes;",
            "written by `make bench`, which measures them anew. A ratio of 1.02 means two per cent",
            "more CPU time than the thing in the second column.",
            "",
            "| what | against | median | least to most | pairs | limit |",
            "|---|---|---|---|---|---|",
            *rows,
            "",
            f"countermark {VERSION}, torch {torch.__version__}, one thread, CPU.",
            "",
        ]
    )


def main() -> None:
    """Measure, print, and exit 1 when a limit is not kept."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", type=Path, help="also write the page to this file")
    arguments = parser.parse_args()
    ratios = measure()
    sys.stdout.write(page(ratios))
    if arguments.write:
        write_bytes(arguments.write, page(ratios).encode())
    sys.exit(0 if all(each.kept for each in ratios) else 1)


if __name__ == "__main__":
    main()
