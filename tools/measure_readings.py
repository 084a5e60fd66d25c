"""Measure how readings of a linear mark withstand free edits, and write the page about it.

    python tools/measure_readings.py > docs/bounded_readings.md

Two tables: forms of a reading on a Gaussian layer, from which the default was chosen; and what the
chosen one costs and gains in networks that are trained with their marks, three seeds each.
"""

from __future__ import annotations

import copy
import platform
import subprocess
import sys
import warnings
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import nn

from countermark._version import VERSION
from countermark.attacks.overwrite import OverwriteClosedForm
from countermark.keys.key import Key, KeyMaterial
from countermark.schemes.bounded_readings import compute_line_scales
from countermark.schemes.uchida.scheme import Uchida
from countermark.training.data import load_data
from countermark.training.models import build
from countermark.verification.verify import read_suspect

Layer = NDArray[np.float64]
SHAPE, BITS, MARGIN, SEEDS = (512, 512), 256, 4.0, (1, 2, 3)


# --- forms of a reading


def unit_of_nonzero(w: Layer) -> float:
    """Deviations as robust as can be: by the median of the absolute values that are not 0."""
    there = np.abs(w[w != 0])
    return float(np.median(there)) / 0.6745 if there.size else 1.0


def rows_alone(w: Layer) -> Layer:
    units = np.sqrt(np.square(w).mean(axis=1, keepdims=True))
    return np.asarray(w / np.where(units > 0, units, 1))


def redescending(w: Layer) -> Layer:
    x = w / unit_of_nonzero(w)
    return np.where(np.abs(x) <= 4, x, 0)


def lines(w: Layer) -> Layer:
    return (
        compute_line_scales(w.reshape(-1), w.shape).read(w.reshape(-1), 0, w.size).reshape(w.shape)
    )


FORMS: Mapping[str, Callable[[Layer], Layer]] = {
    "plain": lambda w: w / np.sqrt(np.square(w).mean()),
    "clipped": lambda w: np.clip(w / unit_of_nonzero(w), -3, 3),
    "redescending": redescending,
    "signs": np.sign,
    "rows": rows_alone,
    "rows and columns": lines,
}


def columns_of(w: Layer, share: float, make: Callable[[tuple[int, int]], Layer]) -> Layer:
    """The layer with some of its columns, the outgoing weights of dead units, made anew."""
    drawn, found = np.random.default_rng(8), w.copy()
    dead = drawn.permutation(w.shape[1])[: round(share * w.shape[1])]
    found[:, dead] = make((len(w), len(dead)))
    return found


def rounded(w: Layer, bits: int) -> Layer:
    step = np.abs(w).max(axis=1, keepdims=True) / (2 ** (bits - 1) - 1)
    return np.asarray(np.round(w / step) * step)


def edits() -> dict[str, Callable[[Layer], Layer]]:
    """What is done to a layer, by name."""
    drawn = np.random.default_rng(7)

    def smallest(w: Layer, share: float) -> NDArray[np.bool_]:
        return np.asarray(np.abs(w) <= np.quantile(np.abs(w), share))

    def tiny(w: Layer) -> Layer:
        return 1e-6 * drawn.normal(size=w.shape)

    def rescaled(w: Layer, spread: float) -> Layer:
        rows, columns = (np.exp(spread * drawn.normal(size=n)) for n in w.shape)
        return w * rows[:, None] * columns

    found: dict[str, Callable[[Layer], Layer]] = {"nothing": lambda w: w}
    for share in (0.6, 0.9):
        found[f"{share:.0%} pruned"] = lambda w, s=share: np.where(smallest(w, s), 0, w)
    for bits in (4, 3, 2):
        found[f"int{bits}"] = lambda w, b=bits: rounded(w, b)
    for share in (0.6, 0.9):
        found[f"smallest {share:.0%} are noise of 1e-6"] = lambda w, s=share: np.where(
            smallest(w, s), tiny(w), w
        )
    for spread in (1.0, 3.0):
        found[f"units rescaled by e^N(0, {spread:.0f}²)"] = lambda w, s=spread: rescaled(w, s)
    for share in (0.05, 0.1, 0.2, 0.4):
        found[f"{share:.0%} dead units, N(0, 100²)"] = lambda w, s=share: columns_of(
            w, s, lambda shape: 100 * drawn.normal(size=shape)
        )
        found[f"{share:.0%} dead units, 100 · Cauchy"] = lambda w, s=share: columns_of(
            w, s, lambda shape: 100 * drawn.standard_cauchy(size=shape)
        )
    return found


