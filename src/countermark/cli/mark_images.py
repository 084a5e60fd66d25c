"""The command `mark-images`: mark the images in a folder as the barrier behind a network does."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from countermark.cli.options import AsJson, read_key_passphrase, show_result
from countermark.errors import ConfigError


def mark_images(
    images: Annotated[
        Path, typer.Argument(metavar="IMAGES_DIR", help="Images that a network made.")
    ],
    key: Annotated[Path, typer.Option(metavar="DIR", help="The key folder.")],
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="To write PNG files to; those there are kept.")
    ],
    as_json: AsJson = False,
) -> int:
    """Mark the images in a folder with a key of outputs.

    It does what the barrier behind a network does.
    Files that are no plain 8-bit images are skipped and counted. After an interruption the same
    command goes on where it stopped.

    \b
    Example:
        countermark mark-images outputs --key images.key --out marked
        countermark verify marked --key images.key --assume-dated --blind-choice
        countermark verify outputs --key images.key --assume-dated  # exit 1
    """
    from countermark.keys.key import Key
    from countermark.schemes import load_scheme, require_output_scheme
    from countermark.verification.image_sets import mark_folder

    # Otherwise the next run, after an interruption, would take marked images for further inputs.
    if out.resolve() == images.resolve():
        raise ConfigError(f"{out} holds the images to be marked: write to another folder")
    loaded = Key.load(key, read_key_passphrase(key))
    marked, skipped = mark_folder(images, require_output_scheme(load_scheme(loaded)), loaded, out)
    about = {"out": str(out), "images": marked, "skipped": skipped.to_json()}
    why = "".join(f"\n  {count} skipped: {reason}" for reason, count in skipped.reasons.items())
    show_result(about, as_json, f"{out}: {marked} images marked{why}")
    return 0
