"""The commands of owners and auditors: demo, embed, verify, schemes."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from countermark.cli.claim import Authorities, Signers
from countermark.cli.key import Commitment, key_or_openings
from countermark.cli.options import (
    AsJson,
    AssumeDated,
    Encrypt,
    ModelArguments,
    Settings,
    new_passphrase,
    pairs,
    require_owner,
    show_result,
)
from countermark.cli.suspect import Asking, disguised, fresh_triggers, reference_of, suspect_of
from countermark.errors import ConfigError
from countermark.report.dated import Dated

app = typer.Typer(
    name="countermark",
    help="Prove that a neural network is yours.\n\nEvery command takes --help, with an example.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    add_completion=False,
)


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
    *,
    model: Annotated[
        str, typer.Option(metavar="NAME|module:factory", help="The host; unet for outputs.")
    ] = "",
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
    siblings: Annotated[
        int,
        typer.Option(
            min=0,
            help="Unmarked relatives to train, where a mark is told from them; 2 or more.",
        ),
    ] = 8,
    outputs: Annotated[
        str | None,
        typer.Option(
            metavar="DIR", help="Write what a network of images makes of test images, unmarked."
        ),
    ] = None,
    precision: Annotated[str, typer.Option(help="fp32, or bf16 autocast.")] = "fp32",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, …")] = "auto",
    encrypt: Encrypt = False,
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
        countermark embed --scheme uchida --model mlp --data digits --layer 2.weight \\
            --bits 256 --owner "ACME Inc." --epochs 3 --out m.safetensors --key acme.key
        countermark embed --scheme none --model mlp --data digits --epochs 3 --out other.safetensors
        countermark embed --scheme deep_watermarking --data drawn --set task=denoise \\
            --set sizes=tiny --set side=32 --set bits=100 --set steps=150 --set batch=8 \\
            --set psnr=21 --epochs 1 --owner "ACME Inc." --out net.safetensors \\
            --key images.key --outputs outputs
    """
    from countermark.bench.embed import UNMARKED, Order
    from countermark.bench.marking import embedder

    fields = pairs(settings, "--set")
    if layer:
        fields["layer"] = layer[0] if len(layer) == 1 else layer
    if bits is not None:
        fields["bits"] = bits
    if scheme == UNMARKED and (fields or key or encrypt):
        warnings.warn(
            "--scheme none embeds nothing: the options of a mark are ignored", stacklevel=1
        )
        fields, key = {}, None
    if scheme != UNMARKED:
        require_owner(owner)
    make, default = embedder(scheme)
    if not (model or default):
        raise ConfigError("what shall be trained? Give --model, such as mlp or vgg16")
    order = Order(
        scheme=scheme,
        fields=fields,
        model=model or default,
        model_arguments=pairs(model_arguments, "--model-arg"),
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
        siblings=siblings,
        outputs=outputs,
        encrypted=encrypt and scheme != UNMARKED,
        test_key=test_key,
    )
    done = make(order, new_passphrase() if order.encrypted else None)
    show_result(done, as_json, _embedded(done))
    return 0


