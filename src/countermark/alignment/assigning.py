"""The best assignment of rows to columns; scipy is loaded here and nowhere else on the way."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from countermark.errors import MissingExtraError


def assigned(
    values: NDArray[np.float64], *, largest: bool = False
) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Rows and columns, each once at most, whose values (rows, columns) have the least sum.

    Args:
        values: what an assignment costs.
        largest: find the largest sum instead.

    Raises:
        MissingExtraError: scipy is not installed.
    """
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError:
        raise MissingExtraError("aligning a suspect to a reference", "align") from None
    rows, columns = linear_sum_assignment(values, maximize=largest)
    return rows, columns
