"""Candidate kernels for the top-k operation, measured by benchmarks/topk_variants.py; nothing else uses them.

Scores: `gluon_score_kernel` keeps its keys in registers (or shared memory), brings queries in with the copy engine and
has two accumulators, so that the ReLU-gate-sum of one query runs beside the product of the next.
`gluon_ws_score_kernel` gives each warpgroup its own keys and a copying warp feeds them all.
Selection: `threshold_kernel` (a sample of the row), `segment_kernel` (what is not below the threshold, row × segment),
`finish_kernel` (a row's candidates in registers: bisection of the score bits, then a stable compaction into the
output) and `direct_kernel` (the same for rows short enough to be held whole).
"""

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper


@gluon.jit
def _group_span(row_start, rows, key_start, length, first_position, ratio, group_start, QUERY_GROUP: gl.constexpr):
    """First and end query of the group that see key `key_start`, for consecutive positions."""
    # position of the first query that sees it: ratio * (key + 1) - 1
    first = ratio * (key_start + 1) - 1 - first_position - row_start - group_start
    first = gl.minimum(gl.maximum(first, 0), QUERY_GROUP)
    last = gl.minimum(rows - group_start, QUERY_GROUP)
    last = gl.where(key_start < length, last, 0)
    return first, last


@gluon.jit
def _finish_tile(
    acc, row, rows_seen, gate, scale, scores, rows, score_stride, column,
    HEADS: gl.constexpr, QUERIES: gl.constexpr, KEYS: gl.constexpr, HAS_SCALES: gl.constexpr, layout: gl.constexpr,
):  # fmt: skip
    """Gate, sum over heads and store one accumulator [KEYS, QUERIES · HEADS], whose first query is the chunk's `row`.

    Queries below `rows_seen` or not below `rows` are not stored."""
    gated = gl.maximum(acc, 0.0) * gl.expand_dims(gate, 0)
    if QUERIES == 1:
        key = gl.arange(0, KEYS, layout=gl.SliceLayout(1, layout))
        score = gl.sum(gated, axis=1)
        if HAS_SCALES:
            score *= scale
        score = gl.where(score == 0.0, 0.0, score)
        gl.store(
            scores + row.to(gl.int64) * score_stride + column + key,
            score,
            mask=(key >= 0) & (row >= rows_seen) & (row < rows),
        )
    else:
        # a query's heads are neighbours: their sum stays within a few threads
        score = gl.sum(gl.reshape(gated, (KEYS, QUERIES, HEADS)), axis=2)  # [KEYS, QUERIES]
        inner: gl.constexpr = score.type.layout
        key = gl.expand_dims(gl.arange(0, KEYS, layout=gl.SliceLayout(1, inner)), 1)
        local = gl.expand_dims(row + gl.arange(0, QUERIES, layout=gl.SliceLayout(0, inner)), 0)
        if HAS_SCALES:
            score *= gl.expand_dims(gl.convert_layout(scale, gl.SliceLayout(1, inner)), 1)
        score = gl.where(score == 0.0, 0.0, score)
        place = local.to(gl.int64) * score_stride + column + key
        gl.store(scores + place, score, mask=(local >= rows_seen) & (local < rows) & (key >= 0))


