"""The evaluation: M networks with D payloads each, and one modification at a time for all."""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from countermark._internal.progress import show_progress
from countermark.errors import ConfigError
from countermark_lab.experiments.provenance import collect_provenance
from countermark_lab.mpai.trial import MarkedNetworks, Modification, Technology, Trial


def evaluate(trial: Trial, technology: Technology) -> dict[str, Any]:
    """Mark, modify, detect and decode. All keys are test keys whose date is assumed.

    Args:
        trial: the settings.
        technology: marks networks of one kind, and reads them.

    Returns: `trial`, `imperceptibility` (mean quality of unmarked and of marked networks),
        `robustness` (one row for each modification), `cost` (CPU seconds of inserting, also as a
        multiple of training the unmarked network; CPU seconds of detecting and decoding; memory in
        MiB), `provenance`.

    Raises:
        ConfigError: scheme, model and fields do not fit.
    """
    if trial.networks < 1 or trial.payloads < 1:
        raise ConfigError("mpai needs at least one network and one payload")
    memory, good, started = _measure_peak_memory(), technology.measure_quality, time.monotonic()
    networks = [technology.mark_network(number) for number in range(trial.networks)]
    inserting = sum(each.seconds for each in networks) / (trial.networks * trial.payloads)
    # The minimum, since the first training also loads libraries.
    training = min(each.trained for each in networks)
    before = [good(each.plain) for each in networks]
    after = [good(one) for each in networks for one in each.marked]
    rows = [_measure_robustness(technology, networks, None)]
    with show_progress("mpai, modifications", len(trial.modifications)) as advance:
        for modification in trial.modifications:
            rows.append(_measure_robustness(technology, networks, modification))
            advance(1)
    first = networks[0]
    detecting = _measure_seconds(lambda: technology.judge_network(first.marked[0], first.keys[0]))
    return {
        "trial": _encode_trial(trial),
        "imperceptibility": {
            f"{technology.quality}_unmarked": statistics.mean(before),
            f"{technology.quality}_marked": statistics.mean(after),
        },
        "robustness": rows,
        "cost": {
            "insert_seconds": inserting, "insert_ratio": inserting / training,
            "detect_and_decode_seconds": detecting,
            "peak_memory_mib": _measure_peak_memory(), "of_which_before_mib": memory,
        },
        "provenance": collect_provenance(time.monotonic() - started),
    }  # fmt: skip


def _measure_robustness(
    technology: Technology, networks: Sequence[MarkedNetworks], modification: Modification | None
) -> dict[str, Any]:
    """Modify all networks alike and return one row of detector and decoder results."""
    false_positives = false_negatives = 0
    errors: list[float] = []
    quality: list[float] = []

    def apply_modification(model: nn.Module) -> nn.Module:
        """Apply the modification, if there is one."""
        return technology.modify_network(model, *modification) if modification else model

    for network in networks:
        plain = apply_modification(network.plain)
        # At most one false positive for each unmarked network, however many keys claim it.
        false_positives += any(technology.judge_network(plain, key).owned for key in network.keys)
        for model, key in zip(network.marked, network.keys, strict=True):
            copy = apply_modification(model)
            verdict = technology.judge_network(copy, key)
            false_negatives += not verdict.owned
            # A modified network may have no readable symbols; it counts as a false negative only.
            errors += [] if verdict.ber is None else [verdict.ber]
            quality.append(technology.measure_quality(copy))
    name, fields = modification or ("none", {})
    return {
        "modification": name, "fields": dict(fields),
        "networks": sum(1 + len(each.marked) for each in networks),
        "false_positives": false_positives, "false_negatives": false_negatives,
        "symbol_error_rate": statistics.mean(errors) if errors else None,
        technology.quality: statistics.mean(quality),
    }  # fmt: skip


def _measure_seconds(what: Callable[[], object]) -> float:
    """Return the CPU seconds that a call takes."""
    start = time.process_time()
    what()
    return time.process_time() - start


def _measure_peak_memory() -> float:
    """Return the most memory that this process has used so far, in MiB."""
    # Linux counts in KiB.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _encode_trial(trial: Trial) -> dict[str, Any]:
    """Return a trial as JSON values."""
    shown = {name: getattr(trial, name) for name in Trial.__dataclass_fields__}
    shown["fields"] = dict(trial.fields)
    shown["modifications"] = [
        {"attack": name} | dict(fields) for name, fields in trial.modifications
    ]
    return shown
