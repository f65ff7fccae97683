"""Attention on devices of compute capability 9.0: the same result as the kernel in triton.py, closer to the matrix
unit.

A block stays on its multiprocessor and takes one item after another, an item being 64 heads of one token and a part of
its index row. Four partitions of four warps hand blocks of gathered rows to each other through shared memory:

- one brings rows in, a ring of stages ahead (hopper_gather.py);
- one multiplies queries with them and makes weights (the online softmax);
- two multiply weights with values, each for one half of the value's elements: an output of 64 × 512 in float32 does not
  fit the registers of one.

So the products of one block run while the softmax of the next does, and rows and queries of the next item come in
before the current one is done. What the softmax hands over is a message in a ring: weights, and the factor by which the
outputs so far are to be multiplied; when an item ends, the reciprocal of the denominator goes a way of its own.

Written in Gluon, which is an experimental part of Triton and cannot be interpreted: import this module only where
`plan.AttentionKernel.HOPPER` was chosen. No length is specialised upon.
"""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from streamindex_service.ops import gluon_names
from streamindex_service.ops.gluon_names import barrier, load_tile, missing
from streamindex_service.ops.sparse_attention import hopper_gather
from streamindex_service.ops.sparse_attention.hopper_gather import HEADS_AN_ITEM, ITEM_HEADS
from streamindex_service.ops.sparse_attention.hopper_items import span, wait_for_inputs
from streamindex_service.ops.sparse_attention.plan import Plan
from streamindex_service.ops.sparse_attention.problem import Problem

# What this module and hopper_gather.py take from Gluon and this Triton's does not have.
MISSING = missing(
    (gl, ("warp_specialize", "allocate_shared_memory", "NVMMADistributedLayout", "inline_asm_elementwise")),
    (hopper, ("mbarrier", "tma", "warpgroup_mma", "warpgroup_mma_wait", "fence_async_shared")),
    (async_copy, ("commit_group", "mbarrier_arrive", "wait_group")),
    (gluon_names, ("barrier", "load_tile", "load_async", "view")),
)
_LOG2E = 1.4426950408889634
_LN2 = gl.constexpr(0.6931471805599453)
# ptxas takes no instruction with a larger output, whatever registers the partition has
VALUE_COLUMNS = gl.constexpr(128)
_VALUE_REGISTERS = 176
_COPY_REGISTERS = 48
_UNPACK_REGISTERS = 88
_UNPACK_VALUE_REGISTERS = 168


def launch(problem: Problem, plan: Plan, ends, out, lse, processors: int) -> None:
    """Fill `out` and `lse`, partial ones of plan.splits parts if there are several. ends: [tokens] int32, one past the
    last valid entry of each index row, or None for the width."""
    p, tiles = problem, plan.tiles
    items = p.tokens * p.heads // ITEM_HEADS * plan.splits
    queries = p.q.view(-1, p.key_dim)
    tail = p.key_dim - p.value_dim
    q_desc = _describe(queries, p.value_dim)
    packing = p.kv.format.packed
    partial = plan.splits > 1
    attend_kernel[(min(processors, items),)](
        q_desc, _describe(queries, tail) if tail else q_desc, *_views(p), p.indices,
        p.indices if ends is None else ends, p.indices if p.sink is None else p.sink, out,
        p.indices if lse is None else lse, items, p.tokens, plan.splits, p.kv.rows, p.width, p.scale * _LOG2E,
        HEADS=p.heads, DIM=p.value_dim, TAIL=tail, BLOCK=tiles.block_entries, STAGES=tiles.stages,
        MESSAGES=tiles.messages, HAS_ENDS=ends is not None, HAS_SINK=p.sink is not None and not partial,
        WANT_LSE=lse is not None, PARTIAL=partial, PLACED=p.placed,
        ROW=packing.row_bytes if packing else 0, NARROW=packing.narrow if packing else 0,
        GROUP=packing.group if packing else 0, ROTARY=packing.rotary_offset if packing else 0,
        VALUE_REGISTERS=_UNPACK_VALUE_REGISTERS if packing else _VALUE_REGISTERS,
        GATHER_REGISTERS=_UNPACK_REGISTERS if packing else _COPY_REGISTERS, num_warps=4, launch_pdl=True,
    )  # fmt: skip


