"""Solve the assignment problem. On the way of a reading, scipy is loaded only here."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from countermark.errors import MissingExtraError


def solve_assignment(
    values: NDArray[np.float64], *, largest: bool = False
) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Return the rows and columns of the assignment with the least sum of values.

    Each row and each column occurs at most once.

    Args:
        values: the cost of each pair, (rows, columns).
        largest: find the largest sum instead.

    Raises:
        MissingExtraError: scipy is not installed.
    """
    try:
        # Imported here, because reading without alignment must not need scipy.
        from scipy.optimize import linear_sum_assignment
    except ImportError:
        raise MissingExtraError("aligning a suspect to a reference", "align") from None
    rows, columns = linear_sum_assignment(values, maximize=largest)
    return rows, columns
