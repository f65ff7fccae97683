"""Scores on devices of compute capability 9.0: the same result as the kernel in triton.py, closer to the matrix unit.

A block holds 256 keys, 64 for each of four warpgroups, and walks over a group of queries. A further warp brings the
queries and their gates into a ring of stages; each warpgroup waits only for the stage it needs, so that the products
of one run beside the ReLU, gate and sum of the others. Two queries of 64 heads (four of 32, one of 128) make one
product of 64 keys × 128 columns.

The sum over heads is written out as one chain of fused multiply-adds per (query, key). Left to a reduction, the first
two terms are products both, and the compiler may fuse either into the sum: it was seen to choose differently for
different queries of one product, so that a score depended on where in the product its query stood.

Written in Gluon, which is an experimental part of Triton and cannot be interpreted: import this module only where
`plan.ScoreKernel.HOPPER` was chosen. No length is specialised upon. Multiprocessors are balanced here, by equal shares
of a group's steps (`_share`); the groups keep the queries that are read at a time in the cache (`shared_queries`).
"""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from streamindex_service.ops.paged_keys import PAGE_KEYS
from streamindex_service.ops.topk.parts import FIELDS, PartTable
from streamindex_service.ops.topk.plan import KernelTiles, shared_queries

# What this module takes from Gluon and this Triton's does not have.
MISSING = [
    name
    for module, names in (
        (
            gl,
            ("warp_specialize", "allocate_shared_memory", "NVMMADistributedLayout", "abs", "fma", "split", "broadcast"),
        ),
        (hopper, ("mbarrier", "tma", "warpgroup_mma", "warpgroup_mma_wait", "fence_async_shared")),
    )
    for name in names
    if not hasattr(module, name)
]
# named so in Triton 3.6, and later
_barrier = getattr(gl, "thread_barrier", None) or gl.barrier
_copy = getattr(hopper.tma, "async_load", None) or hopper.tma.async_copy_global_to_shared
_ELEMENTS = {torch.float8_e4m3fn: gl.float8e4nv, torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}
_WORKER_REGISTERS = 112
_FEEDER_REGISTERS = 24
_TRIMMED_QUERIES = gl.constexpr(256)  # of explicit positions looked at at a time
_FIELDS = gl.constexpr(FIELDS)
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
def _part(parts, part, keys, key_offsets, scales, scale_offsets):
    """A part's own tables, rows, length and position: see `parts.FIELDS`."""
    at = parts + part * _FIELDS
    ALIGNED: gl.constexpr = 128 // keys.dtype.element_ty.primitive_bitwidth
    own_keys = keys + gl.multiple_of(gl.load(at), ALIGNED)
    own_offsets = key_offsets + gl.load(at + 1)
    own_scales = scales + gl.multiple_of(gl.load(at + 2), 4)
    own_scale_offsets = scale_offsets + gl.load(at + 3)
    start, rows = gl.load(at + 4).to(gl.int32), gl.load(at + 5).to(gl.int32)
    length, first_position = gl.load(at + 6).to(gl.int32), gl.load(at + 7).to(gl.int32)
    return own_keys, own_offsets, own_scales, own_scale_offsets, start, rows, length, first_position


