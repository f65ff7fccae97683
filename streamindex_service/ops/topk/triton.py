"""Fused kernels: scores of a chunk of queries × a tile of keys, and the exact selection of each row's best.

Triton is imported here, in scores.py, in selection.py and in the modules of hopper.py only. With TRITON_INTERPRET=1 the
same code runs on CPU tensors, for tests.

Scores: keys are the M operand of the product and (queries × heads) the N operand, so the sum over heads stays within
few threads; a block of keys is loaded once and reused over up to `query_group` queries. On some devices `hopper.py`
computes them instead (`plan.choose_score_kernel`).

Selection: a sample of each row gives a threshold; one pass marks what reaches it, a bit per score; the marked are
counted and collected, and the best are selected among them, or among the whole row if the sample misled. The k-th
largest score's bits are found by bisection in registers, or by a radix search if there are too many; a stable
compaction follows. Candidates are kept in index order, so a tie is decided by position alone and no result depends on
the order in which threads or blocks ran.

No length, row count or stride is a compile-time constant or specialised upon: a new length compiles nothing.
"""

import sys
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from streamindex_service.ops.compiled import variants
from streamindex_service.ops.topk import plan as planning
from streamindex_service.ops.topk.order import Order
from streamindex_service.ops.topk.parts import Parts, PartTable
from streamindex_service.ops.topk.plan import Plan
from streamindex_service.ops.topk.problem import Problem
from streamindex_service.ops.topk.scores import INTERPRETED, score_kernel, scores_of
from streamindex_service.ops.topk.selection import (
    finish_kernel,
    mark_kernel,
    order_kernel,
    rest_kernel,
    select_kernel,
    threshold_kernel,
)

_INT32_END = 2**31


def compiled_variants() -> int:
    """How many kernel variants this process has compiled: flat once warm, whatever the lengths."""
    kernels = [score_kernel, threshold_kernel, mark_kernel, finish_kernel, rest_kernel, select_kernel, order_kernel]
    hopper = sys.modules.get("streamindex_service.ops.topk.hopper")
    return variants([*kernels, getattr(hopper, "score_kernel", None)])


def survivor_counts(problem: Problem, plan: Plan) -> Tensor:
    """Entries the filter left of each row, −1 where the sample misled and the row was read whole, −2 where it sees too
    few keys to be filtered: [rows] int32.

    For tests and for reporting how often the fallback is taken. One chunk and one tile: `plan` must hold all of them.
    """
    run = _Run(problem, plan)
    assert plan.query_chunk >= problem.rows
    width = problem.max_visible(0, problem.rows)
    assert planning.is_filtered(width, problem.top_k, run.tiles)
    assert width <= plan.key_tile
    buffers = _search_chunk(run, 0, problem.rows, width)
    short = problem.visible(0, problem.rows) < planning.FILTERED_TOP_K * problem.top_k
    return buffers.counts.masked_fill(short.to(buffers.counts.device), -2)


def run_triton(problem: Problem, plan: Plan, parts: Parts | None = None) -> None:
    """Fill the outputs chunk by chunk, without waiting for the device. Raises ValueError for a q that is not 16-byte
    aligned.

    parts: whose keys the rows are scored with, where not all with the problem's own. The best of a row are selected as
    ever.
    """
    if problem.q.data_ptr() % 16:
        raise ValueError("q: its address is not a multiple of 16 bytes")
    with torch.cuda.device_of(problem.q):  # kernels start on the current device, which need not be the tensors'
        run = _Run(problem, plan, parts)
        # From the last row on, which sees most keys: while the device has long work the host gets ahead of it.
        stop = problem.rows
        while stop > 0:
            start = _chunk_start(run, stop)
            width = problem.max_visible(start, stop)
            if width <= problem.top_k and problem.order is Order.INDEX and problem.out_scores is None:
                _all_visible(run, start, stop)
            else:
                _search_chunk(run, start, stop, width)
            stop = start


class _Run:
    """What all chunks of one run share; `arena` is the one allocation that every chunk lays its buffers out in."""

    def __init__(self, problem: Problem, plan: Plan, parts: Parts | None = None) -> None:
        assert plan.tiles is not None
        self.problem, self.plan, self.tiles = problem, plan, plan.tiles
        self.parts = parts
        rows = min(plan.query_chunk, problem.rows)
        self.arena_bytes = planning.arena_bytes(problem.top_k, rows, plan.key_tile, plan.tiles)
        self.arena = torch.empty(self.arena_bytes, dtype=torch.uint8, device=problem.q.device)
        self.floats, self.ints = self.arena.view(torch.float32), self.arena.view(torch.int32)
        self.scores = scores_of(problem, plan.tiles)