@gluon.jit
def _gates(w, row_start, row, rows, HEADS: gl.constexpr, QUERIES: gl.constexpr, layout: gl.constexpr):
    """Gates [QUERIES · HEADS] of the chunk's queries from `row` on; outside the chunk, those of its first or last."""
    n = gl.arange(0, QUERIES * HEADS, layout=layout)
    query = gl.minimum(gl.maximum(row + n // HEADS, 0), rows - 1)
    return gl.load(w + (row_start + query).to(gl.int64) * HEADS + n % HEADS)


@gluon.jit
def _ask(q_desc, row, slot, q_smem, full, HEADS: gl.constexpr, BYTES: gl.constexpr):
    hopper.mbarrier.expect(full.index(slot), BYTES)
    hopper.tma.async_copy_global_to_shared(q_desc, [row * HEADS, 0], full.index(slot), q_smem.index(slot))


@gluon.jit
def _load_keys(
    keys, key_offsets, scales, scale_offsets, key_start, length, mma: gl.constexpr, element: gl.constexpr,
    KEYS: gl.constexpr, HEAD_DIM: gl.constexpr, PAGE: gl.constexpr, HAS_SCALES: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """Keys [KEYS, HEAD_DIM] as a tensor, and their scales [KEYS] along the accumulator's rows."""
    bits: gl.constexpr = element.primitive_bitwidth
    vector: gl.constexpr = 128 // bits
    lanes: gl.constexpr = HEAD_DIM // vector
    wide: gl.constexpr = gl.BlockedLayout([1, vector], [32 // lanes, lanes], [WARPS, 1], [1, 0])
    page, inside = key_start // PAGE, key_start % PAGE
    key = gl.arange(0, KEYS, layout=gl.SliceLayout(1, wide))
    dim = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, wide))
    offset = gl.multiple_of(gl.load(key_offsets + page), 16)
    place = gl.expand_dims((inside + key) * HEAD_DIM, 1) + gl.expand_dims(dim, 0)
    k = gl.load(keys + offset + place, mask=gl.expand_dims(key_start + key < length, 1), other=0.0)
    scale = gl.full((KEYS,), 1.0, gl.float32, layout=gl.SliceLayout(1, mma))
    if HAS_SCALES:
        row = gl.arange(0, KEYS, layout=gl.SliceLayout(1, mma))
        scale = gl.load(scales + gl.load(scale_offsets + page) + inside + row, mask=key_start + row < length, other=0.0)
    return k, scale


_SCORE_SCALARS = ["row_start", "rows", "tile_start", "length", "first_position", "ratio", "score_stride"]


@gluon.jit(do_not_specialize=_SCORE_SCALARS, do_not_specialize_on_alignment=["w"])
def gluon_score_kernel(
    q_desc, w, keys, key_offsets, scales, scale_offsets, scores,
    row_start, rows, tile_start, length, first_position, ratio, score_stride,
    HEADS: gl.constexpr, HEAD_DIM: gl.constexpr, BLOCK_KEYS: gl.constexpr, QUERY_GROUP: gl.constexpr,
    PAGE: gl.constexpr, HAS_SCALES: gl.constexpr, STAGES: gl.constexpr, IN_REGISTERS: gl.constexpr,
    WARPS: gl.constexpr,
):  # fmt: skip
    """As the operation's score kernel, for consecutive positions. Two queries a stage, one accumulator each: while one
    is gated and summed, the other's product runs."""
    element: gl.constexpr = q_desc.dtype
    bits: gl.constexpr = element.primitive_bitwidth
    PAIR_BYTES: gl.constexpr = 2 * HEADS * HEAD_DIM * bits // 8
    mma: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[WARPS, 1], instr_shape=[16, HEADS, 256 // bits]
    )
    column = gl.program_id(0) * BLOCK_KEYS
    key_start = tile_start + column
    group_start = gl.program_id(1) * QUERY_GROUP
    first, last = _group_span(row_start, rows, key_start, length, first_position, ratio, group_start, QUERY_GROUP)
    if first < last:
        q_smem = gl.allocate_shared_memory(element, [STAGES, 2 * HEADS, HEAD_DIM], q_desc.layout)
        full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], hopper.mbarrier.MBarrierLayout())
        for each in gl.static_range(STAGES):
            hopper.mbarrier.init(full.index(each), count=1)
        hopper.fence_async_shared()
        gl.thread_barrier()
        row = group_start + first // 2 * 2
        pairs = (group_start + last - row + 1) // 2
        for ahead in gl.static_range(STAGES - 1):
            _ask(q_desc, row_start + row + 2 * ahead, ahead, q_smem, full, HEADS, PAIR_BYTES)
        k, scale = _load_keys(
            keys, key_offsets, scales, scale_offsets, key_start, length, mma, element,
            BLOCK_KEYS, HEAD_DIM, PAGE, HAS_SCALES, WARPS,
        )  # fmt: skip
        k_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_KEYS, HEAD_DIM], element)
        operand = gl.allocate_shared_memory(element, [BLOCK_KEYS, HEAD_DIM], k_layout, k)
        hopper.fence_async_shared()
        gl.thread_barrier()
        if IN_REGISTERS:
            operand = operand.load(gl.DotOperandLayout(0, mma, 32 // bits))

        zero = gl.zeros((BLOCK_KEYS, HEADS), gl.float32, layout=mma)
        odd = zero
        for pair in range(pairs):
            slot = pair % STAGES
            now = row + 2 * pair
            gl.thread_barrier()  # everyone's products of the stage before are done
            hopper.mbarrier.wait(full.index(slot), (pair // STAGES) & 1)
            stage = q_smem.index(slot)
            even = hopper.warpgroup_mma(
                operand, stage.slice(0, HEADS, dim=0).permute((1, 0)), zero, use_acc=False, is_async=True
            )
            # past the last pair the copies only fill slots, which the end waits for
            _ask(
                q_desc,
                row_start + now + 2 * (STAGES - 1),
                (pair + STAGES - 1) % STAGES,
                q_smem,
                full,
                HEADS,
                PAIR_BYTES,
            )
            gate = _gates(w, row_start, now - 1, rows, HEADS, 1, gl.SliceLayout(0, mma))
            _finish_tile(
                odd, now - 1, row, gate, scale, scores, rows, score_stride, column,
                HEADS, 1, BLOCK_KEYS, HAS_SCALES, mma,
            )  # fmt: skip
            even = hopper.warpgroup_mma_wait(0, deps=[even])
            odd = hopper.warpgroup_mma(
                operand, stage.slice(HEADS, HEADS, dim=0).permute((1, 0)), zero, use_acc=False, is_async=True
            )
            gate = _gates(w, row_start, now, rows, HEADS, 1, gl.SliceLayout(0, mma))
            _finish_tile(
                even, now, row, gate, scale, scores, rows, score_stride, column,
                HEADS, 1, BLOCK_KEYS, HAS_SCALES, mma,
            )  # fmt: skip
            odd = hopper.warpgroup_mma_wait(0, deps=[odd])
        gate = _gates(w, row_start, row + 2 * pairs - 1, rows, HEADS, 1, gl.SliceLayout(0, mma))
        _finish_tile(
            odd, row + 2 * pairs - 1, row, gate, scale, scores, rows, score_stride, column,
            HEADS, 1, BLOCK_KEYS, HAS_SCALES, mma,
        )  # fmt: skip
        for ahead in gl.static_range(STAGES - 1):  # copies under way must land before the memory is another block's
            hopper.mbarrier.wait(full.index((pairs + ahead) % STAGES), ((pairs + ahead) // STAGES) & 1)
        gl.thread_barrier()
        for each in gl.static_range(STAGES):
            hopper.mbarrier.invalidate(full.index(each))


@gluon.jit
def _feed(
    q_desc, w, row_start, row, rows, steps, q_smem, w_smem, full, empty,
    QUERIES: gl.constexpr, HEADS: gl.constexpr, STAGES: gl.constexpr, BYTES: gl.constexpr,
):  # fmt: skip
    """The copying warp: keep the ring of query stages full."""
    for step in range(steps):
        slot = step % STAGES
        now = row + step * QUERIES
        gate = _gates(
            w, row_start, now, rows, HEADS, QUERIES, gl.BlockedLayout([QUERIES * HEADS // 32], [32], [1], [0])
        )
        hopper.mbarrier.wait(empty.index(slot), ((step // STAGES) & 1) ^ 1)
        _ask(q_desc, row_start + now, slot, q_smem, full, HEADS, BYTES)
        w_smem.index(slot).store(gate)
        hopper.mbarrier.arrive(full.index(slot), count=1)


@gluon.jit
def _consume(
    k_smem, w_smem, scales, scale_offsets, scores, row, rows, steps, key_start, column, length, score_stride,
    q_smem, full, empty,
    WORKER: gl.constexpr, HEADS: gl.constexpr, KEYS: gl.constexpr, QUERIES: gl.constexpr, PAGE: gl.constexpr,
    HAS_SCALES: gl.constexpr, STAGES: gl.constexpr, IN_REGISTERS: gl.constexpr,
):  # fmt: skip
    """One warpgroup: its keys against every query of the group."""
    element: gl.constexpr = q_smem.dtype
    bits: gl.constexpr = element.primitive_bitwidth
    mma: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, QUERIES * HEADS, 256 // bits]
    )
    operand = k_smem.slice(WORKER * KEYS, KEYS, dim=0)
    if IN_REGISTERS:
        operand = operand.load(gl.DotOperandLayout(0, mma, 32 // bits))
    key_start += WORKER * KEYS
    column += WORKER * KEYS
    scale = gl.full((KEYS,), 1.0, gl.float32, layout=gl.SliceLayout(1, mma))
    if HAS_SCALES:
        key = gl.arange(0, KEYS, layout=gl.SliceLayout(1, mma))
        place = scales + gl.load(scale_offsets + key_start // PAGE) + key_start % PAGE + key
        scale = gl.load(place, mask=key_start + key < length, other=0.0)
    zero = gl.zeros((KEYS, QUERIES * HEADS), gl.float32, layout=mma)
    for step in range(steps):
        slot = step % STAGES
        hopper.mbarrier.wait(full.index(slot), (step // STAGES) & 1)
        products = hopper.warpgroup_mma(operand, q_smem.index(slot).permute((1, 0)), zero, use_acc=False, is_async=True)
        products = hopper.warpgroup_mma_wait(0, deps=[products])
        gate = w_smem.index(slot).load(gl.SliceLayout(0, mma))
        _finish_tile(
            products, row + step * QUERIES, row, gate, scale, scores, rows, score_stride, column,
            HEADS, QUERIES, KEYS, HAS_SCALES, mma,
        )  # fmt: skip
        hopper.mbarrier.arrive(empty.index(slot), count=1)


@gluon.jit(do_not_specialize=_SCORE_SCALARS, do_not_specialize_on_alignment=["w"])
def gluon_ws_score_kernel(
    q_desc, w, keys, key_offsets, scales, scale_offsets, scores,
    row_start, rows, tile_start, length, first_position, ratio, score_stride,
    HEADS: gl.constexpr, HEAD_DIM: gl.constexpr, BLOCK_KEYS: gl.constexpr, QUERY_GROUP: gl.constexpr,
    PAGE: gl.constexpr, HAS_SCALES: gl.constexpr, STAGES: gl.constexpr, IN_REGISTERS: gl.constexpr,
    QUERIES: gl.constexpr, WORKERS: gl.constexpr, WORKER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """As above, but every warpgroup holds BLOCK_KEYS / WORKERS keys of its own and waits only for the queries, which
    one further warp copies in. Launched with 4 warps."""
    element: gl.constexpr = q_desc.dtype
    bits: gl.constexpr = element.primitive_bitwidth
    BYTES: gl.constexpr = QUERIES * HEADS * HEAD_DIM * bits // 8
    KEYS: gl.constexpr = BLOCK_KEYS // WORKERS
    column = gl.program_id(0) * BLOCK_KEYS
    key_start = tile_start + column
    group_start = gl.program_id(1) * QUERY_GROUP
    first, last = _group_span(row_start, rows, key_start, length, first_position, ratio, group_start, QUERY_GROUP)
    row = group_start + first // QUERIES * QUERIES
    steps = gl.where(first < last, (group_start + last - row + QUERIES - 1) // QUERIES, 0)
    q_smem = gl.allocate_shared_memory(element, [STAGES, QUERIES * HEADS, HEAD_DIM], q_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], hopper.mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], hopper.mbarrier.MBarrierLayout())
    w_smem = gl.allocate_shared_memory(gl.float32, [STAGES, QUERIES * HEADS], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    for slot in gl.static_range(STAGES):
        hopper.mbarrier.init(full.index(slot), count=2)  # the copy engine's bytes, and the gates
        hopper.mbarrier.init(empty.index(slot), count=WORKERS)
    k_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_KEYS, HEAD_DIM], element)
    k_smem = gl.allocate_shared_memory(element, [BLOCK_KEYS, HEAD_DIM], k_layout)
    if steps > 0:
        mma: gl.constexpr = gl.NVMMADistributedLayout(
            version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, HEADS, 256 // bits]
        )
        for part in gl.static_range(BLOCK_KEYS // 64):
            k, _ = _load_keys(
                keys, key_offsets, scales, scale_offsets, key_start + part * 64, length, mma, element,
                64, HEAD_DIM, PAGE, False, 4,
            )  # fmt: skip
            k_smem.slice(part * 64, 64, dim=0).store(k)
    hopper.fence_async_shared()
    gl.thread_barrier()
    # the tuples stand here in full: put into a variable, a constexpr becomes a tensor
    if WORKERS == 2:
        gl.warp_specialize(
            [
                (_consume, (
                    k_smem, w_smem, scales, scale_offsets, scores, row, rows, steps, key_start, column, length,
                    score_stride, q_smem, full, empty, 0, HEADS, KEYS, QUERIES, PAGE, HAS_SCALES, STAGES, IN_REGISTERS,
                )),
                (_consume, (
                    k_smem, w_smem, scales, scale_offsets, scores, row, rows, steps, key_start, column, length,
                    score_stride, q_smem, full, empty, 1, HEADS, KEYS, QUERIES, PAGE, HAS_SCALES, STAGES, IN_REGISTERS,
                )),
                (_feed, (
                    q_desc, w, row_start, row, rows, steps, q_smem, w_smem, full, empty, QUERIES, HEADS, STAGES, BYTES,
                )),
            ],
            [4, 1], [WORKER_REGISTERS, 24],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_consume, (
                    k_smem, w_smem, scales, scale_offsets, scores, row, rows, steps, key_start, column, length,
                    score_stride, q_smem, full, empty, 0, HEADS, KEYS, QUERIES, PAGE, HAS_SCALES, STAGES, IN_REGISTERS,
                )),
                (_consume, (
                    k_smem, w_smem, scales, scale_offsets, scores, row, rows, steps, key_start, column, length,
                    score_stride, q_smem, full, empty, 1, HEADS, KEYS, QUERIES, PAGE, HAS_SCALES, STAGES, IN_REGISTERS,
                )),
                (_consume, (
                    k_smem, w_smem, scales, scale_offsets, scores, row, rows, steps, key_start, column, length,
                    score_stride, q_smem, full, empty, 2, HEADS, KEYS, QUERIES, PAGE, HAS_SCALES, STAGES, IN_REGISTERS,
                )),
                (_consume, (
                    k_smem, w_smem, scales, scale_offsets, scores, row, rows, steps, key_start, column, length,
                    score_stride, q_smem, full, empty, 3, HEADS, KEYS, QUERIES, PAGE, HAS_SCALES, STAGES, IN_REGISTERS,
                )),
                (_feed, (
                    q_desc, w, row_start, row, rows, steps, q_smem, w_smem, full, empty, QUERIES, HEADS, STAGES, BYTES,
                )),
            ],
            [4, 4, 4, 1], [WORKER_REGISTERS, WORKER_REGISTERS, WORKER_REGISTERS, 24],
        )  # fmt: skip


@triton.jit
def _ordered_bits(score):
    """uint32 bits whose unsigned order is the float order; 0 is below every number."""
    bits = score.to(tl.uint32, bitcast=True)
    return tl.where((bits >> 31) != 0, ~bits, bits | 0x80000000)


@triton.jit
def _bisect(bits, needed, LOWEST_BIT: tl.constexpr):
    """The largest t (a multiple of 2^LOWEST_BIT) that at least `needed` of `bits` reach, or any t that exactly
    `needed` reach."""
    reached = tl.full((), 0, tl.uint32)
    step = tl.full((), 0x80000000, tl.uint32)
    while step >= (1 << LOWEST_BIT):
        trial = reached | step
        count = tl.sum((bits >= trial).to(tl.int32), axis=0)
        reached = tl.where(count >= needed, trial, reached)
        step = tl.where(count == needed, 0, step >> 1).to(tl.uint32)
    return reached


@triton.jit
def _write_best(
    bits, index, take, out_indices, out_scores, scratch, top_k,
    TOP_K_PAD: tl.constexpr, SORT: tl.constexpr, SCORES: tl.constexpr,
):  # fmt: skip
    """The best `take` entries of a row in registers, in index order or (SORT) best first, then padding. Entries stand
    in index order; of equal scores the first are taken."""
    kth = _bisect(bits, take, 0)
    above = (bits > kth).to(tl.int32)
    tie = (bits == kth).to(tl.int32)
    ties_taken = take - tl.sum(above, axis=0)
    ranks = tl.cumsum(above + (tie << 16), axis=0)  # both counts are below 2^16
    tie_rank = ranks >> 16
    place = (ranks & 0xFFFF) + tl.minimum(tie_rank, ties_taken) - 1
    kept = (above != 0) | ((tie != 0) & (tie_rank <= ties_taken))
    score = tl.where((bits >> 31) != 0, bits & 0x7FFFFFFF, ~bits).to(tl.float32, bitcast=True)
    lane = tl.arange(0, TOP_K_PAD)
    if SORT:
        packed = ((bits ^ 0x80000000).to(tl.int32, bitcast=True).to(tl.int64) << 32) | (0x7FFFFFFF - index).to(tl.int64)
        tl.store(scratch + place, packed, mask=kept)
        tl.debug_barrier()
        lowest = tl.full((), -0x8000000000000000, tl.int64)
        best = tl.sort(tl.load(scratch + lane, mask=lane < take, other=lowest), descending=True)
        high = (best >> 32).to(tl.int32).to(tl.uint32, bitcast=True) ^ 0x80000000
        score = tl.where((high >> 31) != 0, high & 0x7FFFFFFF, ~high).to(tl.float32, bitcast=True)
        index = 0x7FFFFFFF - (best & 0x7FFFFFFF).to(tl.int32)
        tl.store(out_indices + lane, tl.where(lane < take, index, -1), mask=lane < top_k)
        if SCORES:
            tl.store(out_scores + lane, tl.where(lane < take, score, float("-inf")), mask=lane < top_k)
    else:
        tl.store(out_indices + place, index, mask=kept)
        tl.store(out_indices + lane, -1, mask=(lane >= take) & (lane < top_k))
        if SCORES:
            tl.store(out_scores + place, score, mask=kept)
            tl.store(out_scores + lane, float("-inf"), mask=(lane >= take) & (lane < top_k))


@triton.jit
def _seen(row, row_start, first_position, ratio, length):
    return tl.minimum((first_position.to(tl.int64) + row_start + row + 1) // ratio, length).to(tl.int32)


@triton.jit(
    do_not_specialize=["row_start", "length", "first_position", "ratio", "score_stride", "top_k"],
    do_not_specialize_on_alignment=["out_indices", "out_scores"],
)
def direct_kernel(
    scores, out_indices, out_scores, scratch, row_start, length, first_position, ratio, score_stride, top_k,
    WIDTH: tl.constexpr, TOP_K_PAD: tl.constexpr, SORT: tl.constexpr, SCORES: tl.constexpr,
):  # fmt: skip
    """The best of a row of at most WIDTH scores, held in registers. Grid: (rows of the chunk,); outputs are the
    chunk's."""
    row = tl.program_id(0)
    visible = _seen(row, row_start, first_position, ratio, length)
    lane = tl.arange(0, WIDTH)
    value = tl.load(scores + row.to(tl.int64) * score_stride + lane, mask=lane < visible, other=0.0)
    bits = tl.where(lane < visible, _ordered_bits(value), 0)
    out = row.to(tl.int64) * top_k
    _write_best(
        bits, lane, tl.minimum(visible, top_k), out_indices + out, out_scores + out, scratch + out, top_k,
        TOP_K_PAD, SORT, SCORES,
    )  # fmt: skip


@triton.jit(do_not_specialize=["row_start", "length", "first_position", "ratio", "score_stride", "top_k", "every"])
def threshold_kernel(
    scores, thresholds, row_start, length, first_position, ratio, score_stride, top_k, every, SAMPLE: tl.constexpr
):
    """Per row, bits that somewhat more than top_k scores should reach: from one line of 32 in `every`, at most SAMPLE
    scores. 0 where the row is short. Grid: (rows of the chunk,)."""
    row = tl.program_id(0)
    visible = _seen(row, row_start, first_position, ratio, length)
    sample = visible // (32 * every) * 32
    lane = tl.arange(0, SAMPLE)
    place = lane // 32 * (32 * every) + lane % 32
    value = tl.load(scores + row.to(tl.int64) * score_stride + place, mask=lane < sample, other=0.0)
    bits = tl.where(lane < sample, _ordered_bits(value), 0)
    mean = top_k.to(tl.float32) * sample.to(tl.float32) / tl.maximum(visible, 1).to(tl.float32)
    needed = (mean + 4.0 * tl.sqrt(mean) + 4.0).to(tl.int32)
    threshold = tl.full((), 0, tl.uint32)
    if needed < sample:
        threshold = _bisect(bits, needed, 14)
    tl.store(thresholds + row, threshold.to(tl.int32, bitcast=True))


@triton.jit(do_not_specialize=["row_start", "length", "first_position", "ratio", "score_stride", "segment_keys"])
def segment_kernel(
    scores, thresholds, survivor_scores, survivor_indices, counts,
    row_start, length, first_position, ratio, score_stride, segment_keys,
    SEGMENTS: tl.constexpr, CAPACITY: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr, SKIP: tl.constexpr,
):  # fmt: skip
    """What of one segment of one row reaches the row's threshold, in index order; what does not fit is only counted.
    Grid: (SEGMENTS, rows of the chunk). SKIP: blocks without survivors are not scanned."""
    segment, row = tl.program_id(0), tl.program_id(1)
    visible = _seen(row, row_start, first_position, ratio, length)
    threshold = tl.load(thresholds + row).to(tl.uint32, bitcast=True)
    begin = segment * segment_keys
    end = tl.minimum(begin + segment_keys, visible)
    scores += row.to(tl.int64) * score_stride
    to = (row.to(tl.int64) * SEGMENTS + segment) * CAPACITY
    lane = tl.arange(0, BLOCK)
    kept = tl.full((), 0, tl.int32)
    for start in tl.range(begin, end, BLOCK, num_stages=STAGES):
        index = start + lane
        value = tl.load(scores + index, mask=index < end, other=0.0)
        take = ((index < end) & (_ordered_bits(value) >= threshold)).to(tl.int32)
        if SKIP:
            found = tl.sum(take, axis=0)
            if found > 0:
                place = kept + tl.cumsum(take, axis=0) - 1
                fits = (take != 0) & (place < CAPACITY)
                tl.store(survivor_scores + to + place, value, mask=fits)
                tl.store(survivor_indices + to + place, index, mask=fits)
            kept += found
        else:
            place = kept + tl.cumsum(take, axis=0) - 1
            fits = (take != 0) & (place < CAPACITY)
            tl.store(survivor_scores + to + place, value, mask=fits)
            tl.store(survivor_indices + to + place, index, mask=fits)
            kept += tl.sum(take, axis=0)
    tl.store(counts + row.to(tl.int64) * SEGMENTS + segment, kept)


@triton.jit(
    do_not_specialize=["row_start", "length", "first_position", "ratio", "top_k"],
    do_not_specialize_on_alignment=["out_indices", "out_scores"],
)
def finish_kernel(
    survivor_scores, survivor_indices, counts, misled, out_indices, out_scores, scratch,
    row_start, length, first_position, ratio, top_k,
    SEGMENTS: tl.constexpr, CAPACITY: tl.constexpr, LANES: tl.constexpr,
    TOP_K_PAD: tl.constexpr, SORT: tl.constexpr, SCORES: tl.constexpr,
):  # fmt: skip
    """The best of a row's survivors. A row whose sample misled is only flagged in `misled` [rows] int32.
    Grid: (rows,)."""
    row = tl.program_id(0)
    visible = _seen(row, row_start, first_position, ratio, length)
    take = tl.minimum(visible, top_k)
    lane = tl.arange(0, LANES)
    place = lane
    total = tl.full((), 0, tl.int32)
    fits = tl.full((), 1, tl.int32)
    for segment in tl.static_range(SEGMENTS):
        count = tl.load(counts + row.to(tl.int64) * SEGMENTS + segment)
        place = tl.where(lane >= total, segment * CAPACITY + lane - total, place)
        total += count
        fits &= (count <= CAPACITY).to(tl.int32)
    good = (fits != 0) & (total >= take) & (total <= LANES)
    tl.store(misled + row, 1 - good.to(tl.int32))
    if good:
        survivor_scores += row.to(tl.int64) * (SEGMENTS * CAPACITY)
        survivor_indices += row.to(tl.int64) * (SEGMENTS * CAPACITY)
        value = tl.load(survivor_scores + place, mask=lane < total, other=0.0)
        index = tl.load(survivor_indices + place, mask=lane < total, other=0)
        bits = tl.where(lane < total, _ordered_bits(value), 0)
        out = row.to(tl.int64) * top_k
        _write_best(
            bits, index, take, out_indices + out, out_scores + out, scratch + out, top_k, TOP_K_PAD, SORT, SCORES
        )
