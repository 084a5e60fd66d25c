"""The command `advise`: recommend how to stamp a finished checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from countermark.cli.options import (
    AsJson,
    Bits,
    Layers,
    Settings,
    parse_scheme_fields,
    show_result,
)


def advise(
    model: Annotated[
        Path, typer.Argument(metavar="MODEL", help="A .safetensors file, or a folder of them.")
    ],
    layer: Layers = None,
    bits: Bits = None,
    settings: Settings = None,
    as_json: AsJson = False,
) -> int:
    """Recommend how to stamp a checkpoint, and forecast the effect.

    Changes nothing.
    The forecast is computed from the checkpoint's own weights; it is not a measurement.

    \b
    Example:
        countermark advise other.safetensors
        countermark advise other.safetensors --bits 128 --set margin=3 --json
    """
    from countermark.checkpoints import open_weights
    from countermark.stamping import advise as advised
    from countermark.stamping.copying import get_shards

    with open_weights(model) as weights:
        # Raises for a format that `stamp` cannot copy: advice on it would be useless.
        get_shards(weights, model)
        advice = advised(weights, parse_scheme_fields(settings, layer, bits))
    show_result(
        advice.to_json(), as_json, "\n".join(format_advice(advice.to_json(), advice.is_gentle))
    )
    return 0


def format_advice(advice: Mapping[str, Any], gentle: bool) -> list[str]:
    """Return advice as lines of text.

    Args:
        advice: as JSON values.
        gentle: whether the expected change of the weights is small.
    """
    fields, rates = advice["fields"], advice["forecast"]
    part = f"{fields['values']:,} values of each" if fields["values"] else "whole"
    where = f"{len(advice['tensors'])} tensors, {part}: {advice['values_read']:,} values"
    cost = f"margin {fields['margin']:g}, expected change {advice['expected_change']:.2%} "
    cost += f"({advice['expected_change_of_tensors']:.2%} of the tensors as wholes)"
    lines = [
        f"{fields['bits']} bits in {where}, {cost}",
        "forecast of wrong bits, from the weights as they are:",
        *(f"  {change:<16}  {rate:.3f}" for change, rate in rates.items()),
    ]
    if not gentle:
        lines.append(
            "That is much for so few weights: measure the model before you release it, take fewer "
            "bits, or train the mark in with `embed`."
        )
    return lines
