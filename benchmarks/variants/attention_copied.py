"""Attention over copies: the rows that are named are copied out of their pages, behind each other, and attended there.

What kernels need that read rows of one tensor. The service's read rows in their pages.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from streamindex_service.ops.cached_attention.copies import Copies
from streamindex_service.ops.index_rows import assemble_index_rows
from streamindex_service.ops.kv_rows import KvRows
from streamindex_service.ops.paged_keys import PAGE_KEYS
from streamindex_service.ops.paged_kv_rows import PLACE_UNIT_BYTES, JoinedKvRows

_WORD_BYTES = 4
_TILE_WORDS = 4096  # words that a program has under way


def copied(copies: Copies, indices: Tensor, positions: Tensor, window: int, table: Tensor) -> tuple[KvRows, Tensor]:
    """The rows that are attended as one tensor, and index rows of it. table: see `JoinedKvRows.unit_table`."""
    wanted, found = copies.rows(indices)
    source = copies.source
    kv_format = source.parts[0].format
    anchor = source.placed(indices.device).anchor
    data = torch.empty((len(wanted), source.row_bytes), dtype=torch.uint8, device=indices.device)
    _gather(source, anchor, table, wanted, data, source.row_bytes, 0)
    scales = None
    if source.scale_bytes:
        scales = torch.empty((len(wanted), source.scale_bytes), dtype=torch.uint8, device=indices.device)
        _gather(source, anchor, table, wanted, scales, source.scale_bytes, PAGE_KEYS * source.row_bytes)
    entries = assemble_index_rows(
        found, positions, window=window, window_row=copies.window_row, compressed_row=0, implementation="triton"
    )
    return KvRows(kv_format, data if kv_format.packed else data.view(torch.bfloat16), scales), entries


@triton.jit(do_not_specialize=["length", "count"])
def _gather_kernel(
    anchor, table, wanted, out, length, count,
    WORDS: tl.constexpr, SKIP: tl.constexpr, PAGE: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """WORDS of each wanted row, ROWS a program. SKIP: word of a page at which the copied part of its row 0 begins;
    UNIT: words of a unit of the table."""
    place = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    word = tl.arange(0, BLOCK)
    row = tl.load(wanted + place, mask=place < count, other=-1)
    valid = (row >= 0) & (row < length)
    row = tl.where(valid, row, 0)
    source = tl.load(table + row // PAGE, mask=valid, other=0) * UNIT + SKIP + row % PAGE * WORDS
    wide = valid[:, None] & (word < WORDS)[None, :]
    words = tl.load(anchor + source[:, None] + word[None, :], mask=wide, other=0)  # [ROWS, BLOCK]
    tl.store(out + place[:, None] * WORDS + word[None, :], words, mask=wide)


def _gather(
    source: JoinedKvRows, anchor: Tensor, table: Tensor, wanted: Tensor, out: Tensor, row_bytes: int, skip_bytes: int
) -> None:
    words = row_bytes // _WORD_BYTES
    block = triton.next_power_of_2(words)
    at_once = max(1, _TILE_WORDS // block)
    _gather_kernel[(triton.cdiv(len(wanted), at_once),)](
        anchor.view(torch.int32), table, wanted, out.view(torch.int32), source.length, len(wanted),
        WORDS=words, SKIP=skip_bytes // _WORD_BYTES, PAGE=PAGE_KEYS, UNIT=PLACE_UNIT_BYTES // _WORD_BYTES,
        ROWS=at_once, BLOCK=block, num_warps=4,
    )  # fmt: skip
