"""The `key` commands: show the public part of a key, disclose triggers, check a disclosure."""

from __future__ import annotations

import struct
import warnings
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from countermark._internal.output_paths import require_free_path
from countermark.cli.options import AsJson, Commitment, NewFile, read_key_passphrase, show_result
from countermark.errors import ConfigError, make_printable

if TYPE_CHECKING:
    from countermark.predictors.base import Images

_MOST_SHOWN = 100  # entries of a list that people would read


def show_key(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The key folder.")],
    as_json: AsJson = False,
) -> int:
    """Show the public part of a key: scheme, fields, commitment. Never the secret.

    \b
    Example:
        countermark key show acme.key
    """
    from countermark.keys.storage import load_header

    # The header is not encrypted, so no passphrase is asked for.
    header = load_header(folder).model_dump(mode="json")
    show_result(
        header,
        as_json,
        "\n".join(
            make_printable(f"{name}: {_shorten_value(value)}") for name, value in header.items()
        ),
    )
    return 0


def _shorten_value(value: object) -> object:
    """Return a value of a key header as people read it: of a long list only the length."""
    if isinstance(value, dict):
        value = {name: _shorten_value(each) for name, each in value.items()}
    if isinstance(value, list | dict) and len(value) > _MOST_SHOWN:
        return f"{len(value):,} entries (--json lists them)"
    return value


def open_key_triggers(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The key folder.")],
    triggers: Annotated[
        str, typer.Option(metavar="N,N,…|all", help="Which triggers, counted from 0.")
    ],
    out: NewFile,
    as_json: AsJson = False,
) -> int:
    """Open some triggers of a key for somebody who must not see the other triggers.

    They can check with `key check-opening` that the key committed to these triggers and that nobody
    chose the labels, and with `verify --opened` how a suspect answers. Let them choose the triggers
    by number: you know the labels, so your own choice proves less.

    \b
    Example:
        countermark embed --scheme adi --model mlp --data digits --owner "ACME Inc." --epochs 8 \\
            --out triggers.safetensors --key triggers.key
        countermark key open triggers.key --triggers 0,3,7 --out opened.json
    """
    from countermark.keys.key import Key
    from countermark.verification.disclosure import disclose_triggers

    key = Key.load(folder, read_key_passphrase(folder))
    opened = disclose_triggers(key, _parse_indices(triggers))
    opened.save(out)
    count = len(opened.opened)
    # A trigger that others know can be trained out of a copy, so the warning comes every time.
    warnings.warn(
        f"whoever sees these {count} triggers can train them out: give {out} to nobody who need "
        "not have it, and count on them no more",
        stacklevel=1,
    )
    about = {
        "opened": str(out), "triggers": [each.index for each in opened.opened],
        "committed": opened.trigger_scheme.triggers, "commitment": opened.commitment,
    }  # fmt: skip
    text = f"{out}: {count} of {about['committed']} triggers, commitment {opened.commitment}"
    show_result(about, as_json, text)
    return 0


def check_disclosure(
    opened: Annotated[Path, typer.Argument(metavar="FILE", help="As `key open` writes it.")],
    commitment: Commitment = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Write the images there as PNG; must not exist."),
    ] = None,
    as_json: AsJson = False,
) -> int:
    """Check that a key committed to these opened triggers, and print their labels.

    Exits 0 when it did, 3 when the triggers are of a test key, which proves nothing, 2 when the
    check failed or something else stopped the answer.

    \b
    Example:
        countermark key check-opening opened.json --out pictures
        countermark verify triggers.safetensors --model mlp --opened opened.json  # exit 3
    """
    from countermark._internal.files import write_folder
    from countermark.verification.disclosure import TriggerDisclosure

    # Refuse an existing folder before anything is read and checked.
    if out:
        require_free_path(out)
    loaded = TriggerDisclosure.load(opened)
    found = loaded.check(commitment)
    if out:
        names = [f"trigger-{each.index:05}-class-{each.label}.png" for each in found]
        pictures = [encode_png(each.image) for each in found]
        write_folder(out, dict(zip(names, pictures, strict=True)))
    about = {
        "commitment": loaded.commitment, "owner": loaded.owner, "scheme": loaded.scheme,
        "test_key": loaded.test_key, "committed": loaded.trigger_scheme.triggers,
        "opened": [{"index": each.index, "label": each.label} for each in found],
    }  # fmt: skip
    lines = [
        f"commitment {loaded.commitment}" + ("" if commitment else ": is it the one you know?"),
        f"owner {loaded.owner}, {len(found)} of {about['committed']} triggers of {loaded.scheme}",
        *(f"trigger {each.index}: class {each.label}" for each in found),
    ]
    if loaded.test_key:
        lines.append("this is a test key: anybody can make it again, so it proves nothing")
    show_result(about, as_json, "\n".join(map(make_printable, lines)))
    return 3 if loaded.test_key else 0


def _parse_indices(given: str) -> list[int] | None:
    """Parse N,N,… into trigger numbers; return None for `all`.

    Raises:
        ConfigError: the text is something else.
    """
    if given == "all":
        return None
    try:
        return [int(each) for each in given.split(",")]
    except ValueError:
        raise ConfigError(
            f"--triggers is {make_printable(given, 80)}: expected numbers such as 0,3,7, or all"
        ) from None


def encode_png(image: Images) -> bytes:
    """Encode an image (C, H, W) of 8-bit values as a PNG file (ISO/IEC 15948).

    An image with three channels is written in colour. Any other image is written in grey, with its
    channels below each other.
    """
    # Written out here because commands about keys must run without an imaging library.
    colours, width = 3 if len(image) == 3 else 1, image.shape[2]
    rows = (image.transpose(1, 2, 0) if colours == 3 else image).reshape(-1, width * colours)
    # IHDR: width, height, bit depth, colour type (2 is RGB, 0 is grey), then three methods, all 0.
    about = struct.pack(">IIBBBBB", width, len(rows), 8, 2 if colours == 3 else 0, 0, 0, 0)
    # Each row begins with its filter type; 0 means unfiltered.
    content = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in ((b"IHDR", about), (b"IDAT", content), (b"IEND", b""))
    )
