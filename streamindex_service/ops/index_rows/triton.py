"""The operation in one kernel: a program a token. No count is a compile-time constant or specialised upon."""

import torch
import triton
import triton.language as tl

from streamindex_service.ops.compiled import variants
from streamindex_service.ops.index_rows.problem import Problem

_BLOCK = 1024


@triton.jit(
    do_not_specialize=["first", "window", "top_k", "window_row", "compressed_row"],
    do_not_specialize_on_alignment=["positions", "window_rows"],
)
def assemble_kernel(
    found, positions, window_rows, out, first, window, top_k, window_row, compressed_row,
    EXPLICIT: tl.constexpr, ROW_EACH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid: (tokens,). found: [tokens, top_k]; positions: [tokens] int64, if EXPLICIT, else from `first` on;
    window_rows: likewise, if ROW_EACH, else window_row for all; out: [tokens, window + top_k]."""
    token = tl.program_id(0).to(tl.int64)
    last = tl.load(positions + token) if EXPLICIT else first + token
    row_of_0 = tl.load(window_rows + token) if ROW_EACH else window_row
    width = window + top_k
    for start in range(0, width, BLOCK):
        entry = start + tl.arange(0, BLOCK)
        is_local = entry < window
        position = last - window + 1 + entry
        row = position + row_of_0
        local = tl.where((position >= 0) & (row >= 0), row, -1)
        wanted = (entry >= window) & (entry < width)
        index = tl.load(found + token * top_k + (entry - window), mask=wanted, other=-1)
        chosen = tl.where(index >= 0, index + compressed_row, -1)
        tl.store(out + token * width + entry, tl.where(is_local, local.to(tl.int32), chosen), mask=entry < width)


def compiled_variants() -> int:
    """How many kernel variants this process has compiled: flat once warm, whatever the lengths."""
    return variants((assemble_kernel,))


def run_triton(problem: Problem) -> None:
    """Fill the output, without waiting for the device."""
    p = problem
    explicit, row_each = not isinstance(p.positions, int), not isinstance(p.window_row, int)
    with torch.cuda.device_of(p.found):  # kernels start on the current device, which need not be the tensors'
        assemble_kernel[(p.tokens,)](
            p.found, p.positions if explicit else p.found, p.window_row if row_each else p.found, p.out,
            0 if explicit else p.positions, p.window, p.top_k, 0 if row_each else p.window_row, p.compressed_row,
            EXPLICIT=explicit, ROW_EACH=row_each, BLOCK=_BLOCK, num_warps=4,
        )  # fmt: skip
