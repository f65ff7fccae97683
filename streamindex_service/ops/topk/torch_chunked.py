"""The StreamIndex algorithm in torch: query chunks × key tiles, a top-k of each tile, merged with the best so far.

Source: StreamIndex (chunked indexer with streamed top-k merge). On the CPU every score comes from blocks of one fixed
shape, so that no chunk, tile or neighbour can change a bit of it. On CUDA the products are large library calls, whose
summation order may depend on their shape: fast, but not repeatable across tilings.
"""

from functools import partial

import torch
from torch import Tensor

from streamindex_service.ops.formats import KeyFormat
from streamindex_service.ops.paged_keys import PAGE_KEYS
from streamindex_service.ops.row_threads import share_rows
from streamindex_service.ops.topk.order import arrange, pack, unpack
from streamindex_service.ops.topk.plan import Plan
from streamindex_service.ops.topk.problem import Problem

# What `pack` makes of a score of −inf at the last possible index: it sorts behind every key, and unpacks to padding.
_EMPTY = -2139095041 << 32
_GATE_ALIGNMENT = 16  # float32 elements: each row of gates starts on a cache line of its own


def run_chunked(problem: Problem, plan: Plan) -> None:
    """Fill the outputs, one query chunk after another, within the plan's workspace."""
    for start in range(0, problem.rows, plan.query_chunk):
        stop = min(start + plan.query_chunk, problem.rows)
        if problem.q.is_cuda:
            _fill(problem, plan, start, stop)
        else:
            share_rows(partial(_fill, problem, plan), start, stop)


def _fill(problem: Problem, plan: Plan, start: int, stop: int) -> None:
    best = _search_chunk(problem, plan, start, stop)
    indices, scores = unpack(best)
    indices, scores = arrange(indices, scores, problem.order)
    problem.out_indices[start:stop] = indices
    if problem.out_scores is not None:
        problem.out_scores[start:stop] = scores


def _search_chunk(problem: Problem, plan: Plan, start: int, stop: int) -> Tensor:
    """Packed keys [rows, top_k] of the best that rows `start` to `stop` see, best first."""
    rows, width = stop - start, problem.max_visible(start, stop)
    visible = problem.visible(start, stop)
    device = problem.q.device
    scorer = _CudaScorer(problem, start, stop) if device.type == "cuda" else _CpuScorer(problem, start, stop, visible)
    visible = visible.to(device)
    best = torch.full((rows, problem.top_k), _EMPTY, dtype=torch.int64, device=device)
    for tile_start in range(0, width, plan.key_tile):
        tile_stop = min(tile_start + plan.key_tile, width)
        scores = scorer.scores(tile_start, tile_stop)
        columns = torch.arange(tile_start, tile_stop, device=device)
        scores.masked_fill_(columns[None, :] >= visible[:, None], -torch.inf)
        joined = torch.empty((rows, problem.top_k + tile_stop - tile_start), dtype=torch.int64, device=device)
        joined[:, : problem.top_k] = best
        pack(scores, tile_start, joined[:, problem.top_k :])
        best = torch.topk(joined, problem.top_k, dim=1, sorted=True).values
    return best


class _CpuScorer:
    """Scores in blocks [heads × head_dim] · [head_dim × 256 keys] of one row and one page, in float32.

    The library may choose its summation order by shape and by alignment, so both are fixed: every operand is copied
    to a buffer of its own whose rows start on a cache line, and a ragged last page is padded with zeros.
    """

    def __init__(self, problem: Problem, start: int, stop: int, visible: Tensor) -> None:
        self._keys = problem.keys
        self._visible = visible.tolist()
        self._q = problem.q[start:stop].to(torch.float32, copy=True)
        pitch = -(-problem.heads // _GATE_ALIGNMENT) * _GATE_ALIGNMENT
        self._w = torch.zeros((stop - start, 1, pitch))[:, :, : problem.heads]
        self._w[:, 0] = problem.w[start:stop]
        self._page = torch.empty((PAGE_KEYS, problem.head_dim))
        self._products = torch.empty((problem.heads, PAGE_KEYS))

    def scores(self, tile_start: int, tile_stop: int) -> Tensor:
        """Scores [rows, tile_stop - tile_start] float32 of the tile's keys; those a row cannot see are arbitrary but
        finite."""
        first, last = tile_start // PAGE_KEYS, -(-tile_stop // PAGE_KEYS)
        scores = torch.zeros((len(self._visible), (last - first) * PAGE_KEYS))
        transposed = self._page.T
        for number in range(first, last):
            page_start = number * PAGE_KEYS
            self._load_page(number)
            block = scores[:, page_start - tile_start : page_start - tile_start + PAGE_KEYS]
            for row, visible in enumerate(self._visible):
                if visible > page_start:
                    torch.mm(self._q[row], transposed, out=self._products)
                    torch.mm(self._w[row], self._products.relu_(), out=block[row : row + 1])
            if self._keys.scale_pages is not None:
                block *= self._valid_scales(number)
        return scores[:, : tile_stop - tile_start]

    def _load_page(self, number: int) -> None:
        valid = min(self._keys.length - number * PAGE_KEYS, PAGE_KEYS)
        self._page[:valid] = self._keys.pages[number][:valid]
        self._page[valid:] = 0.0

    def _valid_scales(self, number: int) -> Tensor:
        assert self._keys.scale_pages is not None
        columns = torch.arange(number * PAGE_KEYS, (number + 1) * PAGE_KEYS)
        return torch.where(columns < self._keys.length, self._keys.scale_pages[number], 0.0)


class _CudaScorer:
    """Scores of a whole tile at once: one library product [chunk · heads × head_dim] · [head_dim × tile], accumulated
    in float32."""

    def __init__(self, problem: Problem, start: int, stop: int) -> None:
        self._keys = problem.keys
        # e4m3 values are exact in bfloat16, and their products in float32
        self._dtype = torch.bfloat16 if problem.format is KeyFormat.FP8_E4M3 else problem.format.torch_dtype
        self._q = problem.q[start:stop].to(self._dtype).view(-1, problem.head_dim)
        self._w = problem.w[start:stop, None, :]

    def scores(self, tile_start: int, tile_stop: int) -> Tensor:
        """Scores [rows, tile_stop - tile_start] float32 of the tile's keys, seen or not."""
        k, scales = self._keys.gather(tile_start, tile_stop, self._dtype)
        if self._dtype is torch.float32:
            products = torch.mm(self._q, k.T)
        else:
            products = torch.mm(self._q, k.T, out_dtype=torch.float32)
        rows, _, heads = self._w.shape
        scores = torch.bmm(self._w, products.relu_().view(rows, heads, -1))[:, 0]
        return scores if scales is None else scores.mul_(scales)
