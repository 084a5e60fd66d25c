"""Accelerate: the mark goes into the optimizer inside the one that `prepare` gives back."""

from __future__ import annotations

import torch

from countermark.embedding import Embedding
from countermark.errors import MissingExtraError
from countermark.loops.distributed import require_agreement

try:
    from accelerate.optimizer import AcceleratedOptimizer
except ImportError:
    raise MissingExtraError("marking under Accelerate", "hf") from None


def attach(mark: Embedding, optimizer: torch.optim.Optimizer) -> None:
    """Embed inside the steps of a prepared optimizer, as `mark.attach` does.

    Steps that `accelerator.accumulate` leaves out do not reach the inner optimizer, nor the mark.
    Clipping (`accelerator.clip_grad_norm_`) comes before the step and spares the penalty's
    gradient.

    Args:
        mark: an open embedding in the prepared model, `accelerator.unwrap_model(model)`.
        optimizer: what `accelerator.prepare` gave back.

    Raises:
        LoopError: as `mark.attach`; the ranks of a distributed run do not embed the same mark.
    """
    require_agreement(mark)
    while isinstance(optimizer, AcceleratedOptimizer):
        optimizer = optimizer.optimizer
    mark.attach(optimizer)
