"""What a call of attention over caches attends: sequences of query rows, and the rows that each may name."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

from streamindex_service.ops.paged_kv_rows import JoinedKvRows, PagedKvRows


@dataclass(frozen=True)
class CachedSequence:
    """`tokens` query rows that follow each other, and what they attend.

    compressed: rows that their indices name; window_rows: uncompressed rows, of which row 0 is token
    `first_window_row`: they must hold what the window of every query needs as far as it exists.
    """

    tokens: int
    compressed: PagedKvRows
    window_rows: PagedKvRows
    first_window_row: int = 0


@dataclass(frozen=True)
class AllVisible:
    """Every query attends all compressed rows that it sees: row s if s < (position + 1) // ratio. Of DeepSeek-V4's
    layers of ratio 128 (HCA)."""

    ratio: int

    def counts(self, sequences: Sequence[CachedSequence], positions: Tensor) -> npt.NDArray[np.int64]:
        """How many rows each query sees: [queries], of positions [queries] int64 on the CPU."""
        lengths = np.repeat([each.compressed.length for each in sequences], [each.tokens for each in sequences])
        seen: npt.NDArray[np.int64] = np.minimum((positions.numpy() + 1) // self.ratio, lengths)
        return seen


def join(sequences: Sequence[CachedSequence], queries: int) -> JoinedKvRows:
    """The compressed rows of all sequences, then the window rows of all. Raises ValueError unless they are of one
    format and have so many queries."""
    tokens = sum(sequence.tokens for sequence in sequences)
    if tokens != queries:
        raise ValueError(f"sequences: they have {tokens} queries, there are {queries} positions")
    parts = (*(each.compressed for each in sequences), *(each.window_rows for each in sequences))
    if len({(part.format, part.key_dim) for part in parts}) != 1:
        raise ValueError("sequences: their rows have different formats")
    return JoinedKvRows(parts)
