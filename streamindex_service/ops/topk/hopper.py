"""Scores on devices of compute capability 9.0: the same result as the kernel in triton.py, closer to the matrix unit.

A block holds 256 keys, 64 for each of four warpgroups, and walks over a group of queries. A further warp brings the
queries and their gates into a ring of stages; each warpgroup waits only for the stage it needs, so that the products
of one run beside the ReLU, gate and sum of the others. Two queries of 64 heads (four of 32, one of 128) make one
product of 64 keys × 128 columns.

Written in Gluon, which is an experimental part of Triton and cannot be interpreted: import this module only where
`plan.ScoreKernel.HOPPER` was chosen. No length is specialised upon; the group of queries is a run-time value too, so
that the host can balance the blocks over the multiprocessors without a change of any score.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from streamindex_service.ops.paged_keys import PAGE_KEYS
from streamindex_service.ops.topk.plan import HOPPER_GROUP, KernelTiles

# What this module takes from Gluon and this Triton's does not have.
MISSING = [
    name
    for module, names in (
        (gl, ("warp_specialize", "allocate_shared_memory", "NVMMADistributedLayout", "abs")),
        (hopper, ("mbarrier", "tma", "warpgroup_mma", "warpgroup_mma_wait", "fence_async_shared")),
    )
    for name in names
    if not hasattr(module, name)
]
# named so in Triton 3.6, and later
_barrier = getattr(gl, "thread_barrier", None) or gl.barrier
_copy = getattr(hopper.tma, "async_load", None) or hopper.tma.async_copy_global_to_shared
_WORKER_REGISTERS = 112
_FEEDER_REGISTERS = 24
_SCALARS = ["row_start", "rows", "tile_start", "length", "first_position", "ratio", "score_stride", "query_group"]


def describe_queries(problem, tiles: KernelTiles) -> TensorDescriptor:
    """What the copy engine needs to know of q [rows, heads, head_dim], once for a run."""
    q = problem.q
    element = {1: gl.float8e4nv, 2: gl.bfloat16}[q.element_size()]
    block = [tiles.block_queries * tiles.heads_pad, tiles.dim_pad]
    layout = gl.NVMMASharedLayout.get_default_for(block, element)  # the layout depends on the element's size alone
    return TensorDescriptor.from_tensor(q.view(-1, q.shape[2]), block, layout)


def launch_scores(
    problem, tiles: KernelTiles, q_desc, scores, positions, row_start: int, rows: int, tile_start: int, keys: int,
    query_group: int,
) -> None:  # fmt: skip
    """Write the scores [rows, keys] of one chunk × tile. positions: the chunk's own on the device, or None where they
    are consecutive."""
    p, table, scale_table = problem, problem.keys.key_table, problem.keys.scale_table
    explicit = positions is not None
    grid = (-(-keys // tiles.block_keys), -(-rows // query_group))
    # pointers that a variant does not use are given the offset table: any other tensor's alignment could compile anew
    score_kernel[grid](
        q_desc, p.w, table.anchor, table.offsets,
        scale_table.anchor if scale_table else table.offsets, scale_table.offsets if scale_table else table.offsets,
        positions if explicit else table.offsets, scores,
        row_start, rows, tile_start, p.keys.length, 0 if explicit else p.positions, p.ratio, scores.stride(0),
        query_group,
        HEADS=p.heads, HEAD_DIM=p.head_dim, QUERIES=tiles.block_queries, BLOCK_KEYS=tiles.block_keys,
        MOST_QUERIES=HOPPER_GROUP, PAGE=PAGE_KEYS, HAS_SCALES=scale_table is not None, EXPLICIT=explicit,
        STAGES=tiles.score_stages, NARROW=p.format.element_bytes == 1, REGISTERS=_WORKER_REGISTERS,
        FEEDER_REGISTERS=_FEEDER_REGISTERS, num_warps=tiles.score_warps,
    )  # fmt: skip


@gluon.jit
def _span(
    positions, row_start, rows, key_start, length, first_position, ratio, group_start, query_group,
    MOST_QUERIES: gl.constexpr, EXPLICIT: gl.constexpr,
):  # fmt: skip
    """First and end query of the group that see key `key_start` (exact for sorted positions, safe for any)."""
    if EXPLICIT:
        lane = gl.arange(0, MOST_QUERIES, layout=gl.BlockedLayout([MOST_QUERIES // 128], [32], [4], [0]))
        member = group_start + lane
        inside = (lane < query_group) & (member < rows)
        position = gl.load(positions + gl.minimum(member, rows - 1))
        sees = inside & (gl.minimum((position + 1) // ratio, length) > key_start)
        first = gl.min(gl.where(sees, lane, MOST_QUERIES), axis=0)
        last = gl.max(gl.where(sees, lane + 1, 0), axis=0)
    else:
        # the first position that sees it is ratio * (key_start + 1) - 1
        nearest = key_start.to(gl.int64) * ratio + ratio - 1 - first_position - row_start - group_start
        first = gl.minimum(gl.maximum(nearest, 0), query_group).to(gl.int32)
        last = gl.minimum(rows - group_start, query_group)
        last = gl.where(key_start < length, last, 0)
    return first, last


@gluon.jit
def _feed(
    q_desc, w, row_start, row, rows, steps, q_smem, w_smem, full, empty,
    QUERIES: gl.constexpr, HEADS: gl.constexpr, STAGES: gl.constexpr, BYTES: gl.constexpr, NARROW: gl.constexpr,
):  # fmt: skip
    """The copying warp: keep the ring of query stages full."""
    COLUMNS: gl.constexpr = QUERIES * HEADS
    n = gl.arange(0, COLUMNS, layout=gl.BlockedLayout([COLUMNS // 32], [32], [1], [0]))
    for step in range(steps):
        slot = step % STAGES
        now = row + step * QUERIES
        # past the last row, those of the last: what they make is not stored
        query = gl.minimum(now + n // HEADS, rows - 1)
        gate = gl.load(w + (row_start + query).to(gl.int64) * HEADS + n % HEADS)
        if NARROW:
            gate *= 0.5  # see _consume
        hopper.mbarrier.wait(empty.index(slot), ((step // STAGES) & 1) ^ 1)
        hopper.mbarrier.expect(full.index(slot), BYTES)
        _copy(q_desc, [(row_start + now) * HEADS, 0], full.index(slot), q_smem.index(slot))
        w_smem.index(slot).store(gate)
        hopper.mbarrier.arrive(full.index(slot), count=1)


@gluon.jit
def _consume(
    k_smem, w_smem, scales, scale_offsets, scores, row, rows, steps, key_start, column, length, score_stride,
    q_smem, full, empty,
    WORKER: gl.constexpr, HEADS: gl.constexpr, KEYS: gl.constexpr, QUERIES: gl.constexpr, PAGE: gl.constexpr,
    HAS_SCALES: gl.constexpr, STAGES: gl.constexpr, NARROW: gl.constexpr,
):  # fmt: skip
    """One warpgroup: its keys against every query of the group."""
    element: gl.constexpr = q_smem.dtype
    bits: gl.constexpr = element.primitive_bitwidth
    mma: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, QUERIES * HEADS, 256 // bits]
    )
    operand = k_smem.slice(WORKER * KEYS, KEYS, dim=0)
    if NARROW:  # keys of two bytes do not fit the registers beside the products
        operand = operand.load(gl.DotOperandLayout(0, mma, 32 // bits))
    key_start += WORKER * KEYS
    column += WORKER * KEYS
    scale = gl.full((KEYS,), 1.0, gl.float32, layout=gl.SliceLayout(1, mma))
    if HAS_SCALES:
        scaled = gl.arange(0, KEYS, layout=gl.SliceLayout(1, mma))
        place_of_scale = scales + gl.load(scale_offsets + key_start // PAGE) + key_start % PAGE + scaled
        scale = gl.load(place_of_scale, mask=key_start + scaled < length, other=0.0)
    zero = gl.zeros((KEYS, QUERIES * HEADS), gl.float32, layout=mma)
    for step in range(steps):
        slot = step % STAGES
        now = row + step * QUERIES
        hopper.mbarrier.wait(full.index(slot), (step // STAGES) & 1)
        products = hopper.warpgroup_mma(operand, q_smem.index(slot).permute((1, 0)), zero, use_acc=False, is_async=True)
        products = hopper.warpgroup_mma_wait(0, deps=[products])
        gate = gl.expand_dims(w_smem.index(slot).load(gl.SliceLayout(0, mma)), 0)
        if NARROW:  # noqa: SIM108
            # ReLU(x) as (x + |x|) / 2, the half being in the gate: bit for bit the same, since products of 8-bit
            # floats are far from overflow, and additions have twice the rate of maxima
            gated = (products + gl.abs(products)) * gate
        else:
            gated = gl.maximum(products, 0.0) * gate
        if QUERIES == 1:
            score = gl.sum(gated, axis=1)  # [KEYS]
            if HAS_SCALES:
                score *= scale
            score = gl.where(score == 0.0, 0.0, score)  # −0.0 becomes +0.0
            key = gl.arange(0, KEYS, layout=gl.SliceLayout(1, mma))
            gl.store(scores + now.to(gl.int64) * score_stride + column + key, score, mask=(key >= 0) & (now < rows))
        else:
            # a query's heads are neighbours: their sum stays within a few threads
            score = gl.sum(gl.reshape(gated, (KEYS, QUERIES, HEADS)), axis=2)  # [KEYS, QUERIES]
            inner: gl.constexpr = score.type.layout
            key = gl.expand_dims(gl.arange(0, KEYS, layout=gl.SliceLayout(1, inner)), 1)
            query = gl.expand_dims(gl.arange(0, QUERIES, layout=gl.SliceLayout(0, inner)), 0)
            if HAS_SCALES:
                score *= gl.expand_dims(gl.convert_layout(scale, gl.SliceLayout(1, inner)), 1)
            score = gl.where(score == 0.0, 0.0, score)
            place = (now + query).to(gl.int64) * score_stride + column + key
            gl.store(scores + place, score, mask=(now + query < rows) & (key >= 0))
        hopper.mbarrier.arrive(empty.index(slot), count=1)


@gluon.jit(do_not_specialize=_SCALARS, do_not_specialize_on_alignment=["w", "positions"])
def score_kernel(
    q_desc, w, keys, key_offsets, scales, scale_offsets, positions, scores,
    row_start, rows, tile_start, length, first_position, ratio, score_stride, query_group,
    HEADS: gl.constexpr, HEAD_DIM: gl.constexpr, QUERIES: gl.constexpr, BLOCK_KEYS: gl.constexpr,
    MOST_QUERIES: gl.constexpr, PAGE: gl.constexpr, HAS_SCALES: gl.constexpr, EXPLICIT: gl.constexpr,
    STAGES: gl.constexpr, NARROW: gl.constexpr, REGISTERS: gl.constexpr, FEEDER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """One block of keys against one group of a chunk's queries. Grid: (key blocks of the tile, query groups); 4 warps,
    and those of the other partitions.

    q_desc: q as [all rows × HEADS, HEAD_DIM]. Everything else as in triton.py's kernel.
    """
    element: gl.constexpr = q_desc.dtype
    bits: gl.constexpr = element.primitive_bitwidth
    BYTES: gl.constexpr = QUERIES * HEADS * HEAD_DIM * bits // 8
    KEYS: gl.constexpr = BLOCK_KEYS // 4
    column = gl.program_id(0) * BLOCK_KEYS
    key_start = tile_start + column
    group_start = gl.program_id(1) * query_group
    first, last = _span(
        positions, row_start, rows, key_start, length, first_position, ratio, group_start, query_group,
        MOST_QUERIES, EXPLICIT,
    )  # fmt: skip
    row = group_start + first // QUERIES * QUERIES
    steps = gl.where(first < last, (group_start + last - row + QUERIES - 1) // QUERIES, 0)

    q_smem = gl.allocate_shared_memory(element, [STAGES, QUERIES * HEADS, HEAD_DIM], q_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], hopper.mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], hopper.mbarrier.MBarrierLayout())
    w_smem = gl.allocate_shared_memory(gl.float32, [STAGES, QUERIES * HEADS], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    for slot in gl.static_range(STAGES):
        hopper.mbarrier.init(full.index(slot), count=2)  # the copy engine's bytes, and the gates
        hopper.mbarrier.init(empty.index(slot), count=4)  # one for each warpgroup
    k_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_KEYS, HEAD_DIM], element)
    k_smem = gl.allocate_shared_memory(element, [BLOCK_KEYS, HEAD_DIM], k_layout)
    if steps > 0:
        vector: gl.constexpr = 128 // bits
        lanes: gl.constexpr = HEAD_DIM // vector
        wide: gl.constexpr = gl.BlockedLayout([1, vector], [32 // lanes, lanes], [4, 1], [1, 0])
        page, inside = key_start // PAGE, key_start % PAGE
        key = gl.arange(0, KEYS, layout=gl.SliceLayout(1, wide))
        dim = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, wide))
        offset = gl.multiple_of(gl.load(key_offsets + page), 16)
        for part in gl.static_range(4):
            place = gl.expand_dims((inside + part * KEYS + key) * HEAD_DIM, 1) + gl.expand_dims(dim, 0)
            valid = gl.expand_dims(key_start + part * KEYS + key < length, 1)
            # rows past the length may be NaN: never load them
            k_smem.slice(part * KEYS, KEYS, dim=0).store(gl.load(keys + offset + place, mask=valid, other=0.0))
    hopper.fence_async_shared()
    _barrier()
    # the tuples stand here in full: put into a variable, a constexpr becomes a tensor
    gl.warp_specialize(
        [
            (_consume, (
                k_smem, w_smem, scales, scale_offsets, scores, row, rows, steps, key_start, column, length,
                score_stride, q_smem, full, empty, 0, HEADS, KEYS, QUERIES, PAGE, HAS_SCALES, STAGES, NARROW,
            )),
            (_consume, (
                k_smem, w_smem, scales, scale_offsets, scores, row, rows, steps, key_start, column, length,
                score_stride, q_smem, full, empty, 1, HEADS, KEYS, QUERIES, PAGE, HAS_SCALES, STAGES, NARROW,
            )),
            (_consume, (
                k_smem, w_smem, scales, scale_offsets, scores, row, rows, steps, key_start, column, length,
                score_stride, q_smem, full, empty, 2, HEADS, KEYS, QUERIES, PAGE, HAS_SCALES, STAGES, NARROW,
            )),
            (_consume, (
                k_smem, w_smem, scales, scale_offsets, scores, row, rows, steps, key_start, column, length,
                score_stride, q_smem, full, empty, 3, HEADS, KEYS, QUERIES, PAGE, HAS_SCALES, STAGES, NARROW,
            )),
            (_feed, (
                q_desc, w, row_start, row, rows, steps, q_smem, w_smem, full, empty, QUERIES, HEADS, STAGES, BYTES,
                NARROW,
            )),
        ],
        [4, 4, 4, 1], [REGISTERS, REGISTERS, REGISTERS, FEEDER_REGISTERS],
    )  # fmt: skip
