"""Hugging Face Trainer: a callback that adds the mark right before each optimizer step."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from countermark.embedding import Embedding
from countermark.errors import LoopError, MissingExtraError
from countermark.loops.distributed import require_agreement
from countermark.loops.state_file import STATE_FILE, restore_state, write_state

try:
    from transformers import TrainerCallback
except ImportError:
    raise MissingExtraError("the callback for Hugging Face Trainer", "hf") from None


class MarkCallback(TrainerCallback):
    """Embeds a mark while `Trainer.train` runs; one of the `callbacks=[…]` of a Trainer.

    The gradient of the penalty is added once a step, whatever `gradient_accumulation_steps` says,
    and after Trainer has clipped to `max_grad_norm` (1.0 unless told): it escapes the clip.

    The mark's state goes into every checkpoint, last of all, and comes back when training resumes.

    Args:
        mark: an embedding in the Trainer's model, open while `train` runs.
        checkpoint: the folder that `train` resumes from; needed only where it lies outside
            `output_dir` and `TrainingArguments` do not name it.
    """

    def __init__(self, mark: Embedding, checkpoint: str | Path | None = None) -> None:
        self._mark, self._checkpoint = mark, checkpoint

    def on_train_begin(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
        """Take up the mark where training resumes, and make sure that all ranks embed the same.

        Raises:
            LoopError: the gradients cannot be met; the checkpoint holds no state of this mark; or
                the ranks differ.
        """
        if args.fp16 and not args.max_grad_norm:
            raise LoopError(
                "not every Trainer unscales the gradients of fp16 where it does not clip: "
                "set max_grad_norm, or bf16"
            )
        if state is not None and state.global_step:
            restore_state(self._mark, self._resumed_from(args, state))
        require_agreement(self._mark)

    def on_save(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
        """Write the mark's state into the checkpoint that was just saved."""
        folder = Path(args.output_dir, f"checkpoint-{state.global_step}")
        if args.should_save and folder.is_dir():
            write_state(self._mark, folder)

    def _resumed_from(self, args: Any, state: Any) -> Path:
        named = self._checkpoint or args.resume_from_checkpoint
        if isinstance(named, str | Path) and Path(named).is_dir():
            return Path(named)
        return Path(args.output_dir, f"checkpoint-{state.global_step}")

    def on_pre_optimizer_step(self, *_: Any, **given: Any) -> None:
        """Add the penalty's gradient."""
        self._mark.add_gradient(given["optimizer"])

    def on_epoch_end(self, *_: Any, **__: Any) -> None:
        """Tell the mark, and make sure that the ranks still agree."""
        self._mark.end_epoch()
        require_agreement(self._mark)


def last_checkpoint(output_dir: str | Path) -> str | None:
    """The newest checkpoint in an output folder that is whole; None where there is none.

    A checkpoint is whole once the mark's state is in it, since that is written last. Give it to
    `train(resume_from_checkpoint=…)`.
    """
    found = {
        int(match[1]): folder
        for folder in Path(output_dir).glob("checkpoint-*")
        if (match := re.fullmatch(r"checkpoint-(\d+)", folder.name))
        and (folder / STATE_FILE).is_file()
    }
    return str(found[max(found)]) if found else None
