"""Scores on devices of compute capability 9.0: the same result as the kernel in triton.py, closer to the matrix unit.

A block holds 256 keys, 64 for each of four warpgroups, and walks over a group of queries. A further warp brings the
queries and their gates into a ring of stages; each warpgroup waits only for the stage it needs, so that the products
of one run beside the ReLU, gate and sum of the others. Two queries of 64 heads (four of 32, one of 128) make one
product of 64 keys × 128 columns.

Written in Gluon, which is an experimental part of Triton and cannot be interpreted: import this module only where
`plan.ScoreKernel.HOPPER` was chosen. No length is specialised upon. Multiprocessors are balanced here, by equal shares
of a group's steps (`hopper_work.share`); the groups keep the queries that are read at a time in the cache
(`shared_queries`).
"""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from streamindex_service.ops import gluon_names
from streamindex_service.ops.gluon_names import barrier, load_tile, missing
from streamindex_service.ops.paged_keys import PAGE_KEYS
from streamindex_service.ops.topk.hopper_sums import score_layout, scores_of
from streamindex_service.ops.topk.hopper_work import group_work, part_at, segment, share, trim
from streamindex_service.ops.topk.parts import PartTable
from streamindex_service.ops.topk.plan import KernelTiles, shared_queries

# What this module takes from Gluon and this Triton's does not have.
MISSING = missing(
    (gl, ("warp_specialize", "allocate_shared_memory", "NVMMADistributedLayout", "abs", "fma", "split", "broadcast")),
    (hopper, ("mbarrier", "tma", "warpgroup_mma", "warpgroup_mma_wait", "fence_async_shared")),
    (gluon_names, ("barrier", "load_tile")),
)
_ELEMENTS = {torch.float8_e4m3fn: gl.float8e4nv, torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}
_WORKER_REGISTERS = 112
_FEEDER_REGISTERS = 24
_TRIMMED_QUERIES = gl.constexpr(256)  # of explicit positions looked at at a time
_SCALARS = [
    "row_start", "rows", "tile_start", "tile_keys", "length", "first_position", "ratio", "score_stride", "query_group",
    "part_count",
]  # fmt: skip


def describe_queries(problem, tiles: KernelTiles) -> TensorDescriptor:
    """What the copy engine needs to know of q [rows, heads, head_dim], once for a run."""
    q = problem.q
    element = _ELEMENTS[q.dtype]
    block = [tiles.block_queries * tiles.heads_pad, tiles.dim_pad]
    layout = gl.NVMMASharedLayout.get_default_for(block, element)
    return TensorDescriptor.from_tensor(q.view(-1, q.shape[2]), block, layout)


def launch_scores(
    problem, tiles: KernelTiles, q_desc, scores, positions, row_start: int, rows: int, tile_start: int, keys: int,
    processors: int,
) -> None:  # fmt: skip
    """Write the scores [rows, keys] of one chunk × tile. positions: the chunk's own on the device, or None where they
    are consecutive."""
    explicit = positions is not None
    first_position = 0 if explicit else problem.positions
    _launch(
        problem, tiles, q_desc, positions, scores, row_start, rows, tile_start, keys, first_position, None, rows,
        processors,
    )  # fmt: skip


def launch_part_scores(
    problem, tiles: KernelTiles, q_desc, scores, parts: PartTable, row_start: int, tile_start: int, keys: int,
    processors: int,
) -> None:  # fmt: skip
    """Write the scores [rows, keys] of all parts of one chunk × tile, whose first row is row_start, each with its own
    keys."""
    _launch(
        problem, tiles, q_desc, None, scores, row_start, 0, tile_start, keys, 0, parts, parts.most_rows, processors
    )  # fmt: skip


