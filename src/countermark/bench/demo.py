"""`countermark demo`: the whole product on real digits in a minute, and what it looks like."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from countermark import files
from countermark.attacks.prune import Prune
from countermark.bench.data import BUNDLED, Dataset, load_data
from countermark.bench.embed import Order, embed, load_into
from countermark.bench.models import build
from countermark.bench.train import accuracy
from countermark.errors import ConfigError, MissingExtraError
from countermark.examine import verify
from countermark.key import Key
from countermark.stats import least_matches, log10_binomial_tail
from countermark.verdict import Verdict
from countermark.weights import save_weights

_EPOCHS, _LAYER, _BITS = 15, "2.weight", 256


@dataclass(frozen=True)
class Shown:
    """One line of the demo's table."""

    suspect: str
    file: str
    accuracy: float
    verdict: Verdict


def run_demo(out: Path) -> list[Shown]:
    """Mark a network, then judge it, an unmarked one, and a pruned copy of the first.

    Args:
        out: folder for models, key, verdicts and figure; must not exist.

    Returns: the lines of the table, which is printed to standard output.
    """
    if out.exists():
        raise ConfigError(f"{out} exists: choose another folder with --out, or remove it")
    _require_figures()
    console = Console(stderr=True)
    data = load_data(BUNDLED)
    with console.status("training a marked and an unmarked network"):
        _train(out, "marked", seed=1)
        _train(out, "unmarked", seed=2)
    _prune(out / "marked.safetensors", out / "pruned.safetensors")
    key = Key.load(out / "acme.key")
    shown = [
        _judge("owner's model", out / "marked.safetensors", key, data),
        _judge("stranger's model", out / "unmarked.safetensors", key, data),
        _judge("copy, 50 % pruned", out / "pruned.safetensors", key, data),
    ]
    _write(out, shown)
    _print(shown)
    return shown


def _require_figures() -> None:
    """Say before a minute of training, not after it, that the figure cannot be drawn."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise MissingExtraError("the demo's figure", "report") from None


def _train(out: Path, name: str, seed: int) -> None:
    marked = name == "marked"
    embed(
        Order(
            scheme="uchida" if marked else "none",
            fields={"layer": _LAYER, "bits": _BITS} if marked else {},
            model="mlp",
            data=BUNDLED,
            owner="ACME Inc.",
            epochs=_EPOCHS,
            seed=seed,
            out=str(out / f"{name}.safetensors"),
            key=str(out / "acme.key") if marked else None,
        )
    )


def _prune(victim: Path, out: Path) -> None:
    model = build("mlp", {})
    load_into(model, victim)
    save_weights(Prune(0.5).run(model).model.state_dict(), out)


def _judge(what: str, path: Path, key: Key, data: Dataset) -> Shown:
    model = build("mlp", {})
    load_into(model, path)
    return Shown(what, path.name, accuracy(model, data), verify(path, key))


def _write(out: Path, shown: list[Shown]) -> None:
    for each in shown:
        content = json.dumps(each.verdict.to_json(), indent=2).encode() + b"\n"
        files.write_bytes((out / each.file).with_suffix(".verdict.json"), content)
    _figure(out / "demo.png", shown)


def _figure(path: Path, shown: list[Shown]) -> None:
    """The null distribution of matching bits, the threshold, and where each suspect lies."""
    from matplotlib.figure import Figure

    ks = np.arange(_BITS + 1)
    tails = [10 ** log10_binomial_tail(int(k), _BITS) for k in ks]
    chances = np.array(tails) - np.array([*tails[1:], 0.0])
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    axes = figure.add_subplot()
    axes.bar(ks, chances, width=1.0, color="#9aa5b1", label="a model without the mark (exact)")
    threshold = least_matches(_BITS, math.log10(shown[0].verdict.alpha))
    if threshold is not None:
        axes.axvline(threshold, color="#52606d", linestyle=":", label="threshold, p = 1e-6")
    styles = (("#0b6e4f", 5, "-"), ("#b44d12", 2, "-"), ("#f0c419", 2, "--"))
    for each, (colour, width, dashes) in zip(shown, styles, strict=True):
        label = f"{each.suspect}: {each.verdict.matched} bits"
        at = each.verdict.matched or 0
        axes.axvline(at, color=colour, linewidth=width, linestyle=dashes, label=label)
    axes.set(xlabel=f"matching bits out of {_BITS}", ylabel="probability", xlim=(90, 260))
    axes.legend(loc="center", bbox_to_anchor=(0.68, 0.6), fontsize=8, framealpha=1.0)
    with files.replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=140)


def _print(shown: list[Shown]) -> None:
    table = Table(title="Is ACME's mark in this model?", title_justify="left")
    table.add_column("suspect")
    for heading in ("accuracy", "bits", "log10 p", "forgery bits"):
        table.add_column(heading, justify="right")
    table.add_column("verdict")
    for each in shown:
        verdict = each.verdict
        table.add_row(
            each.suspect,
            f"{100 * each.accuracy:.1f} %",
            f"{verdict.matched}/{verdict.bits}",
            f"{verdict.log10_p:.1f}",
            f"{verdict.forgery_bits:.0f}",
            verdict.outcome.replace("_", " "),
        )
    Console(file=sys.stdout).print(table)
