"""Attention on devices of compute capability 9.0: the same result as the kernel in triton.py, closer to the matrix
unit.

A block stays on its multiprocessor and takes one tile after another, a tile being 64 heads of one token. Four
partitions of four warps hand blocks of gathered rows to each other through shared memory:

- one gathers rows, a ring of stages ahead;
- one multiplies queries with them and makes weights (the online softmax);
- two multiply weights with values, each for one half of the value's elements: an output of 64 × 512 in float32 does not
  fit the registers of one.

So the products of one block run while the softmax of the next does, and rows of the next tile are gathered before the
current one is done. What the softmax hands over is a message in a ring: weights, and the factor by which the outputs so
far are to be multiplied; the last message of a tile is a factor alone, the reciprocal of the denominator.

Written in Gluon, which is an experimental part of Triton and cannot be interpreted: import this module only where
`plan.AttentionKernel.HOPPER` was chosen. No length is specialised upon.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from streamindex_service.ops.sparse_attention.plan import Tiles
from streamindex_service.ops.sparse_attention.problem import Problem

# What this module takes from Gluon and this Triton's does not have.
MISSING = [
    name
    for module, names in (
        (gl, ("warp_specialize", "allocate_shared_memory", "NVMMADistributedLayout")),
        (hopper, ("mbarrier", "tma", "warpgroup_mma", "warpgroup_mma_wait", "fence_async_shared")),
        (async_copy, ("async_copy_global_to_shared", "mbarrier_arrive")),
    )
    for name in names
    if not hasattr(module, name)
]
# named so in Triton 3.6, and later
_barrier = getattr(gl, "thread_barrier", None) or gl.barrier
_copy = getattr(hopper.tma, "async_load", None) or hopper.tma.async_copy_global_to_shared
_LOG2E = 1.4426950408889634
_LN2 = gl.constexpr(0.6931471805599453)
_HEADS = 64
_VALUE_REGISTERS = 176
_GATHER_REGISTERS = 48
# ptxas takes no instruction with a larger output, whatever registers the partition has
VALUE_COLUMNS = gl.constexpr(128)


def launch(problem: Problem, tiles: Tiles, ends, out, lse, processors: int) -> None:
    """Fill the outputs. ends: [tokens] int32, one past the last valid entry of each index row."""
    p = problem
    count = p.tokens * p.heads // _HEADS
    queries = p.q.view(-1, p.key_dim)
    tail = p.key_dim - p.value_dim
    q_desc = _describe(queries, p.value_dim)
    attend_kernel[(min(processors, count),)](
        q_desc, _describe(queries, tail) if tail else q_desc, p.kv.data, p.indices, ends,
        ends if p.sink is None else p.sink, out, ends if lse is None else lse,
        count, p.kv.rows, p.width, p.scale * _LOG2E,
        HEADS=p.heads, DIM=p.value_dim, TAIL=tail, BLOCK=tiles.block_entries, STAGES=tiles.stages,
        MESSAGES=tiles.messages, AHEAD=tiles.ahead, HAS_SINK=p.sink is not None, WANT_LSE=lse is not None,
        VALUE_REGISTERS=_VALUE_REGISTERS, GATHER_REGISTERS=_GATHER_REGISTERS,
        num_warps=4,
    )  # fmt: skip


def _describe(queries, columns: int) -> TensorDescriptor:
    block = [_HEADS, columns]
    return TensorDescriptor.from_tensor(queries, block, gl.NVMMASharedLayout.get_default_for(block, gl.bfloat16))


@gluon.jit
def _gather(
    data, indices, ends, tiles, rows, width, key_smem, tail_smem, bias_smem, full, empty,
    HEADS: gl.constexpr, DIM: gl.constexpr, TAIL: gl.constexpr, BLOCK: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Keep the ring of gathered rows full. bias: 0 for a valid entry, −inf for another, whose row is zeros."""
    HEAD_BLOCKS: gl.constexpr = HEADS // 64
    wide: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    lane = gl.arange(0, BLOCK, layout=gl.SliceLayout(1, wide))
    dim = gl.arange(0, DIM, layout=gl.SliceLayout(0, wide))
    done = tiles * 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        token = tile // HEAD_BLOCKS
        end = gl.load(ends + token)
        entries = indices + token.to(gl.int64) * width
        following = gl.load(entries + lane, mask=lane < end, other=-1)
        for start in range(0, end, BLOCK):
            slot = done % STAGES
            index = following
            following = gl.load(entries + start + BLOCK + lane, mask=start + BLOCK + lane < end, other=-1)
            valid = (index >= 0) & (index < rows)
            place = gl.where(valid, index, 0).to(gl.int64) * (DIM + TAIL)
            row = data + gl.expand_dims(place, 1)
            mask = gl.expand_dims(valid, 1)
            hopper.mbarrier.wait(empty.index(slot), ((done // STAGES) & 1) ^ 1)
            async_copy.async_copy_global_to_shared(
                key_smem.index(slot), row + gl.expand_dims(dim, 0), mask=mask & (gl.expand_dims(dim, 0) >= 0)
            )
            if TAIL > 0:
                tail = gl.expand_dims(gl.arange(0, TAIL, layout=gl.SliceLayout(0, wide)), 0)
                async_copy.async_copy_global_to_shared(tail_smem.index(slot), row + DIM + tail, mask=mask & (tail >= 0))
            async_copy.mbarrier_arrive(full.index(slot), increment_count=False)
            bias_smem.index(slot).store(gl.where(valid, 0.0, float("-inf")))
            hopper.mbarrier.arrive(full.index(slot), count=1)
            done += 1


@gluon.jit
def _multiply(
    q_smem, q_tail_smem, key_smem, tail_smem, full, done,
    TAIL: gl.constexpr, BLOCK: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Products of the queries with block number `done` of the ring, under way: [64, BLOCK]."""
    mma: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK, 16])
    slot = done % STAGES
    hopper.mbarrier.wait(full.index(slot), (done // STAGES) & 1)
    hopper.fence_async_shared()
    zero = gl.zeros((64, BLOCK), gl.float32, layout=mma)
    products = hopper.warpgroup_mma(q_smem, key_smem.index(slot).permute((1, 0)), zero, use_acc=False, is_async=True)
    if TAIL > 0:
        products = hopper.warpgroup_mma(q_tail_smem, tail_smem.index(slot).permute((1, 0)), products, is_async=True)
    return products


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
    q_desc, q_tail_desc, ends, sink, lse, tiles, scale_log2,
    q_smem, q_tail_smem, key_smem, tail_smem, bias_smem, weight_smem, factor_smem,
    q_full, full, weight_full, weight_empty,
    HEADS: gl.constexpr, DIM: gl.constexpr, TAIL: gl.constexpr, BLOCK: gl.constexpr, STAGES: gl.constexpr,
    MESSAGES: gl.constexpr, AHEAD: gl.constexpr, HAS_SINK: gl.constexpr, WANT_LSE: gl.constexpr,
):  # fmt: skip
    """Logits and the online softmax of each block: a message of weights [64, BLOCK] bf16 and factors [64].

    AHEAD: the products of the next block are under way during the softmax of this one.
    """
    HEAD_BLOCKS: gl.constexpr = HEADS // 64
    mma: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK, 16])
    by_head: gl.constexpr = gl.SliceLayout(1, mma)
    head = gl.arange(0, 64, layout=by_head)
    done = tiles * 0
    sent = tiles * 0
    turn = tiles * 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        token = tile // HEAD_BLOCKS
        first_head = tile % HEAD_BLOCKS * 64
        hopper.mbarrier.expect(q_full, 128 * (DIM + TAIL))
        _copy(q_desc, [token * HEADS + first_head, 0], q_full, q_smem)
        if TAIL > 0:
            _copy(q_tail_desc, [token * HEADS + first_head, DIM], q_full, q_tail_smem)
        blocks = (gl.load(ends + token) + BLOCK - 1) // BLOCK
        largest = gl.full((64,), float("-inf"), gl.float32, layout=by_head)
        total = gl.zeros((64,), gl.float32, layout=by_head)
        hopper.mbarrier.wait(q_full, turn & 1)
        turn += 1
        if AHEAD:
            if blocks > 0:
                products = _multiply(q_smem, q_tail_smem, key_smem, tail_smem, full, done, TAIL, BLOCK, STAGES)
                products = hopper.warpgroup_mma_wait(0, deps=[products])
                for _ in range(1, blocks):
                    following = _multiply(q_smem, q_tail_smem, key_smem, tail_smem, full, done + 1, TAIL, BLOCK, STAGES)
                    largest, total = _send(
                        products, largest, total, scale_log2, bias_smem.index(done % STAGES), weight_smem,
                        factor_smem, weight_full, weight_empty, sent, MESSAGES,
                    )  # fmt: skip
                    products = hopper.warpgroup_mma_wait(0, deps=[following])
                    done += 1
                    sent += 1
                largest, total = _send(
                    products, largest, total, scale_log2, bias_smem.index(done % STAGES), weight_smem, factor_smem,
                    weight_full, weight_empty, sent, MESSAGES,
                )  # fmt: skip
                done += 1
                sent += 1
        else:
            for _ in range(blocks):
                products = _multiply(q_smem, q_tail_smem, key_smem, tail_smem, full, done, TAIL, BLOCK, STAGES)
                products = hopper.warpgroup_mma_wait(0, deps=[products])
                largest, total = _send(
                    products, largest, total, scale_log2, bias_smem.index(done % STAGES), weight_smem, factor_smem,
                    weight_full, weight_empty, sent, MESSAGES,
                )  # fmt: skip
                done += 1
                sent += 1
        nothing = total == 0.0
        if WANT_LSE:
            natural = (largest + gl.log2(total)) * _LN2
            place = token.to(gl.int64) * HEADS + first_head
            gl.store(lse + place + head, gl.where(nothing, float("inf"), natural))
        if HAS_SINK:
            logit = gl.load(sink + first_head + head) * (1.0 / _LN2)
            total += gl.where(nothing, 0.0, gl.exp2(logit - largest))
        message = sent % MESSAGES
        hopper.mbarrier.wait(weight_empty.index(message), ((sent // MESSAGES) & 1) ^ 1)
        factor_smem.index(message).store(gl.where(nothing, 0.0, 1.0 / total))
        hopper.mbarrier.arrive(weight_full.index(message), count=1)
        sent += 1


@gluon.jit
def _add_values(
    ends, out, tiles, key_smem, weight_smem, factor_smem, full, empty, weight_full, weight_empty,
    HALF: gl.constexpr, HEADS: gl.constexpr, DIM: gl.constexpr, BLOCK: gl.constexpr, STAGES: gl.constexpr,
    MESSAGES: gl.constexpr,
):  # fmt: skip
    """Weights times values, for one half of the values' elements."""
    HEAD_BLOCKS: gl.constexpr = HEADS // 64
    COLUMNS: gl.constexpr = DIM // 2
    mma: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, VALUE_COLUMNS, 16]
    )
    by_head: gl.constexpr = gl.SliceLayout(1, mma)
    head = gl.expand_dims(gl.arange(0, 64, layout=by_head), 1)
    column = gl.expand_dims(HALF * COLUMNS + gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, mma)), 0)
    done = tiles * 0
    sent = tiles * 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        token = tile // HEAD_BLOCKS
        end = gl.load(ends + token)
        acc = gl.zeros((64, COLUMNS), gl.float32, layout=mma)
        for _ in range(0, end, BLOCK):
            slot, message = done % STAGES, sent % MESSAGES
            hopper.mbarrier.wait(full.index(slot), (done // STAGES) & 1)
            hopper.mbarrier.wait(weight_full.index(message), (sent // MESSAGES) & 1)
            hopper.fence_async_shared()
            factor = factor_smem.index(message).load(by_head)
            acc = acc * gl.expand_dims(factor, 1)
            values = key_smem.index(slot).slice(HALF * COLUMNS, COLUMNS, dim=1)
            acc = hopper.warpgroup_mma(weight_smem.index(message), values, acc, is_async=True)
            acc = hopper.warpgroup_mma_wait(0, deps=[acc])
            hopper.mbarrier.arrive(weight_empty.index(message), count=1)
            hopper.mbarrier.arrive(empty.index(slot), count=1)
            done += 1
            sent += 1
        message = sent % MESSAGES
        hopper.mbarrier.wait(weight_full.index(message), (sent // MESSAGES) & 1)
        factor = factor_smem.index(message).load(by_head)
        hopper.mbarrier.arrive(weight_empty.index(message), count=1)
        sent += 1
        place = token.to(gl.int64) * HEADS + tile % HEAD_BLOCKS * 64
        acc = acc * gl.expand_dims(factor, 1)
        gl.store(out + place * DIM + (head * DIM + column), acc.to(gl.bfloat16))


@gluon.jit(
    do_not_specialize=["tiles", "rows", "width", "scale_log2"],
    do_not_specialize_on_alignment=["indices", "ends", "sink", "lse"],
)
def attend_kernel(
    q_desc, q_tail_desc, data, indices, ends, sink, out, lse, tiles, rows, width, scale_log2,
    HEADS: gl.constexpr, DIM: gl.constexpr, TAIL: gl.constexpr, BLOCK: gl.constexpr, STAGES: gl.constexpr,
    MESSAGES: gl.constexpr, AHEAD: gl.constexpr, HAS_SINK: gl.constexpr, WANT_LSE: gl.constexpr,
    VALUE_REGISTERS: gl.constexpr, GATHER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """All tiles. Grid: (multiprocessors,); 4 warps, and those of the other partitions.

    q_desc: q as [tokens × HEADS, DIM + TAIL] in blocks of [64, DIM]; q_tail_desc: in blocks of [64, TAIL].
    Everything else as in triton.py's kernel.
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
    q_full = gl.allocate_shared_memory(gl.int64, [1], hopper.mbarrier.MBarrierLayout())
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], hopper.mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], hopper.mbarrier.MBarrierLayout())
    weight_full = gl.allocate_shared_memory(gl.int64, [MESSAGES, 1], hopper.mbarrier.MBarrierLayout())
    weight_empty = gl.allocate_shared_memory(gl.int64, [MESSAGES, 1], hopper.mbarrier.MBarrierLayout())
    hopper.mbarrier.init(q_full, count=1)
    for slot in gl.static_range(STAGES):
        hopper.mbarrier.init(full.index(slot), count=129)  # copies of 128 threads, and the biases
        hopper.mbarrier.init(empty.index(slot), count=2)
    for message in gl.static_range(MESSAGES):
        hopper.mbarrier.init(weight_full.index(message), count=1)
        hopper.mbarrier.init(weight_empty.index(message), count=2)
    hopper.fence_async_shared()
    _barrier()
    # the tuples stand here in full: put into a variable, a constexpr becomes a tensor
    gl.warp_specialize(
        [
            (_weigh, (
                q_desc, q_tail_desc, ends, sink, lse, tiles, scale_log2,
                q_smem, q_tail_smem, key_smem, tail_smem, bias_smem, weight_smem, factor_smem,
                q_full, full, weight_full, weight_empty,
                HEADS, DIM, TAIL, BLOCK, STAGES, MESSAGES, AHEAD, HAS_SINK, WANT_LSE,
            )),
            (_add_values, (
                ends, out, tiles, key_smem, weight_smem, factor_smem, full, empty, weight_full, weight_empty,
                0, HEADS, DIM, BLOCK, STAGES, MESSAGES,
            )),
            (_add_values, (
                ends, out, tiles, key_smem, weight_smem, factor_smem, full, empty, weight_full, weight_empty,
                1, HEADS, DIM, BLOCK, STAGES, MESSAGES,
            )),
            (_gather, (
                data, indices, ends, tiles, rows, width, key_smem, tail_smem, bias_smem, full, empty,
                HEADS, DIM, TAIL, BLOCK, STAGES,
            )),
        ],
        [4, 4, 4], [VALUE_REGISTERS, VALUE_REGISTERS, GATHER_REGISTERS],
    )  # fmt: skip
