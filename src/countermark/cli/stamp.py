"""The commands for finished checkpoints: `advise`, `stamp` and `check`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from countermark.cli.options import (
    AsJson,
    Checkpoint,
    Encrypt,
    ModelArguments,
    NewCheckpoint,
    NewKey,
    Settings,
    parse_pairs,
    parse_scheme_fields,
    read_key_passphrase,
    read_new_passphrase,
    require_owner,
    show_result,
)
from countermark.errors import ConfigError

if TYPE_CHECKING:
    from countermark.training.robustness_check import RobustnessReport

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
    """Recommend how to stamp a finished checkpoint, and forecast the effect. Changes nothing.

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
        advice.to_json(), as_json, "\n".join(_format_advice(advice.to_json(), advice.is_gentle))
    )
    return 0


def stamp(
    model: Checkpoint,
    owner: Annotated[str, typer.Option(metavar="TEXT", help="Whose mark it is.")],
    key: NewKey,
    out: NewCheckpoint,
    layer: Layers = None,
    bits: Bits = None,
    settings: Settings = None,
    encrypt: Encrypt = False,
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

    Options that you leave out are chosen as `advise` recommends. The input is only read. The copy
    is written completely or not at all.

    \b
    Example:
        countermark stamp other.safetensors --owner "ACME Inc." --key stamp.key \\
            --out stamped.safetensors --set margin=4
        countermark verify stamped.safetensors --key stamp.key
    """
    from countermark.stamping import stamp as stamped
    from countermark.stamping.making import StampPaths

    require_owner(owner)
    places = StampPaths(out, key)
    # Check the output paths first, so that nobody types a passphrase in vain.
    places.check(model)
    if encrypt:
        places = StampPaths(out, key, read_new_passphrase())
    asked = _make_measurement(host, data, prompts, parse_pairs(model_arguments, "--model-arg"))
    # Measure the input first: a model or data that cannot be read then stops the command before
    # a copy and a key are written.
    before = asked.measure_outputs(model) if asked else None
    done = stamped(
        model, places, owner=owner, fields=parse_scheme_fields(settings, layer, bits),
        keep_before=not no_reference,
    )  # fmt: skip
    kept = asked.compare_outputs(before, asked.measure_outputs(out)) if asked else {}
    about = {"model": str(out), "key": str(key), **done.to_json(), "outputs": kept}
    lines = [
        f"{out}: {about['matched']} of {about['bits']} bits, relative change {done.change:.2%}",
        *_format_advice(about, done.advice.is_gentle),
        *(f"measured: {name.replace('_', ' ')} {value:.4g}" for name, value in kept.items()),
        f"{key}: commitment {about['commitment']}",
        "Keep the key secret and backed up: without it nothing can be proven, with it anybody can.",
    ]
    show_result(about, as_json, "\n".join(lines))
    return 0


def check(
    marked: Annotated[
        Path, typer.Argument(metavar="MARKED", help="Your marked model: a file, or a folder.")
    ],
    key: Annotated[Path, typer.Option(metavar="DIR", help="Its key folder.")],
    host: Annotated[
        str | None,
        typer.Option(
            "--model", metavar="NAME|module:factory", help="How to build it, to train it on."
        ),
    ] = None,
    data: Annotated[
        str | None, typer.Option(metavar="NAME|DIR", help="What it is trained on for an epoch.")
    ] = None,
    model_arguments: ModelArguments = None,
    as_json: AsJson = False,
) -> int:
    """Run the attacks that a thief tries first on your marked model, and read your key after each.

    Exits 0 when the mark is proven after every attack, 1 when it is not proven after some attack or
    is not in the untouched model, 3 when the key gives no verdict on the untouched model, 2 when
    something stopped the answer.

    \b
    Example:
        countermark check stamped.safetensors --key stamp.key
        countermark check m.safetensors --key acme.key --model mlp --data digits
    """
    from countermark.keys.key import Key
    from countermark.training.robustness_check import check_robustness as checked

    arguments = parse_pairs(model_arguments, "--model-arg")
    if bool(host) != bool(data) or (arguments and not host):
        raise ConfigError("a model is trained on by --model NAME and --data NAME: give both")
    loaded = Key.load(key, read_key_passphrase(key))
    done = checked(marked, loaded, model=host, data=data, arguments=arguments)
    show_result(done.to_json(), as_json, "\n".join(_format_tries(done)))
    return done.exit_code


# Words for a verdict on the untouched model, and for a verdict after an attack.
_FIRST = {"owned": "proven", "not_proven": "not found", "no_verdict": "cannot tell"}
_WORDS = {"owned": "still proven", "not_proven": "REMOVED", "no_verdict": "there, not proven"}


def _format_tries(done: RobustnessReport) -> list[str]:
    """Return the result of `check` as lines of text, one for each attack."""
    lines = []
    # The first entry is the untouched model; its words differ from those after an attack.
    for number, each in enumerate(done.tries):
        line = f"{each.what:<42}  {(_WORDS if number else _FIRST)[each.outcome]:<17}"
        if each.matched is not None:
            line += f"  {each.matched} of {each.bits} bits, log10 p {each.log10_p:.1f}"
        if each.accuracy is not None:
            line += f", test accuracy {each.accuracy:.2%}"
        lines.append(line)
    if done.reason:
        lines.append(f"nothing was tried: {done.reason}")
    return lines + [f"not tried: {each}" for each in done.not_tried]


def _make_measurement(
    host: str | None, data: str | None, prompts: Path | None, arguments: dict[str, Any]
) -> Any:
    """Return the measurement to make before and after stamping, or None.

    Raises:
        ConfigError: options that do not go together.
    """
    if bool(host) != bool(data) or (arguments and not host) or (host and prompts):
        raise ConfigError("outputs are measured by --model NAME --data NAME, or by --prompts FILE")
    if not (host or prompts):
        return None
    # The import is late because it loads torch, which stamping itself does not need.
    from countermark.training.fidelity import ClassifierFidelity, TextFidelity

    return (
        TextFidelity(prompts) if prompts else ClassifierFidelity(host or "", arguments, data or "")
    )


def _format_advice(advice: Mapping[str, Any], gentle: bool) -> list[str]:
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