@app.command()
def verify(
    suspect: Annotated[
        str,
        typer.Argument(
            metavar="FILE|URL|IMAGES_DIR",
            help=".safetensors or torch file; a prediction service, for a key of triggers; or a "
            "folder of published images, for a key of outputs.",
        ),
    ],
    key: Annotated[
        Path | None, typer.Option("--key", metavar="DIR", help="The key folder.")
    ] = None,
    opened: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="In place of a key, triggers that `key open` wrote."),
    ] = None,
    commitment: Commitment = None,
    blind_choice: Annotated[
        bool,
        typer.Option(
            "--blind-choice",
            help="You state that whoever chose the opened triggers did not know their labels; "
            "recorded. Else the others count as misses.",
        ),
    ] = False,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|module:factory",
            help="What the file is the weights of, for a key of triggers or --reference; else as "
            "the key says.",
        ),
    ] = None,
    model_arguments: ModelArguments = None,
    ask: Annotated[
        list[str] | None,
        typer.Option(
            "--ask",
            metavar="K=V",
            help="How a service is asked, such as protocol=oip; @FILE for a file's text.",
        ),
    ] = None,
    transcript: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write what was asked and answered; must not exist."),
    ] = None,
    replay: Annotated[
        bool, typer.Option("--replay", help="FILE is such a transcript: judge it, ask nobody.")
    ] = False,
    fresh: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|DIR",
            help="Ask about fresh triggers, made of the first test images of these data, in place "
            "of the committed ones.",
        ),
    ] = None,
    fresh_images: Annotated[
        int, typer.Option(metavar="N", help="Of how many test images fresh triggers are made.")
    ] = 200,
    reference: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Your own model: also read the suspect after its neurons were put into the order "
            "and scale of this one. Best is one from before the mark.",
        ),
    ] = None,
    alpha: Annotated[
        float, typer.Option(metavar="P", help="Threshold for the chance of a false accusation.")
    ] = 1e-6,
    assume_dated: AssumeDated = False,
    claim: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="A claim of this key, as evidence of its age."),
    ] = None,
    authority: Authorities = None,
    signer: Signers = None,
    suspect_date: Annotated[
        str | None,
        typer.Option(
            metavar="DATE",
            help="You state that the suspect is not older than this; recorded.",
        ),
    ] = None,
    ledger: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Where claims are counted: p is multiplied by them."),
    ] = None,
    null: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Another null of the scheme: fresh_keys or unmarked_models, both for a large "
            "--alpha.",
        ),
    ] = None,
    digest: Annotated[
        bool, typer.Option("--digest", help="Record the digest of the whole file too.")
    ] = False,
    resume: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Where an interrupted reading of many images goes on; else unused."
        ),
    ] = None,
    reader: Annotated[
        str | None,
        typer.Option(metavar="module:factory", help="A key's own reader, if you trust its code."),
    ] = None,
    as_json: AsJson = False,
) -> int:
    """Say whether a key's mark is in a suspect, and how probable a false accusation is.

    A key of triggers asks a live model: one that is built and filled from the file, or a service.
    With --opened it is asked about some of its triggers, and the key is not needed. A key of
    outputs reads images; what is no plain picture is skipped and counted.

    With --claim, the key is older than the suspect if a tree head of the --ledger with that claim
    under it was stamped by an --authority before the --suspect-date.

    Exits 0 when the mark is present, 1 when it is not proven, 3 when this key cannot tell, 2 when
    something stopped the answer.

    \b
    Example:
        countermark verify m.safetensors --key acme.key
        countermark verify other.safetensors --key acme.key --json  # exit 1
        countermark verify other.safetensors --key acme.key --reference m.safetensors  # exit 1
    """
    from countermark.examine import examine
    from countermark.verdict import Terms

    if not 0 < alpha < 1:
        raise ConfigError(f"--alpha is {alpha}: expected a probability between 0 and 1")
    if blind_choice and opened is None:
        raise ConfigError("--blind-choice is for --opened: a key has all of its triggers")
    loaded = key_or_openings(key, opened, commitment, reader)
    dated = Dated(claim, authority or [], signer or [], suspect_date, ledger)
    arguments = pairs(model_arguments, "--model-arg")
    aligned_to = reference_of(reference, loaded, model, arguments)
    if aligned_to is not None:  # a key of weights needs the architecture for nothing else
        model, arguments = None, {}
    asked = Asking(pairs(ask, "--ask"), model, arguments, transcript, replay=replay)
    with suspect_of(suspect, loaded, asked) as found:
        terms = Terms(alpha, assume_dated, blind_choice, dating=dated.of(loaded))
        judged = fresh_triggers(loaded, fresh, fresh_images) if fresh else loaded
        judged_as = found if aligned_to is None else disguised(found, aligned_to)
        verdict = examine(judged_as, judged, terms, null=null, digest=digest, resume=resume)
    show_result(verdict.to_json(), as_json, verdict.explain())
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
        show_result(rows, as_json, "\n".join(f"{each}\n    {rows[each]}" for each in rows))
        return 0
    about = scheme_named(name).describe()
    lines = [f"{field}: {value}" for field, value in about.items() if field != "fields"]
    lines += ["fields:", *(f"  {each} = {default}" for each, default in about["fields"].items())]
    show_result(about, as_json, "\n".join(lines))
    return 0


def _embedded(done: Mapping[str, Any]) -> str:
    if "accuracy" in done:
        text = f"{done['model']}: test accuracy {100 * done['accuracy']:.2f} %"
    else:
        text = (
            f"{done['model']}: {done['task_psnr']:.1f} dB on test images; marked outputs are "
            f"{done['psnr']:.1f} dB, SSIM {done['ssim']:.3f} from its own"
        )
    if done["key"]:
        text += (
            f"\n{done['key']}: {done['matched']} of {done['bits']} {done['unit']}, "
            f"commitment {done['commitment']}\n"
        )
        if done.get("siblings"):
            text += (
                f"{done['siblings']} unmarked siblings: {done['sibling_epochs']} epochs beside the "
                f"host's {done['epochs']}, {done['sibling_seconds']:.0f} s of CPU time\n"
            )
        text += (
            "Keep the key secret and backed up: without it "
            "nothing can be proven, with it anybody can."
        )
    return text
