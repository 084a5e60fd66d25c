"""SPAM features: how differences of neighbouring pixels follow each other.

T. Pevný, P. Bas, J. Fridrich, "Steganalysis by subtractive pixel adjacency matrix", IEEE TIFS 5(2),
2010: second order, T = 3. For the direction → and the difference D_{i,j} = I_{i,j} − I_{i,j+1}

    M→_{u,v,w} = P(D_{i,j+2} = u | D_{i,j+1} = v, D_{i,j} = w),    u, v, w in −T..T,

and 0 if the condition never holds. Of the eight directions, the four straight ones are averaged,
and the four diagonal ones: 2·7³ = 686 numbers. Feature 49(u+3) + 7(v+3) + (w+3) is the straight
average at (u, v, w); the diagonal average stands 343 places further.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

from countermark._internal.progress import show_progress
from countermark.errors import find_by_name
from countermark_lab.steganalysis.images import Images, check_images

Form: TypeAlias = Literal["cooccurrence", "transition"]
Colour: TypeAlias = Literal["average", "concatenation"]
Planes: TypeAlias = NDArray[np.int16]  # (p, H, W)
Matrices: TypeAlias = NDArray[np.float64]  # (p, 7, 7, 7), (p, 9, 9, 9) beyond ±T

T = 3
FEATURES = 2 * (2 * T + 1) ** 3
BINS = (2 * T + 3) ** 3  # with one bin beyond ±T on each side
# Steps in rows and columns; the opposite directions follow from these by symmetry.
STRAIGHT = ((0, 1), (1, 0))
DIAGONAL = ((1, 1), (1, -1))
AT_A_TIME = 2**19  # pixels; the work arrays then stay within some 50 MB


def compute_spam_features(
    images: Images, *, form: Form = "cooccurrence", colour: Colour = "average"
) -> NDArray[np.float32]:
    """Return the features of each image, float32 (n, 686), or (n, C·686) for separate channels.

    A constant image has P = 1 at u = v = w = 0. An image that is flipped or turned by a right angle
    keeps its features, and so does an image with brighter pixels.

    Args:
        images: uint8 (n, C, H, W), sides of 4 pixels or more.
        form: `compute_transition` is the paper's form, as above: a triple with a difference beyond ±T
            counts only in the condition. `compute_cooccurrence` clips the differences to ±T and takes the
            joint P(u, v, w), as that group's later rich models do (J. Fridrich, J. Kodovský, IEEE
            TIFS 7(3), 2012). It is the default: in images of 32×32 it finds more
            (docs/steganalysis.md).
        colour: `average` over the channels or `concatenation`. The average is the default: at
            32×32 a channel has 928 triples a direction for 343 bins, and the average over three
            channels has less noise.

    Raises:
        ConfigError: the images are invalid, or form or colour has an unknown name.
    """
    probabilities = find_by_name("form of SPAM features", form, FORMS)
    find_by_name("treatment of colour", colour, dict.fromkeys(get_args(Colour)))
    count, channels, height, width = check_images(images).shape
    planes = images.reshape(-1, height, width)  # (n·C, H, W)
    found = np.empty((len(planes), FEATURES), dtype=np.float32)
    # A batch is bounded by its pixels and by its histograms, which are larger for small images.
    step = max(1, AT_A_TIME // max(height * width, BINS))
    with show_progress("SPAM features", len(planes)) as advance:
        for first in range(0, len(planes), step):
            # int16, because differences of uint8 would wrap around.
            part = planes[first : first + step].astype(np.int16)
            found[first : first + step] = _average_directions(part, probabilities)
            advance(len(part))
    apart = found.reshape(count, channels, FEATURES)
    return apart.mean(1) if colour == "average" else apart.reshape(count, -1)


def compute_transition(planes: Planes, step: tuple[int, int]) -> Matrices:
    """Return the sum (p, 7, 7, 7) of the paper's M_{u,v,w} in a direction and the opposite one."""
    there = _count_triples(planes, step, T + 1)  # (p, 9, 9, 9): the outer ones lie beyond ±T
    return _compute_conditional(there) + _compute_conditional(_reverse_counts(there))


def compute_cooccurrence(planes: Planes, step: tuple[int, int]) -> Matrices:
    """Return the sum (p, 7, 7, 7) of P(u, v, w) in a direction and in the opposite one.

    Differences are clipped to ±T.
    """
    there = _count_triples(planes, step, T)
    # Both directions have equally many triples, so a single total normalises their sum.
    joint: Matrices = (there + _reverse_counts(there)) / there.sum((1, 2, 3), keepdims=True)
    return joint


FORMS: Mapping[str, Callable[[Planes, tuple[int, int]], Matrices]] = {
    "cooccurrence": compute_cooccurrence,
    "transition": compute_transition,
}


def _average_directions(
    planes: Planes, probabilities: Callable[[Planes, tuple[int, int]], Matrices]
) -> Matrices:
    """Return the averages over four straight and four diagonal directions, float64 (p, 686)."""
    halves = [
        (probabilities(planes, one) + probabilities(planes, other)).reshape(len(planes), -1) / 4
        for one, other in (STRAIGHT, DIAGONAL)
    ]
    return np.concatenate(halves, axis=1)


def _count_triples(planes: Planes, step: tuple[int, int], reach: int) -> Matrices:
    """Count the triples (D_{j+2}, D_{j+1}, D_j) clipped to ±reach, float64 (p, side³ as 3 axes)."""
    side = 2 * reach + 1
    points = [_shift_planes(planes, step, along) for along in range(4)]
    # One code for plane and triple, so that a single bincount serves all planes.
    codes = np.arange(len(planes))[:, None, None]
    for one, next_one in zip(points[2::-1], points[:0:-1], strict=True):  # D_{j+2} first
        codes = codes * side + (np.clip(one - next_one, -reach, reach) + reach)
    counts = np.bincount(codes.ravel(), minlength=len(planes) * side**3)
    return counts.reshape(-1, side, side, side).astype(np.float64)  # (p·side³,) -> (p, u, v, w)


def _compute_conditional(counts: Matrices) -> Matrices:
    """Return P(u | v, w) for u, v, w within ±T, 0 if the condition never holds, (p, 7, 7, 7)."""
    conditions = counts.sum(1, keepdims=True)  # (p, 1, 9, 9): whatever u follows
    inner: Matrices = (counts / np.maximum(conditions, 1.0))[:, 1:-1, 1:-1, 1:-1]
    return inner


def _shift_planes(planes: Planes, step: tuple[int, int], along: int) -> Planes:
    """Return the planes `along` steps further, cut to where three steps stay inside."""
    (down, right), (height, width) = step, planes.shape[1:]
    rows = slice(along * down, height - (3 - along) * down)
    # A step to the left starts at the right margin.
    if right < 0:
        return planes[:, rows, 3 - along : width - along]
    return planes[:, rows, along * right : width - (3 - along) * right]


def _reverse_counts(counts: Matrices) -> Matrices:
    """Return the counts in the opposite direction: triples reversed, differences negated."""
    return counts.transpose(0, 3, 2, 1)[:, ::-1, ::-1, ::-1]
