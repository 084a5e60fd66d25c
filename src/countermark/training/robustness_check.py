"""Common attacks on the owner's marked model, and the verdict of its key after each attack."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from countermark._internal.progress import show_progress
from countermark.alignment.symmetries import find_chain_groups
from countermark.attacks.base import Attack, NamedTensors
from countermark.attacks.dead_units import FillUnits
from countermark.attacks.fine_tune import FineTune
from countermark.attacks.noise import Noise
from countermark.attacks.output_layer import HEADS, ShiftLogits
from countermark.attacks.prune import Prune
from countermark.attacks.quantise import Quantise
from countermark.checkpoints import Array, Weights, open_weights
from countermark.errors import ConfigError
from countermark.keys.key import Key
from countermark.results.subject import Subject
from countermark.results.verdict import KeyIdentity, Outcome, VerificationOptions, judge
from countermark.schemes import load_weight_scheme
from countermark.schemes.stamp.scheme import Stamp
from countermark.schemes.weights import WeightScheme
from countermark.training.data import load_data
from countermark.training.embed_classifier import load_host
from countermark.training.loop import accuracy
from countermark.verification.verify import verify

# These descriptions are printed as they stand. `check_robustness` also finds SHIFTED by its text.
UNTOUCHED = "as it is"
TRAINED_ON = "trained on for one epoch"
TRIES: Mapping[str, Attack] = {
    "weights shaken by a tenth of their spread": Noise(0.1),
    "weights shaken by half of their spread": Noise(0.5),
    "weights shaken by all of their spread": Noise(1.0),
    "half of the weights set to zero": Prune(0.5),
    "nine of ten weights set to zero": Prune(0.9),
    "rounded to 8 bits": Quantise(8, "channel"),
    "rounded to 4 bits": Quantise(4, "channel"),
    "noise in one of 20 columns (dead units)": FillUnits("outgoing"),
    "noise in one of 20 rows (units unheard)": FillUnits("incoming"),
}
# Applies to the last layer only: adding one vector to all of its rows changes no class there.
SHIFTED = "one vector in all rows of the last layer"
NOT_TRIED = (
    "reordered or rescaled neurons, which hide what is read in order: keep a reference for verify",
    "rotated streams, turned value heads, another order of classes: see attack list",
    "blocks put in or taken out: verify finds blocks by the values that a stamp's key keeps",
    "distilling, merging with other models, long training: no key of weights is sure of these",
)
NO_LAST_LAYER = "a shift of all scores: the key reads no layer that is a model's last by its name"
NOT_TRAINED = "training on: give --model and --data"


@dataclass(frozen=True)
class AttackOutcome:
    """The verdict after one attack.

    Attributes:
        what: describes the attack in plain words.
        outcome: of the verdict.
        matched, bits: the number of matching bits, and of all bits.
        log10_p: of the verdict.
        accuracy: on test images after the attack, 0 to 1; None where it was not measured.
    """

    what: str
    outcome: Outcome
    matched: int | None
    bits: int
    log10_p: float | None
    accuracy: float | None = None


@dataclass(frozen=True)
class RobustnessReport:
    """The verdicts after all attacks on a marked model.

    Attributes:
        tries: one entry for each attack; the first one is the untouched model.
        not_tried: the attacks that were left out, in plain words.
        reason: why the key proves nothing in the untouched model; empty where it does.
        seconds: elapsed time.
    """

    tries: tuple[AttackOutcome, ...]
    not_tried: tuple[str, ...]
    reason: str
    seconds: float

    @property
    def exit_code(self) -> int:
        """Exit code: 0 if the mark survives all attacks, 1 if not, 3 without any verdict."""
        if self.tries[0].outcome == "no_verdict":
            return 3
        return 0 if all(each.outcome == "owned" for each in self.tries) else 1

    def to_json(self) -> dict[str, Any]:
        """Return all attributes as JSON values."""
        return asdict(self)


def check_robustness(
    marked: Path, key: Key, *, model: str | None = None, data: str | None = None,
    arguments: Mapping[str, Any] | None = None,
) -> RobustnessReport:  # fmt: skip
    """Attack the tensors that a key reads, in memory, and read them again.

    Args:
        marked: the file of the owner's marked model.
        key: the key of that model, of a linear weight scheme.
        model: name or factory that builds the model; needed to fine-tune it.
        data: data set to fine-tune it on; without model and data, fine-tuning is left out.
        arguments: arguments of the factory.

    Raises:
        ConfigError: the key is of another kind, or model and data do not fit.
        SuspectError: the model cannot be read.
    """
    began = time.monotonic()
    scheme = load_weight_scheme(key)
    # A learnt reader compares with unmarked models in every verdict: minutes for each attack.
    if not scheme.linear:
        raise ConfigError(
            f"a key of {key.scheme} has a learnt reader, whose verdicts take too long to try many: "
            "expected a key of uchida or stamp; use attack run and verify"
        )
    # Without a mark in the untouched model, attacks would say nothing.
    untouched = verify(marked, key)
    tries = [
        AttackOutcome(UNTOUCHED, untouched.outcome, untouched.matched, key.bits, untouched.log10_p)
    ]
    if not untouched.owned:
        return RobustnessReport(tuple(tries), (), untouched.reason, time.monotonic() - began)
    tries += _run_attacks(marked, scheme, key)
    if model and data:
        tries.append(_run_fine_tuning(marked, key, (model, dict(arguments or {})), data))
    left = NOT_TRIED if model and data else (NOT_TRAINED, *NOT_TRIED)
    if all(each.what != SHIFTED for each in tries):
        left = (*left, NO_LAST_LAYER)
    return RobustnessReport(tuple(tries), left, "", time.monotonic() - began)


def _run_attacks(marked: Path, scheme: WeightScheme, key: Key) -> Iterator[AttackOutcome]:
    """Run every attack that needs no data, and yield a verdict for each.

    All attacks run on one tensor before the next one is read, so the file is read only once.
    """
    with open_weights(marked) as weights:
        last = _find_last_layer(weights)
    tried: dict[str, Attack] = dict(TRIES)
    if last in key.tensors:
        tried[SHIFTED] = ShiftLogits(layer="rows")
    found: dict[str, dict[str, Array]] = {what: {} for what in tried}
    with open_weights(marked) as weights, show_progress("attacks", len(key.tensors)) as advance:
        for name, shape in key.tensors.items():
            rows, part = _read_attacked_rows(weights, scheme, key, name)
            for what, attack in tried.items():
                # A copy, since attacks may change the tensor in place.
                victim = NamedTensors({"rows": torch.from_numpy(rows.copy())})
                if what != SHIFTED or name == last:
                    victim = attack.run(victim).model  # type: ignore[assignment]
                values = victim.state_dict()["rows"].numpy().reshape(-1)
                found[what][name] = values.reshape(shape) if part is None else values[part]
            advance(1)
    subject, identity = Subject(name=str(marked)), KeyIdentity.from_key(key)
    for what, tensors in found.items():
        evidence = scheme.extract(tensors, key)
        verdict = judge(
            evidence, scheme.null(), subject=subject, key=identity, terms=VerificationOptions()
        )
        yield AttackOutcome(what, verdict.outcome, verdict.matched, verdict.bits, verdict.log10_p)


def _find_last_layer(weights: Weights) -> str:
    """Find the name of the weight of a file's last layer.

    A layer counts as the last by the name of its module, or as the end of a plain chain of layers.

    Returns: the tensor name; empty if the file does not show which layer is the last.
    """
    shapes = {name: each.shape for name, each in weights.tensors.items()}
    matrices = [name for name, shape in shapes.items() if len(shape) > 1]
    named = [each for each in matrices if each.split(".")[-2:-1] and each.split(".")[-2] in HEADS]
    if named:
        return named[-1]
    try:
        chain = find_chain_groups(shapes)
    except ConfigError:
        return ""
    # The last layer takes in units of the layer before it and gives none to a later layer.
    consumed = {m.name for units in chain for m in units.members if m.power < 0}
    produced = {m.name for units in chain for m in units.members if m.power > 0}
    return next(iter(consumed - produced), "")


def _read_attacked_rows(
    weights: Weights, scheme: WeightScheme, key: Key, name: str
) -> tuple[Array, slice | None]:
    """Read the rows of a tensor that an attack changes.

    Returns: rows (n, width), and the slice of their flattened values that the key reads, None for
        all values. For a stamp that reads a part of the tensor, only the rows around that part are
        read.
    """
    shape = key.tensors[name]
    if (
        not isinstance(scheme, Stamp)
        or len(shape) < 2
        or scheme.count_read_values(shape) == prod(shape)
    ):
        return weights.read(name).reshape(shape[0] if len(shape) > 1 else 1, -1), None
    place, width = scheme.draw_places(key.tensors, key.material)[name], prod(shape[1:])
    # Round outwards to whole rows, since attacks work on rows; -(-a // b) rounds up.
    first, last = place.start // width, -(-place.stop // width)
    rows = weights.read_part(name, first * width, (last - first) * width)
    return rows.reshape(-1, width), slice(place.start - first * width, place.stop - first * width)


def _run_fine_tuning(
    marked: Path, key: Key, host: tuple[str, dict[str, Any]], data: str
) -> AttackOutcome:
    """Fine-tune all layers for one epoch and read the key again."""
    loaded = load_data(data)
    # A rate of 1e-3 is low enough that the model keeps its accuracy, as a thief wants it to.
    tuned = FineTune(lr=1e-3).run(load_host(*host, marked, loaded), loaded).model
    verdict = verify(tuned, key)
    return AttackOutcome(
        TRAINED_ON, verdict.outcome, verdict.matched, key.bits, verdict.log10_p,
        accuracy(tuned, loaded),
    )  # fmt: skip
