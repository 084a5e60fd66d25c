"""`countermark demo`: the whole product on real digits in a minute, and what it looks like."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from countermark._internal import files
from countermark.attacks.prune import Prune
from countermark.checkpoints import load_state, save_weights
from countermark.errors import ConfigError, MissingExtraError
from countermark.keys.key import Key
from countermark.results.statistics import compute_log10_binomial_tail, find_least_matches
from countermark.results.verdict import ALPHA, Verdict
from countermark.schemes import load_weight_scheme
from countermark.training.data import BUNDLED, Dataset, load_data
from countermark.training.embed_classifier import Order, embed, load_into
from countermark.training.loop import accuracy
from countermark.training.models import build
from countermark.verification.verify import verify

_EPOCHS, _BITS = 15, 256
# A thief adds a vector to all rows of the last layer, and no answer changes: the mark of Uchida
# lies in the first layer. The secret networks read hidden units as the last layer's inputs.
_FIRST, _LAST = "0.weight", "2.weight"
_SIBLINGS = 4
_STRANGERS = 20
_UNMARKED = 2  # supplied for the verdicts of learnt readers
_COPY = "pruned"
_ALPHA = 1e-4  # of the learnt readers: the default would rank each suspect among a million


@dataclass(frozen=True)
class DemoResult:
    """One line of the demo's table."""

    mark: str
    suspect: str
    accuracy: float
    verdict: Verdict
    file: str


@dataclass(frozen=True)
class _DemoMark:
    """One way to mark the network; `name` is also that of its model and key."""

    name: str
    scheme: str
    fields: dict[str, Any]
    alpha: float = ALPHA

    def get_model_path(self, out: Path) -> Path:
        return out / f"{self.name}.safetensors"

    def get_key_path(self, out: Path) -> Path:
        return out / f"{self.name}.key"


_MARKS = (
    _DemoMark("uchida", "uchida", {"layer": _FIRST, "bits": _BITS}),
    _DemoMark("network", "independent_network", {"layer": _LAST, "bits": _BITS}, _ALPHA),
    _DemoMark(
        "published",
        "independent_network",
        {"layer": _LAST, "bits": _BITS, "as_published": True},
        _ALPHA,
    ),
)


def run_demo(out: Path) -> list[DemoResult]:
    """Mark networks by both schemes, then judge them, an unmarked one, and pruned copies.

    Args:
        out: folder for models, keys, verdicts and figure; must not exist.

    Returns: the lines of the table, which is printed to standard output.
    """
    if out.exists():
        raise ConfigError(f"{out} exists: choose another folder with --out, or remove it")
    _require_figures()
    console = Console(stderr=True)
    data = load_data(BUNDLED)
    stranger = out / "stranger.safetensors"
    unmarked = [out / f"unmarked-{number}.safetensors" for number in range(_UNMARKED)]
    with console.status("training unmarked networks"):
        _train_network(stranger, None, out)
        for number, path in enumerate(unmarked):
            _train_network(path, None, out, seed=3 + number)
    shown = []
    for mark in _MARKS:
        with console.status(f"marking a network: {mark.name}"):
            _train_network(mark.get_model_path(out), mark, out)
            shown += _judge_suspects(mark, stranger, (out, unmarked), data)
    with console.status(f"training {_STRANGERS} more unmarked networks"):
        strangers = [_train_stranger(out / "strangers", 100 + n) for n in range(_STRANGERS)]
    _write_results(out, shown)
    _print_table(shown, {mark.name: _count_false_reads(mark, strangers, out) for mark in _MARKS})
    return shown


