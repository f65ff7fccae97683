"""Attention of up to 32 heads over packed rows on devices of compute capability 9.0: the same result as the kernel in
triton.py, and no more work for what heads there are not.

The kernel in hopper.py multiplies 64 heads at a time. Where a model's heads are shared out over several devices (tensor
parallel), 8 to 32 are left, and most of its products would be of nothing. Here an item is 16 heads of one token and a
part of its index row, and products are those of mma.sync, whose operands are registers: a gathered row is widened on
its way from shared memory to the matrix unit, and never written back.

A program stays on its multiprocessor and takes one item after another. Its partitions hand blocks of rows to each other
through a ring of stages in shared memory:

- one brings rows in and takes their scales apart (hopper_few_heads_gather.py);
- one multiplies queries with them and makes weights (the online softmax), which it leaves in the stage, with the factor
  by which the outputs so far are to be multiplied;
- one multiplies weights with values, and gives the stage back.

So rows come in, and the weights of a block are found, while the values of the block before are added up.

Everything 8-bit is multiplied in f16, for which the device widens e4m3 in one instruction for two. f16 has seven bits
more than e4m3 and holds every one of its numbers, so nothing is lost by that; what f16 lacks is range, which powers of
two make good. They are exact, and are taken out again in float32:

- Queries [16, D] are brought up by one power of two a head, so that the largest element has f16's largest exponent.
  Elements keep all their bits down to 2^-31 of it.
- Keys are multiplied as they stand; the scale of a group goes into the float32 sums of the group's products.
- Values are multiplied as they stand; their scale, as a share of 2^e, the power of two of the largest scale of their
  row, is multiplied into the weight that they meet. A row's 2^e goes into its weight as well: the exponent of a softmax
  weight is logit + e (base 2), and what is taken from all of them is the largest of these. The denominator is summed
  without 2^e.
- Weights, at most 1, are brought up by 2^15, and shares, below 2, down by half: the range of f16 lies below.

So a row's contribution to an output keeps all bits of its weight times its share down to 2^-28 of the largest weight
that there is, and counts as nothing below 2^-39 of it. A weight here is that of a contribution, with the row's largest
scale in it: a row of tiny values may have the largest.

Scales of one row that lie further apart than 2^12, or beyond what e may be, are no shares that f16 holds well enough.
Of a block of rows with such a one, weights and values go to the matrix unit in bf16, as in the other kernels: slower,
and right.

Rotary elements are bf16 in the row and stay so, in both products.

Written in Gluon, which is an experimental part of Triton and cannot be interpreted: import this module only where
`plan.AttentionKernel.HOPPER_FEW_HEADS` was chosen. No length is specialised upon.
"""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import ampere, hopper
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from streamindex_service.ops import gluon_names
from streamindex_service.ops.gluon_names import barrier, missing, view
from streamindex_service.ops.sparse_attention.hopper_few_heads_gather import (
    BEYOND,
    COPY_THREADS,
    COPY_WARPS,
    ENTRIES,
    HEADS_AN_ITEM,
    ITEM_HEADS,
    ROTARY_WORDS,
    SHARE_HEAD,
    WORDS,
    any_beyond,
    copy_rows,
    exponent_of,
    power,
    word_layout,
)
from streamindex_service.ops.sparse_attention.hopper_few_heads_products import (
    add_values,
    for_each_head,
    hold_queries,
    in_order,
    load_queries,
    multiply,
    value_layout,
    zeros,
)
from streamindex_service.ops.sparse_attention.hopper_items import span, wait_for_inputs
from streamindex_service.ops.sparse_attention.plan import Plan
from streamindex_service.ops.sparse_attention.problem import Problem

# What this module takes from Gluon and this Triton's does not have.
MISSING = missing(
    (gl, ("warp_specialize", "allocate_shared_memory", "inline_asm_elementwise", "SharedLinearLayout")),
    (gl, ("DistributedLinearLayout", "DotOperandLayout", "NVMMADistributedLayout")),
    (gl, ("broadcast", "permute")),
    (gl.shared_memory_descriptor, ("permute", "reshape")),
    (gluon, ("constexpr_function",)),
    (ampere, ("mma_v2",)),
    (hopper, ("mbarrier", "fence_async_shared")),
    (async_copy, ("mbarrier_arrive",)),
    (gluon_names, ("barrier", "load_async", "view")),
)
_LOG2E = 1.4426950408889634
_LN2 = gl.constexpr(0.6931471805599453)
VALUES = gl.constexpr(512)  # elements of a value, and of a key but for a tail
# Eight that add up values were slower, and so were eight that weigh: docs/performance-attention.md, "Few heads".
_VALUE_WARPS = 4
_VALUE_REGISTERS = 184
_COPY_REGISTERS = 72
_WEIGHT_HEAD = gl.constexpr(2.0**15)  # what weights in f16 are multiplied by: the range of f16 lies below


