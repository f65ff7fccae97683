"""Launches of the score kernels: the portable one, which is here, and the one for compute capability 9.0."""

from functools import cache
from typing import Protocol

import torch
import triton
import triton.language as tl
from torch import Tensor

from streamindex_service.ops.paged_keys import PAGE_KEYS
from streamindex_service.ops.topk.parts import FIELDS, PartTable
from streamindex_service.ops.topk.plan import KernelTiles, ScoreKernel
from streamindex_service.ops.topk.problem import Problem
from streamindex_service.ops.topk.selection import visible_keys

_FIELDS = tl.constexpr(FIELDS)
_SCORE_SCALARS = ["row_start", "rows", "tile_start", "length", "first_position", "ratio", "score_stride"]


@triton.jit(do_not_specialize=_SCORE_SCALARS, do_not_specialize_on_alignment=["w", "positions"])
def score_kernel(
    q, w, keys, key_offsets, scales, scale_offsets, positions, parts, scores,
    row_start, rows, tile_start, length, first_position, ratio, score_stride,
    HEADS: tl.constexpr, HEADS_PAD: tl.constexpr, HEAD_DIM: tl.constexpr, DIM_PAD: tl.constexpr,
    BLOCK_KEYS: tl.constexpr, BLOCK_QUERIES: tl.constexpr, QUERY_GROUP: tl.constexpr, PAGE: tl.constexpr,
    HAS_SCALES: tl.constexpr, EXPLICIT: tl.constexpr, PARTS: tl.constexpr, STAGES: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """One block of keys against one group of a chunk's queries. Grid: (key blocks of the tile, query groups), and of
    PARTS as many times: groups of the part that has most, key blocks of the one that sees most.

    q: [all rows, HEADS, HEAD_DIM], w: [all rows, HEADS], of which the chunk is rows row_start to row_start + rows.
    scores: [rows, score_stride] float32, column c being key tile_start + c. Entries that a row cannot see are written
    too, or not; nobody reads them. parts: of PARTS their table (see parts.py), which tells rows, positions and keys of
    each.
    """
    if PARTS:
        own = parts + tl.program_id(2) * _FIELDS
        ALIGNED: tl.constexpr = 128 // keys.dtype.element_ty.primitive_bitwidth
        keys += tl.multiple_of(tl.load(own), ALIGNED)
        key_offsets += tl.load(own + 1)
        scales += tl.multiple_of(tl.load(own + 2), 4)
        scale_offsets += tl.load(own + 3)
        start_of_part = tl.load(own + 4)
        scores += (start_of_part - row_start) * score_stride
        row_start, rows = start_of_part.to(tl.int32), tl.load(own + 5).to(tl.int32)
        length, first_position = tl.load(own + 6).to(tl.int32), tl.load(own + 7).to(tl.int32)
    column = tl.program_id(0) * BLOCK_KEYS
    key_start = tile_start + column
    group_start = tl.program_id(1) * QUERY_GROUP

    # Which of the group's queries see any key of the block: skip the rest (exact for sorted positions, safe for any).
    lane = tl.arange(0, QUERY_GROUP)
    member = tl.minimum(group_start + lane, rows - 1)
    visible = visible_keys(positions, first_position, member, row_start, ratio, length, EXPLICIT)
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


# The interpreter multiplies the raw bits of bfloat16 operands: there, and only there, the product takes float32 ones.
INTERPRETED = not isinstance(score_kernel, triton.JITFunction)


class Scores(Protocol):
    """The scores of one run's chunks. Each call is one launch."""

    def of_rows(
        self,
        problem: Problem,
        scores: Tensor,
        positions: Tensor | None,
        start: int,
        rows: int,
        tile_start: int,
        keys: int,
    ) -> None:
        """Scores [rows, keys] of rows from `start` on with keys from `tile_start` on.

        positions: of these rows, [rows] int64 on the device, or None where they are consecutive.
        """

    def of_parts(
        self, problem: Problem, scores: Tensor, parts: PartTable, start: int, tile_start: int, keys: int
    ) -> None:
        """Scores [rows, keys] of the rows from `start` on that are of these parts, each with its own keys."""


def scores_of(problem: Problem, tiles: KernelTiles) -> Scores:
    """What a run's plan chose."""
    return HopperScores(problem, tiles) if tiles.score_kernel is ScoreKernel.HOPPER else PortableScores(tiles)


class PortableScores:
    """On any device."""

    def __init__(self, tiles: KernelTiles) -> None:
        self._tiles = tiles

    def of_rows(
        self,
        problem: Problem,
        scores: Tensor,
        positions: Tensor | None,
        start: int,
        rows: int,
        tile_start: int,
        keys: int,
    ) -> None:
        """See `Scores`."""
        grid = (triton.cdiv(keys, self._tiles.block_keys), triton.cdiv(rows, self._tiles.query_group))
        first_position = problem.positions if positions is None else 0
        self._launch(grid, problem, scores, positions, None, start, rows, tile_start, first_position)

    def of_parts(
        self, problem: Problem, scores: Tensor, parts: PartTable, start: int, tile_start: int, keys: int
    ) -> None:
        """See `Scores`."""
        groups = triton.cdiv(parts.most_rows, self._tiles.query_group)
        grid = (triton.cdiv(keys, self._tiles.block_keys), groups, parts.count)
        self._launch(grid, problem, scores, None, parts, start, 0, tile_start, 0)

    def _launch(
        self, grid: tuple[int, ...], problem: Problem, scores: Tensor, positions: Tensor | None,
        parts: PartTable | None, start: int, rows: int, tile_start: int, first_position: int | Tensor,
    ) -> None:  # fmt: skip
        p, tiles = problem, self._tiles
        table, scale_table = p.keys.key_table, p.keys.scale_table
        # pointers that a variant does not use are given the offset table: another tensor's alignment could compile anew
        score_kernel[grid](
            p.q, p.w, table.anchor, table.offsets,
            scale_table.anchor if scale_table else table.offsets, scale_table.offsets if scale_table else table.offsets,
            table.offsets if positions is None else positions, table.offsets if parts is None else parts.table, scores,
            start, rows, tile_start, p.keys.length, first_position, p.ratio, scores.stride(0),
            HEADS=p.heads, HEADS_PAD=tiles.heads_pad, HEAD_DIM=p.head_dim, DIM_PAD=tiles.dim_pad,
            BLOCK_KEYS=tiles.block_keys, BLOCK_QUERIES=tiles.block_queries, QUERY_GROUP=tiles.query_group,
            PAGE=PAGE_KEYS, HAS_SCALES=scale_table is not None, EXPLICIT=positions is not None,
            PARTS=parts is not None, STAGES=tiles.score_stages, WIDEN=INTERPRETED,
            num_warps=tiles.score_warps, num_stages=tiles.score_stages,
        )  # fmt: skip


class HopperScores:
    """On devices of compute capability 9.0."""

    def __init__(self, problem: Problem, tiles: KernelTiles) -> None:
        # imported here: Gluon is an experimental part of Triton
        from streamindex_service.ops.topk import hopper

        self._hopper = hopper
        self._tiles = tiles
        self._queries = hopper.describe_queries(problem, tiles)
        self._processors = _multiprocessors(problem.q.device)

    def of_rows(
        self,
        problem: Problem,
        scores: Tensor,
        positions: Tensor | None,
        start: int,
        rows: int,
        tile_start: int,
        keys: int,
    ) -> None:
        """See `Scores`."""
        self._hopper.launch_scores(
            problem, self._tiles, self._queries, scores, positions, start, rows, tile_start, keys, self._processors
        )

    def of_parts(
        self, problem: Problem, scores: Tensor, parts: PartTable, start: int, tile_start: int, keys: int
    ) -> None:
        """See `Scores`."""
        self._hopper.launch_part_scores(
            problem, self._tiles, self._queries, scores, parts, start, tile_start, keys, self._processors
        )


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
