"""Rows of scattered pages, copied behind each other, for implementations that read rows of one tensor."""

import torch
from torch import Tensor

from streamindex_service.ops.paged_keys import PAGE_KEYS
from streamindex_service.ops.paged_kv_rows import JoinedKvRows, PagedKvRows
from streamindex_service.ops.row_threads import share_rows


def gather_rows(rows: PagedKvRows | JoinedKvRows, wanted: Tensor, data: Tensor, scales: Tensor | None = None) -> None:
    """Copy rows out of their pages.

    wanted: [n] int64, on the device of the pages; what is negative or not below rows.length is passed over, and its
    place in the outputs keeps what it held. data: [n, row_bytes] uint8; scales: [n, scale_bytes] uint8 for a format
    with scales beside the rows, else None.
    """

    def copy(start: int, stop: int) -> None:
        part = slice(start, stop)
        _copy_by_pages(rows, wanted[part], data[part], None if scales is None else scales[part])

    if data.is_cuda:
        copy(0, len(wanted))
    else:
        share_rows(copy, 0, len(wanted))


def _copy_by_pages(rows: PagedKvRows | JoinedKvRows, wanted: Tensor, data: Tensor, scales: Tensor | None) -> None:
    """Takes no memory but a list of the rows."""
    places = torch.nonzero((wanted >= 0) & (wanted < rows.length)).flatten()
    places = places[torch.argsort(wanted[places], stable=True)]
    ordered = wanted[places]
    pages, counts = torch.unique_consecutive(ordered // PAGE_KEYS, return_counts=True)
    start = 0
    for page, count in zip(pages.tolist(), counts.tolist(), strict=True):
        part, inside = places[start : start + count], ordered[start : start + count] % PAGE_KEYS
        data[part] = rows.data[page][inside]
        if scales is not None:
            scales[part] = rows.scales[page][inside]
        start += count
