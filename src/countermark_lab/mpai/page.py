"""The result of an evaluation as Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Name and unit of each measure of quality that a technology may use.
_SAID = {"accuracy": ("accuracy", "%"), "psnr": ("PSNR", "dB")}


def render_evaluation(done: Mapping[str, Any]) -> str:
    """Format the result of `evaluate` as Markdown: two paragraphs and a table."""
    trial, seen, cost = done["trial"], done["imperceptibility"], done["cost"]
    made = done["provenance"]
    fields = ", ".join(f"{name} = {value}" for name, value in trial["fields"].items())
    every, marked = trial["networks"], trial["networks"] * trial["payloads"]
    host = f"{trial['model']} on {trial['data']}: {every} networks"
    # Stored results name the measure only by their keys.
    quality = next(name for name in _SAID if f"{name}_marked" in seen)
    said, unit = _SAID[quality]
    before, after = seen[f"{quality}_unmarked"], seen[f"{quality}_marked"]
    lines = [
        (
            f"{trial['scheme']} ({fields or 'default fields'}) in {host}, {trial['payloads']} "
            f"payloads each, {trial['epochs']} epochs, alpha {trial['alpha']:g}."
        ),
        (
            f"{said[0].upper()}{said[1:]} {before:.2f} {unit} unmarked, {after:.2f} {unit} "
            f"marked. Inserting takes {cost['insert_ratio']:.2f} × the CPU time of the unmarked "
            f"training; at most {cost['peak_memory_mib']:.0f} MiB in all. countermark "
            f"{made['countermark']}, torch {made['torch']}, {made['device']}, {made['date']}."
        ),
        "",
        f"| modification | false positives | false negatives | symbol error rate | {said} {unit} |",
        "|---|---|---|---|---|",
    ]
    for row in done["robustness"]:
        how = ", ".join(f"{name} {value}" for name, value in row["fields"].items())
        rate = row["symbol_error_rate"]
        lines.append(
            f"| {row['modification']} {how} | {row['false_positives']} of {every} | "
            f"{row['false_negatives']} of {marked} | "
            f"{'unread' if rate is None else f'{rate:.4f}'} | {row[quality]:.2f} |"
        )
    return "\n".join(lines)