def _launch(
    problem, tiles, q_desc, positions, scores, row_start, rows, tile_start, keys, first_position, parts, most_rows,
    processors,
):  # fmt: skip
    p, table, scale_table = problem, problem.keys.key_table, problem.keys.scale_table
    query_group = shared_queries(most_rows, p.heads * p.head_dim * p.format.element_bytes)
    # pointers that a variant does not use are given the offset table: any other tensor's alignment could compile anew
    score_kernel[(processors,)](
        q_desc, p.w, table.anchor, table.offsets,
        scale_table.anchor if scale_table else table.offsets, scale_table.offsets if scale_table else table.offsets,
        table.offsets if positions is None else positions, table.offsets if parts is None else parts.table, scores,
        row_start, rows, tile_start, keys, p.keys.length, first_position, p.ratio, scores.stride(0),
        query_group, 0 if parts is None else parts.count,
        HEADS=p.heads, HEAD_DIM=p.head_dim, QUERIES=tiles.block_queries, BLOCK_KEYS=tiles.block_keys,
        PAGE=PAGE_KEYS, HAS_SCALES=scale_table is not None, EXPLICIT=positions is not None, PARTS=parts is not None,
        STAGES=tiles.score_stages, NARROW=p.format.element_bytes == 1, REGISTERS=_WORKER_REGISTERS,
        FEEDER_REGISTERS=_FEEDER_REGISTERS, num_warps=tiles.score_warps,
    )  # fmt: skip


