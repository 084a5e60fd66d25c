"""The command line: reads options, calls the library, prints, and exits by the answer.

Judging commands exit 0 yes, 1 no, 3 cannot tell; 2 is anything that stopped the answer, an uncaught
exception included. What needs torch is imported inside the command that needs it.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from countermark.errors import ConfigError, CountermarkError

app = typer.Typer(
    name="countermark",
    help="Prove that a neural network is yours.\n\nEvery command takes --help, with an example.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    add_completion=False,
)
key_app = typer.Typer(help="Look at keys.", rich_markup_mode=None, no_args_is_help=True)
attack_app = typer.Typer(
    help="Do to a model what a thief would.", rich_markup_mode=None, no_args_is_help=True
)
app.add_typer(key_app, name="key")
app.add_typer(attack_app, name="attack")

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="K=V", help="Set a field; repeatable.")
]
ModelArguments = Annotated[
    list[str] | None,
    typer.Option("--model-arg", metavar="K=V", help="An argument of the model; repeatable."),
]
KeyFolder = Annotated[Path, typer.Option("--key", metavar="DIR", help="The key folder.")]

STOPPED = 2


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder to write; must not exist.")] = Path("demo"),
) -> int:
    """Mark a small network on real digits, then find the mark, and find it missing elsewhere.

    \b
    Example:
        countermark demo --out demo
    """
    from countermark.bench.demo import run_demo

    run_demo(out)
    return 0


@app.command()
def embed(
    scheme: Annotated[str, typer.Option(metavar="NAME|none", help="See `schemes`.")],
    model: Annotated[str, typer.Option(metavar="NAME|module:factory", help="The host.")],
    data: Annotated[str, typer.Option(metavar="NAME|DIR", help="digits, a folder or a hub id.")],
    out: Annotated[str, typer.Option(metavar="FILE", help="The .safetensors file to write.")],
    layer: Annotated[
        list[str] | None, typer.Option(metavar="T", help="Tensor to mark; repeatable, or all.")
    ] = None,
    bits: Annotated[int | None, typer.Option(metavar="N", help="Message length.")] = None,
    owner: Annotated[str, typer.Option(metavar="TEXT", help="Whose mark it is.")] = "",
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training images.")] = 10,
    seed: Annotated[int, typer.Option(help="Steers training only, never a secret.")] = 0,
    key: Annotated[
        str | None, typer.Option(metavar="DIR", help="The key folder to write; must not exist.")
    ] = None,
    start: Annotated[
        str | None, typer.Option(metavar="FILE", help="Fine-tune from these weights.")
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Distil: learn this model's answers, no labels."),
    ] = None,
    precision: Annotated[str, typer.Option(help="fp32, or bf16 autocast.")] = "fp32",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, …")] = "auto",
    encrypt: Annotated[
        bool,
        typer.Option(
            "--encrypt",
            help="Encrypt the key: passphrase by prompt or COUNTERMARK_PASSPHRASE_FILE.",
        ),
    ] = False,
    settings: Settings = None,
    model_arguments: ModelArguments = None,
    test_key: Annotated[int | None, typer.Option(hidden=True)] = None,
    as_json: AsJson = False,
) -> int:
    """Train a model with an ownership mark in it (or without one: --scheme none).

    Interrupted at any moment, the same command goes on where it stopped. Prints a note when the
    message is too short to prove anything without a dated claim.

    \b
    Example:
        countermark embed --scheme uchida --model mlp --data digits --layer 2.weight
            --bits 256 --owner "ACME Inc." --epochs 3 --out m.safetensors --key acme.key
        countermark embed --scheme none --model mlp --data digits --epochs 3 --out other.safetensors
    """
    from countermark.bench.embed import UNMARKED, Order
    from countermark.bench.embed import embed as make

    fields = _pairs(settings, "--set")
    if layer:
        fields["layer"] = layer[0] if len(layer) == 1 else layer
    if bits is not None:
        fields["bits"] = bits
    if scheme != UNMARKED and not owner:
        raise ConfigError('a mark needs an owner: give --owner "ACME Inc."')
    order = Order(
        scheme=scheme,
        fields=fields,
        model=model,
        model_arguments=_pairs(model_arguments, "--model-arg"),
        data=data,
        owner=owner,
        epochs=epochs,
        seed=seed,
        precision=precision,
        device=device,
        out=out,
        key=key,
        start=start,
        teacher=teacher,
        test_key=test_key,
    )
    done = make(order, _new_passphrase() if encrypt else None)
    _print(done, as_json, _embedded(done))
    return 0


@app.command()
def verify(
    suspect: Annotated[Path, typer.Argument(metavar="FILE", help=".safetensors or torch file.")],
    key: KeyFolder,
    alpha: Annotated[
        float, typer.Option(metavar="P", help="Threshold for the chance of a false accusation.")
    ] = 1e-6,
    assume_dated: Annotated[
        bool,
        typer.Option(
            "--assume-dated", help="You state that the key is older than the suspect; recorded."
        ),
    ] = False,
    null: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="fair_coin (default), or fresh_keys for linear keys."),
    ] = None,
    digest: Annotated[
        bool, typer.Option("--digest", help="Record the digest of the whole file too.")
    ] = False,
    as_json: AsJson = False,
) -> int:
    """Say whether a key's mark is in a model file, and how probable a false accusation is.

    Exits 0 when the mark is present, 1 when it is not proven, 3 when this key cannot tell, 2 when
    something stopped the answer.

    \b
    Example:
        countermark verify m.safetensors --key acme.key
        countermark verify other.safetensors --key acme.key --json  # exit 1
    """
    from countermark.examine import verify as judge_suspect
    from countermark.key import Key

    if not 0 < alpha < 1:
        raise ConfigError(f"--alpha is {alpha}: expected a probability between 0 and 1")
    verdict = judge_suspect(
        suspect,
        Key.load(key, _passphrase_of(key)),
        alpha=alpha,
        assume_dated=assume_dated,
        null=null,
        digest=digest,
    )
    _print(verdict.to_json(), as_json, verdict.explain())
    return verdict.exit_code


@app.command()
def schemes(
    name: Annotated[str | None, typer.Argument(help="One scheme, with its fields.")] = None,
    as_json: AsJson = False,
) -> int:
    """List the schemes, or one with all its fields and their defaults.

    \b
    Example:
        countermark schemes
        countermark schemes uchida --json
    """
    from countermark.schemes import SCHEMES, scheme_named

    if name is None:
        rows = {each: str(scheme.paper) for each, scheme in SCHEMES.items()}
        _print(rows, as_json, "\n".join(f"{each}\n    {rows[each]}" for each in rows))
        return 0
    about = scheme_named(name).describe()
    lines = [f"{field}: {value}" for field, value in about.items() if field != "fields"]
    lines += ["fields:", *(f"  {each} = {default}" for each, default in about["fields"].items())]
    _print(about, as_json, "\n".join(lines))
    return 0


@key_app.command()
def show(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The key folder.")],
    as_json: AsJson = False,
) -> int:
    """Show what is public of a key: scheme, fields, commitment. Never the secret.

    \b
    Example:
        countermark key show acme.key
    """
    from countermark.keyfile import load_header

    header = load_header(folder).model_dump(mode="json")
    _print(header, as_json, "\n".join(f"{name}: {value}" for name, value in header.items()))
    return 0


@attack_app.command("list")
def attack_list(as_json: AsJson = False) -> int:
    """List the attacks and what each one does.

    \b
    Example:
        countermark attack list --json
    """
    from countermark.attacks import ATTACKS

    rows = {
        name: {"does": attack.does, "source": attack.source, "needs_data": attack.needs_data}
        for name, attack in ATTACKS.items()
    }
    _print(rows, as_json, "\n".join(f"{name}: {row['does']}" for name, row in rows.items()))
    return 0


@attack_app.command("run")
def attack_run(
    name: Annotated[str, typer.Argument(help="See `attack list`.")],
    victim: Annotated[Path, typer.Argument(metavar="IN", help="The model file; unchanged.")],
    out: Annotated[Path, typer.Option(metavar="OUT", help="The file to write.")],
    settings: Settings = None,
    as_json: AsJson = False,
) -> int:
    """Attack a copy of a model file and say what it cost.

    \b
    Example:
        countermark attack run prune m.safetensors --out pruned.safetensors --set fraction=0.5
        countermark verify pruned.safetensors --key acme.key
    """
    from countermark.attacks import attack_named
    from countermark.attacks.base import NamedTensors
    from countermark.weights import load_state, save_weights

    attack = attack_named(name).from_fields(_pairs(settings, "--set"))
    if out.exists():
        raise ConfigError(f"{out} exists: choose another name or move it away")
    attacked = attack.run(NamedTensors(load_state(victim)))
    save_weights(attacked.model.state_dict(), out)
    cost = attacked.cost
    done = {
        "attack": name,
        "fields": attack.to_fields(),
        "model": str(out),
        "cost": {"seconds": cost.seconds, "epochs": cost.epochs, "data_share": cost.data_share},
    }
    _print(done, as_json, f"{out}: {attack} in {cost.seconds:.2f} s of CPU time")
    return 0


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit with its code.

    Args:
        arguments: instead of those of the process, for tests.
    """
    sys.exit(run(arguments))


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code instead of exiting."""
    _warnings_as_notes()
    try:
        code = app(args=arguments, prog_name="countermark", standalone_mode=False)
        sys.stdout.flush()
    except CountermarkError as error:
        return _stopped(str(error))
    except (KeyboardInterrupt, typer.Abort):
        return _stopped("interrupted")
    except Exception as error:  # the exit code must never be mistaken for an answer
        if hasattr(error, "show") and hasattr(error, "exit_code"):  # a usage error, told by typer
            error.show()
            return STOPPED
        if os.environ.get("COUNTERMARK_DEBUG"):
            traceback.print_exc()
        what = str(error).partition("\n")[0]
        return _stopped(
            f"internal error, {type(error).__name__}: {what} (COUNTERMARK_DEBUG=1 shows where)"
        )
    return code if isinstance(code, int) else 0


def _stopped(why: str) -> int:
    typer.echo(f"countermark: {why}", err=True)
    return STOPPED


def _print(value: Mapping[str, Any], as_json: bool, text: str) -> None:
    typer.echo(json.dumps(value, indent=2, allow_nan=False) if as_json else text)


def _embedded(done: Mapping[str, Any]) -> str:
    text = f"{done['model']}: test accuracy {100 * done['accuracy']:.2f} %"
    if done["key"]:
        text += (
            f"\n{done['key']}: {done['matched']} of {done['bits']} bits, "
            f"commitment {done['commitment']}\nKeep the key secret and backed up: without it "
            "nothing can be proven, with it anybody can."
        )
    return text


def _pairs(given: Sequence[str] | None, option: str) -> dict[str, Any]:
    """K=V options as a dictionary; a value is JSON where it is JSON, else text."""
    pairs: dict[str, Any] = {}
    for each in given or ():
        name, equals, value = each.partition("=")
        if not equals or not name or name in pairs:
            raise ConfigError(f"{option} {each!r}: expected NAME=VALUE, each name once")
        try:
            pairs[name] = json.loads(value)
        except ValueError:
            pairs[name] = value
    return pairs


def _passphrase_of(folder: Path) -> str | None:
    """The passphrase of an encrypted key, from the file that is named for it, or a prompt."""
    from countermark.keyfile import load_header

    if load_header(folder).encryption is None:
        return None
    return _passphrase_file() or str(typer.prompt("Passphrase", hide_input=True, err=True))


def _new_passphrase() -> str:
    kept = _passphrase_file()
    if kept:
        return kept
    return str(typer.prompt("New passphrase", hide_input=True, confirmation_prompt=True, err=True))


def _passphrase_file() -> str | None:
    path = os.environ.get("COUNTERMARK_PASSPHRASE_FILE")
    if not path:
        return None
    try:
        passphrase = Path(path).read_text().rstrip("\n")
    except OSError as error:
        raise ConfigError(f"COUNTERMARK_PASSPHRASE_FILE={path}: {error.strerror}") from None
    if not passphrase:
        raise ConfigError(f"COUNTERMARK_PASSPHRASE_FILE={path} is empty: put a passphrase there")
    return passphrase


def _warnings_as_notes() -> None:
    """Warnings of the library as one line each, without the place in its source."""
    import warnings

    def note(message: Warning | str, *_: object, **__: object) -> None:
        typer.echo(f"note: {message}", err=True)

    warnings.showwarning = note
