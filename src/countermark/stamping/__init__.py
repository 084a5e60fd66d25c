"""Marks for finished checkpoints: no data, no training, any size.

    forecast   what changes of the weights will cost bits, from the weights' own distribution
    advising   which tensors, bits and margin, and what to expect of them
    solving    the shift of each bit that gives it its margin, across rounding
    copying    a copy of a checkpoint with some values replaced, there whole or not at all
    making     all of it: a checkpoint and an owner's name to a stamped copy and a key

numpy; the weights of a checkpoint are never in memory together.
"""

from __future__ import annotations

from countermark.stamping.advising import Advice, advise
from countermark.stamping.making import Stamped, stamp

__all__ = ["Advice", "Stamped", "advise", "stamp"]
