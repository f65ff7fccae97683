"""Where the rows of several sequences lie that are attended: the kernels read them in their pages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from streamindex_service.ops.cached_attention.sequences import CachedSequence, join
from streamindex_service.ops.extent_pages import to_device
from streamindex_service.ops.paged_kv_rows import PlacedKvRows


@dataclass(frozen=True)
class Places:
    """Rows of all sequences, and what is needed to find those that a query attends; tensors are on their device.

    table: [pages] int64, of all pages behind each other, units of 16 bytes from the anchor.
    columns: [5, queries] int64: of each query the compressed rows that it may attend, the first ones of its sequence,
        and the number of the first in the order of pages; window rows, the number of the first, and the token that it
        is of.
    positions: [queries] int64. window: tokens. ends: see `sparse_attention`, where indices are not given.
    """

    rows: PlacedKvRows
    table: Tensor
    columns: Tensor
    positions: Tensor
    window: int
    ends: Tensor | None

    @classmethod
    def of(
        cls,
        sequences: Sequence[CachedSequence],
        positions: Tensor,
        window: int,
        device: torch.device,
        visible: np.ndarray | None = None,
    ) -> Places:
        """positions: [queries] int64 on the CPU; window: tokens, 0 for none; device: of the pages; visible: [queries],
        of each query how many compressed rows it attends, the first ones, instead of any that it names. Raises
        ValueError if the sequences disagree, or for a page that is not aligned to 16 bytes."""
        joined = join(sequences, len(positions))
        first_rows = joined.first_rows()
        of_sequences = [
            (each.compressed.length, compressed, each.window_rows.length, recent, each.first_window_row)
            for each, compressed, recent in zip(
                sequences, first_rows[: len(sequences)], first_rows[len(sequences) :], strict=True
            )
        ]
        columns = np.array(of_sequences, dtype=np.int64).T.repeat([each.tokens for each in sequences], axis=1)
        ends = None
        if visible is not None:
            columns[0] = visible
            ends = to_device((window + visible).astype(np.int32), device)
        return cls(
            joined.placed(device),
            joined.unit_table(device),
            to_device(np.ascontiguousarray(columns), device),
            positions.to(device, non_blocking=True),
            window,
            ends,
        )

    def entries(self, indices: Tensor | None, width: int) -> Tensor:
        """Index rows of places, [queries, window + width] int64, −1 for none: the window of each query, its own token
        last, then what its indices [queries, width] int32 name, in their order; without indices the rows that it
        attends. No entries where there are no rows."""
        # imported here: Triton need not be installed where it is not asked for
        from streamindex_service.ops.cached_attention.triton import run_places

        entries = self.window + width if len(self.table) else 0
        out = torch.empty((len(self.positions), entries), dtype=torch.int64, device=self.positions.device)
        if out.numel():
            run_places(indices, self.positions, self.columns, self.table, out, self.window)
        return out