def _require_figures() -> None:
    """Say before a minute of training, not after it, that the figure cannot be drawn."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise MissingExtraError("the demo's figure", "report") from None


def _train_network(
    model: Path, mark: _DemoMark | None, out: Path, *, seed: int = 2, epochs: int = _EPOCHS
) -> None:
    embed(
        Order(
            scheme="none" if mark is None else mark.scheme,
            fields={} if mark is None else mark.fields,
            model="mlp",
            data=BUNDLED,
            owner="ACME Inc.",
            epochs=epochs,
            seed=seed if mark is None else 1,
            out=str(model),
            key=None if mark is None else str(mark.get_key_path(out)),
            siblings=_SIBLINGS,
        )
    )


def _train_stranger(folder: Path, seed: int) -> dict[str, NDArray[np.float32]]:
    """Train one more unmarked network, shortly, and return its weights by name."""
    path = folder / f"{seed}.safetensors"
    _train_network(path, None, folder, seed=seed, epochs=5)
    return {name: tensor.numpy() for name, tensor in load_state(path).items()}


def _judge_suspects(
    mark: _DemoMark, stranger: Path, places: tuple[Path, list[Path]], data: Dataset
) -> list[DemoResult]:
    """Judge the owner's model, a stranger's, and a copy of the first of which half was pruned.

    A learnt reader is judged beside other unmarked networks, as an examiner supplies them.
    """
    out, unmarked = places
    key, model = Key.load(mark.get_key_path(out)), build("mlp", {})
    load_into(model, mark.get_model_path(out))
    pruned = out / f"{mark.name}-pruned.safetensors"
    save_weights(Prune(0.5).run(model).model.state_dict(), pruned)
    shown = []
    for suspect, path in (
        ("owner's", mark.get_model_path(out)),
        ("stranger's", stranger),
        (_COPY, pruned),
    ):
        load_into(model, path)
        verdict = verify(
            path, key, alpha=mark.alpha, assume_dated=bool(key.learnt),
            unmarked=unmarked if key.learnt else (),
        )  # fmt: skip
        file = f"{mark.name}-on-{path.stem}.verdict.json"
        shown.append(DemoResult(mark.name, suspect, accuracy(model, data), verdict, file))
    return shown


def _count_false_reads(
    mark: _DemoMark, strangers: Sequence[Mapping[str, NDArray[np.float32]]], out: Path
) -> int:
    """How many unmarked networks give every bit of the message."""
    key = Key.load(mark.get_key_path(out))
    read = [load_weight_scheme(key).extract(each, key).match_count for each in strangers]
    return read.count(key.bits)


def _write_results(out: Path, shown: list[DemoResult]) -> None:
    for each in shown:
        content = json.dumps(each.verdict.to_json(), indent=2).encode() + b"\n"
        files.write_bytes(out / each.file, content)
    _draw_figure(out / "demo.png", [each for each in shown if each.mark == _MARKS[0].name])


def _draw_figure(path: Path, shown: list[DemoResult]) -> None:
    """Draw the null distribution of matching bits, the threshold, and where each suspect lies."""
    from matplotlib.figure import Figure

    ks = np.arange(_BITS + 1)
    tails = [10 ** compute_log10_binomial_tail(int(k), _BITS) for k in ks]
    chances = np.array(tails) - np.array([*tails[1:], 0.0])
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    axes = figure.add_subplot()
    axes.bar(ks, chances, width=1.0, color="#9aa5b1", label="a model without the mark (exact)")
    threshold = find_least_matches(_BITS, math.log10(shown[0].verdict.alpha))
    if threshold is not None:
        axes.axvline(threshold, color="#52606d", linestyle=":", label="threshold, p = 1e-6")
    styles = (("#0b6e4f", 5, "-"), ("#b44d12", 2, "-"), ("#f0c419", 2, "--"))
    for each, (colour, width, dashes) in zip(shown, styles, strict=True):
        label = f"{each.suspect}: {each.verdict.matched} bits"
        at = each.verdict.matched or 0
        axes.axvline(at, color=colour, linewidth=width, linestyle=dashes, label=label)
    axes.set(xlabel=f"matching bits out of {_BITS}", ylabel="probability", xlim=(90, 260))
    axes.legend(loc="center", bbox_to_anchor=(0.68, 0.6), fontsize=8, framealpha=1.0)
    with files.replace_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=140)


def _print_table(shown: list[DemoResult], false_reads: Mapping[str, int]) -> None:
    table = Table(title="Is ACME's mark in this model?", title_justify="left", box=SIMPLE)
    table.add_column("mark")
    table.add_column("suspect")
    for heading in ("accuracy", "bits", "log10 p", "L2"):
        table.add_column(heading, justify="right")
    table.add_column("verdict")
    for each in shown:
        verdict = each.verdict
        table.add_row(
            each.mark,
            each.suspect,
            f"{100 * each.accuracy:.1f} %",
            f"{verdict.matched}/{verdict.bits}",
            f"{verdict.log10_p:.1f}",
            "" if verdict.loss is None else f"{verdict.loss:.1e}",
            verdict.outcome.replace("_", " "),
        )
        if each.suspect == _COPY:
            last = f"false: {false_reads[each.mark]}"
            table.add_row(each.mark, f"{_STRANGERS} others", *[""] * 4, last, end_section=True)
    table.caption = (
        "network: Wang 2020's secret network, hardened; published: as printed. "
        f"L2 near .69 knows nothing. false: how many of {_STRANGERS} other unmarked networks give "
        "every bit of the message, which the printed criterion takes for the mark."
    )
    table.caption_justify = "left"
    Console(file=sys.stdout).print(table)
