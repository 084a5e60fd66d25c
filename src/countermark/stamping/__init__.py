"""Marks for finished checkpoints, without data or training, for models of any size.

    forecast   expected bit errors after changes of the weights, from the weights' distribution
    candidates which tensors can carry a mark, and which of these should
    advising   choice of tensors, bits and margin, and the expected effects
    solving    the shift of each bit that gives the bit its margin after rounding
    copying    a copy of a checkpoint with some values replaced, written completely or not at all
    making     from a checkpoint and an owner's name to a stamped copy and its key

These modules need numpy only; they never hold all weights of a checkpoint in memory together.
"""

from __future__ import annotations

from countermark.stamping.advising import Advice, advise
from countermark.stamping.making import StampResult, stamp

__all__ = ["Advice", "StampResult", "advise", "stamp"]
