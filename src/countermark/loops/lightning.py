"""Lightning: a callback that adds the mark right before each optimizer step."""

from __future__ import annotations

from typing import Any

import torch

from countermark.embedding import Embedding
from countermark.errors import LoopError, MissingExtraError
from countermark.loops.distributed import require_agreement

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError:
    raise MissingExtraError("the callback for Lightning", "lightning") from None


class MarkCallback(Callback):
    """Embeds a mark while `Trainer.fit` runs; one of the `callbacks=[…]` of a Trainer.

    The gradient of the penalty is added once a step, whatever `accumulate_grad_batches` says, and
    before Lightning clips (`gradient_clip_val`): it is clipped with the rest.

    Args:
        mark: an embedding in the module or a part of it, open while `fit` runs.
        optimizer: which of the module's optimizers trains the marked tensors, where it has several.
    """

    def __init__(self, mark: Embedding, optimizer: int = 0) -> None:
        self._mark, self._number = mark, optimizer

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Make sure that gradients can be met, and that all ranks embed the same mark."""
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
        if optimizer is trainer.optimizers[self._number]:
            self._mark.add_gradient(optimizer)

    def on_train_epoch_end(self, *_: Any) -> None:
        """Tell the mark, and make sure that the ranks still agree."""
        self._mark.end_epoch()
        require_agreement(self._mark)