class _Buffers:
    """A chunk's part of the arena, in the order and with the sizes that `plan.arena_parts` gives."""

    def __init__(self, run: _Run, rows: int, stride: int) -> None:
        top_k = run.problem.top_k
        begin, parts = 0, []
        for size in planning.arena_parts(top_k, rows, stride, run.tiles):
            parts.append(begin // 4)
            begin += size
        assert begin <= run.arena_bytes
        # Kernels take addresses; a tensor with the right shape costs the host more than a launch, so few are made.
        floats, ints = run.floats, run.ints
        self.scores = floats[parts[0] : parts[0] + rows * stride].view(rows, stride)
        lists = [
            (floats[a : a + rows * top_k].view(rows, top_k), ints[b : b + rows * top_k].view(rows, top_k))
            for a, b in (parts[1:3], parts[3:5])
        ]
        self.lists = (lists[0], lists[1])
        self.survivors = (floats[parts[5] :], ints[parts[6] :])
        self.marks, self.thresholds = ints[parts[7] :], ints[parts[8] :]
        self.counts = ints[parts[9] : parts[9] + rows]


@dataclass(frozen=True)
class _Chunk:
    """Query rows `start` to `stop`; positions: [rows] int64 on the device, or None where they are consecutive.

    together: the run's parts among these rows that one launch takes, and its problem.
    """

    start: int
    stop: int
    positions: Tensor | None
    together: tuple[PartTable, Problem] | None = None


def _chunk_start(run: _Run, stop: int) -> int:
    """Where the chunk that ends at `stop` begins: rows that see few keys make larger chunks of the same arena."""
    problem, plan = run.problem, run.plan
    planned = min(plan.query_chunk, stop)
    if not plan.grow or (planned == stop and not isinstance(problem.positions, int)):
        return stop - planned

    def fits(rows: int) -> bool:
        stride = min(plan.key_tile, planning.score_stride(problem.max_visible(stop - rows, stop)))
        return rows <= planning.most_rows(problem.top_k, stride, run.tiles, run.arena_bytes)

    # Rows that see too few keys to be filtered stay apart from those that are: among these, they would be left over.
    filtered = _first_row_of(problem, planning.least_filtered(problem.top_k, run.tiles))
    most = min(max(planning.MAX_QUERY_CHUNK, filtered), stop)
    if isinstance(problem.positions, int):  # the last row sees most, however many are taken before it
        stride = min(plan.key_tile, planning.score_stride(problem.max_visible(stop - 1, stop)))
        rows = min(most, planning.most_rows(problem.top_k, stride, run.tiles, run.arena_bytes))
    else:
        rows = planning.largest(most, fits)
    start = stop - max(planned, rows)
    return filtered if start < filtered < stop else start


def _first_row_of(problem: Problem, keys: int) -> int:
    """The first row that sees so many keys; 0 where rows are in no order."""
    if not isinstance(problem.positions, int):
        return 0
    return max(0, keys * problem.ratio - 1 - problem.positions)


def _search_chunk(run: _Run, start: int, stop: int, width: int) -> _Buffers:
    problem, plan = run.problem, run.plan
    together = None if run.parts is None else run.parts.together(start, stop)
    chunk = _Chunk(start, stop, _chunk_positions(problem, start, stop), together)
    buffers = _Buffers(run, stop - start, min(plan.key_tile, planning.score_stride(width)))
    old, new = buffers.lists
    tile = buffers.scores.stride(0)
    for tile_start in range(0, max(width, 1), tile):
        tile_keys = min(tile, width - tile_start)
        if tile_keys > 0:
            _score_chunk(run, buffers.scores, chunk, tile_start, tile_keys)
        if tile_start + tile >= width and problem.order is Order.INDEX:  # as the caller wants it
            scores = new[0] if problem.out_scores is None else problem.out_scores[start:stop]
            new = (scores, problem.out_indices[start:stop])
        _launch_select(run, buffers, chunk, tile_start, tile_keys, old, new)
        old, new = new, old
    if problem.order is Order.SCORE:
        _launch_order(problem, start, *old)
    return buffers


def _score_chunk(run: _Run, scores: Tensor, chunk: _Chunk, tile_start: int, keys: int) -> None:
    """Scores of a chunk's rows with keys tile_start to tile_start + keys, of each part with its own."""
    if run.parts is None:
        rows = chunk.stop - chunk.start
        run.scores.of_rows(run.problem, scores, chunk.positions, chunk.start, rows, tile_start, keys)
        return
    if chunk.together is not None:
        table, problem = chunk.together
        run.scores.of_parts(problem, scores, table, chunk.start, tile_start, keys)
    for part in run.parts.apart(chunk.start, chunk.stop):
        seen = min(keys, part.problem.max_visible(part.start, part.stop) - tile_start)
        if seen > 0:
            assert chunk.positions is not None
            inside = slice(part.start - chunk.start, part.stop - chunk.start)
            rows, positions = part.stop - part.start, chunk.positions[inside]
            run.scores.of_rows(part.problem, scores[inside], positions, part.start, rows, tile_start, seen)


def _launch_order(problem: Problem, start: int, scores: Tensor, indices: Tensor) -> None:
    """Put the results of rows `start` on, which stand in index order, in order of score: to the outputs."""
    rows, top_k = scores.shape
    window = slice(start, start + rows)
    out, out_scores = problem.out_indices[window], scores  # the scores stay where they are if nobody wants them
    if problem.out_scores is not None:
        out_scores = problem.out_scores[window]
    if INTERPRETED:  # a sorting network takes minutes; its test has a small one
        ordered, permutation = torch.sort(scores, dim=1, descending=True, stable=True)
        torch.gather(indices, 1, permutation, out=out)
        out_scores.copy_(ordered)
        return
    held = planning.survivor_lanes(top_k)
    order_kernel[(rows,)](
        scores, indices, out_scores, out, top_k,
        LANES=held.ordered, WANT_SCORES=problem.out_scores is not None, num_warps=min(held.warps, 8),
    )  # fmt: skip


def _launch_select(
    run: _Run, buffers: _Buffers, chunk: _Chunk, tile_start: int, keys: int,
    old: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor],
) -> None:  # fmt: skip
    p, b, tiles, rows = run.problem, buffers, run.tiles, chunk.stop - chunk.start
    explicit = chunk.positions is not None
    positions = chunk.positions if explicit else p.keys.key_table.offsets
    scalars = (
        chunk.start, tile_start, keys, p.keys.length, 0 if explicit else p.positions, p.ratio, b.scores.stride(0),
        p.top_k, planning.survivor_capacity(p.top_k),
    )  # fmt: skip
    # short tiles are read faster than sampled; the answer is the same, so this may depend on the length
    filtered = planning.is_filtered(keys, p.top_k, tiles)
    if not filtered:
        arguments = (b.scores, *old, *new, positions, *scalars)
        select = {"LANES": tiles.select_lanes, "BLOCK": tiles.select_block, "EXPLICIT": explicit}
        select_kernel[(rows,)](*arguments, **select, MANY=False, num_warps=tiles.select_warps)
        if keys + min(tile_start, p.top_k) > tiles.select_lanes:
            select_kernel[(rows,)](*arguments, **select, MANY=True, num_warps=2 * tiles.select_warps)
        return
    threshold_kernel[(rows,)](
        b.scores, b.thresholds, positions, *scalars,
        LANES=tiles.sample_lanes, EVERY=tiles.sample_every, LINE=tiles.sample_line, EXPLICIT=explicit,
        num_warps=tiles.select_warps,
    )  # fmt: skip
    mark_kernel[(triton.cdiv(keys, tiles.mark_block), rows)](
        b.scores, b.thresholds, b.marks, positions, *scalars,
        BLOCK=tiles.mark_block, EXPLICIT=explicit, num_warps=tiles.select_warps,
    )  # fmt: skip
    held = planning.survivor_lanes(p.top_k)
    finish_kernel[(rows,)](
        b.scores, b.thresholds, b.marks, *old, *b.survivors, b.counts, *new, positions, *scalars,
        LANES=held.lanes, MOST_LANES=held.most_lanes, WORDS=tiles.collect_words, BLOCK=tiles.select_block // 4,
        EXPLICIT=explicit, num_warps=held.warps, maxnreg=held.registers,
    )  # fmt: skip
    rest_kernel[(triton.cdiv(rows, tiles.rest_rows),)](
        b.scores, *old, *b.survivors, b.counts, *new, positions, rows, *scalars,
        MOST_LANES=held.most_lanes, ROWS=tiles.rest_rows, BLOCK=tiles.select_block, EXPLICIT=explicit,
        num_warps=2 * tiles.select_warps,
    )  # fmt: skip


