"""Accelerate: attach a mark to the optimizer inside the one that `prepare` returns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from countermark.embedding import Embedding
from countermark.embedding.integrations.distributed import require_agreement
from countermark.embedding.integrations.state_file import restore_state, write_state
from countermark.errors import MissingExtraError

try:
    from accelerate import Accelerator
    from accelerate.optimizer import AcceleratedOptimizer
except ImportError:
    raise MissingExtraError("marking under Accelerate", "hf") from None


def attach(
    mark: Embedding, optimizer: torch.optim.Optimizer, accelerator: Accelerator | None = None
) -> None:
    """Embed inside the steps of a prepared optimizer, as `mark.attach` does.

    With an accelerator, `save_state` writes the mark's state into its folder and `load_state`
    restores the state; a folder without a state is refused.

    Steps that `accelerator.accumulate` skips do not reach the inner optimizer and embed nothing.
    Clipping (`accelerator.clip_grad_norm_`) comes before the step and does not clip the penalty's
    gradient.

    Args:
        mark: an open embedding in the prepared model, `accelerator.unwrap_model(model)`.
        optimizer: the optimizer that `accelerator.prepare` returned.
        accelerator: its checkpoints get the mark's state; None leaves checkpoints alone.

    Raises:
        LoopError: as `mark.attach`; or the ranks of a distributed run do not embed the same mark.
    """
    require_agreement(mark)
    # The outer optimizer's `step` is called even where accumulation or GradScaler skips the step.
    while isinstance(optimizer, AcceleratedOptimizer):
        optimizer = optimizer.optimizer
    mark.attach(optimizer)
    if accelerator is not None:
        _join_checkpoints(mark, accelerator)


def _join_checkpoints(mark: Embedding, accelerator: Accelerator) -> None:
    """Register hooks that save and restore the mark's state with the accelerator's checkpoints."""

    def save(models: list[Any], weights: list[Any], folder: str) -> None:  # noqa: ARG001
        # One process writes: all ranks hold the same state.
        if accelerator.is_main_process:
            write_state(mark, Path(folder))

    def load(models: list[Any], folder: str) -> None:  # noqa: ARG001
        restore_state(mark, Path(folder))

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)
