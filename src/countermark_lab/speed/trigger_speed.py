"""Cost of trigger marks: rows that join a batch, and the making of triggers."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from countermark.embedding import Embedding
from countermark.keys.key import KeyMaterial
from countermark.schemes.deepstego.networks import StegoNetwork, repeat_tile, spread_logo
from countermark.schemes.deepstego.scheme import DeepStego
from countermark.schemes.deepstego.stego_generators import StegoMaker
from countermark.schemes.logo import GRID
from countermark.training.models import Value, build
from countermark_lab.speed.ratios import Ratio, measure_in_turn, summarise_ratios

_COVERS = 1024
_PAIRS = 15


@dataclass(frozen=True)
class TimedHost:
    """A host model and its timing: `take_steps` steps together, each on `batch` rows of the host."""

    name: str
    model: str
    arguments: tuple[tuple[str, Value], ...]
    shape: tuple[int, int, int]
    batch: int
    steps: int


_VGG16 = TimedHost("VGG16, width .25", "vgg16", (("width", 0.25),), (3, 32, 32), 64, 1)
_MLP = TimedHost("the MLP", "mlp", (), (1, 28, 28), 32, 200)


def measure_trigger_ratios() -> list[Ratio]:
    """Measure all ratios of trigger marks; takes about a minute."""
    torch.set_num_threads(1)
    return [
        measure_mixing(_VGG16, 1.3),
        measure_mixing(_MLP, 3.0),
        measure_trigger_making(_VGG16, 1.0),
    ]


def measure_mixing(host: TimedHost, limit: float) -> Ratio:
    """Measure the CPU time of `mark.mix` and a step, against a step of as many rows."""
    # One training step: well-trained networks take as much CPU time to apply.
    scheme = DeepStego(10, stego_steps=1, foreign=2, warm_up=0)
    covers, classes = _draw_images(host.shape, 2 * _COVERS), torch.randint(0, 10, (2 * _COVERS,))
    images, labels = torch.randn(2 * host.batch, *host.shape), classes[: 2 * host.batch]
    plain, marked = (build(host.model, dict(host.arguments)) for _ in range(2))
    material = KeyMaterial.from_test_seed(0)
    with scheme.embed(
        marked, owner="bench", covers=covers, labels=classes, material=material
    ) as mark:
        mark.mix(images[:1], labels[:1])  # the first call trains the stego networks
        mixed = _make_stepper(marked, images[: host.batch], labels[: host.batch], mark)
        # A mixed batch has twice the rows, so that the unmixed step takes 2 × batch rows too.
        unmixed = _make_stepper(plain, images, labels, None)
        ratios = measure_in_turn(lambda: mixed(host.steps), lambda: unmixed(host.steps), _PAIRS)
    what = (
        f"deepstego, one step of {host.name} on a mixed batch, {host.batch} rows and as many more"
    )
    return summarise_ratios(what, "the same step of as many rows, unmixed", ratios, limit)


def _make_stepper(
    model: nn.Module, images: Tensor, labels: Tensor, mark: Embedding | None
) -> Callable[[int], float]:
    """Return a function that takes `count` training steps and returns their CPU seconds."""
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)

    def take_steps(count: int) -> float:
        start = time.process_time()
        for _ in range(count):
            x, y = mark.mix(images, labels) if mark else (images, labels)
            F.cross_entropy(model(x), y).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()
        return time.process_time() - start

    return take_steps


def measure_trigger_making(
    host: TimedHost = _VGG16, limit: float = 1.0, covers: int = _COVERS
) -> Ratio:
    """Measure the CPU time of making triggers, against classifying as many covers.

    Args:
        host: the model that classifies.
        limit: largest ratio that is allowed.
        covers: number of triggers.
    """
    images, network = _draw_images(host.shape, covers), StegoNetwork(host.shape[0])
    network.eval().requires_grad_(False)
    model = build(host.model, dict(host.arguments)).eval()
    signs = 2.0 * torch.randint(0, 2, (host.shape[0], GRID, GRID)) - 1
    tile = repeat_tile(signs, *host.shape[1:])
    # Random logos: the time does not depend on their bits.
    logos = torch.randint(0, 2, (covers, GRID, GRID))

    def time_making() -> float:
        start = time.process_time()
        StegoMaker(network, spread_logo(logos, tile))(images.numpy())
        return time.process_time() - start

    def time_classifying() -> float:
        start = time.process_time()
        with torch.no_grad():
            # Batches of 32 images, as a server would classify them.
            for first in range(0, covers, 32):
                model(images[first : first + 32].float() / 255)
        return time.process_time() - start

    what = f"deepstego, {covers:,} triggers of {host.shape[1]} × {host.shape[2]} in colour"
    return summarise_ratios(
        what,
        f"{host.name} on the same images",
        measure_in_turn(time_making, time_classifying, _PAIRS),
        limit,
    )


def _draw_images(shape: tuple[int, int, int], count: int) -> Tensor:
    """Draw `count` images uint8 of random pixels."""
    return torch.randint(0, 256, (count, *shape), dtype=torch.uint8)
