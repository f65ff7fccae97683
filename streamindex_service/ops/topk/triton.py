"""Fused kernels: scores of a chunk of queries × a tile of keys, and the exact selection of each row's best.

The only module of the operation that imports Triton. With TRITON_INTERPRET=1 the same code runs on CPU tensors, for
tests.

Scores: keys are the M operand of the product and (queries × heads) the N operand, so the sum over heads stays within
few threads; a block of keys is loaded once and reused over up to `query_group` queries. Selection: a radix search for
the k-th largest score's bits, then a stable compaction. Candidates are kept in index order, so a tie is decided by
position alone and no result depends on the order in which threads or blocks ran.

No length, row count or stride is a compile-time constant or specialised upon: a new length compiles nothing.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from streamindex_service.ops.paged_keys import PAGE_KEYS
from streamindex_service.ops.topk.order import Order
from streamindex_service.ops.topk.plan import KernelTiles, Plan, survivor_capacity
from streamindex_service.ops.topk.problem import Problem

_SCORE_SCALARS = ["row_start", "rows", "tile_start", "length", "first_position", "ratio", "score_stride"]
_SELECT_SCALARS = [
    "row_start", "tile_start", "tile_keys", "length", "first_position", "ratio", "score_stride", "old_stride", "top_k",
    "capacity",
]  # fmt: skip
_SELECT_POINTERS = [
    "positions", "scores", "old_scores", "old_indices", "survivor_scores", "survivor_indices", "survivor_counts",
    "new_scores", "new_indices",
]  # fmt: skip


@triton.jit
def _visible(positions, first_position, row, row_start, ratio, length, EXPLICIT: tl.constexpr):
    """Keys that chunk rows `row` see: min((position + 1) // ratio, length), int32. EXPLICIT positions are the chunk's
    own."""
    position = tl.load(positions + row) if EXPLICIT else first_position.to(tl.int64) + row_start + row
    return tl.minimum((position + 1) // ratio, length).to(tl.int32)


@triton.jit(do_not_specialize=_SCORE_SCALARS, do_not_specialize_on_alignment=["w", "positions"])
def _score_kernel(
    q, w, keys, key_offsets, scales, scale_offsets, positions, scores,
    row_start, rows, tile_start, length, first_position, ratio, score_stride,
    HEADS: tl.constexpr, HEADS_PAD: tl.constexpr, HEAD_DIM: tl.constexpr, DIM_PAD: tl.constexpr,
    BLOCK_KEYS: tl.constexpr, BLOCK_QUERIES: tl.constexpr, QUERY_GROUP: tl.constexpr, PAGE: tl.constexpr,
    HAS_SCALES: tl.constexpr, EXPLICIT: tl.constexpr, STAGES: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """One block of keys against one group of a chunk's queries. Grid: (key blocks of the tile, query groups).

    q: [all rows, HEADS, HEAD_DIM], w: [all rows, HEADS], of which the chunk is rows row_start to row_start + rows.
    scores: [rows, score_stride] float32, column c being key tile_start + c. Entries that a row cannot see are written
    too, or not; nobody reads them.
    """
    column = tl.program_id(0) * BLOCK_KEYS
    key_start = tile_start + column
    group_start = tl.program_id(1) * QUERY_GROUP

    # Which of the group's queries see any key of the block: skip the rest (exact for sorted positions, safe for any).
    lane = tl.arange(0, QUERY_GROUP)
    member = tl.minimum(group_start + lane, rows - 1)
    visible = _visible(positions, first_position, member, row_start, ratio, length, EXPLICIT)
    sees = (group_start + lane < rows) & (visible > key_start)
    first = tl.min(tl.where(sees, lane, QUERY_GROUP), axis=0) // BLOCK_QUERIES * BLOCK_QUERIES
    last = tl.max(tl.where(sees, lane + 1, 0), axis=0)

    if first < last:
        key = tl.arange(0, BLOCK_KEYS)  # [BK]
        dim = tl.arange(0, DIM_PAD)  # [D]
        valid = key_start + key < length
        page = key_start // PAGE
        inside = key_start % PAGE + key
        offset = tl.multiple_of(tl.load(key_offsets + page), 16)
        k_ptr = keys + offset + inside[:, None] * HEAD_DIM + dim[None, :]
        # rows past the length may be NaN: never load them
        k = tl.load(k_ptr, mask=valid[:, None] & (dim < HEAD_DIM)[None, :], other=0.0)  # [BK, D]
        if WIDEN:
            k = k.to(tl.float32)
        if HAS_SCALES:
            scale_offset = tl.multiple_of(tl.load(scale_offsets + page), 16)
            scale = tl.load(scales + scale_offset + inside, mask=valid, other=0.0)  # [BK]

        n = tl.arange(0, BLOCK_QUERIES * HEADS_PAD)  # [BQ · H]
        head = n % HEADS_PAD
        for start in tl.range(first, last, BLOCK_QUERIES, num_stages=STAGES):
            if BLOCK_QUERIES == 1:
                row = row_start.to(tl.int64) + group_start + start
                q_ptr = q + row * (HEADS * HEAD_DIM) + (head * HEAD_DIM)[:, None] + dim[None, :]
                w_ptr = w + row * HEADS + head
            else:
                # past the last row, read the last one again: its scores are not stored
                rows_of_n = tl.minimum(group_start + start + n // HEADS_PAD, rows - 1).to(tl.int64) + row_start
                q_ptr = q + (rows_of_n * (HEADS * HEAD_DIM) + head * HEAD_DIM)[:, None] + dim[None, :]
                w_ptr = w + rows_of_n * HEADS + head
            if HEADS == HEADS_PAD and HEAD_DIM == DIM_PAD:
                queries = tl.load(q_ptr)  # [BQ · H, D]
            else:
                queries = tl.load(q_ptr, mask=(head < HEADS)[:, None] & (dim < HEAD_DIM)[None, :], other=0.0)
            if WIDEN:
                queries = queries.to(tl.float32)
            gate = tl.load(w_ptr, mask=head < HEADS, other=0.0)
            products = tl.dot(k, tl.trans(queries), input_precision="ieee")  # [BK, BQ · H] float32
            gated = tl.maximum(products, 0.0) * gate[None, :]
            if BLOCK_QUERIES == 1:
                score = tl.sum(gated, axis=1)  # [BK]
                if HAS_SCALES:
                    score *= scale
                score = tl.where(score == 0.0, 0.0, score)  # −0.0 becomes +0.0
                out = scores + (group_start + start).to(tl.int64) * score_stride + column + key
                tl.store(out, score)
            else:
                score = tl.sum(tl.reshape(gated, (BLOCK_KEYS, BLOCK_QUERIES, HEADS_PAD)), axis=2)  # [BK, BQ]
                if HAS_SCALES:
                    score *= scale[:, None]
                score = tl.where(score == 0.0, 0.0, score)
                local = group_start + start + tl.arange(0, BLOCK_QUERIES)
                out = scores + local.to(tl.int64)[None, :] * score_stride + (column + key)[:, None]
                tl.store(out, score, mask=(local < rows)[None, :])


@triton.jit
def _ordered_bits(score):
    """uint32 bits whose unsigned order is the float order."""
    bits = score.to(tl.uint32, bitcast=True)
    return tl.where((bits >> 31) != 0, ~bits, bits | 0x80000000)


@triton.jit
def _add_digits(histogram, values, count, prefix, SHIFT: tl.constexpr, EVERY: tl.constexpr, BLOCK: tl.constexpr):
    """Add to `histogram` [256] the digits at SHIFT of those of `count` floats whose higher digits are `prefix`.

    EVERY > 1 takes one run of 32 floats (a memory line) in every EVERY runs, `count` floats in all.
    """
    lane = tl.arange(0, BLOCK)
    for start in range(0, count, BLOCK):
        inside = start + lane < count
        place = start + lane
        if EVERY > 1:
            place = place // 32 * (32 * EVERY) + place % 32
        bits = _ordered_bits(tl.load(values + place, mask=inside, other=0.0))
        if SHIFT < 24:
            inside = inside & ((bits >> (SHIFT + 8)) == prefix)
        digit = ((bits >> SHIFT) & 255).to(tl.int32)
        # digits that do not count go to bin 0, and are taken off again
        counted = tl.histogram(tl.where(inside, digit, 0), 256)
        outside = BLOCK - tl.sum(inside.to(tl.int32), axis=0)
        histogram += counted - tl.where(tl.arange(0, 256) == 0, outside, 0)
    return histogram


@triton.jit
def _next_digit(histogram, needed, prefix):
    """The prefix one digit longer that holds the `needed`-th largest, and which of the entries with it that is."""
    # at_least[b]: entries with digit b or more; the one sought has the largest digit with at_least ≥ needed
    at_least = tl.sum(histogram, axis=0) - tl.cumsum(histogram, axis=0) + histogram
    digit = tl.sum((at_least >= needed).to(tl.int32), axis=0) - 1
    needed -= tl.sum(tl.where(tl.arange(0, 256) > digit, histogram, 0), axis=0)
    return needed, (prefix << 8) | digit.to(tl.uint32)


@triton.jit
def _keep(
    values,
    ids,
    first_id,
    count,
    kth,
    ties_left,
    kept,
    new_scores,
    new_indices,
    HAS_IDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Append, in order, the entries above `kth` and the first `ties_left` equal to it. Returns the counts that remain
    and are kept."""
    lane = tl.arange(0, BLOCK)
    for start in range(0, count, BLOCK):
        inside = start + lane < count
        value = tl.load(values + start + lane, mask=inside, other=0.0)
        bits = _ordered_bits(value)
        tie = (inside & (bits == kth)).to(tl.int32)
        tie_rank = tl.cumsum(tie, axis=0)  # 1 for the first
        take = (inside & (bits > kth)).to(tl.int32) | (tie & (tie_rank <= ties_left).to(tl.int32))
        place = kept + tl.cumsum(take, axis=0) - 1
        index = tl.load(ids + start + lane, mask=inside, other=0) if HAS_IDS else first_id + start + lane
        tl.store(new_scores + place, value, mask=take != 0)
        tl.store(new_indices + place, index, mask=take != 0)
        ties_left -= tl.minimum(tl.sum(tie, axis=0), ties_left)
        kept += tl.sum(take, axis=0)
    return ties_left, kept


@triton.jit(do_not_specialize=_SELECT_SCALARS, do_not_specialize_on_alignment=_SELECT_POINTERS)
def _filter_kernel(
    scores, old_scores, old_indices, survivor_scores, survivor_indices, survivor_counts, positions,
    row_start, tile_start, tile_keys, length, first_position, ratio, score_stride, old_stride, top_k, capacity,
    BLOCK: tl.constexpr, EVERY: tl.constexpr, EXPLICIT: tl.constexpr,
):  # fmt: skip
    """What of one row can still be among the best, in index order: one pass over the tile. Grid: (rows of the chunk,).

    A sample of the tile gives a threshold that should leave somewhat more than top_k; every entry not below it
    survives. If that turns out to be fewer than top_k, or more than `capacity`, the sample misled: the count is
    stored as −1, and the selection reads the whole row. A right count makes the survivors a superset of the answer.
    """
    row = tl.program_id(0)
    visible = _visible(positions, first_position, row, row_start, ratio, length, EXPLICIT)
    old_count = tl.minimum(tl.minimum(visible, tile_start), top_k)
    tile_count = tl.maximum(tl.minimum(visible - tile_start, tile_keys), 0)
    scores += row.to(tl.int64) * score_stride
    old_scores += row.to(tl.int64) * old_stride
    old_indices += row.to(tl.int64) * old_stride
    survivor_scores += row.to(tl.int64) * capacity
    survivor_indices += row.to(tl.int64) * capacity

    result = tl.full((), -1, tl.int32)
    if tile_count >= 8 * top_k:
        sample = tile_count // (32 * EVERY) * 32
        # of the best top_k, the sample holds about `mean`; four deviations more make fewer than top_k survivors rare
        mean = top_k.to(tl.float32) * sample.to(tl.float32) / tile_count.to(tl.float32)
        needed = tl.minimum((mean + 4.0 * tl.sqrt(mean) + 4.0).to(tl.int32), sample)
        prefix = tl.full((), 0, tl.uint32)
        for step in tl.static_range(2):
            histogram = tl.zeros((256,), tl.int32)
            histogram = _add_digits(histogram, scores, sample, prefix, 24 - 8 * step, EVERY, BLOCK)
            needed, prefix = _next_digit(histogram, needed, prefix)
        threshold = prefix << 16
        kept = tl.full((), 0, tl.int32)
        kept = _survive(
            old_scores, old_indices, 0, old_count, threshold, kept, capacity, survivor_scores, survivor_indices,
            True, BLOCK,
        )  # fmt: skip
        kept = _survive(
            scores, old_indices, tile_start, tile_count, threshold, kept, capacity, survivor_scores, survivor_indices,
            False, BLOCK,
        )  # fmt: skip
        result = tl.where((kept >= top_k) & (kept <= capacity), kept, -1)
    tl.store(survivor_counts + row, result)


@triton.jit
def _survive(
    values, ids, first_id, count, threshold, kept, capacity, to_scores, to_indices,
    HAS_IDS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Append, in order, the entries whose bits are not below `threshold`; what does not fit is counted, not stored."""
    lane = tl.arange(0, BLOCK)
    for start in range(0, count, BLOCK):
        inside = start + lane < count
        value = tl.load(values + start + lane, mask=inside, other=0.0)
        take = (inside & (_ordered_bits(value) >= threshold)).to(tl.int32)
        place = kept + tl.cumsum(take, axis=0) - 1
        index = tl.load(ids + start + lane, mask=inside, other=0) if HAS_IDS else first_id + start + lane
        fits = (take != 0) & (place < capacity)
        tl.store(to_scores + place, value, mask=fits)
        tl.store(to_indices + place, index, mask=fits)
        kept += tl.sum(take, axis=0)
    return kept


@triton.jit(do_not_specialize=_SELECT_SCALARS, do_not_specialize_on_alignment=_SELECT_POINTERS)
def _select_kernel(
    scores, old_scores, old_indices, survivor_scores, survivor_indices, survivor_counts, new_scores, new_indices,
    positions,
    row_start, tile_start, tile_keys, length, first_position, ratio, score_stride, old_stride, top_k, capacity,
    BLOCK: tl.constexpr, FILTERED: tl.constexpr, EXPLICIT: tl.constexpr,
):  # fmt: skip
    """The best top_k of (candidates so far, this tile's scores) of one row, in index order, padded. Grid: (rows of
    the chunk,).

    scores: [rows, score_stride] float32 of keys tile_start to tile_start + tile_keys. Candidates so far have smaller
    indices than any key of the tile and stand in index order, so "first in order" is "smallest index" across both.
    FILTERED: where the filter found the row's survivors, only they are read.
    """
    row = tl.program_id(0)
    visible = _visible(positions, first_position, row, row_start, ratio, length, EXPLICIT)
    old_count = tl.minimum(tl.minimum(visible, tile_start), top_k)
    tile_count = tl.maximum(tl.minimum(visible - tile_start, tile_keys), 0)
    scores += row.to(tl.int64) * score_stride
    old_scores += row.to(tl.int64) * old_stride
    old_indices += row.to(tl.int64) * old_stride
    new_scores += row.to(tl.int64) * old_stride
    new_indices += row.to(tl.int64) * old_stride
    if FILTERED:
        survivors = tl.load(survivor_counts + row)
        if survivors >= 0:  # they stand for candidates and tile alike
            old_scores = survivor_scores + row.to(tl.int64) * capacity
            old_indices = survivor_indices + row.to(tl.int64) * capacity
            old_count = survivors
            tile_count = survivors * 0

    kth = tl.full((), 0, tl.uint32)  # bits of the k-th best score; 0 is below every score
    needed = tl.full((), 0, tl.int32)  # how many equal to it belong to the result
    if old_count + tile_count > top_k:
        needed += top_k
        for step in tl.static_range(4):
            histogram = tl.zeros((256,), tl.int32)
            histogram = _add_digits(histogram, old_scores, old_count, kth, 24 - 8 * step, 1, BLOCK)
            histogram = _add_digits(histogram, scores, tile_count, kth, 24 - 8 * step, 1, BLOCK)
            needed, kth = _next_digit(histogram, needed, kth)

    kept = tl.full((), 0, tl.int32)
    needed, kept = _keep(old_scores, old_indices, 0, old_count, kth, needed, kept, new_scores, new_indices, True, BLOCK)
    needed, kept = _keep(
        scores, old_indices, tile_start, tile_count, kth, needed, kept, new_scores, new_indices, False, BLOCK
    )
    lane = tl.arange(0, BLOCK)
    for start in range(kept, top_k, BLOCK):
        unused = start + lane < top_k
        tl.store(new_scores + start + lane, float("-inf"), mask=unused)
        tl.store(new_indices + start + lane, -1, mask=unused)


# The interpreter multiplies the raw bits of bfloat16 operands: there, and only there, the product takes float32 ones.
_INTERPRETED = not isinstance(_score_kernel, triton.JITFunction)


def compiled_variants() -> int:
    """How many kernel variants this process has compiled: flat once warm, whatever the lengths."""
    total = 0
    for kernel in (_score_kernel, _filter_kernel, _select_kernel):
        for cache in getattr(kernel, "device_caches", {}).values():
            total += len(cache[0])
    return total


def survivor_counts(problem: Problem, plan: Plan) -> Tensor:
    """Entries the filter left of each row, −1 where the sample misled and the row was read whole: [rows] int32.

    For tests and for reporting how often the fallback is taken. One chunk and one tile: `plan` must hold all of them.
    """
    assert plan.tiles is not None
    assert plan.query_chunk >= problem.rows
    workspace, width = _Workspace(problem, plan), problem.max_visible(0, problem.rows)
    assert max(plan.tiles.filter_keys, 8 * problem.top_k) <= width <= plan.key_tile
    _search_chunk(problem, plan, workspace, 0, problem.rows, width)
    return workspace.survivors[2]


def run_triton(problem: Problem, plan: Plan) -> None:
    """Fill the outputs chunk by chunk, without waiting for the device. Raises ValueError for a q that is not 16-byte
    aligned."""
    assert plan.tiles is not None
    if problem.q.data_ptr() % 16:
        raise ValueError("q: its address is not a multiple of 16 bytes")
    with torch.cuda.device_of(problem.q):  # kernels start on the current device, which need not be the tensors'
        workspace = _Workspace(problem, plan)
        for start in range(0, problem.rows, plan.query_chunk):
            stop = min(start + plan.query_chunk, problem.rows)
            width = problem.max_visible(start, stop)
            if width <= problem.top_k and problem.order is Order.INDEX and problem.out_scores is None:
                _all_visible(problem, start, stop)
            else:
                _search_chunk(problem, plan, workspace, start, stop, width)


class _Workspace:
    """Scores of one chunk × tile, and two candidate lists that tiles of keys write by turns. One allocation each for
    a whole run."""

    def __init__(self, problem: Problem, plan: Plan) -> None:
        device, rows = problem.q.device, min(plan.query_chunk, problem.rows)
        self.scores = torch.empty((rows, plan.key_tile), dtype=torch.float32, device=device)
        self.lists = [
            (
                torch.empty((rows, problem.top_k), dtype=torch.float32, device=device),
                torch.empty((rows, problem.top_k), dtype=torch.int32, device=device),
            )
            for _ in range(2)
        ]
        self.capacity = survivor_capacity(problem.top_k)
        self.survivors = (
            torch.empty((rows, self.capacity), dtype=torch.float32, device=device),
            torch.empty((rows, self.capacity), dtype=torch.int32, device=device),
            torch.empty((rows,), dtype=torch.int32, device=device),
        )


@dataclass(frozen=True)
class _Chunk:
    """Query rows `start` to `stop`; positions: [rows] int64 on the device, or None where they are consecutive."""

    start: int
    stop: int
    positions: Tensor | None


def _search_chunk(problem: Problem, plan: Plan, workspace: _Workspace, start: int, stop: int, width: int) -> None:
    chunk = _Chunk(start, stop, _chunk_positions(problem, start, stop))
    old, new = workspace.lists
    for tile_start in range(0, max(width, 1), plan.key_tile):
        tile_keys = min(plan.key_tile, width - tile_start)
        if tile_keys > 0:
            _launch_scores(problem, plan.tiles, workspace.scores, chunk, tile_start, tile_keys)
        _launch_select(problem, plan.tiles, workspace, chunk, tile_start, tile_keys, old, new)
        old, new = new, old
    scores, indices = old[0][: stop - start], old[1][: stop - start]
    if problem.order is Order.SCORE:
        # stable: equal scores stay in index order
        scores, permutation = torch.sort(scores, dim=1, descending=True, stable=True)
        indices = indices.gather(1, permutation)
    problem.out_indices[start:stop] = indices
    if problem.out_scores is not None:
        problem.out_scores[start:stop] = scores


def _launch_scores(
    problem: Problem, tiles: KernelTiles, scores: Tensor, chunk: _Chunk, tile_start: int, keys: int
) -> None:
    p, rows = problem, chunk.stop - chunk.start
    table, scale_table = p.keys.key_table, p.keys.scale_table
    explicit = chunk.positions is not None
    grid = (triton.cdiv(keys, tiles.block_keys), triton.cdiv(rows, tiles.query_group))
    # pointers that a variant does not use are given the offset table: any other tensor's alignment could compile anew
    _score_kernel[grid](
        p.q, p.w, table.anchor, table.offsets,
        scale_table.anchor if scale_table else table.offsets, scale_table.offsets if scale_table else table.offsets,
        chunk.positions if explicit else table.offsets, scores,
        chunk.start, rows, tile_start, p.keys.length, 0 if explicit else p.positions, p.ratio, scores.stride(0),
        HEADS=p.heads, HEADS_PAD=tiles.heads_pad, HEAD_DIM=p.head_dim, DIM_PAD=tiles.dim_pad,
        BLOCK_KEYS=tiles.block_keys, BLOCK_QUERIES=tiles.block_queries, QUERY_GROUP=tiles.query_group,
        PAGE=PAGE_KEYS,
        HAS_SCALES=scale_table is not None, EXPLICIT=explicit, STAGES=tiles.score_stages, WIDEN=_INTERPRETED,
        num_warps=tiles.score_warps, num_stages=tiles.score_stages,
    )  # fmt: skip


def _launch_select(
    problem: Problem, tiles: KernelTiles, workspace: _Workspace, chunk: _Chunk, tile_start: int, keys: int,
    old: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor],
) -> None:  # fmt: skip
    p, explicit, grid = problem, chunk.positions is not None, (chunk.stop - chunk.start,)
    positions = chunk.positions if explicit else p.keys.key_table.offsets
    scalars = (
        chunk.start, tile_start, keys, p.keys.length, 0 if explicit else p.positions, p.ratio,
        workspace.scores.stride(0), p.top_k, p.top_k, workspace.capacity,
    )  # fmt: skip
    # short tiles are read faster than sampled; the answer is the same, so this may depend on the length
    filtered = keys >= max(tiles.filter_keys, 8 * p.top_k)
    if filtered:
        _filter_kernel[grid](
            workspace.scores, *old, *workspace.survivors, positions, *scalars,
            BLOCK=tiles.select_block, EVERY=tiles.sample_every, EXPLICIT=explicit, num_warps=tiles.select_warps,
        )  # fmt: skip
    _select_kernel[grid](
        workspace.scores, *old, *workspace.survivors, *new, positions, *scalars,
        BLOCK=tiles.select_block, FILTERED=filtered, EXPLICIT=explicit, num_warps=tiles.select_warps,
    )  # fmt: skip


def _chunk_positions(problem: Problem, start: int, stop: int) -> Tensor | None:
    """The chunk's explicit positions [rows] int64 on the device, or None where they are consecutive."""
    if isinstance(problem.positions, int):
        return None
    chunk = problem.positions[start:stop]
    if problem.q.is_cuda:
        # pinned, so that the copy does not make the host wait for the device
        return chunk.clone().pin_memory().to(problem.q.device, non_blocking=True)
    return chunk.clone()


def _all_visible(problem: Problem, start: int, stop: int) -> None:
    """Rows that see at most top_k keys, wanted by index and without scores: every visible key, no score needed."""
    visible = problem.visible(start, stop).to(torch.int32)
    if problem.q.is_cuda:
        visible = visible.pin_memory().to(problem.q.device, non_blocking=True)
    places = torch.arange(problem.top_k, dtype=torch.int32, device=problem.q.device)
    problem.out_indices[start:stop] = torch.where(places[None, :] < visible[:, None], places[None, :], -1)
