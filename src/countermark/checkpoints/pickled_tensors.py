"""Find the tensors in a parsed pickle of torch, whatever else it holds, with a name for each.

    {"net": {"fc.weight": tensor}}                  net.fc.weight
    a pickled module (_parameters, _buffers, _modules)   the names of its state dict
    {"state_dict": {"fc.weight": tensor}}           fc.weight, as under "model"

Settings, numbers, arrays and objects without tensors are passed over, and so are the states of
optimizers, whose tensors are no weights but have the same shapes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

from countermark.checkpoints.safe_unpickle import PersistentReference, PickledCall, PickledName

# An object of a pickle may be referred to many times, so a small file can describe a tree of
# exponential size. These bounds end the walk through the tree.
_MOST_TENSORS, _MOST_PARTS, _DEEPEST = 100_000, 1 << 22, 64
_MOST_LETTERS = 1 << 26  # letters of all names together; a name is as long as its path
_MOST_DIMENSIONS = 32
# Training scripts often save the state dict under one of these keys, beside the optimizer.
_WRAPPERS = ("state_dict", "model")
_OPTIMIZER = re.compile(r"(?i:(^|_)optim(i[sz]ers?)?(_|\d|$))")  # a word of a key
_PACKED, _PACKED_PARTS = "._packed_params._packed_params", ("weight", "bias")
# Calls whose first argument is the tensor that is a parameter or lay on another device.
_TENSOR_AROUND = (
    "torch._utils._rebuild_parameter", "torch._utils._rebuild_device_tensor_from_cpu_tensor",
)  # fmt: skip
_MODULE_PARTS = ("_parameters", "_buffers", "_modules")
_STORAGES = {
    "Double": "F64", "Float": "F32", "Half": "F16", "BFloat16": "BF16", "Long": "I64", "Int": "I32",
    "Short": "I16", "Char": "I8", "Byte": "U8", "Bool": "BOOL", "ComplexFloat": "C64",
    "ComplexDouble": "C128", "QInt8": "I8", "QUInt8": "U8", "QInt32": "I32", "Untyped": "U8",
}  # fmt: skip
TORCH_DTYPES: Mapping[str, str] = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64",
    "int32": "I32", "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL", "uint16": "U16",
    "uint32": "U32", "uint64": "U64", "complex64": "C64", "complex128": "C128",
    "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "float8_e8m0fnu": "F8_E8M0",
    "float8_e4m3fnuz": "F8_E4M3FNUZ", "float8_e5m2fnuz": "F8_E5M2FNUZ",
}  # fmt: skip
"""Dtypes of torch and the words of safetensors for them."""


@dataclass(frozen=True)
class Quantiser:
    """The numbers that the codes of a quantised tensor stand for: (code - zero) * scale.

    Attributes:
        scale, zero: a number each, or a tensor with a number for each step along an axis.
        axis: that axis.
    """

    scale: float | StoredTensor
    zero: float | StoredTensor
    axis: int = 0


@dataclass(frozen=True)
class StoredTensor:
    """A dense tensor: the key of the storage that holds its values, and its layout in there.

    Attributes:
        storage: key of the storage in the file.
        dtype: as safetensors spells it.
        offset: position of the first value in the storage, in values.
        shape, strides: as torch has them, in values.
        quantiser: of a tensor that torch quantised.
    """

    storage: str
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    quantiser: Quantiser | None = None


@dataclass(frozen=True)
class FoundTensors:
    """The tensors of a file by name.

    Attributes:
        tensors: all tensors.
        others: names of tensors beside the state dict that stands under "state_dict" or "model".
        is_program: whether the file is a program of `torch.export`.
    """

    tensors: dict[str, StoredTensor]
    others: frozenset[str] = frozenset()
    is_program: bool = False


def find_tensors(root: Any) -> FoundTensors:
    """Find every tensor in a parsed pickle, named by its path.

    A state dict under "state_dict" or "model" gives its names without this key, and the tensors
    beside it are told apart: such a file was always read as that state dict.

    Raises:
        ValueError: there are too many objects, or sizes of a tensor are no numbers, or do not fit
            each other.
    """
    main = root
    for wrapper in _WRAPPERS:
        if _get_items(inner := _get_items(main).get(wrapper)):
            main = inner
    if main is root or not (tensors := dict(_Walk().walk(main))):
        return FoundTensors(dict(_Walk().walk(root)))
    beside = dict(_Walk(passed_over=main).walk(root))
    others = frozenset(beside.keys() - tensors.keys())
    return FoundTensors(tensors | {name: beside[name] for name in beside if name in others}, others)


def describe_pickle(root: Any) -> str:
    """Describe what a pickle holds, for a message that refuses it."""
    if isinstance(root, PickledCall) and isinstance(root.by, PickledName):
        return root.by.name
    return type(root).__name__


class _Walk:
    """A walk through the objects of a parsed pickle, within bounds.

    Args:
        passed_over: an object that is not entered.
    """

    def __init__(self, passed_over: Any = None) -> None:
        self._passed_over = passed_over
        self._steps = self._tensors = self._letters = 0
        self._above: set[int] = set()  # objects that are being walked: a cycle ends there
        self._seen: set[int] = set()  # objects that were walked and need no second name

    def walk(self, value: Any, path: str = "") -> Iterator[tuple[str, StoredTensor]]:
        """Yield every tensor in an object with its name.

        Args:
            value: the object.
            path: prefix of the names, with a dot at its end.

        Raises:
            ValueError: there are too many objects, or a name is no text.
        """
        if value is self._passed_over or id(value) in self._above or id(value) in self._seen:
            return
        if len(self._above) >= _DEEPEST:
            return
        is_layer = _is_module(value)
        # Objects of a trainer refer to each other in all directions, so each of them is walked
        # once. A state dict or a module may have two names.
        if isinstance(value, PickledCall) and not is_layer and not value.items:
            self._seen.add(id(value))
        self._above.add(id(value))
        for key, part in _list_parts(value):
            self._count(0)
            # The parts of a layer are tensors and layers; lists in it are no part of a state dict.
            if not isinstance(part, PickledCall) and (
                is_layer or not isinstance(part, dict | list | tuple)
            ):
                continue
            if not isinstance(key, str | int):
                continue
            name = f"{path}{key}"
            self._count(len(name))
            name.encode()  # half a surrogate pair is no text, and no digest could cover it
            if (tensor := parse_tensor(part)) is not None:
                self._tensors += 1
                yield name, tensor
            # A layer may be called so; in a mapping of settings and states it is an optimizer.
            elif not _is_optimizer(part) and (is_layer or not is_optimizer_key(key)):
                yield from self._walk_part(name, part)
        self._above.remove(id(value))

    def _walk_part(self, name: str, part: Any) -> Iterator[tuple[str, StoredTensor]]:
        """Yield the tensors in a part of an object that is no tensor itself."""
        layer = name.removesuffix(_PACKED)
        # torch keeps the weight and the bias of a quantised linear layer as one tuple.
        if layer != name and isinstance(part, tuple) and len(part) == len(_PACKED_PARTS):
            part, name = dict(zip(_PACKED_PARTS, part, strict=True)), layer
        yield from self.walk(part, f"{name}.")

    def _count(self, letters: int) -> None:
        """Count one part of an object and the letters of its name.

        Raises:
            ValueError: there are too many.
        """
        self._steps += 1
        self._letters += letters
        if (
            self._steps > _MOST_PARTS
            or self._tensors > _MOST_TENSORS
            or self._letters > _MOST_LETTERS
        ):
            raise ValueError("its objects are too many")


def _list_parts(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield the parts of an object that may be or hold tensors, by their keys."""
    if isinstance(value, list | tuple):
        yield from enumerate(value)
    elif isinstance(value, PickledCall):
        state = _get_state(value)
        if any(part in state for part in _MODULE_PARTS):
            # A state dict names the parts of a module without these words.
            for part in _MODULE_PARTS:
                yield from _get_items(state.get(part)).items()
        else:
            yield from state.items()
        yield from enumerate(value.parts or ())
    yield from _get_items(value).items()


