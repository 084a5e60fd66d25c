"""Parts that several commands share: option types, K=V pairs, passphrases, printing."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from countermark.errors import ConfigError
from countermark.keys.passphrase import read_passphrase_file

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


def require_probability(parameter: typer.CallbackParam, value: float) -> float:
    """Return the value of an option if it lies between 0 and 1, both excluded.

    Raises:
        ConfigError: the value lies outside.
    """
    # The comparison is also false for nan.
    if not 0 < value < 1:
        raise ConfigError(f"{parameter.opts[0]} is {value}: expected a probability between 0 and 1")
    return value


# Endings of weight files in other formats. Other programs choose a reader by the ending.
_OTHER_FORMATS = (".bin", ".ckpt", ".gguf", ".h5", ".onnx", ".pt", ".pth")
_Name = TypeVar("_Name", str, Path)


def require_safetensors_name(parameter: typer.CallbackParam, value: _Name) -> _Name:
    """Return the name of an output file if its ending does not stand for another format.

    Raises:
        ConfigError: the ending stands for a format other than safetensors.
    """
    if str(value).lower().endswith(_OTHER_FORMATS):
        raise ConfigError(
            f"{parameter.opts[0]} {value}: what is written is safetensors: expected "
            "a name that ends in .safetensors"
        )
    return value


ALPHA = 1e-6
"""The value of `results.verdict.ALPHA`, repeated so that `--help` need not import that module."""

Alpha = Annotated[
    float,
    typer.Option(
        metavar="P",
        help="Threshold for the chance of a false accusation.",
        callback=require_probability,
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
        callback=require_safetensors_name,
    ),
]  # fmt: skip
NewKey = Annotated[
    Path, typer.Option(metavar="DIR", help="The key folder to write; must not exist.")
]
NewFile = Annotated[Path, typer.Option(metavar="FILE", help="To write; must not exist.")]
WeightSuspect = Annotated[
    Path, typer.Argument(metavar="SUSPECT", help="A weight file, or a folder of shards.")
]
Layers = Annotated[
    list[str] | None, typer.Option(metavar="T", help="Tensor to mark; repeatable, or all.")
]
Bits = Annotated[int | None, typer.Option(metavar="N", help="Message length.")]
Commitment = Annotated[
    str | None,
    typer.Option(metavar="HEX", help="The commitment that opened triggers must belong to."),
]
LedgerUrl = Annotated[
    str, typer.Option("--ledger", metavar="URL", help="A file, or postgresql://USER@HOST/NAME.")
]
Authorities = Annotated[
    list[Path] | None,
    typer.Option(
        "--authority",
        metavar="PEM",
        help="A time-stamping authority whose word you take: its root certificate; repeatable.",
    ),
]
Signers = Annotated[
    list[Path] | None,
    typer.Option(
        "--signer", metavar="PEM", help="A public key that you know to be the claimant's."
    ),
]


def require_owner(owner: str) -> None:
    """Check the owner's name.

    Raises:
        ConfigError: the name is empty, or is no text in the encoding of the shell.
    """
    if not owner:
        raise ConfigError('a mark needs an owner: give --owner "ACME Inc."')
    # Python turns bytes of another encoding into lone surrogates, which UTF-8 cannot encode.
    try:
        owner.encode()
    except UnicodeEncodeError:
        raise ConfigError(
            "--owner is no text in the encoding of this shell: set PYTHONUTF8=1 or LC_ALL=C.UTF-8"
        ) from None


def show_result(value: Mapping[str, Any], as_json: bool, text: str) -> None:
    """Print an answer, as one JSON document or as text for people."""
    # JSON has no nan or infinity, and other programs would refuse them: fail here instead.
    typer.echo(json.dumps(value, indent=2, allow_nan=False) if as_json else text)


def parse_pairs(given: Sequence[str] | None, option: str) -> dict[str, Any]:
    """Parse K=V options into a dictionary. A value that is not valid JSON is taken as text.

    Args:
        given: the options.
        option: the option's name, for messages.

    Raises:
        ConfigError: an option without a name or an equals sign, or a name that comes twice.
    """
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


def parse_scheme_fields(
    settings: Sequence[str] | None, layer: Sequence[str] | None, bits: int | None
) -> dict[str, Any]:
    """Return the fields of a scheme from --set, --layer and --bits.

    Raises:
        ConfigError: a field is given twice.
    """
    fields = parse_pairs(settings, "--set")
    own: dict[str, Any] = {}
    # The field `layer` is one tensor name, or a list of several.
    if layer:
        own["layer"] = layer[0] if len(layer) == 1 else list(layer)
    if bits is not None:
        own["bits"] = bits
    # Neither of two values is a safe guess, so a field that is given twice is refused.
    for name in own.keys() & fields.keys():
        raise ConfigError(f"--{name} and --set {name}: give one of the two")
    return fields | own


def read_key_passphrase(folder: Path) -> str | None:
    """Read the passphrase of an encrypted key.

    It comes from the file that COUNTERMARK_PASSPHRASE_FILE names, or else from a prompt.

    Returns: the passphrase; None if the key is not encrypted or nobody can be asked.
    """
    from countermark.keys.storage import load_header

    if load_header(folder).encryption is None:
        return None
    return read_passphrase_file() or _prompt_for_passphrase("Passphrase", confirm=False)


def read_pem_passphrase(path: Path) -> str | None:
    """Ask for the passphrase that decrypts a private key in a PEM file.

    It comes from the file that COUNTERMARK_PASSPHRASE_FILE names, or else from a prompt.

    Returns: the passphrase; None if the key is not encrypted or nobody can be asked.
    """
    from countermark.claims.signing import is_encrypted

    if not is_encrypted(path):
        return None
    return read_passphrase_file() or _prompt_for_passphrase("Passphrase", confirm=False)


def read_new_passphrase() -> str:
    """Read a passphrase for a new key.

    It comes from the file that COUNTERMARK_PASSPHRASE_FILE names, or else from a prompt that asks
    twice.

    Raises:
        ConfigError: there is no such file and nobody can be asked, or the passphrase is empty.
    """
    passphrase = read_passphrase_file() or _prompt_for_passphrase("New passphrase", confirm=True)
    if not passphrase:
        raise ConfigError(
            "--encrypt needs a passphrase: give it at the prompt of a terminal, "
            "or a file with it in COUNTERMARK_PASSPHRASE_FILE"
        )
    return passphrase


def read_shared_passphrase() -> str | None:
    """Read one passphrase for many keys from the file that COUNTERMARK_PASSPHRASE_FILE names.

    Returns: the passphrase; None if no file is named.
    """
    return read_passphrase_file()


def _prompt_for_passphrase(what: str, *, confirm: bool) -> str | None:
    """Ask for a passphrase at the terminal; return None if standard input is no terminal."""
    # Input from a pipe is no passphrase, and a service would wait forever.
    if sys.stdin is None or not sys.stdin.isatty():
        return None
    return str(typer.prompt(what, hide_input=True, confirmation_prompt=confirm, err=True))
