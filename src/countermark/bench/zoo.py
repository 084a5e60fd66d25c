"""Unmarked hosts by the hundred, to test null hypotheses on: small MLPs trained many at a time.

N hosts are one stack of parameters, so that one batched product serves all of them. Each host is
the one that `fit` would train, up to rounding, whoever is trained beside it, and lies in a cache
under its own digest: what was interrupted goes on, and no host is trained twice.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, asdict, dataclass, replace
from pathlib import Path
from typing import TypeAlias

import numpy as np
import rfc8785
import torch
import torch.nn.functional as F
from filelock import FileLock
from numpy.typing import NDArray
from torch import Tensor, nn

from countermark.bench.data import Dataset, load_data
from countermark.bench.embed import load_into
from countermark.bench.models import build
from countermark.bench.train import accuracy, epoch_order, seeded
from countermark.errors import ConfigError, DataError
from countermark.progress import progress
from countermark.weights import load_state, open_weights, save_weights

Arrays: TypeAlias = dict[str, NDArray[np.float32]]

_SIDE, _CLASSES = 28, 10  # the MLP of `build("mlp", {})` reads 28 x 28 pixels
_LANES = 16  # the parameters of a host are padded to whole vectors and cache lines
_LUMA = (19595, 38470, 7471)  # Rec. 601: 0.299, 0.587, 0.114, times 2^16


@dataclass(frozen=True)
class HostSpec:
    """What makes an unmarked host the one it is: all that its weights follow from.

    Attributes:
        data: as `load_data` takes it.
        seed: of the initial weights (unused where there is a `start`).
        epochs: passes over the training rows.
        order: seed of the data order; None for `seed`.
        rows: first and one past the last training row; None for all.
        grey28: grey (Rec. 601 luma), cropped to the middle 28 x 28 pixels.
        start: a weight file to begin from; its content enters the digest, not its name.
        lr: learning rate of Adam.
        batch_size: rows a step; an incomplete last batch is left out.

    Raises:
        ConfigError: a number is out of its range.
    """

    data: str
    seed: int
    _: KW_ONLY
    epochs: int
    order: int | None = None
    rows: tuple[int, int] | None = None
    grey28: bool = False
    start: str | None = None
    lr: float = 1e-3
    batch_size: int = 32

    def __post_init__(self) -> None:
        if self.epochs < 0 or self.batch_size < 1 or not 0 < self.lr < math.inf:
            raise ConfigError(
                "a host needs epochs >= 0, batch_size >= 1 and a finite lr > 0, got "
                f"{self.epochs}, {self.batch_size} and {self.lr}"
            )

    @property
    def data_order(self) -> int:
        """The seed of the data order, whether or not it was given."""
        return self.seed if self.order is None else self.order

    @property
    def digest(self) -> str:
        """The host's name, 16 hexadecimal digits: a hash of its canonical JSON.

        Raises:
            SuspectError: `start` cannot be read.
        """
        content = asdict(self) | {"order": self.data_order}
        if self.start is not None:
            with open_weights(self.start) as weights:
                content["start"] = weights.file_digest()
        return hashlib.sha256(rfc8785.dumps(content)).hexdigest()[:16]


def train_hosts(
    specs: Sequence[HostSpec], cache: Path, *, at_a_time: int = 32
) -> Iterator[tuple[HostSpec, Arrays]]:
    """Train the hosts that `cache` lacks, on the CPU, then read all of them.

    Training is over when the call returns; a host is read when the iterator comes to it.

    Args:
        specs: which hosts; the results come in this order.
        cache: folder of the files `<digest>.safetensors`; made if need be.
        at_a_time: hosts trained together, and lost together when the process is killed.

    Returns: each spec with its weights float32: "0.weight" (64, 784), "0.bias" (64,),
        "2.weight" (10, 64), "2.bias" (10,).

    Raises:
        ConfigError: `at_a_time` is below 1, or a `start` does not fit.
        DataError: the data cannot be read or do not fit the MLP.
        SuspectError: a `start` or a file of the cache cannot be read.
    """
    if at_a_time < 1:
        raise ConfigError(f"at_a_time must be at least 1, got {at_a_time}")
    paths = {spec: host_path(spec, cache) for spec in specs}
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{cache}.lock"):  # cells that run side by side share the hosts
        missing = {path: spec for spec, path in paths.items() if not path.exists()}
        epochs = sum(spec.epochs for spec in missing.values())
        with progress("training hosts, epochs", epochs) as advance:
            for group, data in _groups(missing.values(), at_a_time):
                stack = _Stack(group, data)
                stack.train(advance)
                for spec, state in zip(group, stack.states(), strict=True):
                    save_weights(state, paths[spec])
    return ((spec, _arrays(paths[spec])) for spec in specs)


def host_path(spec: HostSpec, cache: Path) -> Path:
    """Where a host lies in the cache; good as the `start` of another."""
    return cache / f"{spec.digest}.safetensors"


def host_data(spec: HostSpec) -> Dataset:
    """The data a host sees: its training rows, their scale, and every test row.

    Raises:
        DataError: the data cannot be read, do not fit the MLP, or have fewer rows.
    """
    return _cut(fitting(spec.data, spec.grey28), spec.rows)


def test_accuracy(weights: Mapping[str, NDArray[np.float32]], data: Dataset) -> float:
    """Share of the test images, 0 to 1, that a host classifies right; `data` as of `host_data`."""
    model = _initial(0)
    model.load_state_dict({name: torch.from_numpy(each) for name, each in weights.items()})
    return accuracy(model, data)


test_accuracy.__test__ = False  # type: ignore[attr-defined]  # pytest would take it for a test


class _Stack:
    """N hosts that take equally many equally large steps, as parameters (N, ...) each."""

    def __init__(self, specs: Sequence[HostSpec], data: Dataset) -> None:
        self._specs = specs
        cuts = {spec.rows: _cut(data, spec.rows) for spec in specs}  # each finds its scale once
        self._parts = [cuts[spec.rows] for spec in specs]
        self._rows, self._batch = len(self._parts[0].train_labels), specs[0].batch_size
        self._steps = self._rows // self._batch
        if self._steps < 1:
            raise DataError(
                f"{data.name}: expected at least one batch of {self._batch} training rows, "
                f"got {self._rows}: take more rows or a smaller batch_size"
            )
        states = [_first_state(spec) for spec in specs]
        self._shapes = {name: each.shape for name, each in states[0].items()}
        # Unpadded, Adam's rounding of a weight would depend on the place of its host.
        size = sum(each.numel() for each in states[0].values())
        self._flat = torch.zeros(len(specs), math.ceil(size / _LANES) * _LANES)
        self._flat.grad = torch.zeros_like(self._flat)
        self._parameters, self._into = self._named(self._flat), self._named(self._flat.grad)
        for name, stacked in self._parameters.items():
            stacked.copy_(torch.stack([each[name] for each in states]))
        # Adam works on each element alone: one on the stack is as good as one for each host.
        self._adam = torch.optim.Adam([self._flat], specs[0].lr, fused=True)
        self._images = torch.empty(len(specs), self._batch, _SIDE * _SIDE)

    def train(self, advance: Callable[[float], None]) -> None:
        """All epochs; `advance` is told of shares of epochs, summed over the hosts."""
        for epoch in range(self._specs[0].epochs):
            orders = [epoch_order(spec.data_order, epoch, self._rows) for spec in self._specs]
            for step in range(self._steps):
                at = slice(step * self._batch, (step + 1) * self._batch)
                labels = self._load([order[at] for order in orders])
                self._gradients(labels)
                self._adam.step()
                advance(len(self._specs) / self._steps)

    def states(self) -> Iterator[dict[str, Tensor]]:
        """The parameters of one host after the other, by name."""
        for at in range(len(self._specs)):
            yield {name: stacked[at] for name, stacked in self._parameters.items()}

    def _named(self, flat: Tensor) -> dict[str, Tensor]:
        """Views (N, ...) of parameters or gradients (N, P), by the names of the parameters."""
        found, at = {}, 0
        for name, shape in self._shapes.items():
            found[name] = flat[:, at : at + shape.numel()].view(-1, *shape)  # (N, ...)
            at += shape.numel()
        return found

    def _load(self, rows: Sequence[Tensor]) -> Tensor:
        """Put the rows (B,) of each host into `_images` (N, B, 784); their labels (N, B)."""
        for to, part, chosen in zip(self._images, self._parts, rows, strict=True):
            # Indexing with [chosen] would take three times as long.
            images = part.train_images.index_select(0, chosen)
            to.copy_(part.normalised(images).flatten(1))  # (B, 1, 28, 28) -> (B, 784)
        return torch.stack([p.train_labels[r] for p, r in zip(self._parts, rows, strict=True)])

    def _gradients(self, labels: Tensor) -> None:
        """Gradients of each host's mean cross-entropy, by the chain rule, into `_flat.grad`.

        Written out: autograd allocates all gradients anew at each step, which costs a third more.
        """
        weight, bias, out_weight, out_bias = self._parameters.values()
        to_weight, to_bias, to_out_weight, to_out_bias = self._into.values()
        hidden = torch.baddbmm(bias[:, None], self._images, weight.mT).relu_()  # (N, B, 64)
        scores = torch.baddbmm(out_bias[:, None], hidden, out_weight.mT)  # (N, B, 10)
        errors = (scores.softmax(2) - F.one_hot(labels, _CLASSES)) / self._batch
        torch.bmm(errors.mT, hidden, out=to_out_weight)
        torch.sum(errors, 1, out=to_out_bias)
        behind = torch.bmm(errors, out_weight).mul_(hidden > 0)  # (N, B, 64)
        torch.bmm(behind.mT, self._images, out=to_weight)
        torch.sum(behind, 1, out=to_bias)


def _groups(specs: Iterable[HostSpec], at_a_time: int) -> Iterator[tuple[list[HostSpec], Dataset]]:
    """Hosts that can be stacked, `at_a_time` at most, with their data; each set is read once."""
    for alike in _by(lambda spec: (spec.data, spec.grey28), specs):
        data = fitting(alike[0].data, alike[0].grey28)
        for hosts in _by(lambda s: (_count(s.rows), s.batch_size, s.lr, s.epochs), alike):
            for at in range(0, len(hosts), at_a_time):
                yield hosts[at : at + at_a_time], data


def _by(key: Callable[[HostSpec], Hashable], specs: Iterable[HostSpec]) -> Iterable[list[HostSpec]]:
    groups: dict[Hashable, list[HostSpec]] = {}
    for spec in specs:
        groups.setdefault(key(spec), []).append(spec)
    return groups.values()


def _count(rows: tuple[int, int] | None) -> int | None:
    return rows[1] - rows[0] if rows else None


def fitting(name: str, grey28: bool) -> Dataset:
    """A data set in pictures and classes that the MLP takes, all rows.

    Raises:
        DataError: it cannot be read, or does not fit.
    """
    data = load_data(name)
    if grey28:
        train, test = _grey28(name, data.train_images), _grey28(name, data.test_images)
        data = replace(data, train_images=train, test_images=test)
    shape = list(data.train_images.shape[1:])
    if shape != [1, _SIDE, _SIDE] or data.classes > _CLASSES:
        raise DataError(
            f"{name}: expected at most {_CLASSES} classes and pictures of shape "
            f"[1, {_SIDE}, {_SIDE}], got {data.classes} and {shape}; grey28 adapts larger pictures"
        )
    return data


def _grey28(name: str, images: Tensor) -> Tensor:
    """Pictures uint8 (N, C, H, W) as luma (N, 1, 28, 28), the middle of each."""
    height, width = images.shape[2:]
    if min(height, width) < _SIDE:
        raise DataError(f"{name}: grey28 needs pictures of 28 x 28 or more, got {height} x {width}")
    top, left = (height - _SIDE) // 2, (width - _SIDE) // 2
    middle = images[:, :, top : top + _SIDE, left : left + _SIDE]
    if len(middle[0]) == 1:
        return middle.contiguous()
    red, green, blue = (w * part.int() for w, part in zip(_LUMA, middle.unbind(1), strict=True))
    return ((red + green + blue + 0x8000) >> 16).to(torch.uint8)[:, None]  # (N, 1, 28, 28)


def _cut(data: Dataset, rows: tuple[int, int] | None) -> Dataset:
    """The data with those training rows only, and with the scale of these."""
    if rows is None:
        return data
    first, end = rows
    if not 0 <= first < end <= len(data.train_labels):
        most = len(data.train_labels)
        raise DataError(f"{data.name}: expected rows within 0 to {most}, got {first} to {end}")
    images, labels = data.train_images[first:end], data.train_labels[first:end]
    return replace(data, train_images=images, train_labels=labels)


def _first_state(spec: HostSpec) -> dict[str, Tensor]:
    model = _initial(spec.seed)
    if spec.start is not None:
        load_into(model, Path(spec.start))
    return dict(model.state_dict())


def _initial(seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):  # the caller's random numbers go on undisturbed
        seeded(seed, "init")
        return build("mlp", {})


def _arrays(path: Path) -> Arrays:
    return {name: tensor.numpy() for name, tensor in load_state(path).items()}