@gluon.jit
def _feed_rows(
    q_desc, w, positions, row_start, rows, tile_start, tile_keys, length, first_position, ratio, query_group,
    q_smem, w_smem, full, empty, done, turned,
    QUERIES: gl.constexpr, HEADS: gl.constexpr, BLOCK_KEYS: gl.constexpr, STAGES: gl.constexpr, BYTES: gl.constexpr,
    NARROW: gl.constexpr, EXPLICIT: gl.constexpr,
):  # fmt: skip
    """Stages for the queries of some rows. done: that were filled; turned: see `share`; both as they are then."""
    COLUMNS: gl.constexpr = QUERIES * HEADS
    place_of_gate = gl.arange(0, COLUMNS, layout=gl.BlockedLayout([COLUMNS // 32], [32], [1], [0]))
    # of 16 columns, a lane of the product has 2 l, 2 l + 1, 2 l + 8 and 2 l + 9
    n = place_of_gate // 16 * 16 + place_of_gate // 4 % 4 * 2 + place_of_gate // 2 % 2 * 8 + place_of_gate % 2
    for group_start in range(0, rows, query_group):
        steps, whole, _, total = group_work(
            group_start, query_group, rows, row_start, tile_start, tile_keys, length, first_position, ratio,
            QUERIES, BLOCK_KEYS, EXPLICIT,
        )  # fmt: skip
        place, end, turned = share(total, turned)
        while place < end:
            block, step, count = segment(
                place, end, steps, whole, group_start, row_start, tile_start, first_position, ratio,
                QUERIES, BLOCK_KEYS,
            )  # fmt: skip
            row = group_start + step * QUERIES
            if EXPLICIT:
                count = gl.minimum(count, _TRIMMED_QUERIES // QUERIES)
                first, last = trim(
                    positions, row, count, rows, tile_start + block * BLOCK_KEYS, length, ratio,
                    QUERIES, _TRIMMED_QUERIES, 1,
                )  # fmt: skip
                place += count
                row += first * QUERIES
                count = last - first
            else:
                place += count
            for turn in range(done, done + count):
                slot = turn % STAGES
                # past the last row, those of the last: what they make is not stored
                query = gl.minimum(row + n // HEADS, rows - 1)
                gate = gl.load(w + (row_start + query).to(gl.int64) * HEADS + n % HEADS)
                if NARROW:
                    gate *= 0.5  # see scores_of
                hopper.mbarrier.wait(empty.index(slot), ((turn // STAGES) & 1) ^ 1)
                hopper.mbarrier.expect(full.index(slot), BYTES)
                load_tile(q_desc, [(row_start + row) * HEADS, 0], full.index(slot), q_smem.index(slot))
                w_smem.index(slot).store(gate)
                hopper.mbarrier.arrive(full.index(slot), count=1)
                row += QUERIES
            done += count
    return done, turned


@gluon.jit
def _feed(
    q_desc, w, keys, key_offsets, scales, scale_offsets, positions, parts, row_start, rows, tile_start, tile_keys,
    length, first_position, ratio, query_group, part_count, q_smem, w_smem, full, empty,
    QUERIES: gl.constexpr, HEADS: gl.constexpr, BLOCK_KEYS: gl.constexpr, STAGES: gl.constexpr, BYTES: gl.constexpr,
    NARROW: gl.constexpr, EXPLICIT: gl.constexpr, PARTS: gl.constexpr,
):  # fmt: skip
    """The copying warp: keep the ring of query stages full."""
    done, turned = rows * 0, rows * 0
    if PARTS:
        for part in range(part_count):
            _, _, _, _, own_start, own_rows, own_length, own_position = part_at(
                parts, part, keys, key_offsets, scales, scale_offsets
            )
            done, turned = _feed_rows(
                q_desc, w, positions, own_start, own_rows, tile_start, tile_keys, own_length, own_position, ratio,
                query_group, q_smem, w_smem, full, empty, done, turned,
                QUERIES, HEADS, BLOCK_KEYS, STAGES, BYTES, NARROW, EXPLICIT,
            )  # fmt: skip
    else:
        _feed_rows(
            q_desc, w, positions, row_start, rows, tile_start, tile_keys, length, first_position, ratio,
            query_group, q_smem, w_smem, full, empty, done, turned,
            QUERIES, HEADS, BLOCK_KEYS, STAGES, BYTES, NARROW, EXPLICIT,
        )  # fmt: skip


@gluon.jit
def _consume_rows(
    keys, key_offsets, scales, scale_offsets, positions, scores, row_start, rows, tile_start, tile_keys, length,
    first_position, ratio, score_stride, query_group, k_smem, q_smem, w_smem, full, empty,
    done, turned,
    WORKER: gl.constexpr, HEADS: gl.constexpr, HEAD_DIM: gl.constexpr, QUERIES: gl.constexpr, BLOCK_KEYS: gl.constexpr,
    PAGE: gl.constexpr, HAS_SCALES: gl.constexpr, EXPLICIT: gl.constexpr, STAGES: gl.constexpr, NARROW: gl.constexpr,
):  # fmt: skip
    """One warpgroup: its quarter of each key block against every query of the block's segment. done: stages that were
    used; turned: see `share`. Both as they are after that."""
    KEYS: gl.constexpr = BLOCK_KEYS // 4
    bits: gl.constexpr = q_smem.dtype.primitive_bitwidth
    COLUMNS: gl.constexpr = QUERIES * HEADS
    mma: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, COLUMNS, 256 // bits]
    )
    out: gl.constexpr = score_layout(KEYS, QUERIES)
    vector: gl.constexpr = 128 // bits
    lanes: gl.constexpr = HEAD_DIM // vector
    wide: gl.constexpr = gl.BlockedLayout([1, vector], [32 // lanes, lanes], [4, 1], [1, 0])
    my_keys = k_smem.slice(WORKER * KEYS, KEYS, dim=0)
    for group_start in range(0, rows, query_group):
        steps, whole, _, total = group_work(
            group_start, query_group, rows, row_start, tile_start, tile_keys, length, first_position, ratio,
            QUERIES, BLOCK_KEYS, EXPLICIT,
        )  # fmt: skip
        place, end, turned = share(total, turned)
        while place < end:
            block, step, count = segment(
                place, end, steps, whole, group_start, row_start, tile_start, first_position, ratio,
                QUERIES, BLOCK_KEYS,
            )  # fmt: skip
            row = group_start + step * QUERIES
            if EXPLICIT:
                count = gl.minimum(count, _TRIMMED_QUERIES // QUERIES)
                first, last = trim(
                    positions, row, count, rows, tile_start + block * BLOCK_KEYS, length, ratio,
                    QUERIES, _TRIMMED_QUERIES, 4,
                )  # fmt: skip
                place += count
                row += first * QUERIES
                count = last - first
            else:
                place += count
            column = block * BLOCK_KEYS + WORKER * KEYS
            key_start = tile_start + column
            page, inside = key_start // PAGE, key_start % PAGE
            offset = gl.multiple_of(gl.load(key_offsets + page), 16)
            key = gl.expand_dims(gl.arange(0, KEYS, layout=gl.SliceLayout(1, wide)), 1)
            dim = gl.expand_dims(gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, wide)), 0)
            # rows past the length may be NaN: never load them
            loaded = gl.load(keys + offset + (inside + key) * HEAD_DIM + dim, mask=key_start + key < length, other=0.0)
            my_keys.store(loaded)
            hopper.fence_async_shared()
            operand = my_keys
            if NARROW:  # keys of two bytes do not fit the registers beside the products
                operand = my_keys.load(gl.DotOperandLayout(0, mma, 32 // bits))
            key = gl.expand_dims(gl.arange(0, KEYS, layout=gl.SliceLayout(1, out)), 1)
            query = gl.expand_dims(gl.arange(0, QUERIES, layout=gl.SliceLayout(0, out)), 0)
            scale = gl.full((KEYS, 1), 1.0, gl.float32, layout=out)
            if HAS_SCALES:
                place_of_scale = scales + gl.load(scale_offsets + page) + inside + key
                scale = gl.load(place_of_scale, mask=key_start + key < length, other=0.0)
            zero = gl.zeros((KEYS, COLUMNS), gl.float32, layout=mma)
            # few values live through the loop: the products take most of the registers
            target = scores + row.to(gl.int64) * score_stride + column + (query * score_stride + key)
            jump = score_stride * QUERIES
            left = rows - row
            for step in range(count):
                slot = (done + step) % STAGES
                hopper.mbarrier.wait(full.index(slot), ((done + step) // STAGES) & 1)
                products = hopper.warpgroup_mma(
                    operand, q_smem.index(slot).permute((1, 0)), zero, use_acc=False, is_async=True
                )
                products = hopper.warpgroup_mma_wait(0, deps=[products])
                score = scores_of(products, w_smem.index(slot), HEADS, NARROW)
                score = gl.convert_layout(score, out)
                if HAS_SCALES:
                    score *= scale
                # −0.0 + 0.0 is +0.0
                mask = (query < left - step * QUERIES) & (key >= 0)
                gl.store(target + step.to(gl.int64) * jump, score + 0.0, mask=mask)
                hopper.mbarrier.arrive(empty.index(slot), count=1)
            done += count
    return done, turned


@gluon.jit
def _consume(
    keys, key_offsets, scales, scale_offsets, positions, parts, scores, row_start, rows, tile_start, tile_keys, length,
    first_position, ratio, score_stride, query_group, part_count, k_smem, q_smem, w_smem, full, empty,
    WORKER: gl.constexpr, HEADS: gl.constexpr, HEAD_DIM: gl.constexpr, QUERIES: gl.constexpr, BLOCK_KEYS: gl.constexpr,
    PAGE: gl.constexpr, HAS_SCALES: gl.constexpr, EXPLICIT: gl.constexpr, PARTS: gl.constexpr, STAGES: gl.constexpr,
    NARROW: gl.constexpr,
):  # fmt: skip
    """One warpgroup: all rows, or part after part."""
    done, turned = rows * 0, rows * 0
    if PARTS:
        for part in range(part_count):
            own_keys, own_offsets, own_scales, own_scale_offsets, own_start, own_rows, own_length, own_first = part_at(
                parts, part, keys, key_offsets, scales, scale_offsets
            )
            done, turned = _consume_rows(
                own_keys, own_offsets, own_scales, own_scale_offsets, positions,
                scores + (own_start - row_start).to(gl.int64) * score_stride, own_start, own_rows, tile_start,
                tile_keys, own_length, own_first, ratio, score_stride, query_group, k_smem, q_smem, w_smem, full,
                empty, done, turned,
                WORKER, HEADS, HEAD_DIM, QUERIES, BLOCK_KEYS, PAGE, HAS_SCALES, EXPLICIT, STAGES, NARROW,
            )  # fmt: skip
    else:
        _consume_rows(
            keys, key_offsets, scales, scale_offsets, positions, scores, row_start, rows, tile_start, tile_keys, length,
            first_position, ratio, score_stride, query_group, k_smem, q_smem, w_smem, full, empty, done, turned,
            WORKER, HEADS, HEAD_DIM, QUERIES, BLOCK_KEYS, PAGE, HAS_SCALES, EXPLICIT, STAGES, NARROW,
        )  # fmt: skip


@gluon.jit(do_not_specialize=_SCALARS, do_not_specialize_on_alignment=["w", "positions"])
def score_kernel(
    q_desc, w, keys, key_offsets, scales, scale_offsets, positions, parts, scores,
    row_start, rows, tile_start, tile_keys, length, first_position, ratio, score_stride, query_group, part_count,
    HEADS: gl.constexpr, HEAD_DIM: gl.constexpr, QUERIES: gl.constexpr, BLOCK_KEYS: gl.constexpr,
    PAGE: gl.constexpr, HAS_SCALES: gl.constexpr, EXPLICIT: gl.constexpr, PARTS: gl.constexpr,
    STAGES: gl.constexpr, NARROW: gl.constexpr, REGISTERS: gl.constexpr, FEEDER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """A chunk of queries against a tile of keys. Grid: (multiprocessors,); 4 warps, and those of the other partitions.

    The chunk is worked on group by group of queries, so that the queries that all blocks read at a time stay in the
    cache. A group's work is a row of steps, a step being one product of QUERIES queries with one block of keys, block
    by block; each block of the grid takes an equal part of it, whichever keys that begins or ends with.

    q_desc: q as [all rows × HEADS, HEAD_DIM]. Everything else as in triton.py's kernel. PARTS go through the ring
    one after another, without a gap.
    """
    element: gl.constexpr = q_desc.dtype
    bits: gl.constexpr = element.primitive_bitwidth
    BYTES: gl.constexpr = QUERIES * HEADS * HEAD_DIM * bits // 8
    q_smem = gl.allocate_shared_memory(element, [STAGES, QUERIES * HEADS, HEAD_DIM], q_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], hopper.mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], hopper.mbarrier.MBarrierLayout())
    w_smem = gl.allocate_shared_memory(gl.float32, [STAGES, QUERIES * HEADS], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    for slot in gl.static_range(STAGES):
        hopper.mbarrier.init(full.index(slot), count=2)  # the copy engine's bytes, and the gates
        hopper.mbarrier.init(empty.index(slot), count=4)  # one for each warpgroup
    k_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_KEYS, HEAD_DIM], element)
    k_smem = gl.allocate_shared_memory(element, [BLOCK_KEYS, HEAD_DIM], k_layout)
    hopper.fence_async_shared()
    barrier()
    # the tuples stand here in full: put into a variable, a constexpr becomes a tensor
    gl.warp_specialize(
        [
            (_consume, (
                keys, key_offsets, scales, scale_offsets, positions, parts, scores, row_start, rows, tile_start,
                tile_keys, length, first_position, ratio, score_stride, query_group, part_count, k_smem, q_smem, w_smem,
                full, empty,
                0, HEADS, HEAD_DIM, QUERIES, BLOCK_KEYS, PAGE, HAS_SCALES, EXPLICIT, PARTS, STAGES, NARROW,
            )),
            (_consume, (
                keys, key_offsets, scales, scale_offsets, positions, parts, scores, row_start, rows, tile_start,
                tile_keys, length, first_position, ratio, score_stride, query_group, part_count, k_smem, q_smem, w_smem,
                full, empty,
                1, HEADS, HEAD_DIM, QUERIES, BLOCK_KEYS, PAGE, HAS_SCALES, EXPLICIT, PARTS, STAGES, NARROW,
            )),
            (_consume, (
                keys, key_offsets, scales, scale_offsets, positions, parts, scores, row_start, rows, tile_start,
                tile_keys, length, first_position, ratio, score_stride, query_group, part_count, k_smem, q_smem, w_smem,
                full, empty,
                2, HEADS, HEAD_DIM, QUERIES, BLOCK_KEYS, PAGE, HAS_SCALES, EXPLICIT, PARTS, STAGES, NARROW,
            )),
            (_consume, (
                keys, key_offsets, scales, scale_offsets, positions, parts, scores, row_start, rows, tile_start,
                tile_keys, length, first_position, ratio, score_stride, query_group, part_count, k_smem, q_smem, w_smem,
                full, empty,
                3, HEADS, HEAD_DIM, QUERIES, BLOCK_KEYS, PAGE, HAS_SCALES, EXPLICIT, PARTS, STAGES, NARROW,
            )),
            (_feed, (
                q_desc, w, keys, key_offsets, scales, scale_offsets, positions, parts, row_start, rows, tile_start,
                tile_keys, length, first_position, ratio, query_group, part_count, q_smem, w_smem, full, empty,
                QUERIES, HEADS, BLOCK_KEYS, STAGES, BYTES, NARROW, EXPLICIT, PARTS,
            )),
        ],
        [4, 4, 4, 1], [REGISTERS, REGISTERS, REGISTERS, FEEDER_REGISTERS],
    )  # fmt: skip