def _views(problem: Problem) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows as the kernel reads them, and the scales beside packed ones (else any tensor)."""
    kv = problem.kv
    if kv.format.packed is None:
        return kv.data, problem.indices
    return kv.data.view(torch.int32), problem.indices if kv.scales is None else kv.scales.view(torch.int64)


def _describe(queries, columns: int) -> TensorDescriptor:
    block = [ITEM_HEADS, columns]
    return TensorDescriptor.from_tensor(queries, block, gl.NVMMASharedLayout.get_default_for(block, gl.bfloat16))


@gluon.constexpr_function
def _row_layout(columns):
    """Where outputs of a product go so that a thread stores 16 bytes in a row: four threads trade their columns."""
    registers = [[0, 1], [0, 2], [0, 4], [8, 0]] + [[0, 1 << bit] for bit in range(5, columns.bit_length() - 1)]
    lanes = [[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout(registers, lanes, [[16, 0], [32, 0]], [], [64, columns])


@gluon.jit
def _multiply(
    q_smem, q_tail_smem, key_smem, tail_smem, full, done,
    TAIL: gl.constexpr, BLOCK: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Products of the queries with block number `done` of the ring: [64, BLOCK]."""
    mma: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK, 16])
    slot = done % STAGES
    hopper.mbarrier.wait(full.index(slot), (done // STAGES) & 1)
    hopper.fence_async_shared()
    zero = gl.zeros((64, BLOCK), gl.float32, layout=mma)
    products = hopper.warpgroup_mma(q_smem, key_smem.index(slot).permute((1, 0)), zero, use_acc=False, is_async=True)
    if TAIL > 0:
        products = hopper.warpgroup_mma(q_tail_smem, tail_smem.index(slot).permute((1, 0)), products, is_async=True)
    return hopper.warpgroup_mma_wait(0, deps=[products])


@gluon.jit
def _ask(
    q_desc, q_tail_desc, item, items, splits, q_smem, q_tail_smem, q_full,
    HEADS: gl.constexpr, DIM: gl.constexpr, TAIL: gl.constexpr,
):  # fmt: skip
    """Have the queries of an item brought in, if there is such an item."""
    HEAD_BLOCKS: gl.constexpr = HEADS // 64
    if item < items:
        row = item // HEAD_BLOCKS // splits * HEADS + item % HEAD_BLOCKS * 64
        hopper.mbarrier.expect(q_full, 128 * (DIM + TAIL))
        load_tile(q_desc, [row, 0], q_full, q_smem)
        if TAIL > 0:
            load_tile(q_tail_desc, [row, DIM], q_full, q_tail_smem)


@gluon.jit
def _send(
    products, largest, total, scale_log2, bias_smem, weight_smem, factor_smem, weight_full, weight_empty, sent,
    MESSAGES: gl.constexpr,
):  # fmt: skip
    """One step of the online softmax, and its message; returns the largest logits and the denominators so far."""
    logits = products * scale_log2 + gl.expand_dims(bias_smem.load(gl.SliceLayout(0, products.type.layout)), 0)
    new_largest = gl.maximum(largest, gl.max(logits, axis=1))
    # of a row without an entry so far: any finite number, for −inf − −inf is no number
    shift = gl.where(new_largest == float("-inf"), 0.0, new_largest)
    factor = gl.exp2(largest - shift)
    weights = gl.exp2(logits - gl.expand_dims(shift, 1))
    total = total * factor + gl.sum(weights, axis=1)
    message = sent % MESSAGES
    hopper.mbarrier.wait(weight_empty.index(message), ((sent // MESSAGES) & 1) ^ 1)
    weight_smem.index(message).store(weights.to(gl.bfloat16))
    factor_smem.index(message).store(factor)
    hopper.fence_async_shared()
    hopper.mbarrier.arrive(weight_full.index(message), count=1)
    return new_largest, total


@gluon.jit
def _weigh(
    q_desc, q_tail_desc, ends, sink, lse, items, tokens, splits, width, scale_log2,
    q_smem, q_tail_smem, key_smem, tail_smem, bias_smem, weight_smem, factor_smem, final_smem,
    q_full, full, weight_full, weight_empty, final_full, final_empty,
    HEADS: gl.constexpr, DIM: gl.constexpr, TAIL: gl.constexpr, BLOCK: gl.constexpr, STAGES: gl.constexpr,
    MESSAGES: gl.constexpr, HAS_ENDS: gl.constexpr, HAS_SINK: gl.constexpr, WANT_LSE: gl.constexpr,
    PARTIAL: gl.constexpr,
):  # fmt: skip
    """Logits and the online softmax of each block: a message of weights [64, BLOCK] bf16 and factors [64]; at the end
    of an item the reciprocals of the denominators [64]."""
    mma: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK, 16])
    by_head: gl.constexpr = gl.SliceLayout(1, mma)
    head = gl.arange(0, 64, layout=by_head)
    done = items * 0
    turn = items * 0
    _ask(q_desc, q_tail_desc, gl.program_id(0), items, splits, q_smem, q_tail_smem, q_full, HEADS, DIM, TAIL)
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        token, first_head, part, begin, end = span(ends, item, splits, width, HEADS, HEADS_AN_ITEM, BLOCK, HAS_ENDS)
        largest = gl.full((64,), float("-inf"), gl.float32, layout=by_head)
        total = gl.zeros((64,), gl.float32, layout=by_head)
        hopper.mbarrier.wait(q_full, turn & 1)
        for _ in range(begin, end, BLOCK):
            products = _multiply(q_smem, q_tail_smem, key_smem, tail_smem, full, done, TAIL, BLOCK, STAGES)
            largest, total = _send(
                products, largest, total, scale_log2, bias_smem.index(done % STAGES), weight_smem, factor_smem,
                weight_full, weight_empty, done, MESSAGES,
            )  # fmt: skip
            done += 1
        barrier()  # every warp is done with the queries
        following = item + gl.num_programs(0)
        _ask(q_desc, q_tail_desc, following, items, splits, q_smem, q_tail_smem, q_full, HEADS, DIM, TAIL)
        nothing = total == 0.0
        if WANT_LSE:
            place = (part.to(gl.int64) * tokens + token) * HEADS + first_head
            base2 = largest + gl.log2(total)
            if PARTIAL:
                gl.store(lse + place + head, gl.where(nothing, float("-inf"), base2))
            else:
                gl.store(lse + place + head, gl.where(nothing, float("inf"), base2 * _LN2))
        if HAS_SINK:
            logit = gl.load(sink + first_head + head) * (1.0 / _LN2)
            total += gl.where(nothing, 0.0, gl.exp2(logit - largest))
        hopper.mbarrier.wait(final_empty, (turn & 1) ^ 1)
        final_smem.store(gl.where(nothing, 0.0, 1.0 / total))
        hopper.mbarrier.arrive(final_full, count=1)
        turn += 1


@gluon.jit
def _add_values(
    ends, out, items, tokens, splits, width, key_smem, weight_smem, factor_smem, final_smem,
    full, empty, weight_full, weight_empty, final_full, final_empty,
    HALF: gl.constexpr, HEADS: gl.constexpr, DIM: gl.constexpr, TAIL: gl.constexpr, BLOCK: gl.constexpr,
    STAGES: gl.constexpr, MESSAGES: gl.constexpr, HAS_ENDS: gl.constexpr, PARTIAL: gl.constexpr,
):  # fmt: skip
    """Weights times values, for one half of the values' elements."""
    COLUMNS: gl.constexpr = DIM // 2
    mma: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, VALUE_COLUMNS, 16]
    )
    by_head: gl.constexpr = gl.SliceLayout(1, mma)
    # a longer key leaves no shared memory for the trade
    stored: gl.constexpr = mma if PARTIAL or TAIL > 0 else _row_layout(COLUMNS)
    head = gl.expand_dims(gl.arange(0, 64, layout=gl.SliceLayout(1, stored)), 1)
    column = gl.expand_dims(HALF * COLUMNS + gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, stored)), 0)
    done = items * 0
    turn = items * 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        token, first_head, part, begin, end = span(ends, item, splits, width, HEADS, HEADS_AN_ITEM, BLOCK, HAS_ENDS)
        acc = gl.zeros((64, COLUMNS), gl.float32, layout=mma)
        for _ in range(begin, end, BLOCK):
            slot, message = done % STAGES, done % MESSAGES
            hopper.mbarrier.wait(full.index(slot), (done // STAGES) & 1)
            hopper.mbarrier.wait(weight_full.index(message), (done // MESSAGES) & 1)
            hopper.fence_async_shared()
            factor = factor_smem.index(message).load(by_head)
            acc = acc * gl.expand_dims(factor, 1)
            values = key_smem.index(slot).slice(HALF * COLUMNS, COLUMNS, dim=1)
            acc = hopper.warpgroup_mma(weight_smem.index(message), values, acc, is_async=True)
            acc = hopper.warpgroup_mma_wait(0, deps=[acc])
            hopper.mbarrier.arrive(weight_empty.index(message), count=1)
            hopper.mbarrier.arrive(empty.index(slot), count=1)
            done += 1
        hopper.mbarrier.wait(final_full, turn & 1)
        factor = final_smem.load(by_head)
        hopper.mbarrier.arrive(final_empty, count=1)
        turn += 1
        acc = acc * gl.expand_dims(factor, 1)
        if PARTIAL:
            place = (part.to(gl.int64) * tokens + token) * HEADS + first_head
            gl.store(out + place * DIM + (head * DIM + column), acc)
        else:
            place = token * HEADS + first_head
            value = acc.to(gl.bfloat16) if TAIL > 0 else gl.convert_layout(acc.to(gl.bfloat16), stored)
            gl.store(out + place * DIM + (head * DIM + column), value)


@gluon.jit(
    do_not_specialize=["items", "tokens", "splits", "rows", "width", "scale_log2"],
    do_not_specialize_on_alignment=["scales", "indices", "ends", "sink", "lse"],
)
def attend_kernel(
    q_desc, q_tail_desc, data, scales, indices, ends, sink, out, lse,
    items, tokens, splits, rows, width, scale_log2,
    HEADS: gl.constexpr, DIM: gl.constexpr, TAIL: gl.constexpr, BLOCK: gl.constexpr, STAGES: gl.constexpr,
    MESSAGES: gl.constexpr, HAS_ENDS: gl.constexpr, HAS_SINK: gl.constexpr, WANT_LSE: gl.constexpr,
    PARTIAL: gl.constexpr, ROW: gl.constexpr, NARROW: gl.constexpr, GROUP: gl.constexpr, ROTARY: gl.constexpr,
    PLACED: gl.constexpr, VALUE_REGISTERS: gl.constexpr, GATHER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """All items. Grid: (multiprocessors,); 4 warps, and those of the other partitions.

    q_desc: q as [tokens × HEADS, DIM + TAIL] in blocks of [64, DIM]; q_tail_desc: in blocks of [64, TAIL].
    data, scales: see hopper_gather.py; NARROW is 0 for bf16 rows. Everything else as in triton.py's kernel.
    """
    key_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK, DIM], gl.bfloat16)
    weight_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, BLOCK], gl.bfloat16)
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    q_smem = gl.allocate_shared_memory(gl.bfloat16, [64, DIM], q_desc.layout)
    key_smem = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BLOCK, DIM], key_layout)
    q_tail_smem = q_smem
    tail_smem = key_smem
    if TAIL > 0:
        tail_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK, TAIL], gl.bfloat16)
        q_tail_smem = gl.allocate_shared_memory(gl.bfloat16, [64, TAIL], q_tail_desc.layout)
        tail_smem = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BLOCK, TAIL], tail_layout)
    bias_smem = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK], flat)
    weight_smem = gl.allocate_shared_memory(gl.bfloat16, [MESSAGES, 64, BLOCK], weight_layout)
    factor_smem = gl.allocate_shared_memory(gl.float32, [MESSAGES, 64], flat)
    final_smem = gl.allocate_shared_memory(gl.float32, [64], flat)
    q_full = gl.allocate_shared_memory(gl.int64, [1], hopper.mbarrier.MBarrierLayout())
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], hopper.mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], hopper.mbarrier.MBarrierLayout())
    weight_full = gl.allocate_shared_memory(gl.int64, [MESSAGES, 1], hopper.mbarrier.MBarrierLayout())
    weight_empty = gl.allocate_shared_memory(gl.int64, [MESSAGES, 1], hopper.mbarrier.MBarrierLayout())
    final_full = gl.allocate_shared_memory(gl.int64, [1], hopper.mbarrier.MBarrierLayout())
    final_empty = gl.allocate_shared_memory(gl.int64, [1], hopper.mbarrier.MBarrierLayout())
    hopper.mbarrier.init(q_full, count=1)
    hopper.mbarrier.init(final_full, count=1)
    hopper.mbarrier.init(final_empty, count=2)
    for slot in gl.static_range(STAGES):
        # bf16: copies of 128 threads, and the biases
        hopper.mbarrier.init(full.index(slot), count=1 if NARROW else 129)
        hopper.mbarrier.init(empty.index(slot), count=2)
    for message in gl.static_range(MESSAGES):
        hopper.mbarrier.init(weight_full.index(message), count=1)
        hopper.mbarrier.init(weight_empty.index(message), count=2)
    hopper.fence_async_shared()
    wait_for_inputs()
    barrier()
    # the tuples stand here in full: put into a variable, a constexpr becomes a tensor
    if NARROW == 0:
        gl.warp_specialize(
            [
                (_weigh, (
                    q_desc, q_tail_desc, ends, sink, lse, items, tokens, splits, width, scale_log2,
                    q_smem, q_tail_smem, key_smem, tail_smem, bias_smem, weight_smem, factor_smem, final_smem,
                    q_full, full, weight_full, weight_empty, final_full, final_empty,
                    HEADS, DIM, TAIL, BLOCK, STAGES, MESSAGES, HAS_ENDS, HAS_SINK, WANT_LSE, PARTIAL,
                )),
                (_add_values, (
                    ends, out, items, tokens, splits, width, key_smem, weight_smem, factor_smem, final_smem,
                    full, empty, weight_full, weight_empty, final_full, final_empty,
                    0, HEADS, DIM, TAIL, BLOCK, STAGES, MESSAGES, HAS_ENDS, PARTIAL,
                )),
                (_add_values, (
                    ends, out, items, tokens, splits, width, key_smem, weight_smem, factor_smem, final_smem,
                    full, empty, weight_full, weight_empty, final_full, final_empty,
                    1, HEADS, DIM, TAIL, BLOCK, STAGES, MESSAGES, HAS_ENDS, PARTIAL,
                )),
                (hopper_gather.copy_rows, (
                    data, indices, ends, items, splits, rows, width, key_smem, tail_smem, bias_smem, full, empty,
                    HEADS, DIM, TAIL, BLOCK, STAGES, HAS_ENDS, PLACED,
                )),
            ],
            [4, 4, 4], [VALUE_REGISTERS, VALUE_REGISTERS, GATHER_REGISTERS],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_weigh, (
                    q_desc, q_tail_desc, ends, sink, lse, items, tokens, splits, width, scale_log2,
                    q_smem, q_tail_smem, key_smem, tail_smem, bias_smem, weight_smem, factor_smem, final_smem,
                    q_full, full, weight_full, weight_empty, final_full, final_empty,
                    HEADS, DIM, TAIL, BLOCK, STAGES, MESSAGES, HAS_ENDS, HAS_SINK, WANT_LSE, PARTIAL,
                )),
                (_add_values, (
                    ends, out, items, tokens, splits, width, key_smem, weight_smem, factor_smem, final_smem,
                    full, empty, weight_full, weight_empty, final_full, final_empty,
                    0, HEADS, DIM, TAIL, BLOCK, STAGES, MESSAGES, HAS_ENDS, PARTIAL,
                )),
                (_add_values, (
                    ends, out, items, tokens, splits, width, key_smem, weight_smem, factor_smem, final_smem,
                    full, empty, weight_full, weight_empty, final_full, final_empty,
                    1, HEADS, DIM, TAIL, BLOCK, STAGES, MESSAGES, HAS_ENDS, PARTIAL,
                )),
                (hopper_gather.unpack_rows, (
                    data, scales, indices, ends, items, splits, rows, width, key_smem, tail_smem, bias_smem,
                    full, empty, HEADS, DIM, BLOCK, STAGES, HAS_ENDS, ROW, NARROW, GROUP, ROTARY, PLACED,
                )),
            ],
            [4, 4, 4], [VALUE_REGISTERS, VALUE_REGISTERS, GATHER_REGISTERS],
        )  # fmt: skip
