"""Which rows of a chunk see which sequence's keys, as the score kernels read it."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from streamindex_service.ops.extent_pages import to_device
from streamindex_service.ops.paged_keys import PagedKeys
from streamindex_service.ops.topk.problem import Part, Problem

# Of a part in the table: how many elements lie between the anchor of the problem's keys and that of its own, between
# the tables of offsets, and the same of scales; first row among all, rows, length of its keys, and the position that
# row 0 would have. Distances and not addresses: what a pointer is aligned to would be lost with it.
FIELDS = 8


@dataclass(frozen=True)
class PartTable:
    """Parts that are scored in one launch. table: [count, FIELDS] int64 on the device; most_rows: of one of them."""

    table: Tensor
    count: int
    most_rows: int


def parts_of(problem: Problem, parts: Sequence[Part], start: int, stop: int) -> tuple[PartTable | None, list[Part]]:
    """The parts of rows `start` to `stop` that see any key: those that one launch takes, and the others.

    One launch, with the keys of `problem`, takes those whose positions go up by one. For a single one it would be of no
    use.
    """
    together: list[Part] = []
    apart: list[Part] = []
    for part in parts:
        inside = Part(max(part.start, start), min(part.stop, stop), part.problem)
        if inside.start < inside.stop and part.problem.max_visible(inside.start, inside.stop) > 0:
            (together if isinstance(part.problem.positions, int) else apart).append(inside)
    if len(together) < 2:
        return None, together + apart
    base = _addresses(problem.keys)
    rows = np.array([_fields(part, base) for part in together], np.int64)
    most_rows = max(part.stop - part.start for part in together)
    return PartTable(to_device(rows, problem.q.device), len(together), most_rows), apart


def _fields(part: Part, base: list[tuple[int, int]]) -> tuple[int, ...]:
    own = part.problem
    assert isinstance(own.positions, int)
    distances = ((at - start) // size for (at, size), (start, _) in zip(_addresses(own.keys), base, strict=True))
    return *distances, part.start, part.stop - part.start, own.keys.length, own.positions


def _addresses(keys: PagedKeys) -> list[tuple[int, int]]:
    """Where tables begin, and the size of their elements: keys, their offsets, scales and theirs."""
    table, scale_table = keys.key_table, keys.scale_table
    tensors = [table.anchor, table.offsets]
    # a kernel for keys without scales looks at none
    tensors += [scale_table.anchor, scale_table.offsets] if scale_table else [table.offsets, table.offsets]
    return [(tensor.data_ptr(), tensor.element_size()) for tensor in tensors]