def _chunk_positions(problem: Problem, start: int, stop: int) -> Tensor | None:
    """The chunk's explicit positions [rows] int64 on the device, or None where they are consecutive."""
    if not isinstance(problem.positions, int):
        chunk = problem.positions[start:stop].clone()
    elif problem.positions + stop <= _INT32_END:
        return None
    else:  # the first position as a wider argument would compile every kernel anew
        chunk = torch.arange(problem.positions + start, problem.positions + stop)
    if problem.q.is_cuda:
        # pinned, so that the copy does not make the host wait for the device
        return chunk.pin_memory().to(problem.q.device, non_blocking=True)
    return chunk


def _all_visible(run: _Run, start: int, stop: int) -> None:
    """Rows that see at most top_k keys, wanted by index and without scores: every visible key, no score needed."""
    problem, rows = run.problem, stop - start
    visible = problem.visible(start, stop).to(torch.int32)
    if problem.q.is_cuda:
        visible = visible.pin_memory().to(problem.q.device, non_blocking=True)
    places = torch.arange(problem.top_k, dtype=torch.int32, device=problem.q.device)
    # in the arena, which is more than large enough: memory beside it is in no plan
    hidden = run.arena[: rows * problem.top_k].view(torch.bool).view(rows, problem.top_k)
    torch.ge(places[None, :], visible[:, None], out=hidden)
    window = problem.out_indices[start:stop]
    window.copy_(places.expand_as(window))
    window.masked_fill_(hidden, -1)