def _get_state(call: PickledCall) -> dict[Any, Any]:
    """Return the attributes of an object, those in slots too."""
    if isinstance(call.state, tuple) and len(call.state) == 2:
        parts = [part for part in call.state if isinstance(part, dict)]
        return {key: each for part in parts for key, each in part.items()}
    return call.state if isinstance(call.state, dict) else {}


def _get_items(value: Any) -> dict[Any, Any]:
    """Return the items of a mapping; an empty dict for any other value."""
    if isinstance(value, PickledCall):
        return value.items or {}
    return value if isinstance(value, dict) else {}


def _is_module(value: Any) -> bool:
    """Return true if an object is a module of torch or of TorchScript."""
    if not isinstance(value, PickledCall) or not isinstance(value.state, dict):
        return False
    is_script = isinstance(value.by, PickledName) and value.by.name.startswith("__torch__")
    return is_script or "_modules" in value.state


def _is_optimizer(value: Any) -> bool:
    """Return true if an object is an optimizer, or the state of one."""
    state = value.state if isinstance(value, PickledCall) else None
    return "param_groups" in _get_items(value) or "param_groups" in _get_items(state)


def is_optimizer_key(key: Any) -> bool:
    """Return true if the key of a mapping says that the state of an optimizer stands under it."""
    return isinstance(key, str) and _OPTIMIZER.search(key) is not None


