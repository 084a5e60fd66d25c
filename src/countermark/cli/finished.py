"""The commands for finished checkpoints: advise, stamp."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from countermark.cli.options import (
    AsJson,
    ModelArguments,
    Settings,
    new_passphrase,
    pairs,
    show_result,
)
from countermark.errors import ConfigError

Layers = Annotated[
    list[str] | None, typer.Option(metavar="T", help="Tensor to mark; repeatable, or all.")
]
Bits = Annotated[int | None, typer.Option(metavar="N", help="Message length.")]


def advise(
    model: Annotated[
        Path, typer.Argument(metavar="MODEL", help="A .safetensors file, or a folder of them.")
    ],
    layer: Layers = None,
    bits: Bits = None,
    settings: Settings = None,
    as_json: AsJson = False,
) -> int:
    """Say how a finished checkpoint should be stamped, and what to expect; changes nothing.

    The forecast is arithmetic on the checkpoint's own weights, not a measurement.

    \b
    Example:
        countermark advise other.safetensors
        countermark advise other.safetensors --bits 128 --set margin=3 --json
    """
    from countermark.stamping import advise as advised
    from countermark.weights import open_weights

    with open_weights(model) as weights:
        advice = advised(weights, _fields(layer, bits, settings))
    show_result(advice.to_json(), as_json, "\n".join(_told(advice.to_json(), advice.gentle)))
    return 0


def stamp(
    model: Annotated[
        Path,
        typer.Argument(metavar="IN", help="A .safetensors file, or a folder of them; unchanged."),
    ],
    owner: Annotated[str, typer.Option(metavar="TEXT", help="Whose mark it is.")],
    key: Annotated[
        Path, typer.Option(metavar="DIR", help="The key folder to write; must not exist.")
    ],
    out: Annotated[
        Path, typer.Option(metavar="OUT", help="The file or folder to write; must not exist.")
    ],
    layer: Layers = None,
    bits: Bits = None,
    settings: Settings = None,
    encrypt: Annotated[
        bool,
        typer.Option(
            "--encrypt",
            help="Encrypt the key: passphrase by prompt or COUNTERMARK_PASSPHRASE_FILE.",
        ),
    ] = False,
    no_reference: Annotated[
        bool,
        typer.Option(
            "--no-reference", help="Do not keep in the key what it reads as it was before."
        ),
    ] = False,
    host: Annotated[
        str | None,
        typer.Option(
            "--model", metavar="NAME|module:factory", help="What IN is the weights of, for --data."
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(metavar="NAME|DIR", help="Print the test accuracy before and after."),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Texts, one a line: print how far their embeddings moved. IN is a folder for it.",
        ),
    ] = None,
    model_arguments: ModelArguments = None,
    as_json: AsJson = False,
) -> int:
    """Put an ownership mark into a finished checkpoint of any size, without data or training.

    What is not said is chosen as `advise` would. The input is only read; the copy is there whole
    or not at all.

    \b
    Example:
        countermark stamp other.safetensors --owner "ACME Inc." --key stamp.key \\
            --out stamped.safetensors
        countermark verify stamped.safetensors --key stamp.key
    """
    from countermark.stamping import stamp as stamped
    from countermark.stamping.making import Places

    if not owner:
        raise ConfigError('a mark needs an owner: give --owner "ACME Inc."')
    places = Places(out, key)
    places.check(model)
    if encrypt:
        places = Places(out, key, new_passphrase())
    asked = _outputs(host, data, prompts, pairs(model_arguments, "--model-arg"))
    before = asked.of(model) if asked else None
    done = stamped(
        model, places, owner=owner, fields=_fields(layer, bits, settings),
        keep_before=not no_reference,
    )  # fmt: skip
    kept = asked.compared(before, asked.of(out)) if asked else {}
    about = {"model": str(out), "key": str(key), **done.to_json(), "outputs": kept}
    lines = [
        f"{out}: {about['matched']} of {about['bits']} bits, relative change {done.change:.2%}",
        *_told(about, done.advice.gentle),
        *(f"measured: {name.replace('_', ' ')} {value:.4g}" for name, value in kept.items()),
        f"{key}: commitment {about['commitment']}",
        "Keep the key secret and backed up: without it nothing can be proven, with it anybody can.",
    ]
    show_result(about, as_json, "\n".join(lines))
    return 0


def _outputs(
    host: str | None, data: str | None, prompts: Path | None, arguments: dict[str, Any]
) -> Any:
    """What shall be measured before and after; None for nothing."""
    if bool(host) != bool(data) or (arguments and not host) or (host and prompts):
        raise ConfigError("outputs are measured by --model NAME --data NAME, or by --prompts FILE")
    if not (host or prompts):
        return None
    from countermark.bench.kept import Pictures, Texts

    return Texts(prompts) if prompts else Pictures(host or "", arguments, data or "")


def _fields(
    layer: list[str] | None, bits: int | None, settings: list[str] | None
) -> dict[str, Any]:
    """Fields of the scheme as the command line gives them."""
    fields = pairs(settings, "--set")
    if layer:
        fields["layer"] = layer[0] if len(layer) == 1 else layer
    if bits is not None:
        fields["bits"] = bits
    return fields


def _told(advice: Mapping[str, Any], gentle: bool) -> list[str]:
    """Advice for people, as lines."""
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
