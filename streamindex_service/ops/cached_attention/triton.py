"""The copy of rows out of scattered pages as a kernel. With TRITON_INTERPRET=1 it runs on CPU tensors, for tests.

Rows are copied as words of 4 bytes. Neither the number of rows nor that of pages is a compile-time constant.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from streamindex_service.ops.compiled import variants
from streamindex_service.ops.paged_keys import PAGE_KEYS
from streamindex_service.ops.paged_kv_rows import JoinedKvRows, PagedKvRows

_WORD_BYTES = 4
_TILE_WORDS = 4096  # words that a program has under way


@triton.jit(do_not_specialize=["length", "count"])
def gather_kernel(
    anchor, table, wanted, out, length, count,
    WORDS: tl.constexpr, SKIP: tl.constexpr, PAGE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Copy WORDS of each wanted row. Grid: (count / ROWS).

    anchor: the first page, int32; table: [pages] int64, words from it; wanted: [count] int64; out: [count, WORDS]
    int32. SKIP: word of a page at which the copied part of its row 0 begins.
    """
    place = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    word = tl.arange(0, BLOCK)
    row = tl.load(wanted + place, mask=place < count, other=-1)
    valid = (row >= 0) & (row < length)
    row = tl.where(valid, row, 0)
    source = tl.load(table + row // PAGE, mask=valid, other=0) + SKIP + row % PAGE * WORDS
    wide = valid[:, None] & (word < WORDS)[None, :]
    words = tl.load(anchor + source[:, None] + word[None, :], mask=wide, other=0)  # [ROWS, BLOCK]
    tl.store(out + place[:, None] * WORDS + word[None, :], words, mask=wide)


def compiled_variants() -> int:
    """How many kernel variants this process has compiled: flat once warm, whatever the lengths."""
    return variants((gather_kernel,))


def run_gather(rows: PagedKvRows | JoinedKvRows, wanted: Tensor, data: Tensor, scales: Tensor | None) -> None:
    """See `gather_rows`. Does not wait for the device."""
    with torch.cuda.device_of(data):  # kernels start on the current device, which need not be the tensors'
        _launch(rows, wanted, data, rows.row_bytes, 0)
        if scales is not None:
            _launch(rows, wanted, scales, rows.scale_bytes, PAGE_KEYS * rows.row_bytes)


def _launch(rows: PagedKvRows | JoinedKvRows, wanted: Tensor, out: Tensor, row_bytes: int, skip_bytes: int) -> None:
    words = row_bytes // _WORD_BYTES
    block = triton.next_power_of_2(words)
    at_once = max(1, _TILE_WORDS // block)
    gather_kernel[(triton.cdiv(len(wanted), at_once),)](
        rows.anchor.view(torch.int32), rows.word_table, wanted, out.view(torch.int32), rows.length, len(wanted),
        WORDS=words, SKIP=skip_bytes // _WORD_BYTES, PAGE=PAGE_KEYS, ROWS=at_once, BLOCK=block,
        num_warps=4,
    )  # fmt: skip