def launch(problem: Problem, plan: Plan, ends, out, lse, processors: int) -> None:
    """Fill `out` and `lse`, partial ones of plan.splits parts if there are several. ends: [tokens] int32, one past the
    last valid entry of each index row, or None for the width."""
    p, tiles, packing = problem, plan.tiles, problem.kv.format.packed
    partial = plan.splits > 1
    items = p.tokens * -(-p.heads // ITEM_HEADS) * plan.splits
    attend_kernel[(min(processors, items),)](
        p.q, p.kv.data.view(torch.int32), p.indices if p.kv.scales is None else p.kv.scales.view(torch.int64),
        p.indices, p.indices if ends is None else ends, p.indices if p.sink is None else p.sink, out,
        p.indices if lse is None else lse, items, p.tokens, plan.splits, p.kv.rows, p.width, p.scale * _LOG2E,
        HEADS=p.heads, TAIL=p.key_dim - p.value_dim, BLOCK=tiles.block_entries, STAGES=tiles.stages,
        HELD_QUERIES=tiles.held_queries, HAS_ENDS=ends is not None, HAS_SINK=p.sink is not None and not partial,
        WANT_LSE=lse is not None, PARTIAL=partial, ROW=packing.row_bytes, NARROW=packing.narrow, GROUP=packing.group,
        ROTARY=packing.rotary_offset, PLACED=p.placed, WARPS=tiles.warps, VALUE_WARPS=_VALUE_WARPS,
        VALUE_REGISTERS=_VALUE_REGISTERS, COPY_REGISTERS=_COPY_REGISTERS, num_warps=tiles.warps,
        launch_pdl=True,
    )  # fmt: skip


@gluon.constexpr_function
def _in_every_warp(warps):
    """Numbers of each head, one from each warp [16, warps]: a thread has all of its heads'."""
    registers = [[0, 1 << bit] for bit in range(warps.bit_length() - 1)] + [[8, 0]]
    lanes = [[0, 0], [0, 0], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout(registers, lanes, [[0, 0]] * (warps.bit_length() - 1), [], [16, warps])


@gluon.jit
def _largest_of_heads(x, WARPS: gl.constexpr):
    """max(x, axis=1) of [16, n] as a product lies. Each warp takes the largest of all warps' for itself: gl.max has
    threads share that out, and wait for each other once more."""
    each = gl.max(gl.reshape(x, (16, x.shape[1] // (8 * WARPS), WARPS, 8)), axis=1)
    each = gl.convert_layout(gl.max(each, axis=2), _in_every_warp(WARPS))
    return gl.convert_layout(gl.max(each, axis=1), gl.SliceLayout(1, x.type.layout))


@gluon.jit
def _weigh(products, rotary_products, scale_head, scale_log2, exponent, bias, largest, WARPS: gl.constexpr):
    """One step of the online softmax. products: divided by 2^e and by a head's power of two; exponent: of 2^e.

    Returns weights with 2^e, at most 1, and without [16, BLOCK], the new `largest` [16], and the factor of all sums so
    far [16].
    """
    above = (exponent - 127).to(gl.float32)
    logits = products * scale_head * power(exponent) + rotary_products * scale_log2 + bias
    new_largest = gl.maximum(largest, _largest_of_heads(logits + above, WARPS))
    # of a row without an entry so far: any finite number, for −inf − −inf is no number
    shift = gl.where(new_largest == float("-inf"), 0.0, new_largest)
    fade = gl.exp2(largest - shift)
    # e first: the difference is next to the logit itself, and what `shift` was rounded by comes back. Where logits are
    # so large that it does not, a weight may be anything, but not infinite.
    place = logits + (above - gl.expand_dims(shift, 1))
    weights = gl.exp2(gl.where(place > 0.0, 0.0, place))
    return weights, weights * power(254 - exponent), new_largest, fade


@gluon.jit
def _finish(
    total, largest, sink, lse, place, head, HEADS: gl.constexpr, HAS_SINK: gl.constexpr, WANT_LSE: gl.constexpr,
    PARTIAL: gl.constexpr,
):  # fmt: skip
    """Store the log-sum-exp; returns the reciprocals of the denominators as powers of two and the rest, [16] each.
    place: of head 0 in `lse`."""
    nothing = total == 0.0
    # Whole powers of the total go to the whole number: without e it may be far from 1, where its logarithm would lose
    # bits and a sink could not be added.
    total = gl.where(nothing, 1.0, total)
    exponent = exponent_of(total)
    down = power(254 - exponent)
    total *= down
    largest = gl.where(nothing, 0.0, largest) + (exponent - 127).to(gl.float32)
    if WANT_LSE:
        base2 = largest + gl.log2(total)
        none = float("-inf") if PARTIAL else float("inf")
        gl.store(lse + place + head, gl.where(nothing, none, base2 if PARTIAL else base2 * _LN2), mask=head < HEADS)
    if HAS_SINK:
        logit = gl.load(sink + head, mask=head < HEADS, other=float("-inf")) * (1.0 / _LN2)
        total += gl.exp2(logit - largest)
    return down, 1.0 / total


@gluon.jit
def _store(value, out, place, first_head, FIRST: gl.constexpr, STOP: gl.constexpr, HEADS: gl.constexpr):
    """Elements FIRST to STOP of the outputs [16, n], in the type of `out`. place: of head 0 among rows of `out`."""
    layout: gl.constexpr = value.type.layout
    head = first_head + gl.arange(0, 16, layout=gl.SliceLayout(1, layout))
    element = gl.expand_dims(FIRST + gl.arange(0, value.shape[1], layout=gl.SliceLayout(0, layout)), 0)
    here = gl.expand_dims(head < HEADS, 1) & (element < STOP)
    gl.store(out + (gl.expand_dims((place + head) * VALUES, 1) + element), value.to(out.dtype.element_ty), mask=here)


@gluon.jit
def _weigh_blocks(
    q, ends, sink, lse, items, tokens, splits, width, scale_log2,
    value_smem, rotary_smem, bias_smem, exponent_smem, share_smem,
    query_smem, weight_smem, plain_smem, fade_smem, final_smem, full, weighed, final_full, final_empty,
    HEADS: gl.constexpr, TAIL: gl.constexpr, BLOCK: gl.constexpr, STAGES: gl.constexpr, HAS_ENDS: gl.constexpr,
    HAS_SINK: gl.constexpr, WANT_LSE: gl.constexpr, PARTIAL: gl.constexpr, NARROW: gl.constexpr, GROUP: gl.constexpr,
    HELD_QUERIES: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """Logits and the online softmax of each block: weights [16, BLOCK], and the factor of all sums so far [16]; at the
    end of an item what its sums are to be multiplied by, two [16]."""
    GROUPS: gl.constexpr = VALUES // GROUP  # the last of rows of 448 is none
    USED: gl.constexpr = NARROW // GROUP
    mma: gl.constexpr = gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[1, WARPS], instr_shape=[16, 8])
    left: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    right: gl.constexpr = gl.DotOperandLayout(1, mma, 2)
    by_head: gl.constexpr = gl.SliceLayout(1, mma)
    by_key: gl.constexpr = gl.SliceLayout(0, mma)
    eights: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 8, [1, 0])
    done = items * 0
    turn = items * 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        token, first_head, part, begin, end = span(
            ends, item, splits, width, HEADS, HEADS_AN_ITEM, BLOCK, HAS_ENDS
        )  # fmt: skip
        down = load_queries(q, query_smem, token, first_head, HEADS, VALUES + TAIL, NARROW, WARPS)
        scale_head = gl.convert_layout(gl.expand_dims(down, 1), mma) * scale_log2
        queries = hold_queries(query_smem, GROUPS, USED if HELD_QUERIES else 0, left)
        head = first_head + gl.arange(0, 16, layout=gl.SliceLayout(1, left))
        element = gl.expand_dims(NARROW + gl.arange(0, 2 * ROTARY_WORDS, layout=gl.SliceLayout(0, left)), 0)
        q_rotary = q + (gl.expand_dims((token * HEADS + head) * (VALUES + TAIL), 1) + element)
        q_rotary = gl.load(q_rotary, mask=gl.expand_dims(head < HEADS, 1) & (element >= 0), other=0.0)
        largest = gl.full((16,), float("-inf"), gl.float32, layout=by_head)
        totals = gl.zeros((16, BLOCK), gl.float32, layout=mma)
        for _ in range(begin, end, BLOCK):
            slot = done % STAGES
            hopper.mbarrier.wait(full.index(slot), (done // STAGES) & 1)
            rotary = view(rotary_smem.index(slot), gl.bfloat16, [BLOCK, 2 * ROTARY_WORDS], eights)
            zero = gl.zeros((16, BLOCK), gl.float32, layout=mma)
            rotary_products = mma_v2(q_rotary, rotary.permute((1, 0)).load(right), zero)
            products = multiply(
                queries, query_smem, value_smem.index(slot), share_smem.index(slot), BLOCK, GROUPS, USED, HELD_QUERIES,
                mma,
            )  # fmt: skip
            beyond = any_beyond(exponent_smem.index(slot), BLOCK, WARPS)
            exponent = exponent_smem.index(slot).load(by_key) & (BEYOND - 1)
            bias = gl.expand_dims(bias_smem.index(slot).load(by_key), 0)
            weights, plain_weights, largest, fade = _weigh(
                products, rotary_products, scale_head, scale_log2, gl.expand_dims(exponent, 0), bias, largest, WARPS
            )
            totals = totals * gl.expand_dims(fade, 1) + plain_weights
            if TAIL == 0:
                plain_smem.index(slot).store(plain_weights.to(gl.bfloat16))
            weights *= _WEIGHT_HEAD
            if beyond:
                in_bf16 = view(weight_smem.index(slot), gl.bfloat16, [16, BLOCK], eights)
                in_bf16.store(weights.to(gl.bfloat16))
            else:
                weight_smem.index(slot).store(weights.to(gl.float16))
            fade_smem.index(slot).store(fade)
            hopper.mbarrier.arrive(weighed.index(slot), count=1)
            done += 1
        place = (part.to(gl.int64) * tokens + token) * HEADS if PARTIAL else token * HEADS
        head = first_head + gl.arange(0, 16, layout=by_head)
        down, rest = _finish(
            gl.sum(totals, axis=1), largest, sink, lse, place, head, HEADS, HAS_SINK, WANT_LSE, PARTIAL
        )  # fmt: skip
        hopper.mbarrier.wait(final_empty, (turn & 1) ^ 1)
        final_smem.index(0).store(down)
        final_smem.index(1).store(rest)
        hopper.mbarrier.arrive(final_full, count=1)
        turn += 1


@gluon.jit
def _add_values(
    ends, out, items, tokens, splits, width,
    value_smem, rotary_smem, exponent_smem, share_smem, narrow_smem, weight_smem, plain_smem, fade_smem, final_smem,
    full, weighed, empty, final_full, final_empty,
    HEADS: gl.constexpr, TAIL: gl.constexpr, BLOCK: gl.constexpr, STAGES: gl.constexpr, HAS_ENDS: gl.constexpr,
    PARTIAL: gl.constexpr, NARROW: gl.constexpr, GROUP: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """Weights times values, block by block, and at the end of an item the outputs."""
    GROUPS: gl.constexpr = VALUES // GROUP
    mma: gl.constexpr = gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[1, WARPS], instr_shape=[16, 8])
    left: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    right: gl.constexpr = gl.DotOperandLayout(1, mma, 2)
    by_head: gl.constexpr = gl.SliceLayout(1, mma)
    by_warp: gl.constexpr = value_layout(WARPS)
    eights: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 8, [1, 0])
    done = items * 0
    turn = items * 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        token, first_head, part, begin, end = span(
            ends, item, splits, width, HEADS, HEADS_AN_ITEM, BLOCK, HAS_ENDS
        )  # fmt: skip
        sums = zeros(GROUPS, WARPS, by_warp)
        acc_rotary = gl.zeros((16, 2 * ROTARY_WORDS), gl.float32, layout=mma)
        for _ in range(begin, end, BLOCK):
            slot = done % STAGES
            # ended long before `weighed`, and waited for all the same: the rows were copied by a third partition
            hopper.mbarrier.wait(full.index(slot), (done // STAGES) & 1)
            hopper.mbarrier.wait(weighed.index(slot), (done // STAGES) & 1)
            beyond = any_beyond(exponent_smem.index(slot), BLOCK, WARPS)
            weight, value, fade = weight_smem.index(slot), value_smem.index(slot), fade_smem.index(slot)
            if beyond:  # few rows at a time: registers that the other way has no use for would be lost to it
                in_bf16 = view(weight, gl.bfloat16, [16, BLOCK], eights)
                sums = add_values(
                    in_bf16, value, share_smem.index(slot), fade, sums, False, 16, BLOCK, GROUPS, WARPS, mma, by_warp
                )
            else:
                sums = add_values(
                    weight, value, narrow_smem.index(slot), fade, sums, True, BLOCK, BLOCK, GROUPS, WARPS, mma, by_warp
                )
            if TAIL == 0:
                rotary = view(rotary_smem.index(slot), gl.bfloat16, [BLOCK, 2 * ROTARY_WORDS], eights)
                acc_rotary *= gl.expand_dims(fade.load(by_head), 1)
                acc_rotary = mma_v2(plain_smem.index(slot).load(left), rotary.load(right), acc_rotary)
            hopper.mbarrier.arrive(empty.index(slot), count=1)
            done += 1
        hopper.mbarrier.wait(final_full, turn & 1)
        down, rest = final_smem.index(0).load(by_head), final_smem.index(1).load(by_head)
        each_down, each_rest = for_each_head(final_smem.index(0), by_warp), for_each_head(final_smem.index(1), by_warp)
        hopper.mbarrier.arrive(final_empty, count=1)
        turn += 1
        place = (part.to(gl.int64) * tokens + token) * HEADS if PARTIAL else token * HEADS
        if TAIL == 0:
            acc_rotary = acc_rotary * gl.expand_dims(down, 1) * gl.expand_dims(rest, 1)
            _store(acc_rotary, out, place, first_head, NARROW, VALUES, HEADS)
        each_down *= 1.0 / (_WEIGHT_HEAD * SHARE_HEAD)
        SET: gl.constexpr = VALUES * WARPS // GROUPS
        for group in gl.static_range(GROUPS // WARPS):
            values = in_order(sums, group, each_down, each_rest, GROUPS, WARPS)
            _store(values, out, place, first_head, SET * group, min(NARROW, SET * (group + 1)), HEADS)


@gluon.jit(
    do_not_specialize=["items", "tokens", "splits", "rows", "width", "scale_log2"],
    do_not_specialize_on_alignment=["scales", "indices", "ends", "sink", "lse"],
)
def attend_kernel(
    q, data, scales, indices, ends, sink, out, lse, items, tokens, splits, rows, width, scale_log2,
    HEADS: gl.constexpr, TAIL: gl.constexpr, BLOCK: gl.constexpr, STAGES: gl.constexpr, HELD_QUERIES: gl.constexpr,
    HAS_ENDS: gl.constexpr, HAS_SINK: gl.constexpr, WANT_LSE: gl.constexpr, PARTIAL: gl.constexpr,
    ROW: gl.constexpr, NARROW: gl.constexpr, GROUP: gl.constexpr, ROTARY: gl.constexpr, PLACED: gl.constexpr,
    WARPS: gl.constexpr, VALUE_WARPS: gl.constexpr, VALUE_REGISTERS: gl.constexpr, COPY_REGISTERS: gl.constexpr,
):  # fmt: skip
    """All items. Grid: (multiprocessors,); WARPS warps, and those of the other partitions.

    data: rows of ROW / 4 int32; scales: of an int64, if they lie beside. NARROW: e4m3 elements of a row, GROUP of
    which share a scale; ROTARY: byte of its bf16 elements, which belong to the value unless there is a TAIL.
    HELD_QUERIES: queries stay in registers. Everything else as in triton.py's kernel.
    """
    GROUPS: gl.constexpr = VALUES // GROUP
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    fours: gl.constexpr = gl.SwizzledSharedLayout(4, 1, 8, [1, 0])
    eights: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 8, [1, 0])
    entry_smem = gl.allocate_shared_memory(gl.int64 if PLACED else gl.int32, [ENTRIES // BLOCK, BLOCK], flat)
    value_smem = gl.allocate_shared_memory(gl.int32, [STAGES, BLOCK, WORDS], word_layout(BLOCK))
    rotary_smem = gl.allocate_shared_memory(gl.int32, [STAGES, BLOCK, ROTARY_WORDS], fours)
    if NARROW == 448:
        scale_smem = gl.allocate_shared_memory(gl.int64, [STAGES, BLOCK], flat)
    else:
        scale_smem = gl.allocate_shared_memory(gl.int32, [STAGES, GROUPS, BLOCK], plain)
    bias_smem = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK], flat)
    exponent_smem = gl.allocate_shared_memory(gl.int32, [STAGES, BLOCK], flat)
    share_smem = gl.allocate_shared_memory(gl.float32, [STAGES, GROUPS, BLOCK], plain)
    narrow_smem = gl.allocate_shared_memory(gl.float16, [STAGES, GROUPS, BLOCK], plain)
    query_smem = gl.allocate_shared_memory(gl.float16, [4, 16, WORDS], eights)
    weight_smem = gl.allocate_shared_memory(gl.float16, [STAGES, 16, BLOCK], eights)
    plain_smem = weight_smem
    if TAIL == 0:
        plain_smem = gl.allocate_shared_memory(gl.bfloat16, [STAGES, 16, BLOCK], eights)
    fade_smem = gl.allocate_shared_memory(gl.float32, [STAGES, 16], flat)
    final_smem = gl.allocate_shared_memory(gl.float32, [2, 16], flat)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], hopper.mbarrier.MBarrierLayout())
    weighed = gl.allocate_shared_memory(gl.int64, [STAGES, 1], hopper.mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], hopper.mbarrier.MBarrierLayout())
    landed = gl.allocate_shared_memory(gl.int64, [STAGES, 1], hopper.mbarrier.MBarrierLayout())
    final_full = gl.allocate_shared_memory(gl.int64, [1], hopper.mbarrier.MBarrierLayout())
    final_empty = gl.allocate_shared_memory(gl.int64, [1], hopper.mbarrier.MBarrierLayout())
    hopper.mbarrier.init(final_full, count=1)
    hopper.mbarrier.init(final_empty, count=1)
    for slot in gl.static_range(STAGES):
        hopper.mbarrier.init(landed.index(slot), count=COPY_THREADS)
        hopper.mbarrier.init(full.index(slot), count=1)
        hopper.mbarrier.init(weighed.index(slot), count=1)
        hopper.mbarrier.init(empty.index(slot), count=1)
    hopper.fence_async_shared()
    wait_for_inputs()
    barrier()
    # the tuples stand here in full: put into a variable, a constexpr becomes a tensor
    gl.warp_specialize(
        [
            (_weigh_blocks, (
                q, ends, sink, lse, items, tokens, splits, width, scale_log2,
                value_smem, rotary_smem, bias_smem, exponent_smem, share_smem,
                query_smem, weight_smem, plain_smem, fade_smem, final_smem, full, weighed, final_full, final_empty,
                HEADS, TAIL, BLOCK, STAGES, HAS_ENDS, HAS_SINK, WANT_LSE, PARTIAL, NARROW, GROUP, HELD_QUERIES,
                WARPS,
            )),
            (_add_values, (
                ends, out, items, tokens, splits, width,
                value_smem, rotary_smem, exponent_smem, share_smem, narrow_smem, weight_smem, plain_smem, fade_smem,
                final_smem, full, weighed, empty, final_full, final_empty,
                HEADS, TAIL, BLOCK, STAGES, HAS_ENDS, PARTIAL, NARROW, GROUP, VALUE_WARPS,
            )),
            (copy_rows, (
                data, scales, indices, ends, items, splits, rows, width,
                entry_smem, value_smem, rotary_smem, scale_smem, bias_smem, exponent_smem, share_smem, narrow_smem,
                landed, full, empty, HEADS, BLOCK, STAGES, HAS_ENDS, ROW, NARROW, GROUP, ROTARY, GROUPS, PLACED,
            )),
        ],
        [VALUE_WARPS, COPY_WARPS], [VALUE_REGISTERS, COPY_REGISTERS],
    )  # fmt: skip
