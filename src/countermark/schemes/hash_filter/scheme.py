"""A linear mark at secret places: key and commitment choose the weights that carry the mark.

The scheme follows NeuralMark (AAAI 2026), whose watermark is a hash that filters the weights. Here
a separate keyed stream filters them, so that places and message are independent. Each round of the
filter halves the number of places.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from countermark.errors import ConfigError
from countermark.keys.key import Key
from countermark.schemes.base import Paper
from countermark.schemes.uchida.scheme import Uchida


@dataclass(frozen=True)
class HashFilter(Uchida):
    """Uchida's linear mark, read from the weights that pass a keyed filter.

    Attributes:
        rounds: R, how often the filter halves the number of weights: about one value in 2^R carries
            the mark.
    """

    name: ClassVar[str] = "hash_filter"
    most_values: ClassVar[int] = 1 << 28  # the filter is expanded when a key is opened
    paper: ClassVar[Paper] = Paper(
        authors="Y. Yao, J. Song, J. Jin",
        title="Hashed Watermark as a Filter: A Unified Defense Against Forging and Overwriting "
        "Attacks in Neural Network Watermarking",
        venue="AAAI",
        year=2026,
        doi="10.48550/arXiv.2507.11137",
    )

    rounds: Annotated[int, Field(ge=1, le=16)] = field(default=2, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.select != "all":
            raise ConfigError("hash_filter chooses the weights itself: leave select out")

    def get_mask(self, key: Key, name: str) -> NDArray[np.bool_]:
        """Return the mask of values that pass all rounds, drawn from (secret, C0, "filter").

        Each round draws one bit for each value. A value passes when all its bits are 1.
        """
        # The mask is not stored in the key. Drawn after C0, it cannot be fitted to the weights.
        stream, size = key.make_stream("filter", name), self.count_read_values(key.tensors[name])
        kept = np.ones(size, dtype=bool)
        for _ in range(self.rounds):
            kept &= stream.take_bit_rows(1, size)[0] == 1
        return kept

    def count_selected_values(self, key: Key) -> int:
        """Return how many values pass the filter."""
        # Unlike Uchida's, this mask selects in every key, although no tensor of the key holds it.
        return self.count_all_read_values(key)
