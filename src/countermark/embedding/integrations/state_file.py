"""The state of an embedding as one safetensors file in a checkpoint, read without pickle.

The metadata field `countermark` holds the state as JSON: `{"tensor": "3"}` stands for the tensor of
that name, `{"tuple": […]}` for a tuple and `{"pairs": […]}` for a dictionary.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from countermark._internal.files import parse_json, write_bytes
from countermark.embedding import Embedding
from countermark.errors import LoopError, make_printable

STATE_FILE = "countermark.safetensors"
"""The name of the file in a checkpoint folder."""


def write_state(mark: Embedding, folder: Path) -> None:
    """Write the state of an embedding into a checkpoint folder, whole or not at all."""
    tensors: dict[str, torch.Tensor] = {}
    document = json.dumps(_encode_value(mark.state(), tensors))
    write_bytes(folder / STATE_FILE, save(tensors, {"countermark": document}))


def restore_state(mark: Embedding, folder: Path) -> None:
    """Restore an embedding from a checkpoint folder.

    Raises:
        LoopError: the folder holds no state of a mark, or a state that is damaged or belongs to
            another embedding.
    """
    path = folder / STATE_FILE
    if not path.is_file():
        raise LoopError(
            f"{folder} holds no state of the mark ({STATE_FILE}): resume from a checkpoint that "
            "the marked training wrote, or load the weights alone and train from step 0"
        )
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            document = parse_json((file.metadata() or {})["countermark"].encode())
        state = _decode_value(document, tensors)
    # A checkpoint is hostile input: nested JSON can exhaust the stack, and names can be missing.
    except (KeyError, OSError, RecursionError, SafetensorError, TypeError, ValueError) as error:
        said = make_printable(" ".join(str(error).split()), 200)
        raise LoopError(f"{path} is damaged ({said}): resume from another checkpoint") from None
    mark.restore(state)


def _encode_value(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """Return a nested state as JSON values, and put its tensors into `tensors`."""
    if isinstance(value, torch.Tensor):
        name = str(len(tensors))
        # safetensors refuses tensors that share memory or are not contiguous.
        tensors[name] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
        return {"tensor": name}
    if isinstance(value, Mapping):
        # Pairs keep keys that are not strings, such as the numbers in an optimizer's state.
        pairs = [
            [_encode_value(key, tensors), _encode_value(each, tensors)]
            for key, each in value.items()
        ]
        return {"pairs": pairs}
    if isinstance(value, tuple):
        return {"tuple": [_encode_value(each, tensors) for each in value]}
    if isinstance(value, list):
        return [_encode_value(each, tensors) for each in value]
    return value


def _decode_value(value: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    """Return the state that `_encode_value` turned into these JSON values."""
    if isinstance(value, list):
        return [_decode_value(each, tensors) for each in value]
    if not isinstance(value, dict):
        return value
    # Any other count of entries raises ValueError, which `restore_state` reports as damage.
    ((kind, inner),) = value.items()
    if kind == "tensor":
        return tensors[inner]
    if kind == "tuple":
        return tuple(_decode_value(each, tensors) for each in inner)
    if kind == "pairs":
        return {_decode_value(key, tensors): _decode_value(each, tensors) for key, each in inner}
    raise ValueError(f"{kind!r} is no part of a state")
