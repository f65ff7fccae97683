"""Scores in 16 bits: every product, gate and sum over heads is rounded to bfloat16 or float16."""

import torch
from torch import Tensor

from benchmarks.inputs import Prefill
from streamindex_service.ops.topk import Order, indexer_scores
from streamindex_service.ops.topk.order import arrange, pack, unpack


def search_in_half(prefill: Prefill, out: Tensor, *, dtype: torch.dtype, query_chunk: int) -> None:
    """Fill `out` [rows, top_k] int32, by index. The selection is exact: only what it selects from is rounded."""
    visible, top_k = prefill.visible(), prefill.model.top_k
    for start in range(0, prefill.rows, query_chunk):
        rows = slice(start, start + query_chunk)
        width = int(visible[rows].max())
        out[rows] = -1
        if width:
            scores = _half_scores(prefill, rows, width, dtype)
            columns = torch.arange(width, device=scores.device)
            scores.masked_fill_(columns[None, :] >= visible[rows].to(scores.device)[:, None], -torch.inf)
            packed = torch.empty(scores.shape, dtype=torch.int64, device=scores.device)
            pack(scores, 0, packed)
            best = torch.topk(packed, min(top_k, width), dim=1).values
            indices, _ = arrange(*unpack(best), Order.INDEX)
            out[rows, : indices.shape[1]] = indices


def _half_scores(prefill: Prefill, rows: slice, width: int, dtype: torch.dtype) -> Tensor:
    """[rows, width] float32, of 16-bit values."""
    k, scales = prefill.keys.gather(0, width, dtype)
    return indexer_scores(prefill.q[rows], prefill.w[rows], k, scales, dtype).float()
