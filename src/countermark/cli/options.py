"""What several commands share: options, K=V pairs, passphrases, printing."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from countermark.errors import ConfigError
from countermark.passphrase import passphrase_file

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="K=V", help="Set a field; repeatable.")
]
ModelArguments = Annotated[
    list[str] | None,
    typer.Option("--model-arg", metavar="K=V", help="An argument of the model; repeatable."),
]
Encrypt = Annotated[
    bool,
    typer.Option(
        "--encrypt", help="Encrypt the key: passphrase by prompt or COUNTERMARK_PASSPHRASE_FILE."
    ),
]


def probability(parameter: typer.CallbackParam, value: float) -> float:
    """An option between 0 and 1.

    Raises:
        ConfigError: it is not.
    """
    if not 0 < value < 1:
        raise ConfigError(f"{parameter.opts[0]} is {value}: expected a probability between 0 and 1")
    return value


_OTHER_FORMATS = (".bin", ".ckpt", ".gguf", ".h5", ".onnx", ".pt", ".pth")
_Name = TypeVar("_Name", str, Path)


def safetensors_name(parameter: typer.CallbackParam, value: _Name) -> _Name:
    """A name that does not say that the file is of another format than safetensors.

    Raises:
        ConfigError: it does.
    """
    if str(value).lower().endswith(_OTHER_FORMATS):
        raise ConfigError(
            f"{parameter.opts[0]} {value}: what is written is safetensors: expected "
            "a name that ends in .safetensors"
        )
    return value


ALPHA = 1e-6
"""As `verdict.ALPHA`, which no `--help` waits for."""

Alpha = Annotated[
    float,
    typer.Option(
        metavar="P", help="Threshold for the chance of a false accusation.", callback=probability
    ),
]
AssumeDated = Annotated[
    bool,
    typer.Option(
        "--assume-dated", help="You state that the key is older than the suspect; recorded."
    ),
]
Checkpoint = Annotated[
    Path, typer.Argument(metavar="IN", help="A .safetensors file, or a folder of them; unchanged.")
]
NewCheckpoint = Annotated[
    Path,
    typer.Option(
        metavar="OUT", help="The file or folder to write; must not exist.",
        callback=safetensors_name,
    ),
]  # fmt: skip
NewKey = Annotated[
    Path, typer.Option(metavar="DIR", help="The key folder to write; must not exist.")
]
WeightSuspect = Annotated[
    Path, typer.Argument(metavar="SUSPECT", help="A weight file, or a folder of shards.")
]


def require_owner(owner: str) -> None:
    """A mark without an owner is nobody's."""
    if not owner:
        raise ConfigError('a mark needs an owner: give --owner "ACME Inc."')
    try:
        owner.encode()
    except UnicodeEncodeError:
        raise ConfigError(
            "--owner is no text in the encoding of this shell: set PYTHONUTF8=1 or LC_ALL=C.UTF-8"
        ) from None


def show_result(value: Mapping[str, Any], as_json: bool, text: str) -> None:
    """Print an answer, as one JSON document or as text for people."""
    typer.echo(json.dumps(value, indent=2, allow_nan=False) if as_json else text)


def pairs(given: Sequence[str] | None, option: str) -> dict[str, Any]:
    """K=V options as a dictionary; a value is JSON where it is JSON, else text."""
    found: dict[str, Any] = {}
    for each in given or ():
        name, equals, value = each.partition("=")
        if not equals or not name or name in found:
            raise ConfigError(f"{option} {each!r}: expected NAME=VALUE, each name once")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found


def fields_of(
    settings: Sequence[str] | None, layer: Sequence[str] | None, bits: int | None
) -> dict[str, Any]:
    """Fields of a scheme: --set, and the two that have options of their own."""
    fields = pairs(settings, "--set")
    own: dict[str, Any] = {}
    if layer:
        own["layer"] = layer[0] if len(layer) == 1 else list(layer)
    if bits is not None:
        own["bits"] = bits
    for name in own.keys() & fields.keys():
        raise ConfigError(f"--{name} and --set {name}: give one of the two")
    return fields | own


def passphrase_of(folder: Path) -> str | None:
    """The passphrase of an encrypted key, from the file that is named for it, or a prompt."""
    from countermark.keyfile import load_header

    if load_header(folder).encryption is None:
        return None
    return passphrase_file() or _ask("Passphrase", confirm=False)


def pem_passphrase(path: Path) -> str | None:
    """The passphrase of an encrypted private key, from the file named for it, or a prompt."""
    from countermark.claims.signing import is_encrypted

    if not is_encrypted(path):
        return None
    return passphrase_file() or _ask("Passphrase", confirm=False)


def new_passphrase() -> str:
    """A passphrase for a new key, from the file that is named for it, or a prompt."""
    passphrase = passphrase_file() or _ask("New passphrase", confirm=True)
    if not passphrase:
        raise ConfigError(
            "--encrypt needs a passphrase: give it at the prompt of a terminal, "
            "or a file with it in COUNTERMARK_PASSPHRASE_FILE"
        )
    return passphrase


def shared_passphrase() -> str | None:
    """One passphrase for many keys, from the file that is named for it; None without one."""
    return passphrase_file()


def _ask(what: str, *, confirm: bool) -> str | None:
    """Ask whoever sits at the terminal; None where nobody does."""
    if sys.stdin is None or not sys.stdin.isatty():
        return None
    return str(typer.prompt(what, hide_input=True, confirmation_prompt=confirm, err=True))
