"""Which rows of several sequences are copied, and where to."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from streamindex_service.ops.cached_attention.sequences import CachedSequence, join
from streamindex_service.ops.extent_pages import to_device
from streamindex_service.ops.paged_kv_rows import JoinedKvRows


@dataclass(frozen=True)
class Copies:
    """What is copied out of `source`, one copy behind the other: first, of sequences of which not all rows are named,
    one for each index of each query; then all rows of the other sequences; then the rows of all windows.

    The tensors are on the device of the queries, and int64.

    length, first_row: [tokens, 1], of each query's sequence the compressed rows, and the number of the first in
        `source`.
    place: [tokens, 1], where the copy is of the query's first index, or of its sequence's row 0.
    picks: [tokens, 1] bool, which of the two.
    window_row: [tokens], where the copy of the sequence's token 0 is, or would be.
    window_copies: [2, tokens, 1], the first copy of its sequence's window rows, and one past the last.
    pickers: [n], the queries that pick, None for all of them.
    runs: [3, n]: rows of `source`, from the first one on, so many; and how many copies of runs come before.
    run_rows: rows of all runs.
    """

    source: JoinedKvRows
    length: Tensor
    first_row: Tensor
    place: Tensor
    picks: Tensor
    window_row: Tensor
    window_copies: Tensor
    pickers: Tensor | None
    runs: Tensor
    run_rows: int

    def rows(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Of `indices` [tokens, width] int32: the rows of `source` to be copied, −1 for a place that stays empty
        ([n] int64); and the copy that each index names, −1 for none ([tokens, width] int32)."""
        wide = indices.to(torch.int64)
        valid = (wide >= 0) & (wide < self.length)
        entry = torch.arange(indices.shape[1], device=indices.device)
        found = torch.where(valid, self.place + torch.where(self.picks, entry, wide), -1).to(torch.int32)
        named, held, start = wide, valid, self.first_row
        if self.pickers is not None:
            named, held, start = (each.index_select(0, self.pickers) for each in (wide, valid, self.first_row))
        picked = torch.where(held, named + start, -1)
        first, count, before = self.runs
        # output_size: else the host would wait for the device to know it
        shift = torch.repeat_interleave(first - before, count, output_size=self.run_rows)
        run = shift + torch.arange(self.run_rows, device=indices.device)
        return torch.cat([picked.flatten(), run]), found

    def leave_out_what_is_not_held(self, entries: Tensor) -> None:
        """Of `entries` [tokens, window], which copies the tokens of windows would be, in place −1 for those that are no
        copies, but other sequences'."""
        first, stop = self.window_copies
        entries.masked_fill_(entries < first, -1).masked_fill_(entries >= stop, -1)


def lay_out(
    sequences: Sequence[CachedSequence], positions: Tensor, width: int, window: int, device: torch.device
) -> Copies:
    """Decide for each sequence by itself whether its rows are picked or all copied: what is fewer.

    positions: [tokens] int64 on the CPU. Raises ValueError if the sequences disagree.
    """
    counts = [sequence.tokens for sequence in sequences]
    compressed = [sequence.compressed for sequence in sequences]
    source = join(sequences, len(positions))
    first_rows = source.first_rows()
    picks = [tokens * width < part.length for tokens, part in zip(counts, compressed, strict=True)]
    picked = width * sum(tokens for tokens, pick in zip(counts, picks, strict=True) if pick)
    runs: list[tuple[int, int, int]] = []  # see Copies
    after = picked

    def run(first: int, count: int) -> int:
        """One more; the place of its first copy."""
        nonlocal after
        runs.append((first, count, after - picked))
        after += count
        return after - count

    places = [
        0 if pick else run(first, part.length)  # of those that pick below
        for pick, first, part in zip(picks, first_rows, compressed, strict=False)
    ]
    window_rows, window_copies = [], []
    for sequence, own, first_row in zip(
        sequences, torch.split(positions, counts), first_rows[len(sequences) :], strict=True
    ):
        start, stop = _window(sequence, own, window)
        place = run(first_row + start - sequence.first_window_row, stop - start)
        window_copies.append((place, place + stop - start))
        # the copy of token 0 is so many before that of the first token copied
        window_rows.append(place - start)
    lengths = [part.length for part in compressed]
    held = zip(*window_copies, strict=True)
    columns = np.array([lengths, first_rows[: len(counts)], places, picks, window_rows, *held], dtype=np.int64)
    columns = np.repeat(columns, counts, axis=1)  # of sequences, then of their queries
    pickers = np.flatnonzero(columns[3])
    columns[2, pickers] = width * np.arange(len(pickers))
    on_device = to_device(columns, device)
    length, first, place, pick, window_row = on_device[:5]
    return Copies(
        source, length[:, None], first[:, None], place[:, None], pick[:, None].bool(), window_row,
        on_device[5:, :, None], None if len(pickers) == len(positions) else to_device(pickers, device),
        to_device(np.ascontiguousarray(np.array(runs, dtype=np.int64).T), device), after - picked,
    )  # fmt: skip


def _window(sequence: CachedSequence, positions: Tensor, window: int) -> tuple[int, int]:
    """Tokens [first, stop) that the windows of a sequence's queries see, as far as they are held."""
    if not window or not len(positions):
        return 0, 0
    first = max(sequence.first_window_row, int(positions.min()) - window + 1)
    held = sequence.first_window_row + sequence.window_rows.length
    return first, max(first, min(held, int(positions.max()) + 1))
