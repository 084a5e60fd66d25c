"""Lightning: a callback that embeds a mark right before each optimizer step."""

from __future__ import annotations

from typing import Any

import torch

from countermark.embedding import Embedding
from countermark.embedding.integrations.distributed import require_agreement
from countermark.errors import LoopError, MissingExtraError

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError:
    raise MissingExtraError("the callback for Lightning", "lightning") from None

_STATE = "countermark"
"""The name of the mark's state in a checkpoint."""


class MarkLightningCallback(Callback):
    """A Lightning callback that embeds a mark while `Trainer.fit` runs.

    The penalty's gradient is added once a step, whatever `accumulate_grad_batches` is, and before
    Lightning clips (`gradient_clip_val`): it is clipped with the rest. The mark's state is saved in
    every checkpoint and restored when `fit` resumes from it.

    Args:
        mark: an embedding in the module or a part of it, open while `fit` runs.
        optimizer: index of the module's optimizer that trains the marked tensors, if it has
            several.
    """

    def __init__(self, mark: Embedding, optimizer: int = 0) -> None:
        self._mark, self._number = mark, optimizer
        self._known = False  # whether this callback has seen the training from its first step

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]  # noqa: ARG002
    ) -> None:  # fmt: skip
        """Put the mark's state into a checkpoint."""
        checkpoint[_STATE] = self._mark.state()

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]  # noqa: ARG002
    ) -> None:  # fmt: skip
        """Restore the mark from the checkpoint that `fit` resumes from.

        Raises:
            LoopError: as `mark.restore`.
        """
        # `validate` and `test` load checkpoints too, and train nothing.
        if trainer.state.fn != "fit":
            return
        if _STATE in checkpoint:
            self._mark.restore(checkpoint[_STATE])
            self._known = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Check that gradients are usable and that all ranks embed the same mark.

        Raises:
            LoopError: gradients would be scaled when the mark adds to them, the ranks differ, or
                training resumed from a checkpoint without a mark.
        """
        if trainer.global_step and not self._known:
            raise LoopError(
                "the checkpoint holds no state of the mark: resume from one that the marked "
                "training wrote, or load the weights alone and train from step 0"
            )
        self._known = True
        # A fused optimizer unscales inside its step, after this callback added its gradient.
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        fused = getattr(trainer.optimizers[self._number], "_step_supports_amp_scaling", False)
        if scaler is not None and fused:
            raise LoopError(
                "Lightning hands over scaled gradients of a fused optimizer under 16-mixed: "
                "set fused=False, or precision='bf16-mixed'"
            )
        require_agreement(self._mark)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer  # noqa: ARG002
    ) -> None:  # fmt: skip
        """Add the penalty's gradient."""
        # A module with several optimizers, such as a GAN, calls this hook for each of them.
        if optimizer is trainer.optimizers[self._number]:
            self._mark.add_gradient(optimizer)

    def on_train_epoch_end(self, *_: Any) -> None:
        """Tell the mark that an epoch ended, and check that the ranks still agree."""
        self._mark.end_epoch()
        require_agreement(self._mark)
