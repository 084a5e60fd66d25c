"""Hugging Face Trainer: a callback that embeds a mark right before each optimizer step."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from countermark.embedding import Embedding
from countermark.embedding.integrations.distributed import require_agreement
from countermark.embedding.integrations.state_file import STATE_FILE, restore_state, write_state
from countermark.errors import LoopError, MissingExtraError

try:
    from transformers import TrainerCallback
except ImportError:
    raise MissingExtraError("the callback for Hugging Face Trainer", "hf") from None


class MarkTrainerCallback(TrainerCallback):
    """A Trainer callback that embeds a mark while `Trainer.train` runs.

    The penalty's gradient is added once a step, whatever `gradient_accumulation_steps` is, and
    after Trainer has clipped to `max_grad_norm` (by default 1.0), so that it is not clipped.

    The mark's state is written into every checkpoint, as its last file, and restored when training
    resumes.

    Args:
        mark: an embedding in the Trainer's model, open while `train` runs.
        checkpoint: the folder that `train` resumes from; needed only if it lies outside
            `output_dir` and `TrainingArguments` do not name it.
    """

    def __init__(self, mark: Embedding, checkpoint: str | Path | None = None) -> None:
        self._mark, self._checkpoint = mark, checkpoint

    def on_train_begin(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
        """Restore the mark if training resumes, and check that all ranks embed the same mark.

        Raises:
            LoopError: gradients would be scaled when the mark adds to them; the checkpoint holds no
                state of this mark; or the ranks differ.
        """
        # Clipping makes Trainer unscale first; without it the mark would add to scaled gradients.
        if args.fp16 and not args.max_grad_norm:
            raise LoopError(
                "not every Trainer unscales the gradients of fp16 where it does not clip: "
                "set max_grad_norm, or bf16"
            )
        if state is not None and state.global_step:
            restore_state(self._mark, self._find_resumed_folder(args, state))
        require_agreement(self._mark)

    def on_save(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
        """Write the mark's state into the checkpoint that was just saved."""
        folder = Path(args.output_dir, f"checkpoint-{state.global_step}")
        # `should_save` is true for one process only: all ranks hold the same state.
        if args.should_save and folder.is_dir():
            write_state(self._mark, folder)

    def _find_resumed_folder(self, args: Any, state: Any) -> Path:
        """Return the checkpoint folder that training resumes from."""
        # Trainer does not tell a callback which folder `train` was given; the step number does.
        named = self._checkpoint or args.resume_from_checkpoint
        if isinstance(named, str | Path) and Path(named).is_dir():
            return Path(named)
        return Path(args.output_dir, f"checkpoint-{state.global_step}")

    def on_pre_optimizer_step(self, *_: Any, **given: Any) -> None:
        """Add the penalty's gradient."""
        self._mark.add_gradient(given["optimizer"])

    def on_epoch_end(self, *_: Any, **__: Any) -> None:
        """Tell the mark that an epoch ended, and check that the ranks still agree."""
        self._mark.end_epoch()
        require_agreement(self._mark)


def last_checkpoint(output_dir: str | Path) -> str | None:
    """Return the newest complete checkpoint of an output folder, or None if there is none.

    A checkpoint is complete once the mark's state is in it, because that file is written last. Pass
    the result to `train(resume_from_checkpoint=…)`.
    """
    found = {
        int(match[1]): folder
        for folder in Path(output_dir).glob("checkpoint-*")
        if (match := re.fullmatch(r"checkpoint-(\d+)", folder.name))
        and (folder / STATE_FILE).is_file()
    }
    return str(found[max(found)]) if found else None
