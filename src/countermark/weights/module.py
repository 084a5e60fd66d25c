"""A live torch module as a suspect."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from countermark.errors import SuspectError
from countermark.weights.base import TensorInfo, Weights

if TYPE_CHECKING:
    from torch import nn


class ModuleWeights(Weights):
    """A live module: its parameters and buffers, as they are now."""

    def __init__(self, module: nn.Module) -> None:
        import torch

        super().__init__(type(module).__name__)
        state = module.state_dict(keep_vars=True)  # extra state need not be a tensor
        self._state = {n: each for n, each in state.items() if isinstance(each, torch.Tensor)}
        self.tensors = {
            name: TensorInfo(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
            for name, tensor in self._state.items()
        }
        # A tied parameter is saved once, under its first name.
        own = {name for name, _ in module.named_parameters()}
        tied = {n for n, _ in module.named_parameters(remove_duplicate=False)} - own
        self.views = frozenset(tied & self.tensors.keys())

    def _load(self, name: str) -> NDArray[Any]:
        values = to_numpy(self.name, name, gathered(self._state[name]))
        self.digests[name] = hashlib.sha256(values.tobytes()).hexdigest()
        return values

    def pieces(self, name: str) -> Iterator[bytes]:
        """The bytes of one tensor, as they are in memory."""
        yield raw_bytes(self.name, name, gathered(self._state[name]))

    def file_digest(self) -> None:
        """A live module is no file."""

    def close(self) -> None:
        """Nothing was opened."""


def to_numpy(suspect: str, name: str, tensor: Any) -> NDArray[Any]:
    """A torch tensor of real numbers as an array of its shape, float64 or else float32.

    A quantised one is the numbers that its codes stand for.
    """
    try:
        if tensor.is_complex():
            raise TypeError("complex")
        wide = tensor.detach().cpu()
        wide = wide.dequantize() if wide.is_quantized else wide
        wide = wide if str(wide.dtype) == "torch.float64" else wide.float()
        values: NDArray[Any] = wide.contiguous().numpy()
    except (RuntimeError, TypeError):  # sparse, on no device, or of a dtype without numbers
        raise SuspectError(
            f"{suspect}: {name} is a {tensor.dtype} tensor: expected dense real weights"
        ) from None
    return values


def raw_bytes(suspect: str, name: str, tensor: Any) -> bytes:
    """The bytes of a dense torch tensor in its own dtype, C order, little-endian."""
    import torch

    try:
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        found: bytes = flat.view(torch.uint8).numpy().tobytes()
    except (RuntimeError, TypeError, NotImplementedError):  # sparse, quantized, on no device
        raise SuspectError(
            f"{suspect}: {name} is a {tensor.dtype} tensor: expected a dense one, whose bytes can "
            "be digested"
        ) from None
    return found


def gathered(tensor: Any) -> Any:
    """A tensor as a whole. One that is sharded (a DTensor) is gathered: every rank has to ask."""
    whole = getattr(tensor, "full_tensor", None)
    return tensor if whole is None else whole()
