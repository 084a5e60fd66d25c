"""Hugging Face Trainer: a callback that adds the mark right before each optimizer step."""

from __future__ import annotations

from typing import Any

from countermark.embedding import Embedding
from countermark.errors import LoopError, MissingExtraError
from countermark.loops.distributed import require_agreement

try:
    from transformers import TrainerCallback
except ImportError:
    raise MissingExtraError("the callback for Hugging Face Trainer", "hf") from None


class MarkCallback(TrainerCallback):
    """Embeds a mark while `Trainer.train` runs; one of the `callbacks=[…]` of a Trainer.

    The gradient of the penalty is added once a step, whatever `gradient_accumulation_steps` says,
    and after Trainer has clipped to `max_grad_norm` (1.0 unless told): it escapes the clip.

    Args:
        mark: an embedding in the Trainer's model, open while `train` runs.
    """

    def __init__(self, mark: Embedding) -> None:
        self._mark = mark

    def on_train_begin(self, args: Any, *_: Any, **__: Any) -> None:
        """Make sure that gradients can be met, and that all ranks embed the same mark."""
        if args.fp16 and not args.max_grad_norm:
            raise LoopError(
                "not every Trainer unscales the gradients of fp16 where it does not clip: "
                "set max_grad_norm, or bf16"
            )
        require_agreement(self._mark)

    def on_pre_optimizer_step(self, *_: Any, **given: Any) -> None:
        """Add the penalty's gradient."""
        self._mark.add_gradient(given["optimizer"])

    def on_epoch_end(self, *_: Any, **__: Any) -> None:
        """Tell the mark, and make sure that the ranks still agree."""
        self._mark.end_epoch()
        require_agreement(self._mark)
