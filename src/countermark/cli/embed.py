"""The command `embed`: train a model with a mark in it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from countermark.cli.options import (
    AsJson,
    Bits,
    Encrypt,
    Layers,
    ModelArguments,
    Settings,
    parse_pairs,
    parse_scheme_fields,
    read_new_passphrase,
    require_owner,
    require_safetensors_name,
    show_result,
)
from countermark.errors import ConfigError


def embed(
    scheme: Annotated[str, typer.Option(metavar="NAME|none", help="See `schemes`.")],
    *,
    model: Annotated[
        str, typer.Option(metavar="NAME|module:factory", help="The host; unet for outputs.")
    ] = "",
    data: Annotated[str, typer.Option(metavar="NAME|DIR", help="digits, a folder or a hub id.")],
    out: Annotated[
        str,
        typer.Option(
            metavar="FILE",
            help="The .safetensors file to write.",
            callback=require_safetensors_name,
        ),
    ],
    layer: Layers = None,
    bits: Bits = None,
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
    """Train a model with an ownership mark in it, or without a mark.

    --scheme none trains without a mark.
    After an interruption the same command goes on where it stopped. Prints a note when the message
    is too short to prove anything without a dated claim.

    \b
    Example:
        countermark embed --scheme uchida --model mlp --data digits --layer 0.weight \\
            --bits 256 --owner "ACME Inc." --epochs 3 --out m.safetensors --key acme.key
        countermark embed --scheme none --model mlp --data digits --epochs 3 --out other.safetensors
        countermark embed --scheme deep_watermarking --data drawn --set task=denoise \\
            --set sizes=tiny --set side=32 --set bits=100 --set steps=250 --set batch=8 \\
            --set psnr=21 --epochs 1 --owner "ACME Inc." --out net.safetensors \\
            --key images.key --outputs outputs
    """
    from countermark.training.embed_classifier import UNMARKED, Order
    from countermark.training.embed_image_model import find_embed_function

    fields = parse_scheme_fields(settings, layer, bits)
    # A script may run one command line for marked and unmarked models, so this is no error.
    if scheme == UNMARKED and (fields or key or encrypt):
        warnings.warn(
            "--scheme none embeds nothing: the options of a mark are ignored", stacklevel=1
        )
        fields, key = {}, None
    if scheme != UNMARKED:
        require_owner(owner)
    make, default = find_embed_function(scheme)
    if not (model or default):
        raise ConfigError("what shall be trained? Give --model, such as mlp or vgg16")
    order = Order(
        scheme=scheme,
        fields=fields,
        model=model or default,
        model_arguments=parse_pairs(model_arguments, "--model-arg"),
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
    # The passphrase is no part of the order, because the order is written to disk.
    try:
        done = make(order, read_new_passphrase() if order.encrypted else None)
    # The file to resume from holds the key's secret until the training ends.
    except KeyboardInterrupt:
        if Path(f"{out}.resume").exists():
            warnings.warn(
                f"the same command goes on where this stopped; {out}.resume holds the secret until "
                "then: remove it if you give up",
                stacklevel=1,
            )
        raise
    show_result(done, as_json, _format_embedding_result(done))
    return 0


def _format_embedding_result(done: Mapping[str, Any]) -> str:
    """Return the result of `embed` as text."""
    # A network that makes images has no test accuracy; its quality is given in decibels.
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
