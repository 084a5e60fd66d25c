"""Zhang et al. 2018: triggers that are images with a text, with noise, or of another domain."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from countermark.errors import ConfigError
from countermark.keys.key import KeyMaterial
from countermark.predictors.base import Images
from countermark.schemes.base import Paper
from countermark.schemes.triggers import DrawnTriggerScheme

_GLYPHS = {"T": (7, 2, 2, 2, 2), "E": (7, 4, 6, 4, 7), "S": (7, 4, 7, 1, 7)}  # 5 rows of 3 pixels
_TEXT, _NOISE = "TEST", 20.0  # the paper's text; standard deviation in grey levels


@dataclass(frozen=True)
class Zhang(DrawnTriggerScheme):
    """A scheme whose triggers show a visible addition, or come from another domain.

    Attributes:
        kind: "content" writes a text on covers, "noise" adds one Gaussian pattern to all of them,
            "unrelated" shows a figure one. The figure is drawn here; the paper takes it from a data
            set of handwriting.
    """

    triggers: Annotated[int, Field(ge=1, le=1 << 16)] = field(default=100)
    kind: Literal["content", "noise", "unrelated"] = field(default="content", kw_only=True)

    name: ClassVar[str] = "zhang"
    paper: ClassVar[Paper] = Paper(
        authors="J. Zhang, Z. Gu, J. Jang, H. Wu, M. Stoecklin, H. Huang, I. Molloy",
        title="Protecting Intellectual Property of Deep Neural Networks with Watermarking",
        venue="ASIACCS",
        year=2018,
        doi="10.1145/3196494.3196550",
    )

    def draw_triggers(self, covers: Images, material: KeyMaterial) -> Images:
        """Return the covers with text or noise, or figures on a plain ground."""
        if self.kind == "noise":
            # One draw for all covers: the pattern has the size of one image.
            pattern = material.make_stream("noise").draw_normal_rows(1, covers[0].size)
            noisy = covers + _NOISE * pattern.reshape(covers.shape[1:])
            return np.rint(noisy).clip(0, 255).astype(np.uint8)
        if self.kind == "content":
            return _write_text(covers, _TEXT, down=1, right=1)
        return self._draw_figures(covers, material)

    @staticmethod
    def _draw_figures(covers: Images, material: KeyMaterial) -> Images:
        """Draw for each cover a slanted stroke on a plain ground, like a handwritten 1."""
        n, channels, height, width = covers.shape
        stream = material.make_stream("figures")
        paint = stream.take_words(2 * n * channels).reshape(2, n, channels, 1, 1) % np.uint64(256)
        # The stroke is jittered in place, slant and thickness, as handwriting is.
        shift = stream.draw_normal_rows(n, 4)[..., None, None]  # down, right, slant, thickness
        y, x = np.linspace(-1, 1, height)[:, None], np.linspace(-1, 1, width)[None]
        along = y - 0.2 * shift[:, 0]
        across = x - 0.2 * shift[:, 1] - 0.4 * shift[:, 2] * along
        thick = 0.1 + 0.05 * np.abs(shift[:, 3])
        stroke = (np.abs(across) < thick) & (np.abs(along) < 0.7)  # (n, H, W)
        figures: Images = np.where(stroke[:, None], paint[0], paint[1]).astype(np.uint8)
        return figures


def _write_text(images: Images, text: str, *, down: int, right: int) -> Images:
    """Return images (n, C, H, W) with a black text on them, 5 pixels high.

    Raises:
        ConfigError: the images are too small for the text.
    """
    bitmap = _render_text(text)
    height, width = bitmap.shape
    if images.shape[2] < down + height or images.shape[3] < right + width:
        raise ConfigError(
            f"images of {images.shape[2]} x {images.shape[3]} pixels are too small for {text!r}: "
            f"expected {down + height} x {right + width} or more"
        )
    written = images.copy()
    place = written[:, :, down : down + height, right : right + width]
    place[..., bitmap == 1] = 0
    return written


def _render_text(text: str) -> NDArray[np.uint8]:
    """Return a text as pixels (5, 4·letters), 1 where there is ink."""
    # Each row of a glyph is a number of three bits, its left pixel the highest bit.
    rows = np.array([_GLYPHS[letter] for letter in text], dtype=np.uint8)  # (letters, 5)
    pixels = (rows[:, :, None] >> np.array([2, 1, 0, 3], dtype=np.uint8)) & 1  # bit 3 is a gap
    return pixels.transpose(1, 0, 2).reshape(5, -1).astype(np.uint8)
