"""Without the merge: each key tile gives its own best, and nothing is compared across tiles.

What StreamIndex ablates: a row's top_k places are shared out evenly over its tiles. Keys beyond a tile's share are
lost, so the answer is wrong wherever the best keys are not spread evenly.
"""

import torch
from torch import Tensor

from benchmarks.inputs import Prefill
from streamindex_service.ops import PagedKeys
from streamindex_service.ops.paged_keys import PAGE_KEYS
from streamindex_service.ops.topk import Order, Plan, topk

# Every row's position is given so that it sees exactly what it sees of the tile; 2 lets a position stand for nothing.
_RATIO = 2


def search_without_merge(prefill: Prefill, out: Tensor, *, implementation: str, query_chunk: int, tiles: int) -> None:
    """Fill `out` [rows, top_k] int32, by index, padding last. tiles: equal parts of what a chunk of rows sees."""
    visible = prefill.visible()
    for start in range(0, prefill.rows, query_chunk):
        rows = slice(start, start + query_chunk)
        out[rows] = _best_of_tiles(prefill, rows, visible[rows], implementation, tiles)


def _best_of_tiles(prefill: Prefill, rows: slice, visible: Tensor, implementation: str, tiles: int) -> Tensor:
    """Indices [rows, top_k] int32 of one chunk; the tiles' lists stand one after the other."""
    top_k = prefill.model.top_k
    pages = max(1, -(-int(visible.max()) // PAGE_KEYS))
    step = -(-pages // tiles)
    starts = range(0, pages, step)
    share = -(-top_k // len(starts))
    lists = [_best_of_tile(prefill, rows, visible, first, step, share, implementation) for first in starts]
    found = torch.cat(lists, dim=1)[:, :top_k]
    padding_last = torch.where(found < 0, torch.iinfo(torch.int32).max, found).sort(dim=1).values
    return torch.where(padding_last == torch.iinfo(torch.int32).max, -1, padding_last)


def _best_of_tile(
    prefill: Prefill, rows: slice, visible: Tensor, first: int, step: int, share: int, implementation: str
) -> Tensor:
    """Indices [rows, share] int32 of the best keys on pages `first` to `first + step`."""
    tile = tile_of(prefill.keys, first, step)
    seen = (visible - first * PAGE_KEYS).clamp(0, tile.length)
    positions = (_RATIO * seen - 1).clamp(min=0)
    plan = Plan(len(visible), step * PAGE_KEYS, 0) if implementation == "chunked" else None
    found = topk(
        prefill.q[rows], prefill.w[rows], tile, positions, ratio=_RATIO, top_k=share, order=Order.INDEX,
        implementation=implementation, plan=plan,
    ).indices  # fmt: skip
    return torch.where(found >= 0, found + first * PAGE_KEYS, -1)


def tile_of(keys: PagedKeys, first: int, count: int) -> PagedKeys:
    """Pages `first` to `first + count` as keys of their own, without a copy."""
    pages = slice(first, first + count)
    length = min(count * PAGE_KEYS, keys.length - first * PAGE_KEYS)
    scales = None if keys.scale_pages is None else keys.scale_pages[pages]
    return PagedKeys(keys.format, keys.head_dim, length, keys.pages[pages], scales)
