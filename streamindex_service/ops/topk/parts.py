"""Rows of one problem that see the keys of several sequences, as the score kernels read it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from streamindex_service.ops.extent_pages import to_device
from streamindex_service.ops.paged_keys import PagedKeys
from streamindex_service.ops.topk.problem import Problem

# Of a part in the table: how many elements lie between the anchor of the problem's keys and that of its own, between
# the tables of offsets, and the same of scales; first row among all, rows, length of its keys, and the position that
# row 0 would have. Distances and not addresses: what a pointer is aligned to would be lost with it.
FIELDS = 8
_INT32_END = 2**31

Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class PartTable:
    """Parts that are scored in one launch. table: [count, FIELDS] int64 on the device; most_rows: of one of them."""

    table: Tensor
    count: int
    most_rows: int


@dataclass(frozen=True)
class Part:
    """Rows `start` to `stop` of a problem, and the same problem with the keys that these rows see."""

    start: int
    stop: int
    problem: Problem


class Parts:
    """Which sequence's keys each row of a problem sees. Steps have few rows of many sequences, so what is usual,
    positions that go up by one, is dealt with for all sequences at once.

    keys, rows: of each sequence, in the order of the problem's rows, which have explicit positions.
    `problem`: the same one to whom rows are known by how many keys they see of their sequence.
    """

    def __init__(self, problem: Problem, keys: Sequence[PagedKeys], rows: Sequence[int]) -> None:
        assert isinstance(problem.positions, Tensor)
        positions = problem.positions.numpy()
        counts = np.array(rows, np.int64)
        self._lengths = np.array([each.length for each in keys], np.int64)
        self._stops = counts.cumsum()
        self._starts = starts = self._stops - counts
        self._visible = np.minimum((positions + 1) // problem.ratio, self._lengths.repeat(counts))
        # Kernels know a row by how many keys it sees: position n − 1 sees n keys of one token each.
        self.problem = replace(problem, positions=torch.from_numpy(self._visible - 1), ratio=1)
        self._keys = keys
        self._ratio = problem.ratio
        self._first = positions[starts]
        alone = np.zeros(len(positions), np.int64)  # rows that do not follow the one before, in their sequence
        alone[1:] = np.diff(positions) != 1
        alone[starts] = 0
        self._in_line = (np.add.reduceat(alone, starts) == 0) & (self._first + counts <= _INT32_END)
        none = (0, 0, 0, 0)
        self._addresses = np.array([each.table_addresses if each.length else none for each in keys], np.int64)

    def together(self, start: int, stop: int) -> tuple[PartTable, Problem] | None:
        """Parts among rows `start` to `stop` whose positions go up by one and of which any key is seen: one launch
        takes all of them, with the problem that is given. None if there is none."""
        first, end = np.maximum(self._starts, start), np.minimum(self._stops, stop)
        wanted = self._in_line & (first < end)
        (chosen,) = np.nonzero(wanted & (self._visible[np.where(wanted, end - 1, 0)] > 0))  # the last row sees most
        if not len(chosen):
            return None
        base = self.problem.keys
        key_bytes = base.format.element_bytes
        sizes = np.array([key_bytes, 8, 4 if base.format.has_scales else 8, 8], np.int64)
        table = np.empty((len(chosen), FIELDS), np.int64)
        table[:, :4] = (self._addresses[chosen] - np.array(base.table_addresses, np.int64)) // sizes
        rows = end[chosen] - first[chosen]
        columns = (first[chosen], rows, self._lengths[chosen], self._first[chosen] - self._starts[chosen])
        for number, column in enumerate(columns, 4):
            table[:, number] = column
        found = PartTable(to_device(table, self.problem.q.device), len(chosen), int(rows.max()))
        return found, replace(self.problem, ratio=self._ratio)

    def apart(self, start: int, stop: int) -> Iterator[Part]:
        """The others among rows `start` to `stop`."""
        for number in np.nonzero(~self._in_line)[0]:
            first, end = max(int(self._starts[number]), start), min(int(self._stops[number]), stop)
            if first < end and self._visible[first:end].any():
                yield Part(first, end, replace(self.problem, keys=self._keys[number]))
