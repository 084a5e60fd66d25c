"""Read a live torch module as a suspect."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from countermark.checkpoints.base import TensorInfo, Weights
from countermark.errors import SuspectError

if TYPE_CHECKING:
    from torch import nn


class ModuleWeights(Weights):
    """The parameters and buffers of a live module, read at the time of each call."""

    def __init__(self, module: nn.Module) -> None:
        import torch

        super().__init__(type(module).__name__)
        # A module may add extra state that is no tensor to its state dict.
        state = module.state_dict(keep_vars=True)
        self._state = {n: each for n, each in state.items() if isinstance(each, torch.Tensor)}
        self.tensors = {
            name: TensorInfo(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
            for name, tensor in self._state.items()
        }
        # A tied parameter is saved once, under its first name. Its other names are views here, so
        # that the model digest counts the values once.
        own = {name for name, _ in module.named_parameters()}
        tied = {n for n, _ in module.named_parameters(remove_duplicate=False)} - own
        self.views = frozenset(tied & self.tensors.keys())

    def _load(self, name: str) -> NDArray[Any]:
        """Load one tensor as float64 or float32, gathered from all ranks if it is sharded."""
        values = convert_to_numpy(self.name, name, gather_tensor(self._state[name]))
        self.digests[name] = hashlib.sha256(values.tobytes()).hexdigest()
        return values

    def read_pieces(self, name: str) -> Iterator[bytes]:
        """Yield the bytes of one tensor, as they are in memory."""
        yield copy_raw_bytes(self.name, name, gather_tensor(self._state[name]))

    def compute_file_digest(self) -> None:
        """Return None: a live module has no file."""

    def close(self) -> None:
        """Do nothing: a live module has no open file."""


def convert_to_numpy(suspect: str, name: str, tensor: Any) -> NDArray[Any]:
    """Convert a torch tensor of real numbers to an array of its shape, float64 or else float32.

    A quantised tensor is converted to the numbers that its codes stand for.

    Args:
        suspect: the suspect's name in messages.
        name: the tensor's name in messages.
        tensor: a torch tensor.

    Raises:
        SuspectError: the tensor is sparse, complex, on no device, or of a dtype without numbers.
    """
    try:
        if tensor.is_complex():
            raise TypeError("complex")
        wide = tensor.detach().cpu()
        wide = wide.dequantize() if wide.is_quantized else wide
        # numpy has no bfloat16, so every dtype but float64 is widened to float32.
        wide = wide if str(wide.dtype) == "torch.float64" else wide.float()
        values: NDArray[Any] = wide.contiguous().numpy()
    except (RuntimeError, TypeError):
        raise SuspectError(
            f"{suspect}: {name} is a {tensor.dtype} tensor: expected dense real weights"
        ) from None
    return values


def copy_raw_bytes(suspect: str, name: str, tensor: Any) -> bytes:
    """Copy the bytes of a dense torch tensor in its own dtype, C order, little-endian.

    Args:
        suspect: the suspect's name in messages.
        name: the tensor's name in messages.
        tensor: a torch tensor.

    Raises:
        SuspectError: the tensor is sparse, quantised, or on no device.
    """
    import torch

    try:
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        found: bytes = flat.view(torch.uint8).numpy().tobytes()
    except (RuntimeError, TypeError, NotImplementedError):
        raise SuspectError(
            f"{suspect}: {name} is a {tensor.dtype} tensor: expected a dense one, whose bytes can "
            "be digested"
        ) from None
    return found


def gather_tensor(tensor: Any) -> Any:
    """Return a tensor as a whole, gathering a sharded one (DTensor); every rank must call this."""
    whole = getattr(tensor, "full_tensor", None)
    return tensor if whole is None else whole()
