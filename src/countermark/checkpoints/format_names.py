"""Name the format of a file or folder that is not read, and how to convert it.

The first bytes decide where the format has any; otherwise the entries of a zip archive, the ending
of the name, or the files in a folder. Nothing in the file is run, unpickled or unpacked.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

from countermark.checkpoints.zip_archive import StoredArchive
from countermark.errors import SuspectError

_SAMPLE = 512  # first bytes that are looked at; the name of a tar archive's format is at byte 257
_MOST_ENTRIES = 10_000
_AS_SAFETENSORS = "load it where it was made and save the weights with safetensors"


@dataclass(frozen=True)
class _Format:
    """A format that is not read.

    Attributes:
        name: what it is, as the end of the sentence "it is …".
        advice: what to do.
        matches: says if the first bytes of a file are of this format, or the name of a file, of an
            entry of a zip archive, or of a file in a folder.
    """

    name: str
    advice: str
    matches: Callable[[bytes], bool]


def _starts(*magics: bytes) -> Callable[[bytes], bool]:
    """Match first bytes."""
    return lambda start: start.startswith(magics)


def _ends(*ends: bytes) -> Callable[[bytes], bool]:
    """Match the end of a name."""
    return lambda name: name.endswith(ends)


def _is_html(start: bytes) -> bool:
    return start.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml", b"<head"))


def _is_tflite(start: bytes) -> bool:
    return start[4:8] == b"TFL3"


def _is_tar(start: bytes) -> bool:
    return start[257:262] == b"ustar"


def _is_picture(start: bytes) -> bool:
    webp = start.startswith(b"RIFF") and start[8:12] == b"WEBP"
    return webp or start.startswith((b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"II*\0", b"MM\0*"))


def _is_flax(start: bytes) -> bool:
    # A map whose first key is a short text, as a nested dict of parameters begins.
    if not start[:1] or not (0x81 <= start[0] <= 0x8F or start[0] in (0xDE, 0xDF)):
        return False
    at = {0xDE: 3, 0xDF: 5}.get(start[0], 1)
    length = start[at] - 0xA0 if len(start) > at else 0
    key = start[at + 1 : at + 1 + length]
    return 0 < length < 32 and key.isascii() and key.decode().isprintable()


def is_json(start: bytes) -> bool:
    """Return true if the first bytes are those of a JSON object or array, as text."""
    # The length of a safetensors header, in eight bytes, always holds zeros.
    return start.lstrip()[:1] in (b"{", b"[") and 0 not in start[:8]


_UNPACK = "unpack it and give the weight file"
_KERAS = (
    "read the weights with keras.models.load_model and save model.get_weights() with safetensors"
)
_ARRAYS = "save the arrays with safetensors.numpy.save_file"
_FILES = (
    _Format("an empty file", "obtain the suspect again", lambda start: not start),
    _Format("a Git LFS pointer, not the file itself", "fetch it with git lfs pull",
            _starts(b"version https://git-lfs")),
    _Format("a GGML file from before GGUF", "convert it to GGUF with llama.cpp",
            _starts(b"lmgg", b"fmgg", b"tjgg", b"algg")),
    _Format("a page of HTML or XML, perhaps a login page that was saved in place of the model",
            "download the model itself", _is_html),
    _Format("an HDF5 file, as Keras writes .h5", _KERAS, _starts(b"\x89HDF\r\n\x1a\n")),
    _Format("a NumPy array (.npy)", _ARRAYS, _starts(b"\x93NUMPY")),
    _Format("a TensorFlow Lite model", "convert it with tflite2onnx or give the model that it was "
            "made of", _is_tflite),
    _Format("a picture", "give a model; images are read by keys of outputs", _is_picture),
    _Format("a compressed archive (gzip, xz, bzip2, zstd or 7z)", _UNPACK,
            _starts(b"\x1f\x8b", b"\xfd7zXZ", b"BZh", b"\x28\xb5\x2f\xfd", b"7z\xbc\xaf")),
    _Format("a tar archive", _UNPACK, _is_tar),
    _Format("a text of JSON and no weights", "give the weight file that belongs to it",
            is_json),
    _Format("a file of msgpack, as Flax writes it", "save the parameters with "
            "safetensors.flax.save_file", _is_flax),
)  # fmt: skip
# Protobuf has no first bytes of its own, and ONNX is protobuf, too: these are known by their names.
_NAMED = (
    _Format("a Core ML model (.mlmodel)", _AS_SAFETENSORS, _ends(b".mlmodel")),
    _Format("the graph of a TensorFlow SavedModel", "convert it to ONNX with tf2onnx",
            _ends(b"saved_model.pb")),
)  # fmt: skip
_ARCHIVES = (
    _Format("an archive of NumPy arrays (.npz)", _ARRAYS, _ends(b".npy")),
    _Format("a Keras model (.keras)", _KERAS, _ends(b"model.weights.h5")),
    _Format("a Core ML package in an archive", _AS_SAFETENSORS, _ends(b".mlmodel")),
)  # fmt: skip
_FOLDERS = (
    _Format("a part of a checkpoint of torch.distributed, without its .metadata", "obtain the whole "
            "folder", _ends(b".distcp")),
    _Format("a diffusers pipeline (model_index.json)", "give the sub-folder of one of its models, "
            "such as unet or transformer", lambda name: name == b"model_index.json"),
    _Format("a TensorFlow SavedModel", "convert it to ONNX with tf2onnx",
            lambda name: name in (b"saved_model.pb", b"saved_model.pbtxt")),
    _Format("a Core ML package (.mlpackage)", _AS_SAFETENSORS,
            _ends(b".mlmodel", b"com.apple.CoreML")),
    _Format("a model of Flax", "save the parameters with safetensors.flax.save_file",
            _ends(b".msgpack")),
    _Format("an Orbax or zarr checkpoint of JAX", _AS_SAFETENSORS,
            lambda name: name in (b"_CHECKPOINT_METADATA", b"manifest.ocdbt", b".zarray")),
    _Format("a TensorFlow checkpoint", "load it in TensorFlow and save the values with safetensors",
            _ends(b".index")),
    _Format("a cache of the Hub with repositories in it", "give one of the folders models--…",
            lambda name: name.startswith(b"models--")),
)  # fmt: skip


def find_format(path: Path) -> str | None:
    """Return what a file or folder is and what to do with it, as two clauses; None if not known."""
    if path.is_dir():
        found = _find_format(_FOLDERS, _list_names(path))
    elif (found := _find_format(_NAMED, [path.name.encode(errors="replace")])) is None:
        with path.open("rb") as file:
            found = _find_format(_FILES, [file.read(_SAMPLE)])
    return None if found is None else f"{found.name}, which is not read here; {found.advice}"


def make_format_refusal(path: Path) -> SuspectError:
    """Make the error for a file or folder whose format is not read."""
    if (found := find_format(path)) is not None:
        return SuspectError(f"{path} is {found}")
    return SuspectError(
        f"{path} is of a format that is not known here: expected a .safetensors, torch, "
        "TorchScript, ONNX or GGUF file; save the weights with safetensors.torch.save_file or "
        "torch.save"
    )


def refuse_other_archives(path: Path) -> None:
    """Raise `SuspectError` for a zip archive that is known to be of another format than torch's.

    Any other file is left to the torch reader, which says what is wrong with it.
    """
    try:
        with path.open("rb") as file:
            names = StoredArchive(file, 0, path.stat().st_size).names[:_MOST_ENTRIES]
    except ValueError:
        return
    # torch ignores the case of names. Programs of torch.export hold files of torch.save.
    if any(
        name.lower().endswith(("data.pkl", "archive_format", "archive_version")) for name in names
    ):
        return
    if found := _find_format(_ARCHIVES, [name.encode(errors="replace") for name in names]):
        raise SuspectError(f"{path} is {found.name}, which is not read here; {found.advice}")


def _find_format(formats: tuple[_Format, ...], seen: list[bytes]) -> _Format | None:
    """Return the first format that matches any of the seen names or beginnings."""
    return next((each for each in formats if any(map(each.matches, seen))), None)


def _list_names(folder: Path) -> list[bytes]:
    """List names of files in a folder and in the folders in it."""
    found = chain(folder.glob("*"), folder.glob("*/*"))
    return [each.name.encode(errors="replace") for each in islice(found, _MOST_ENTRIES)]
