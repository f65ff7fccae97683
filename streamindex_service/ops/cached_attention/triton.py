"""The places of rows as a kernel. With TRITON_INTERPRET=1 it runs on CPU tensors, for tests.

Neither the number of queries, nor that of entries or pages, is a compile-time constant or specialised upon.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from streamindex_service.ops.compiled import variants
from streamindex_service.ops.paged_kv_rows import PLACE_BITS

_BLOCK = 512
_BITS = tl.constexpr(PLACE_BITS)
_ROW = tl.constexpr((1 << PLACE_BITS) - 1)  # the bits of the row


@triton.jit(
    do_not_specialize=["queries", "window", "width"],
    do_not_specialize_on_alignment=["found", "positions", "columns", "table"],
)
def place_kernel(
    found, positions, columns, table, out, queries, window, width, NAMED: tl.constexpr, BLOCK: tl.constexpr
):
    """Grid: (queries, blocks of entries). found: [queries, width] int32, not looked at unless NAMED: entry i is row i
    else; columns, table and the rest: see Places; out: [queries, window + width] int64."""
    query = tl.program_id(0).to(tl.int64)
    step = queries.to(tl.int64)
    length = tl.load(columns + query)
    first = tl.load(columns + step + query)
    window_length = tl.load(columns + 2 * step + query)
    window_first = tl.load(columns + 3 * step + query)
    first_token = tl.load(columns + 4 * step + query)
    position = tl.load(positions + query)
    entries = window + width
    entry = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_local = entry < window
    chosen = (entry >= window) & (entry < entries)
    if NAMED:
        index = tl.load(found + query * width + (entry - window), mask=chosen, other=-1).to(tl.int64)
    else:
        index = tl.where(chosen, entry - window, -1).to(tl.int64)
    row = tl.where(is_local, position - window + 1 + entry - first_token, index)
    held = (row >= 0) & (row < tl.where(is_local, window_length, length))
    number = tl.where(held, row + tl.where(is_local, window_first, first), 0)
    unit = tl.load(table + (number >> _BITS), mask=held, other=0)
    place = (unit << _BITS) | (number & _ROW)
    tl.store(out + query * entries + entry, tl.where(held, place, -1), mask=entry < entries)


def compiled_variants() -> int:
    """How many kernel variants this process has compiled: flat once warm, whatever the lengths."""
    return variants((place_kernel,))


def run_places(
    indices: Tensor | None, positions: Tensor, columns: Tensor, table: Tensor, out: Tensor, window: int
) -> None:
    """See `Places.entries`. Does not wait for the device."""
    queries, entries = out.shape
    with torch.cuda.device_of(out):  # kernels start on the current device, which need not be the tensors'
        place_kernel[(queries, triton.cdiv(entries, _BLOCK))](
            positions if indices is None else indices, positions, columns, table, out, queries, window,
            entries - window, NAMED=indices is not None, BLOCK=_BLOCK, num_warps=4,
        )  # fmt: skip
