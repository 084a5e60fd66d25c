"""Networks in a key: export their tensors, and fill a network from them again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from countermark.errors import ConfigError


def export_weights(network: nn.Module, prefix: str) -> dict[str, NDArray[Any]]:
    """Return copies of a network's tensors by their names in a key, with a prefix."""
    state = network.state_dict()
    return {f"{prefix}{name}": each.numpy().copy() for name, each in state.items()}


def fill_network(
    network: nn.Module, tensors: Mapping[str, NDArray[Any]], prefix: str, what: str
) -> nn.Module:
    """Fill a network from tensors of a key; return it frozen, in eval mode.

    Args:
        network: a network of the right shape.
        tensors: the tensors of the key.
        prefix: the beginning of the names of the network's tensors in the key.
        what: the network in an error message, with its verb: "networks are".

    Raises:
        ConfigError: tensors are missing, not finite, or of another shape or type.
    """
    named = {
        name.removeprefix(prefix): np.array(each)
        for name, each in tensors.items()
        if name.startswith(prefix)
    }
    # A key file is hostile input: torch would convert types silently and load NaN.
    for name, each in network.state_dict().items():
        given = named.get(name)
        kind = each.numpy().dtype
        if given is None or given.dtype != kind or not np.isfinite(given).all():
            got = "none" if given is None else f"{given.dtype} {list(given.shape)}"
            raise ConfigError(
                f"the key's {what} damaged: {name} is {got}, expected finite {kind} "
                f"{list(each.shape)}; restore the key from a backup"
            )
    try:
        network.load_state_dict({name: torch.from_numpy(each) for name, each in named.items()})
    # torch reports wrong shapes and unknown names here; its first line names only the class.
    except RuntimeError as error:
        said = " ".join(str(error).partition("\n")[2].split())
        raise ConfigError(
            f"the key's {what} damaged ({said}): restore the key from a backup"
        ) from None
    return network.eval().requires_grad_(False)