def parse_tensor(value: Any) -> StoredTensor | None:
    """Parse a dense tensor; return None for any other value.

    Raises:
        ValueError: the sizes of the tensor are no numbers, or do not fit each other.
    """
    for _ in range(_DEEPEST):
        if not isinstance(value, PickledCall) or not isinstance(value.by, PickledName):
            return None
        rule, given = value.by.name, value.given
        if rule in {"torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor"}:
            return _make_tensor(given, None)
        if rule == "torch._utils._rebuild_tensor_v3" and len(given) >= 7:
            return _make_tensor(given, given[6])
        if rule == "torch._utils._rebuild_qtensor" and len(given) >= 5:
            return _make_quantised_tensor(given)
        if rule.startswith(_TENSOR_AROUND) and given:
            value = given[0]
        elif rule.startswith("torch._tensor._rebuild_from_type") and len(given) >= 3:
            # A subclass of tensor is pickled as the call that makes the tensor in it.
            value = PickledCall(given[0], given[2]) if isinstance(given[2], tuple) else None
        else:
            return None
    return None


def _make_tensor(given: tuple[Any, ...], dtype: Any) -> StoredTensor | None:
    """Make a tensor of the arguments (storage, offset, shape, strides, …); None if it has no values.

    Args:
        given: the arguments.
        dtype: the dtype of a tensor whose storage has none.
    """
    storage = given[0].identity if given and isinstance(given[0], PersistentReference) else None
    # A storage is a persistent id ("storage", type, key, device, count), in old files with a view.
    if not isinstance(storage, tuple) or len(storage) < 5 or storage[0] != "storage":
        return None
    kind, key = storage[1:3]
    word = parse_storage_dtype(kind)
    if isinstance(dtype, PickledName):
        word = TORCH_DTYPES.get(dtype.name.removeprefix("torch."))
    if word is None or not isinstance(key, str | int):
        return None
    if len(given) < 4 or not is_size_tuple(given[2]) or not is_size_tuple(given[3]):
        raise ValueError("a tensor has sizes that are no numbers")
    view = storage[5][1] if len(storage) > 5 and _is_view(storage[5]) else 0
    if not is_size_tuple((given[1], view)):
        raise ValueError("a tensor has sizes that are no numbers")
    if len(given[2]) != len(given[3]):
        raise ValueError("a tensor has sizes that do not fit each other")
    return StoredTensor(str(key), word, given[1] + view, given[2], given[3])


def _make_quantised_tensor(given: tuple[Any, ...]) -> StoredTensor | None:
    """Make a quantised tensor of the arguments (storage, offset, shape, strides, quantiser, …)."""
    if (codes := _make_tensor(given, None)) is None or not isinstance(given[4], tuple):
        return None
    scheme, *numbers = given[4] if given[4] else (None,)
    by_axis = isinstance(scheme, PickledName) and "per_channel" in scheme.name
    values = [parse_tensor(each) if by_axis else each for each in islice(numbers, 2)]
    axis = numbers[2] if by_axis and len(numbers) > 2 else 0
    if not all(isinstance(each, float | int | StoredTensor) for each in values) or len(values) < 2:
        return None
    if by_axis and (type(axis) is not int or not 0 <= axis < len(codes.shape)):
        raise ValueError("a quantised tensor has no such axis")
    quantiser = Quantiser(values[0], values[1], axis)  # type: ignore[arg-type]
    return StoredTensor(
        codes.storage, codes.dtype, codes.offset, codes.shape, codes.strides, quantiser
    )


def _is_view(value: Any) -> bool:
    """Return true if a value is the view of an old storage: its key, offset and size."""
    return isinstance(value, tuple) and len(value) == 3


def parse_storage_dtype(kind: Any) -> str | None:
    """Return the dtype of a storage class as safetensors spells it; None if it is not known."""
    if not isinstance(kind, PickledName):
        return None
    return _STORAGES.get(kind.name.rpartition(".")[2].removesuffix("Storage"))


def is_size_tuple(values: Any) -> bool:
    """Return true if a value is a tuple of at most 32 sizes: integers from 0 to below 2^62."""
    # Python integers have no limit: the bound keeps products of a size and a stride small.
    return (
        isinstance(values, tuple)
        and len(values) <= _MOST_DIMENSIONS
        and all(type(each) is int and 0 <= each < 1 << 62 for each in values)
    )
