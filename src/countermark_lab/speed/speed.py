"""Speed benchmark of `make bench`: cost of marking and verifying, as ratios of CPU time in one run.

Absolute seconds say more about a machine than about a program, so none are printed. Each ratio is
the median over pairs that ran one after the other; the interval is the smallest and the largest.
The best number of unmarked hosts to train at a time is measured, too.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from countermark._internal.files import write_bytes
from countermark._version import VERSION
from countermark.alignment import Reference, realign_suspect
from countermark.attacks.invariants import Permute
from countermark.checkpoints import ModuleWeights, save_weights
from countermark.embedding import Embedding
from countermark.keys.key import KeyMaterial
from countermark.schemes.independent_network.scheme import IndependentNetwork
from countermark.schemes.uchida.scheme import Uchida
from countermark.schemes.weights import WeightScheme
from countermark.training.data import BUNDLED
from countermark.training.loop import Course, fit, seed_torch
from countermark.training.models import build
from countermark_lab.hosts.model_zoo import AT_A_TIME, HostSpec, load_host_data, train_hosts
from countermark_lab.speed.file_speed import measure_file_ratios
from countermark_lab.speed.output_speed import measure_output_ratios
from countermark_lab.speed.peers import neighbour_ratios
from countermark_lab.speed.ratios import (
    Ratio,
    measure_against_torch,
    measure_in_turn,
    summarise_ratios,
    time_command,
)
from countermark_lab.speed.trigger_speed import measure_trigger_ratios
from countermark_lab.speed.web_speed import PageLoad, load, measure_first_page, render_page_load

_BIG_FILE = 25_000_000  # float32 weights, 100 MB
_DIGITS = (0, 4000)
_AT_A_TIME = (1, 4, 8, 16, 32, 64)
_LEAST_SPEED_UP = 2.0  # limit for the best number of hosts at a time


@dataclass(frozen=True)
class SpeedUp:
    """CPU time of training unmarked hosts one by one, relative to `at_a_time` hosts together.

    A median of 2 means half of the CPU time.
    """

    at_a_time: int
    median: float
    least: float
    most: float
    rounds: int


def measure() -> list[Ratio]:
    """Measure all ratios; takes a few minutes on two cores."""
    mlp, vgg = (
        _StepTiming("the MLP", "mlp", (784,), 32),
        _StepTiming("VGG16", "vgg16", (3, 32, 32), 128),
    )
    on_mlp, on_vgg = "2.weight", "features.0.weight"
    return [
        _measure_step("uchida", Uchida(on_mlp), mlp, 1.4),
        _measure_step("uchida", Uchida(on_vgg), vgg, 1.02),
        _measure_step("published", IndependentNetwork(on_mlp, as_published=True), mlp, 3.0),
        _measure_step("hardened", IndependentNetwork(on_mlp), mlp, 6.0),
        _measure_step("hardened", IndependentNetwork(on_vgg), vgg, 1.05),
        *measure_trigger_ratios(),
        *measure_output_ratios(),
        *_measure_commands(),
        measure_first_page(),
        _measure_alignment(),
        *measure_file_ratios(),
    ]


def speed_ups(hosts: int = 64, rounds: int = 3) -> list[SpeedUp]:
    """Measure the CPU time of `fit`, one MLP after the other, relative to that of `train_hosts`.

    Args:
        hosts: number of MLPs to train, each one epoch on 4,000 bundled digits.
        rounds: number of repetitions; each trains the MLPs one by one and then in every batch size,
            which takes about 20 s.
    """
    # One thread: the seconds of batched products must not depend on the number of cores.
    torch.set_num_threads(1)
    found: list[dict[int, float]] = []
    # Every round trains other seeds.
    for first in range(0, rounds * hosts, hosts):
        specs = [HostSpec(BUNDLED, first + n, epochs=1, rows=_DIGITS) for n in range(hosts)]
        # Compared in the same round, so that a busy machine slows both sides down.
        alone = _time_one_by_one(specs)
        found.append({batch: alone / _time_together(specs, batch) for batch in _AT_A_TIME})
    ratios = {batch: [each[batch] for each in found] for batch in _AT_A_TIME}
    return [
        SpeedUp(batch, statistics.median(each), min(each), max(each), rounds)
        for batch, each in ratios.items()
    ]


def find_best_speed_up(measured: Sequence[SpeedUp]) -> SpeedUp:
    """Return the speed-up with the largest median."""
    return max(measured, key=lambda each: each.median)


def _time_one_by_one(specs: Sequence[HostSpec]) -> float:
    """Return the CPU seconds of training the hosts one after the other."""
    start, data = time.process_time(), load_host_data(specs[0])
    for spec in specs:
        seed_torch(spec.seed, "init")
        model = build(spec.model, {})
        fit(model, data, spec.full_recipe, Course(spec.epochs, spec.data_order, device="cpu"))
    return time.process_time() - start


def _time_together(specs: Sequence[HostSpec], at_a_time: int) -> float:
    """Return the CPU seconds of training the hosts `at_a_time` at a time."""
    with tempfile.TemporaryDirectory() as folder:
        # The temporary folder is empty: every host is trained here, none is read from a cache.
        start = time.process_time()
        train_hosts(specs, Path(folder) / "hosts", at_a_time=at_a_time)
        return time.process_time() - start


@dataclass(frozen=True)
class _StepTiming:
    """A host model whose training step is timed: image shape and batch size."""

    name: str
    model: str
    shape: tuple[int, ...]
    batch: int


def _measure_step(form: str, scheme: WeightScheme, case: _StepTiming, limit: float) -> Ratio:
    """Measure the CPU time of a step with the penalty in the loss, against an unmarked step."""
    form = form if form == scheme.name else f"{scheme.name}, {form}"
    what = f"{form}, one step of {case.name}, batch {case.batch}"
    torch.set_num_threads(1)
    images = torch.randn(case.batch, *case.shape)
    labels = torch.randint(0, 10, (case.batch,))
    plain, marked = build(case.model, {}), build(case.model, {})
    # Equal weights: the two models differ only by the mark.
    marked.load_state_dict(plain.state_dict())
    # A step of the MLP is too short for the clock, so that 400 steps are timed together.
    repeats, pairs = (400, 15) if case.model == "mlp" else (1, 15)
    with scheme.embed(marked, owner="bench", material=KeyMaterial.from_test_seed(0)) as mark:
        without = _make_stepper(plain, images, labels, None)
        embedding = _make_stepper(marked, images, labels, mark)
        ratios = measure_in_turn(lambda: embedding(repeats), lambda: without(repeats), pairs)
    return summarise_ratios(what, "the same step without a mark", ratios, limit)


def _make_stepper(
    model: nn.Module, images: Tensor, labels: Tensor, mark: Embedding | None
) -> Callable[[int], float]:
    """Return a function that takes `count` training steps and returns their CPU seconds."""
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)

    def take_steps(count: int) -> float:
        start = time.process_time()
        for _ in range(count):
            loss = F.cross_entropy(model(images), labels)
            if mark:
                loss = loss + mark.penalty()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()
        return time.process_time() - start

    return take_steps


def _measure_commands() -> list[Ratio]:
    """Measure the CPU time of whole commands against that of importing torch."""
    with tempfile.TemporaryDirectory() as folder:
        suspect, key = Path(folder) / "suspect.safetensors", Path(folder) / "bench.key"
        # The key reads only the small tensor; the other tensor makes the file large.
        layers = {"features.0.weight": torch.randn(64, 3, 3, 3), "rest": torch.randn(_BIG_FILE)}
        save_weights(layers, suspect)
        scheme = Uchida("features.0.weight", 256)
        scheme.generate_key({"features.0.weight": (64, 3, 3, 3)}, owner="bench").save(key)
        verify = ["-m", "countermark", "verify", str(suspect), "--key", str(key)]
        # Random weights hold no mark: the command answers "not proven" and exits with 1.
        return [
            measure_against_torch(
                "verify a linear key in a 100 MB file", lambda: time_command(verify, exits=1), 0.6
            ),
            measure_against_torch(
                "countermark --help", lambda: time_command(["-m", "countermark", "--help"]), 0.3
            ),
        ]


def _measure_alignment() -> Ratio:
    """Measure the CPU time of aligning a permuted VGG16, against importing torch."""
    layer, model = "features.27.weight", build("vgg16", {}).eval()
    # The attack reorders the neurons, which alignment has to undo.
    suspect = ModuleWeights(Permute().run(model).model)
    reference, shape = Reference.from_module(model), {layer: (512, 512, 3, 3)}

    def time_alignment() -> float:
        start = time.process_time()
        realign_suspect(suspect, reference, shape)
        return time.process_time() - start

    return measure_against_torch("align VGG16 to a reference", time_alignment, 4.0, pairs=3)


def render_page(
    ratios: Sequence[Ratio], beside: Sequence[Ratio], measured: Sequence[SpeedUp], loaded: PageLoad
) -> str:
    """Render the documentation page of all measurements, in Markdown.

    Args:
        ratios: ratios to the same work without a mark.
        beside: ratios to other packages for the same work.
        measured: speed-ups of training several unmarked hosts together.
        loaded: measurements of the web page under load.
    """
    return "\n".join(
        [
            "# Performance",
            "",
            "Ratios of CPU time, the two sides run in turn in one process or as whole processes;",
            "written by `make bench`, which measures them anew. A ratio of 1.02 means two per cent",
            "more CPU time than the thing in the second column.",
            "",
            *_render_ratios(ratios),
            "",
            "## Beside other packages",
            "",
            "The same work by a package that does it, in the same run on the same images.",
            "",
            *_render_ratios(beside),
            "",
            *_render_speed_ups(measured),
            "",
            *render_page_load(loaded),
            "",
            f"countermark {VERSION}, torch {torch.__version__}, one thread, CPU.",
            "",
        ]
    )


def _render_ratios(ratios: Sequence[Ratio]) -> list[str]:
    """Render ratios as a Markdown table."""
    return [
        "| what | against | median | least to most | pairs | limit |",
        "|---|---|---|---|---|---|",
        *(
            f"| {each.what} | {each.against} | {each.median:.3f} "
            f"| {each.least:.3f} to {each.most:.3f} | {each.pairs} | {each.limit} |"
            for each in ratios
        ),
    ]


def _render_speed_ups(measured: Sequence[SpeedUp]) -> list[str]:
    """Render the section about unmarked hosts that are trained together."""
    quickest = find_best_speed_up(measured)
    rows = [
        f"| {each.at_a_time} | {each.median:.2f} | {each.least:.2f} to {each.most:.2f} "
        f"| {each.rounds} |"
        for each in measured
    ]
    return [
        "## Unmarked hosts",
        "",
        "64 MLPs, each one epoch on 4,000 bundled digits: CPU time of training them one by one,",
        "relative to that of training so many at a time in batched products, as `null-zoo`",
        "does. A ratio of 2 means half of the CPU time.",
        "",
        "| at a time | median | least to most | rounds |",
        "|---|---|---|---|",
        *rows,
        "",
        f"Best: {quickest.at_a_time} at a time, {quickest.median:.2f} (limit: {_LEAST_SPEED_UP} or",
        f"more). Where nothing is said, {AT_A_TIME} are trained at a time.",
    ]


def measure_all(write: Path | None) -> int:
    """Measure everything, print the page, and write it to a file if one is given.

    Returns: 1 if a limit is not kept, else 0; the page is written in both cases.
    """
    ratios, beside, measured, loaded = measure(), neighbour_ratios(), speed_ups(), load()
    page = render_page(ratios, beside, measured, loaded)
    sys.stdout.write(page)
    if write:
        write_bytes(write, page.encode())
    kept = [
        *(each.is_within_limit for each in (*ratios, *beside)),
        find_best_speed_up(measured).median >= _LEAST_SPEED_UP,
        loaded.is_within_limit,
    ]
    return 0 if all(kept) else 1
