"""The command `check`: attack a marked model, and read its key after each attack."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from countermark.cli.options import (
    AsJson,
    ModelArguments,
    parse_pairs,
    read_key_passphrase,
    show_result,
)
from countermark.errors import ConfigError

if TYPE_CHECKING:
    from countermark.training.robustness_check import RobustnessReport


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
    """Attack your marked model as a thief would, and read your key.

    The attacks are those that a thief tries first. The key is read after each of them.

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
