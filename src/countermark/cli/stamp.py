"""The command `stamp`: put a mark into a finished checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from countermark.cli.advise import format_advice
from countermark.cli.options import (
    AsJson,
    Bits,
    Checkpoint,
    Encrypt,
    Layers,
    ModelArguments,
    NewCheckpoint,
    NewKey,
    Settings,
    parse_pairs,
    parse_scheme_fields,
    read_new_passphrase,
    require_owner,
    show_result,
)
from countermark.errors import ConfigError


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
    """Put an ownership mark into a finished checkpoint of any size.

    It takes no data and no training.
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
        *format_advice(about, done.advice.is_gentle),
        *(f"measured: {name.replace('_', ' ')} {value:.4g}" for name, value in kept.items()),
        f"{key}: commitment {about['commitment']}",
        "Keep the key secret and backed up: without it nothing can be proven, with it anybody can.",
    ]
    show_result(about, as_json, "\n".join(lines))
    return 0


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