def compare_forms() -> list[str]:
    """Wrong bits of 256 in a Gaussian layer, marked for each form with the same margin."""
    drawn = np.random.default_rng(1)
    start, message = drawn.normal(size=SHAPE), drawn.integers(0, 2, BITS) * 2 - 1
    turns = drawn.integers(0, BITS, start.size // BITS)
    bits = ((np.arange(BITS) + turns[:, None]) % BITS).reshape(-1)
    signs = drawn.integers(0, 2, start.size) * 2 - 1

    def score(w: Layer, form: Callable[[Layer], Layer]) -> Layer:
        x = form(w).reshape(-1)
        total, energy = (np.bincount(bits, weights=v, minlength=BITS) for v in (signs * x, x * x))
        return np.asarray(message * total / np.sqrt(np.maximum(energy, 1e-300)))

    columns: dict[str, dict[str, str]] = {}
    for name, form in FORMS.items():
        w = start.copy()
        for _ in range(40):
            lacking = np.maximum(0, MARGIN - score(w, form))
            if lacking.max() < 0.02:
                break
            move = lacking / np.sqrt(start.size / BITS)
            w = w + ((move * message)[bits] * signs).reshape(SHAPE)
        change = np.sqrt(np.square(w - start).sum() / np.square(start).sum())
        columns[name] = {"change": f"{change:.1%}"} | {
            edit: str(int((score(make(w), form) <= 0).sum())) for edit, make in edits().items()
        }
    head = ["| edit | " + " | ".join(FORMS) + " |", "|---|" + "---|" * len(FORMS)]
    rows = ["change", *edits()]
    named = {"change": "change of the weights by the mark"}
    return head + [
        f"| {named.get(row, row)} | " + " | ".join(columns[form][row] for form in FORMS) + " |"
        for row in rows
    ]


# --- networks


@cache
def digits() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    data = load_data("digits")
    return (
        data.normalised(data.train_images), data.train_labels,
        data.normalised(data.test_images), data.test_labels,
    )  # fmt: skip


def accuracy(model: nn.Module) -> float:
    _, _, images, labels = digits()
    with torch.no_grad():
        return float((model(images).argmax(1) == labels).float().mean())


def train(model: nn.Module, epochs: int, rate: float, mark: object = None) -> None:
    images, labels, _, _ = digits()
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    for _ in range(epochs):
        for rows in torch.randperm(len(labels)).split(50):
            loss = F.cross_entropy(model(images[rows]), labels[rows])
            if mark is not None:
                loss = loss + mark.penalty()  # type: ignore[attr-defined]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


HOSTS = {"mlp": ("2.weight", 4), "lenet": ("conv2.weight", 3)}


def trained(host: str, seed: int, reading: str) -> tuple[nn.Module, Key, float]:
    """A marked host, its key, and the accuracy of its unmarked twin."""
    layer, epochs = HOSTS[host]
    models = []
    for marks in (False, True):
        torch.manual_seed(seed)
        model = build(host, {})
        if marks:
            scheme = Uchida(layer, 256, reading=reading)  # type: ignore[arg-type]
            material = KeyMaterial.from_test_seed(seed)
            with scheme.embed(model, owner="ACME Inc.", material=material) as mark:
                train(model, epochs, 1e-3, mark)
        else:
            train(model, epochs, 1e-3)
        models.append(model)
    return models[1], mark.drawn_key, accuracy(models[0])  # type: ignore[return-value]


def changed(model: nn.Module, layer: str, change: Callable[[Layer], Layer]) -> nn.Module:
    copied = copy.deepcopy(model)
    weight = copied.get_parameter(layer)
    flat = weight.detach().double().reshape(weight.shape[0], -1).numpy()
    with torch.no_grad():
        weight.copy_(torch.from_numpy(change(flat)).reshape(weight.shape).float())
    return copied


def dead(model: nn.Module, layer: str, share: float, cauchy: bool) -> nn.Module:
    """A copy whose units before the layer are dead in part, their outgoing weights noise."""
    copied = copy.deepcopy(model)
    weight = copied.get_parameter(layer)
    drawn = torch.Generator().manual_seed(9)
    count = max(1, round(share * weight.shape[1]))
    units = torch.randperm(weight.shape[1], generator=drawn)[:count]
    shape = (weight.shape[0], count, *weight.shape[2:])
    noise = 100 * torch.randn(shape, generator=drawn)
    if cauchy:
        noise = noise / torch.randn(shape, generator=drawn)
    before = {"2.weight": "0", "conv2.weight": "conv1"}[layer]
    with torch.no_grad():
        weight[:, units] = noise
        copied.get_parameter(f"{before}.bias")[units] = -1e4
    return copied


def fine_tuned(model: nn.Module) -> nn.Module:
    copied = copy.deepcopy(model)
    torch.manual_seed(5)
    train(copied, 2, 1e-3)
    return copied


def overwritten(model: nn.Module, layer: str) -> nn.Module:
    attack = OverwriteClosedForm({"layer": layer, "bits": 256}, times=5, margin=0.3)
    return attack.run(model).model


def attacks(layer: str) -> dict[str, Callable[[nn.Module], nn.Module]]:
    table = edits()
    found = {name: lambda m, e=table[name]: changed(m, layer, e) for name in ("90% pruned", "int4")}
    found = {"nothing": copy.deepcopy, **found, "fine-tuned, 2 epochs at 1e-3": fine_tuned}
    found["overwritten five times"] = lambda m: overwritten(m, layer)
    for share in (0.05, 0.1, 0.2, 0.4):
        for cauchy in (False, True):
            name = f"{share:.0%} dead units, " + ("100 · Cauchy" if cauchy else "N(0, 100²)")
            found[name] = lambda m, s=share, c=cauchy: dead(m, layer, s, c)
    return found


def compare_networks(host: str) -> list[str]:
    """Wrong bits and accuracy after attacks, by the former reading and by the bounded one."""
    layer, _ = HOSTS[host]
    rows: dict[str, dict[str, list[tuple[int, float]]]] = {}
    twins = []
    for seed in SEEDS:
        for reading in ("plain", "bounded"):
            model, key, twin = trained(host, seed, reading)
            twins.append(twin)
            for name, attack in attacks(layer).items():
                copied = attack(model)
                wrong = 256 - read_suspect(copied, key).match_count
                found = (wrong, accuracy(copied))
                rows.setdefault(name, {}).setdefault(reading, []).append(found)
    head = [
        f"Unmarked twins: accuracy {100 * np.mean(twins):.1f} %.", "",
        "| after | plain: wrong bits | accuracy | bounded: wrong bits | accuracy |",
        "|---|---|---|---|---|",
    ]  # fmt: skip
    for name, by in rows.items():
        cells = []
        for reading in ("plain", "bounded"):
            cells.append(", ".join(str(wrong) for wrong, _ in by[reading]))
            cells.append(f"{100 * np.mean([kept for _, kept in by[reading]]):.1f} %")
        head.append(f"| {name} | " + " | ".join(cells) + " |")
    return head


PAGE = """# Bounded readings

A hidden unit that never fires may have any outgoing weights, and a unit that nothing leaves any
incoming ones. No output changes, and a reading that sums weights as they are reads nothing but
those: an edit that costs nothing takes the mark away. So `uchida`, `hash_filter`, `stamp` and
recipients read each weight in units of its row and of its column, and cut it off at three such
units ([the formula](format.md#bounded-values)). A row or a column then counts as much as any
other, whatever its scale. Keys of earlier versions, and the published forms, are read as they were
written (`reading` = `plain`), and fall to such units.

Chance reads a bounded layer as it reads any other: it is a function of the suspect that does not
know the key (`tests/unit/test_bounded.py`: twelve kinds of layers, 1,000 keys of each form,
binomial).

## How the form was chosen

Wrong bits of {bits} in a Gaussian layer of {rows} × {columns} weights, marked for each form with a
margin of {margin:g} standard deviations. *clipped*: cut off at three robust deviations, by the
median of the non-zero absolute values; *redescending*: nothing beyond four of them; *rows*: each
row divided by its root mean square; *rows and columns*: the default.

{forms}

## What it costs and gains

Marks of 256 bits in networks that learnt the bundled digits, wrong bits at seeds {seeds}, mean
accuracy of the three; overwriting is the least change that gives a fresh plain key of 256 bits a
margin of .3 deviations, five times.

In the {mlp} output weights of the MLP. {mlp_table}

In the {lenet} weights of LeNet's second convolution, which reads six channels: one of them is
dead, or two at 40 %. {lenet_table}

## Where this comes from

`python tools/measure_readings.py`, countermark {version}, commit {commit}, torch {torch}, numpy
{numpy}, Python {python}, {processor}, one thread, fp32. Random layers and small networks on
digits: what is measured here is the reading, and larger networks may lose other shares of their
accuracy.
"""


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    ).stdout.strip()
    sys.stdout.write(
        PAGE.format(
            bits=BITS, rows=SHAPE[0], columns=SHAPE[1], margin=MARGIN,
            forms="\n".join(compare_forms()), seeds=", ".join(map(str, SEEDS)),
            mlp=640, mlp_table="\n".join(compare_networks("mlp")),
            lenet=build("lenet", {}).get_parameter("conv2.weight").numel(),
            lenet_table="\n".join(compare_networks("lenet")),
            version=VERSION, commit=commit, torch=torch.__version__, numpy=np.__version__,
            python=platform.python_version(), processor=processor(),
        )
    )  # fmt: skip


if __name__ == "__main__":
    main()