@gluon.jit
def _group_work(
    group_start, query_group, rows, row_start, tile_start, tile_keys, length, first_position, ratio,
    QUERIES: gl.constexpr, BLOCK_KEYS: gl.constexpr, EXPLICIT: gl.constexpr,
):  # fmt: skip
    """What a group of queries has to do: steps of a key block that all see; such blocks; all blocks; steps of all."""
    size = gl.minimum(query_group, rows - group_start)
    steps = (size + QUERIES - 1) // QUERIES
    if EXPLICIT:
        blocks = (gl.minimum(tile_keys, length - tile_start) + BLOCK_KEYS - 1) // BLOCK_KEYS
        return steps, blocks, blocks, steps * blocks
    position = first_position.to(gl.int64) + row_start + group_start
    seen_by_first = gl.minimum((position + 1) // ratio, length).to(gl.int32) - tile_start
    seen_by_last = gl.minimum((position + size) // ratio, length).to(gl.int32) - tile_start
    whole = (gl.minimum(gl.maximum(seen_by_first, 0), tile_keys) + BLOCK_KEYS - 1) // BLOCK_KEYS
    blocks = (gl.minimum(gl.maximum(seen_by_last, 0), tile_keys) + BLOCK_KEYS - 1) // BLOCK_KEYS
    total = whole * steps
    for block in range(whole, blocks):
        total += steps - _first_step(block, tile_start, position, ratio, QUERIES, BLOCK_KEYS)
    return steps, whole, blocks, total


@gluon.jit
def _first_step(block, tile_start, position, ratio, QUERIES: gl.constexpr, BLOCK_KEYS: gl.constexpr):
    """The first step of the group whose queries see any key of the block. position: of the group's first query."""
    # the first position that sees a key is ratio * (key + 1) - 1
    nearest = (tile_start + block * BLOCK_KEYS + 1).to(gl.int64) * ratio - 1 - position
    return (gl.maximum(nearest, 0) // QUERIES).to(gl.int32)


@gluon.jit
def _segment(
    place, end, steps, whole, group_start, row_start, tile_start, first_position, ratio,
    QUERIES: gl.constexpr, BLOCK_KEYS: gl.constexpr,
):  # fmt: skip
    """Where step `place` of a group's work lies, and how many follow with the same keys before `end`: (key block,
    step within the group, steps)."""
    block = place // gl.maximum(steps, 1)
    step = place % gl.maximum(steps, 1)
    if block >= whole:
        position = first_position.to(gl.int64) + row_start + group_start
        block = whole
        left = place - whole * steps
        first = _first_step(block, tile_start, position, ratio, QUERIES, BLOCK_KEYS)
        while left >= steps - first:
            left -= steps - first
            block += 1
            first = _first_step(block, tile_start, position, ratio, QUERIES, BLOCK_KEYS)
        step = first + left
    return block, step, gl.minimum(steps - step, end - place)


@gluon.jit
def _trim(
    positions, row, count, rows, key_start, length, ratio,
    QUERIES: gl.constexpr, MOST_QUERIES: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """First and end step of `count` from query `row` on that see key `key_start`, for explicit positions."""
    lane = gl.arange(0, MOST_QUERIES, layout=gl.BlockedLayout([MOST_QUERIES // 32 // WARPS], [32], [WARPS], [0]))
    position = gl.load(positions + gl.minimum(row + lane, rows - 1))
    inside = (lane < count * QUERIES) & (row + lane < rows)
    sees = inside & (gl.minimum((position + 1) // ratio, length) > key_start)
    first = gl.min(gl.where(sees, lane, MOST_QUERIES), axis=0) // QUERIES
    last = (gl.max(gl.where(sees, lane + 1, 0), axis=0) + QUERIES - 1) // QUERIES
    return gl.minimum(first, last), last


@gluon.jit
def _share(total, turned):
    """This block's part of `total` steps: first and end. Parts differ by one step at most.

    turned: where the blocks begin that have one step more, counted back; it is given for the next work, so that those
    come next that had none.
    """
    blocks = gl.num_programs(0)
    block = (gl.program_id(0) + turned) % blocks
    least, more = total // blocks, total % blocks
    begin = block * least + gl.minimum(block, more)
    return begin, begin + least + (block < more).to(gl.int32), (turned + blocks - more) % blocks


@gluon.constexpr_function
def _gate_layout(columns):
    """Registers for `columns` gates such that a thread's stand next to each other in shared memory, four by four.

    Gate columns are kept in groups of 16, and in a group first by the lane that needs them: see `_feed`.
    """
    registers = [[1], [2]] + [[1 << bit] for bit in range(4, columns.bit_length() - 1)]
    return gl.DistributedLinearLayout(registers, [[4], [8], [0], [0], [0]], [[0], [0]], [], [columns])


@gluon.constexpr_function
def _score_layout(keys, queries):
    """Registers for scores [keys, queries] of a product whose sum over heads left each in four lanes: of the four, each
    keeps another one."""
    lanes = {1: [[8, 0], [0, 0]], 2: [[8, 0], [0, 1]], 4: [[0, 1], [0, 2]]}[queries]
    registers = [[8, 0]] if queries == 4 else []
    rows = [[1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout(registers, lanes + rows, [[16, 0], [32, 0]], [], [keys, queries])


@gluon.jit
def _feed_rows(
    q_desc, w, positions, row_start, rows, tile_start, tile_keys, length, first_position, ratio, query_group,
    q_smem, w_smem, full, empty, done, turned,
    QUERIES: gl.constexpr, HEADS: gl.constexpr, BLOCK_KEYS: gl.constexpr, STAGES: gl.constexpr, BYTES: gl.constexpr,
    NARROW: gl.constexpr, EXPLICIT: gl.constexpr,
):  # fmt: skip
    """Stages for the queries of some rows. done: that were filled; turned: see `_share`; both as they are then."""
    COLUMNS: gl.constexpr = QUERIES * HEADS
    place_of_gate = gl.arange(0, COLUMNS, layout=gl.BlockedLayout([COLUMNS // 32], [32], [1], [0]))
    # of 16 columns, a lane of the product has 2 l, 2 l + 1, 2 l + 8 and 2 l + 9
    n = place_of_gate // 16 * 16 + place_of_gate // 4 % 4 * 2 + place_of_gate // 2 % 2 * 8 + place_of_gate % 2
    for group_start in range(0, rows, query_group):
        steps, whole, _, total = _group_work(
            group_start, query_group, rows, row_start, tile_start, tile_keys, length, first_position, ratio,
            QUERIES, BLOCK_KEYS, EXPLICIT,
        )  # fmt: skip
        place, end, turned = _share(total, turned)
        while place < end:
            block, step, count = _segment(
                place, end, steps, whole, group_start, row_start, tile_start, first_position, ratio,
                QUERIES, BLOCK_KEYS,
            )  # fmt: skip
            row = group_start + step * QUERIES
            if EXPLICIT:
                count = gl.minimum(count, _TRIMMED_QUERIES // QUERIES)
                first, last = _trim(
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
                    gate *= 0.5  # see _scores_of
                hopper.mbarrier.wait(empty.index(slot), ((turn // STAGES) & 1) ^ 1)
                hopper.mbarrier.expect(full.index(slot), BYTES)
                _copy(q_desc, [(row_start + row) * HEADS, 0], full.index(slot), q_smem.index(slot))
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
            _, _, _, _, own_start, own_rows, own_length, own_position = _part(
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
def _halves(x):
    """The last axis split in two: by its highest bit, and at the last, by its lowest (the other two are lanes)."""
    KEYS: gl.constexpr = x.shape[0]
    QUERIES: gl.constexpr = x.shape[1]
    HEADS: gl.constexpr = x.shape[2]
    if HEADS == 8:
        paired = gl.reshape(x, (KEYS, QUERIES, 4, 2))
    else:
        paired = gl.permute(gl.reshape(x, (KEYS, QUERIES, 2, HEADS // 2)), (0, 1, 3, 2))
    return gl.split(paired)


@gluon.jit
def _chain(x, gate, total, FIRST: gl.constexpr):
    """total + Σ x · gate over the heads that one thread holds, one after the other: [KEYS, QUERIES, 4]."""
    one, other = _halves(x)
    gate_of_one, gate_of_other = _halves(gate)
    if x.shape[2] == 8:
        total = one * gate_of_one if FIRST else gl.fma(one, gate_of_one, total)
        total = gl.fma(other, gate_of_other, total)
    else:
        total = _chain(one, gate_of_one, total, FIRST)
        total = _chain(other, gate_of_other, total, False)
    return total


@gluon.jit
def _consume_rows(
    keys, key_offsets, scales, scale_offsets, positions, scores, row_start, rows, tile_start, tile_keys, length,
    first_position, ratio, score_stride, query_group, k_smem, q_smem, w_smem, full, empty,
    done, turned,
    WORKER: gl.constexpr, HEADS: gl.constexpr, HEAD_DIM: gl.constexpr, QUERIES: gl.constexpr, BLOCK_KEYS: gl.constexpr,
    PAGE: gl.constexpr, HAS_SCALES: gl.constexpr, EXPLICIT: gl.constexpr, STAGES: gl.constexpr, NARROW: gl.constexpr,
):  # fmt: skip
    """One warpgroup: its quarter of each key block against every query of the block's segment. done: stages that were
    used; turned: see `_share`. Both as they are after that."""
    KEYS: gl.constexpr = BLOCK_KEYS // 4
    bits: gl.constexpr = q_smem.dtype.primitive_bitwidth
    COLUMNS: gl.constexpr = QUERIES * HEADS
    mma: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, COLUMNS, 256 // bits]
    )
    out: gl.constexpr = _score_layout(KEYS, QUERIES)
    vector: gl.constexpr = 128 // bits
    lanes: gl.constexpr = HEAD_DIM // vector
    wide: gl.constexpr = gl.BlockedLayout([1, vector], [32 // lanes, lanes], [4, 1], [1, 0])
    my_keys = k_smem.slice(WORKER * KEYS, KEYS, dim=0)
    for group_start in range(0, rows, query_group):
        steps, whole, _, total = _group_work(
            group_start, query_group, rows, row_start, tile_start, tile_keys, length, first_position, ratio,
            QUERIES, BLOCK_KEYS, EXPLICIT,
        )  # fmt: skip
        place, end, turned = _share(total, turned)
        while place < end:
            block, step, count = _segment(
                place, end, steps, whole, group_start, row_start, tile_start, first_position, ratio,
                QUERIES, BLOCK_KEYS,
            )  # fmt: skip
            row = group_start + step * QUERIES
            if EXPLICIT:
                count = gl.minimum(count, _TRIMMED_QUERIES // QUERIES)
                first, last = _trim(
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
                score = _scores_of(products, w_smem.index(slot), HEADS, NARROW)
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
            own_keys, own_offsets, own_scales, own_scale_offsets, own_start, own_rows, own_length, own_position = _part(
                parts, part, keys, key_offsets, scales, scale_offsets
            )
            done, turned = _consume_rows(
                own_keys, own_offsets, own_scales, own_scale_offsets, positions,
                scores + (own_start - row_start).to(gl.int64) * score_stride, own_start, own_rows, tile_start,
                tile_keys, own_length, own_position, ratio, score_stride, query_group, k_smem, q_smem, w_smem, full,
                empty, done, turned,
                WORKER, HEADS, HEAD_DIM, QUERIES, BLOCK_KEYS, PAGE, HAS_SCALES, EXPLICIT, STAGES, NARROW,
            )  # fmt: skip
    else:
        _consume_rows(
            keys, key_offsets, scales, scale_offsets, positions, scores, row_start, rows, tile_start, tile_keys, length,
            first_position, ratio, score_stride, query_group, k_smem, q_smem, w_smem, full, empty, done, turned,
            WORKER, HEADS, HEAD_DIM, QUERIES, BLOCK_KEYS, PAGE, HAS_SCALES, EXPLICIT, STAGES, NARROW,
        )  # fmt: skip


@gluon.jit
def _scores_of(products, w_smem, HEADS: gl.constexpr, NARROW: gl.constexpr):
    """Σ ReLU(product) · gate over the heads of each query: [keys, queries], the same in four lanes."""
    KEYS: gl.constexpr = products.shape[0]
    COLUMNS: gl.constexpr = products.shape[1]
    gate = gl.reshape(w_smem.load(_gate_layout(COLUMNS)), (COLUMNS // 16, 4, 2, 2))
    gate = gl.reshape(gl.permute(gate, (0, 2, 1, 3)), (COLUMNS,))
    gate = gl.convert_layout(gate, gl.SliceLayout(0, products.type.layout), assert_trivial=True)
    gate, _ = gl.broadcast(gl.expand_dims(gate, 0), products)
    if NARROW:  # noqa: SIM108
        # ReLU(x) as (x + |x|) / 2, the half being in the gate: bit for bit the same for gates from 2^-125 on, since
        # products of 8-bit floats are far from overflow; and additions have twice the rate of maxima
        positive = products + gl.abs(products)
    else:
        positive = gl.maximum(products, 0.0)
    positive = gl.reshape(positive, (KEYS, COLUMNS // HEADS, HEADS))
    gate = gl.reshape(gate, (KEYS, COLUMNS // HEADS, HEADS))
    return gl.sum(_chain(positive, gate, positive, True), axis=2)


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
    _barrier()
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
