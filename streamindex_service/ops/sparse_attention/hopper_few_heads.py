"""Attention of up to 32 heads over packed rows on devices of compute capability 9.0: the same result as the kernel in
triton.py, and no more work for what heads there are not.

The kernel in hopper.py multiplies 64 heads at a time. Where a model's heads are shared out over several devices (tensor
parallel), 8 to 32 are left, and most of its products would be of nothing. Here a program takes 16 heads of one token
and a part of its index row, and multiplies with mma.sync, whose operands are registers: a gathered row is widened on
its way from shared memory to the matrix unit, and never written back.

Everything 8-bit is multiplied in f16, for which the device widens e4m3 in one instruction for two. f16 has seven bits
more than e4m3 and holds every one of its numbers, so nothing is lost by that; what f16 lacks is range, which powers of
two make good. They are exact, and are taken out again in float32:

- Queries [16, D] are brought up by one power of two a head, so that the largest element has f16's largest exponent.
  Elements keep all their bits down to 2^-31 of it.
- Keys are multiplied as they stand; the scale of a group goes into the float32 sums of the group's products.
- Values are multiplied by their scale as a share of 2^e, the power of two of the largest scale of their row. A row's
  2^e goes into its weight instead: the exponent of a softmax weight is logit + e (base 2), and what is taken from all
  of them is the largest of these. The denominator is summed without 2^e.
- Weights, at most 1, are brought up by 2^15 and shares by 2^5: the range of f16 lies below.

So a row's contribution to an output keeps all bits of its weight down to 2^-28 of the largest contribution that there
is, and counts as nothing below 2^-39 of it. That is the size of the contribution, value included: a row of tiny values
may have all the weight.

Scales of one row that lie further apart than 2^20 (2^12 if they are no powers of two), or beyond what e may be, are no
shares that f16 holds. Of a block of rows with such a one, weights and values go to the matrix unit in bf16, as in the
other kernels: slower, and right.

Rotary elements are bf16 in the row and stay so, in both products.

Written in Gluon, which is an experimental part of Triton and cannot be interpreted: import this module only where
`plan.AttentionKernel.HOPPER_FEW_HEADS` was chosen. No length is specialised upon.
"""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import ampere
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from streamindex_service.ops import gluon_names
from streamindex_service.ops.gluon_names import barrier, missing, view
from streamindex_service.ops.sparse_attention.hopper_few_heads_gather import (
    ROTARY_WORDS,
    SHARE_HEAD,
    WORDS,
    exponent_of,
    load_entries,
    load_exponents,
    power,
    share_scales,
    start_copies,
    word_layout,
)
from streamindex_service.ops.sparse_attention.hopper_few_heads_products import (
    add_in_bf16,
    add_in_f16,
    hold_queries,
    load_queries,
    multiply,
)
from streamindex_service.ops.sparse_attention.plan import Plan
from streamindex_service.ops.sparse_attention.problem import Problem

# What this module takes from Gluon and this Triton's does not have.
MISSING = missing(
    (gl, ("allocate_shared_memory", "DistributedLinearLayout", "DotOperandLayout", "NVMMADistributedLayout")),
    (gl, ("SharedLinearLayout", "inline_asm_elementwise")),
    (gluon, ("constexpr_function",)),
    (ampere, ("mma_v2",)),
    (async_copy, ("commit_group", "wait_group")),
    (gluon_names, ("barrier", "load_async", "view")),
)
_LOG2E = 1.4426950408889634
_LN2 = gl.constexpr(0.6931471805599453)
HEADS_A_PROGRAM = gl.constexpr(16)  # M of mma.sync
VALUES = gl.constexpr(512)  # elements of a value, and of a key but for a tail
_WEIGHT_HEAD = gl.constexpr(2.0**15)  # what weights in f16 are multiplied by: the range of f16 lies below


