"""Find the weight file in folders of model stores: the Hub's cache, Ollama, and OCI layouts.

Such a store names files by digest in small JSON documents. Both are hostile input: a name has to be
a plain path below the store's folder, and to lead to a regular file there after all links.
"""

from __future__ import annotations

import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from countermark._internal.files import parse_json, read_regular
from countermark.errors import SuspectError, make_printable

_LARGEST_MANIFEST, _MOST_MANIFESTS = 4 << 20, 1000
_DIGEST = re.compile(r"(sha256):([0-9a-f]{64})")
_CACHED_REPOSITORY = re.compile(r"(models|datasets|spaces)--.+")
# Media types of layers that hold weights: of Ollama, Docker's model runner and CNCF ModelPack.
_WEIGHT_LAYERS = re.compile(
    r"application/vnd\.ollama\.image\.model|application/vnd\.docker\.ai\.(gguf|safetensors)\b.*"
    r"|application/vnd\.cncf\.model\.weight\..*(raw|gguf|safetensors)"
)
_WEIGHT_TITLES = (".gguf", ".safetensors", ".onnx", ".pt", ".pth", ".bin")
_TITLE = "org.opencontainers.image.title"


def resolve_inside(folder: Path, name: str) -> Path:
    """Return the regular file that a name out of a hostile file means, below a folder.

    In a folder of the Hub's cache, whose files are links to the blobs beside, the whole repository
    counts as the folder.

    Raises:
        ValueError: the name is no plain relative path, or the file is missing, is no regular file
            or lies elsewhere after all links.
    """
    shown = make_printable(name, 100)
    parts = name.split("/")
    strange = any(each in "\\:" or not each.isprintable() for each in name)
    if strange or len(name) > 1000 or any(each in ("", ".", "..") for each in parts):
        raise ValueError(f"{shown!r} is no plain path below the model's own folder")
    try:
        found = (folder / name).resolve(strict=True)
        if not found.is_relative_to(_find_store(folder)):
            raise ValueError(f"{shown!r} is a link that leads out of the model's own folder")
        if not stat.S_ISREG(found.stat().st_mode):
            raise ValueError(f"{shown!r} is no regular file")
    except OSError as error:
        raise ValueError(f"{shown!r} cannot be read ({error.strerror})") from None
    return found


def _find_store(folder: Path) -> Path:
    """Return the folder that links may lead to: the folder, or its repository in the Hub's cache."""
    whole = folder.absolute()
    for part in (whole, *whole.parents):
        if part.name == "snapshots" and _CACHED_REPOSITORY.fullmatch(part.parent.name):
            return part.parent.resolve()
    return folder.resolve()


def find_in_store(path: Path) -> Path | None:
    """Return the weight file or the checkpoint folder that a store means; None for anything else.

    Args:
        path: a repository of the Hub's cache, a folder of Ollama or an OCI layout, or a manifest of
            either.

    Raises:
        SuspectError: the store holds several models, or names no weight file in it.
    """
    if path.is_file():
        return _follow_manifest(path)
    if (path / "snapshots").is_dir():
        found = sorted(each for each in (path / "snapshots").glob("*") if each.is_dir())
        return _require_one(path, found, "a repository of the Hub's cache", "snapshots")
    if (path / "manifests").is_dir() and (path / "blobs").is_dir():
        manifests = sorted(_iterate_files(path / "manifests"))
        one = _require_one(path, manifests, "a folder of Ollama models", "manifests")
        return _follow_manifest(one)
    if (path / "oci-layout").is_file():
        return _follow_manifest(path / "index.json")
    return None


def _require_one(path: Path, found: list[Path], kind: str, part: str) -> Path:
    """Return the only model of a store; raise `SuspectError` if there is none or are several."""
    if len(found) == 1:
        return found[0]
    shown = ", ".join(str(each.relative_to(path)) for each in found[:6])
    raise SuspectError(
        f"{path} is {kind} with {len(found)} {part}{': ' if shown else ''}{shown}"
        f"{', …' if len(found) > 6 else ''}; expected one: name it"
    )


def _iterate_files(folder: Path) -> Iterator[Path]:
    """Yield at most `_MOST_MANIFESTS` regular files below a folder."""
    for count, each in enumerate(folder.rglob("*")):
        if count > _MOST_MANIFESTS:
            return
        if each.is_file():
            yield each


def _follow_manifest(path: Path) -> Path | None:
    """Return the blob that a manifest, or the index of an OCI layout, names as the weights.

    Returns None if the file is no manifest.

    Raises:
        SuspectError: the manifest names no weight file or several, or one that is not there.
    """
    try:
        document = parse_json(read_regular(path, _LARGEST_MANIFEST))
    except ValueError:
        return None
    if not isinstance(document, dict) or document.get("schemaVersion") != 2:
        return None
    try:
        store = _find_blobs(path)
        # An OCI index lists manifests, and one of them is the model's.
        if isinstance(document.get("manifests"), list):
            one = _choose_layer(document["manifests"], "manifests")
            document = parse_json(read_regular(_find_blob(store, one), _LARGEST_MANIFEST))
        layers = [each for each in document["layers"] if _holds_weights(each)]
        return _find_blob(store, _choose_layer(layers, "layers with weights"))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise SuspectError(
            f"{path} is a manifest of Ollama or OCI that leads to no weights "
            f"({make_printable(str(error), 200)}): expected one weight file beside it by digest; "
            "give the weight file itself"
        ) from None


def _find_blobs(manifest: Path) -> Path:
    """Return the folder that holds `blobs` and the manifest; raise `ValueError` if there is none."""
    for part in manifest.absolute().parents:
        if (part / "blobs").is_dir():
            return part
    raise ValueError("no folder blobs is above it")


def _choose_layer(found: list[Any], what: str) -> Any:
    """Return the only entry of a manifest; raise `ValueError` otherwise."""
    if len(found) != 1:
        raise ValueError(f"it names {len(found)} {what}")
    return found[0]


def _holds_weights(layer: Any) -> bool:
    """Return true if media type or file name of a layer say that it holds weights."""
    title = str((layer.get("annotations") or {}).get(_TITLE, ""))
    if title:
        return title.lower().endswith(_WEIGHT_TITLES)
    return bool(_WEIGHT_LAYERS.fullmatch(str(layer["mediaType"])))


def _find_blob(store: Path, entry: Any) -> Path:
    """Return the file that an entry names by digest: blobs/sha256-HEX or blobs/sha256/HEX.

    Raises:
        ValueError: the digest is no SHA-256, or the file is not there.
    """
    digest = _DIGEST.fullmatch(str(entry["digest"]))
    if digest is None:
        raise ValueError(f"{str(entry['digest'])[:100]!r} is no SHA-256 digest")
    flat = "-".join(digest.groups())
    nested = "/".join(digest.groups())
    return resolve_inside(store / "blobs", flat if (store / "blobs" / flat).exists() else nested)