def launch(problem: Problem, plan: Plan, ends, out, lse) -> None:
    """Fill `out` and `lse`, partial ones of plan.splits parts if there are several. ends: [tokens] int32, one past the
    last valid entry of each index row, or None for the width."""
    p, tiles, packing = problem, plan.tiles, problem.kv.format.packed
    partial = plan.splits > 1
    head_blocks = -(-p.heads // tiles.block_heads)
    attend_kernel[(p.tokens * head_blocks, plan.splits)](
        p.q, p.kv.data.view(torch.int32), p.indices if p.kv.scales is None else p.kv.scales.view(torch.int64),
        p.indices, p.indices if ends is None else ends, p.indices if p.sink is None else p.sink, out,
        p.indices if lse is None else lse, p.kv.rows, p.width, plan.splits, p.scale * _LOG2E,
        HEADS=p.heads, TAIL=p.key_dim - p.value_dim, BLOCK=tiles.block_entries, STAGES=tiles.stages,
        HELD_QUERIES=tiles.held_queries, HAS_ENDS=ends is not None, HAS_SINK=p.sink is not None and not partial,
        WANT_LSE=lse is not None, PARTIAL=partial, ROW=packing.row_bytes, NARROW=packing.narrow, GROUP=packing.group,
        ROTARY=packing.rotary_offset, WARPS=tiles.warps, num_warps=tiles.warps,
    )  # fmt: skip


@gluon.jit
def _weigh(products, rotary_products, scale_head, scale_log2, exponent, bias, largest):
    """One step of the online softmax. products: divided by 2^e and by a head's power of two; exponent: of 2^e.

    Returns weights with 2^e, at most 1, and without [16, BLOCK], the new `largest` [16], and the factor of all sums so
    far [16, 1].
    """
    above = (exponent - 127).to(gl.float32)
    logits = products * scale_head * power(exponent) + rotary_products * scale_log2 + bias
    new_largest = gl.maximum(largest, gl.max(logits + above, axis=1))
    # of a row without an entry so far: any finite number, for −inf − −inf is no number
    shift = gl.where(new_largest == float("-inf"), 0.0, new_largest)
    fade = gl.expand_dims(gl.exp2(largest - shift), 1)
    # e first: the difference is next to the logit itself, and what `shift` was rounded by comes back. Where logits are
    # so large that it does not, a weight may be anything, but not infinite.
    place = logits + (above - gl.expand_dims(shift, 1))
    weights = gl.exp2(gl.where(place > 0.0, 0.0, place))
    return weights, weights * power(254 - exponent), new_largest, fade


@gluon.jit
def _finish(
    totals, largest, sink, lse, place, head, HEADS: gl.constexpr, HAS_SINK: gl.constexpr, WANT_LSE: gl.constexpr,
    PARTIAL: gl.constexpr,
):  # fmt: skip
    """Store the log-sum-exp; returns the reciprocals of the denominators as powers of two and the rest, [16, 1] each.
    place: of head 0 in `lse`."""
    total = gl.sum(totals, axis=1)
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
    return gl.expand_dims(down, 1), gl.expand_dims(1.0 / total, 1)


@gluon.jit
def _store(value, out, place, first_head, FIRST: gl.constexpr, STOP: gl.constexpr, HEADS: gl.constexpr):
    """Elements FIRST to STOP of the outputs [16, n], in the type of `out`. place: of head 0 among rows of `out`."""
    layout: gl.constexpr = value.type.layout
    head = first_head + gl.arange(0, 16, layout=gl.SliceLayout(1, layout))
    element = gl.expand_dims(FIRST + gl.arange(0, value.shape[1], layout=gl.SliceLayout(0, layout)), 0)
    here = gl.expand_dims(head < HEADS, 1) & (element < STOP)
    gl.store(out + (gl.expand_dims((place + head) * VALUES, 1) + element), value.to(out.dtype.element_ty), mask=here)


@gluon.jit(
    do_not_specialize=["rows", "width", "splits", "scale_log2"],
    do_not_specialize_on_alignment=["scales", "indices", "ends", "sink", "lse"],
)
def attend_kernel(
    q, data, scales, indices, ends, sink, out, lse, rows, width, splits, scale_log2,
    HEADS: gl.constexpr, TAIL: gl.constexpr, BLOCK: gl.constexpr, STAGES: gl.constexpr, HELD_QUERIES: gl.constexpr,
    HAS_ENDS: gl.constexpr, HAS_SINK: gl.constexpr, WANT_LSE: gl.constexpr, PARTIAL: gl.constexpr,
    ROW: gl.constexpr, NARROW: gl.constexpr, GROUP: gl.constexpr, ROTARY: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """16 heads of one token over its index row, or over a part of it. Grid: (tokens × head blocks, splits).

    data: [rows, ROW / 4] int32; scales: [rows] int64, if they lie beside. NARROW: e4m3 elements of a row, GROUP of
    which share a scale; ROTARY: byte of its bf16 elements, which belong to the value unless there is a TAIL.
    HELD_QUERIES: queries stay in registers. Everything else as in triton.py's kernel.
    """
    HEAD_BLOCKS: gl.constexpr = (HEADS + HEADS_A_PROGRAM - 1) // HEADS_A_PROGRAM
    GROUPS: gl.constexpr = VALUES // GROUP  # the last of rows of 448 is none
    USED: gl.constexpr = NARROW // GROUP
    mma: gl.constexpr = gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[1, WARPS], instr_shape=[16, 8])
    left: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    right: gl.constexpr = gl.DotOperandLayout(1, mma, 2)
    by_head: gl.constexpr = gl.SliceLayout(1, mma)
    by_key: gl.constexpr = gl.SliceLayout(0, mma)
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    fours: gl.constexpr = gl.SwizzledSharedLayout(4, 1, 8, [1, 0])
    eights: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 8, [1, 0])
    value_smem = gl.allocate_shared_memory(gl.int32, [STAGES, BLOCK, WORDS], word_layout(BLOCK))
    rotary_smem = gl.allocate_shared_memory(gl.int32, [STAGES, BLOCK, ROTARY_WORDS], fours)
    if NARROW == 448:
        scale_smem = gl.allocate_shared_memory(gl.int64, [STAGES, BLOCK], flat)
    else:
        scale_smem = gl.allocate_shared_memory(gl.int32, [STAGES, GROUPS, BLOCK], plain)
    bias_smem = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK], flat)
    exponent_smem = gl.allocate_shared_memory(gl.int32, [BLOCK], flat)
    share_smem = gl.allocate_shared_memory(gl.float32, [GROUPS, BLOCK], plain)
    narrow_smem = gl.allocate_shared_memory(gl.float16, [GROUPS, BLOCK], plain)
    query_smem = gl.allocate_shared_memory(gl.float16, [4, 16, WORDS], eights)
    weight_smem = gl.allocate_shared_memory(gl.float16, [16, BLOCK], eights)
    if TAIL == 0:
        plain_smem = gl.allocate_shared_memory(gl.bfloat16, [16, BLOCK], eights)

    token = (gl.program_id(0) // HEAD_BLOCKS).to(gl.int64)
    first_head = gl.program_id(0) % HEAD_BLOCKS * HEADS_A_PROGRAM
    part = gl.program_id(1)
    end = gl.load(ends + token) if HAS_ENDS else width
    blocks = (end + BLOCK - 1) // BLOCK
    begin = blocks * part // splits * BLOCK
    end = gl.minimum(blocks * (part + 1) // splits * BLOCK, end)
    entries = indices + token * width
    found = load_entries(entries, begin, end, BLOCK, WARPS)
    for stage in gl.static_range(STAGES - 1):
        start_copies(
            data, scales, found, rows, value_smem.index(stage), rotary_smem.index(stage), scale_smem.index(stage),
            bias_smem.index(stage), ROW, NARROW, ROTARY, WARPS,
        )  # fmt: skip
        found = load_entries(entries, begin + (stage + 1) * BLOCK, end, BLOCK, WARPS)

    down = load_queries(q, query_smem, token, first_head, HEADS, VALUES + TAIL, NARROW, WARPS)
    scale_head = gl.convert_layout(down, mma) * scale_log2
    barrier()
    queries = hold_queries(query_smem, GROUPS, USED if HELD_QUERIES else 0, left)
    head = first_head + gl.arange(0, 16, layout=gl.SliceLayout(1, left))
    element = gl.expand_dims(NARROW + gl.arange(0, 2 * ROTARY_WORDS, layout=gl.SliceLayout(0, left)), 0)
    q_rotary = q + (gl.expand_dims((token * HEADS + head) * (VALUES + TAIL), 1) + element)
    q_rotary = gl.load(q_rotary, mask=gl.expand_dims(head < HEADS, 1) & (element >= 0), other=0.0)

    largest = gl.full((16,), float("-inf"), gl.float32, layout=by_head)
    totals = gl.zeros((16, BLOCK), gl.float32, layout=mma)
    acc_a = gl.zeros((16, WORDS), gl.float32, layout=mma)
    acc_b = gl.zeros((16, WORDS), gl.float32, layout=mma)
    acc_c = gl.zeros((16, WORDS), gl.float32, layout=mma)
    acc_d = gl.zeros((16, WORDS), gl.float32, layout=mma)
    acc_rotary = gl.zeros((16, 2 * ROTARY_WORDS), gl.float32, layout=mma)
    done = end * 0
    for start in range(begin, end, BLOCK):
        slot, ahead = done % STAGES, (done + STAGES - 1) % STAGES
        async_copy.wait_group(STAGES - 2)
        barrier()
        start_copies(
            data, scales, found, rows, value_smem.index(ahead), rotary_smem.index(ahead), scale_smem.index(ahead),
            bias_smem.index(ahead), ROW, NARROW, ROTARY, WARPS,
        )  # fmt: skip
        found = load_entries(entries, start + STAGES * BLOCK, end, BLOCK, WARPS)
        values = value_smem.index(slot)
        rotary = view(rotary_smem.index(slot), gl.bfloat16, [BLOCK, 2 * ROTARY_WORDS], eights)
        share_scales(scale_smem.index(slot), exponent_smem, share_smem, narrow_smem, GROUPS, NARROW, GROUP, WARPS)
        zero = gl.zeros((16, BLOCK), gl.float32, layout=mma)
        rotary_products = mma_v2(q_rotary, rotary.permute((1, 0)).load(right), zero)
        products = multiply(queries, query_smem, values, share_smem, BLOCK, GROUPS, USED, HELD_QUERIES, mma)
        exponent, beyond = load_exponents(exponent_smem, BLOCK, WARPS, by_key)
        bias = gl.expand_dims(bias_smem.index(slot).load(by_key), 0)
        weights, plain_weights, largest, fade = _weigh(
            products, rotary_products, scale_head, scale_log2, gl.expand_dims(exponent, 0), bias, largest
        )
        totals = totals * fade + plain_weights
        if TAIL == 0:
            plain_smem.store(plain_weights.to(gl.bfloat16))
        weights *= _WEIGHT_HEAD
        acc_a, acc_b, acc_c, acc_d = acc_a * fade, acc_b * fade, acc_c * fade, acc_d * fade
        if beyond:
            acc_a, acc_b, acc_c, acc_d = add_in_bf16(
                weights, values, share_smem, weight_smem, acc_a, acc_b, acc_c, acc_d, BLOCK, GROUPS, WARPS, mma
            )
        else:
            acc_a, acc_b, acc_c, acc_d = add_in_f16(
                weights, values, narrow_smem, weight_smem, acc_a, acc_b, acc_c, acc_d, BLOCK, GROUPS, WARPS, mma
            )
        if TAIL == 0:
            acc_rotary = mma_v2(plain_smem.load(left), rotary.load(right), acc_rotary * fade)
        done += 1
    async_copy.wait_group(0)

    place = (part.to(gl.int64) * (gl.num_programs(0) // HEAD_BLOCKS) + token) * HEADS
    head = first_head + gl.arange(0, 16, layout=by_head)
    down, rest = _finish(totals, largest, sink, lse, place, head, HEADS, HAS_SINK, WANT_LSE, PARTIAL)
    if TAIL == 0:
        _store(acc_rotary * down * rest, out, place, first_head, NARROW, VALUES, HEADS)
    down *= 1.0 / (_WEIGHT_HEAD * SHARE_HEAD)
    # elements as words have them
    even = gl.join(acc_a * down * rest, acc_c * down * rest)
    odd = gl.join(acc_b * down * rest, acc_d * down * rest)
    _store(gl.reshape(gl.join(even, odd), (16, VALUES)), out, place, first_head, 0, NARROW, HEADS)
