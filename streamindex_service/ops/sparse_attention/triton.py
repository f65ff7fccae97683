"""Fused kernels: attention of each query token over the rows that its indices name, and the sum of split parts.

Triton is imported here, in hopper*.py and gluon_names.py only. With TRITON_INTERPRET=1 the same code runs on CPU
tensors, for tests.

One program takes a block of heads of one token: heads are the M operand of both products, the gathered rows the N
operand of the first and the K operand of the second. Keys and values are the same rows, so a row is gathered once. The
softmax is the online one, in base 2. Blocks past the last valid entry of a row are not visited.

No token count, row count or width is a compile-time constant or specialised upon: a new length compiles nothing.
"""

import math
import sys
from dataclasses import replace
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_wait

from streamindex_service.ops.compiled import variants
from streamindex_service.ops.paged_kv_rows import PLACE_BITS
from streamindex_service.ops.sparse_attention.plan import MAX_SPLITS, AttentionKernel, Plan
from streamindex_service.ops.sparse_attention.problem import Problem

_LOG2E = 1.4426950408889634
_LN2 = tl.constexpr(0.6931471805599453)
_ENDS_BLOCK = 1024
_COMBINE_DIMS = 128
_PLACE_BITS = tl.constexpr(PLACE_BITS)
_PLACE_ROW = tl.constexpr((1 << PLACE_BITS) - 1)  # the bits of the row


@triton.jit(do_not_specialize=["rows", "width"])
def ends_kernel(indices, ends, rows, width, BLOCK: tl.constexpr):
    """One past the last valid entry of each index row: [tokens] int32. Grid: (tokens,)."""
    token = tl.program_id(0).to(tl.int64)
    end = 0
    for start in range(0, width, BLOCK):
        entry = start + tl.arange(0, BLOCK)
        index = tl.load(indices + token * width + entry, mask=entry < width, other=-1)
        end = tl.maximum(end, tl.max(tl.where((index >= 0) & (index < rows), entry + 1, 0), axis=0))
    tl.store(ends + token, end)


@triton.jit
def to_bf16(x, WIDEN: tl.constexpr):
    """Round to nearest even, which the interpreter's own conversion does not."""
    if WIDEN:
        bits = x.to(tl.uint32, bitcast=True)
        x = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
    return x.to(tl.bfloat16)


@triton.jit
def _first_element(index, ROW: tl.constexpr, UNIT: tl.constexpr, PLACED: tl.constexpr):
    """How many elements lie before the row of an entry: rows have ROW of them. PLACED: entries are places, in units of
    16 bytes, which have UNIT elements (see PlacedKvRows)."""
    if PLACED:
        return (index >> _PLACE_BITS) * UNIT + (index & _PLACE_ROW) * ROW
    return index.to(tl.int64) * ROW


@triton.jit
def _load_rows(
    data, scales, index, valid, DIM: tl.constexpr, FIRST: tl.constexpr, ROW: tl.constexpr, NARROW: tl.constexpr,
    GROUP: tl.constexpr, ROTARY: tl.constexpr, SCALES_BESIDE: tl.constexpr, PLACED: tl.constexpr,
):  # fmt: skip
    """Elements FIRST to FIRST + DIM of the rows `index`, zero where not valid: [BN, DIM] bf16.

    NARROW: e4m3 values of a packed row (0: rows are bf16), GROUP of which share a scale. ROTARY: byte of its bf16 part.
    """
    dim = FIRST + tl.arange(0, DIM)
    row = data + _first_element(index, ROW, 16 if NARROW else 8, PLACED)  # [BN]
    if NARROW == 0:
        return tl.load(row[:, None] + dim[None, :], mask=valid[:, None], other=0.0)
    rotary_row = (row + ROTARY).to(tl.pointer_type(tl.bfloat16))
    if FIRST >= NARROW:
        return tl.load(rotary_row[:, None] + (dim - NARROW)[None, :], mask=valid[:, None], other=0.0)
    is_narrow = dim < NARROW
    wanted = valid[:, None] & is_narrow[None, :]
    value = tl.load(row.to(tl.pointer_type(tl.float8e4nv))[:, None] + dim[None, :], mask=wanted, other=0.0)
    if SCALES_BESIDE:  # an exponent byte is the exponent field of a float32
        scale_row = scales + _first_element(index, 8, 16, PLACED)
        exponent = tl.load(scale_row[:, None] + (dim // GROUP)[None, :], mask=wanted, other=127)
        scale = (exponent.to(tl.int32) << 23).to(tl.float32, bitcast=True)
    else:
        wide_row = (row + NARROW).to(tl.pointer_type(tl.float32))
        scale = tl.load(wide_row[:, None] + (dim // GROUP)[None, :], mask=wanted, other=1.0)
    wide = (value.to(tl.float32) * scale).to(tl.bfloat16)
    if FIRST + DIM > NARROW:
        rotary = tl.load(
            rotary_row[:, None] + (dim - NARROW)[None, :], mask=valid[:, None] & (dim >= NARROW)[None, :], other=0.0
        )
        wide = tl.where(is_narrow[None, :], wide, rotary)
    return wide


@triton.jit(do_not_specialize=["rows", "width", "splits", "scale_log2"], do_not_specialize_on_alignment=["sink", "lse"])
def attend_kernel(
    q, data, scales, indices, ends, sink, out, lse, rows, width, splits, scale_log2,
    HEADS: tl.constexpr, BLOCK_HEADS: tl.constexpr, DIM: tl.constexpr, TAIL: tl.constexpr,
    BLOCK: tl.constexpr, ROW: tl.constexpr, NARROW: tl.constexpr, GROUP: tl.constexpr, ROTARY: tl.constexpr,
    SCALES_BESIDE: tl.constexpr, PLACED: tl.constexpr, HAS_ENDS: tl.constexpr, HAS_SINK: tl.constexpr,
    WANT_LSE: tl.constexpr, PARTIAL: tl.constexpr, STAGES: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """A block of heads of one token over its index row, or over a part of it. Grid: (tokens × head blocks, splits).

    q: [tokens, HEADS, DIM + TAIL] bf16. ends: [tokens] int32, if HAS_ENDS. sink: [HEADS] float32.
    out: [tokens, HEADS, DIM] bf16, lse: [tokens, HEADS] float32, natural. PARTIAL: [splits, tokens, HEADS, DIM] float32
    and [splits, tokens, HEADS] in base 2, −inf for nothing.
    """
    HEAD_BLOCKS: tl.constexpr = (HEADS + BLOCK_HEADS - 1) // BLOCK_HEADS
    token = (tl.program_id(0) // HEAD_BLOCKS).to(tl.int64)
    head = tl.program_id(0) % HEAD_BLOCKS * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    dim = tl.arange(0, DIM)
    is_head = head < HEADS
    query = (token * HEADS + head) * (DIM + TAIL)
    q_tile = tl.load(q + query[:, None] + dim[None, :], mask=is_head[:, None], other=0.0)  # [BH, DIM]
    if TAIL > 0:
        tail = DIM + tl.arange(0, TAIL)
        q_tail = tl.load(q + query[:, None] + tail[None, :], mask=is_head[:, None], other=0.0)
    end = tl.load(ends + token) if HAS_ENDS else width
    blocks = (end + BLOCK - 1) // BLOCK
    part = tl.program_id(1)
    begin = blocks * part // splits * BLOCK
    end = tl.minimum(blocks * (part + 1) // splits * BLOCK, end)
    largest = tl.full((BLOCK_HEADS,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_HEADS,), tl.float32)
    acc = tl.zeros((BLOCK_HEADS, DIM), tl.float32)
    entries = indices + token * width
    lane = tl.arange(0, BLOCK)
    # indices come one block ahead, so that rows can be gathered ahead too
    following = tl.load(entries + begin + lane, mask=begin + lane < end, other=-1)
    for start in tl.range(begin, end, BLOCK, num_stages=STAGES):
        valid = (following >= 0) & (following < rows)
        index = tl.where(valid, following, 0)
        following = tl.load(entries + start + BLOCK + lane, mask=start + BLOCK + lane < end, other=-1)
        keys = _load_rows(  # [BN, DIM]
            data, scales, index, valid, DIM, 0, ROW, NARROW, GROUP, ROTARY, SCALES_BESIDE, PLACED
        )
        if WIDEN:
            logits = tl.dot(q_tile.to(tl.float32), tl.trans(keys.to(tl.float32)), input_precision="ieee")
        else:
            logits = tl.dot(q_tile, tl.trans(keys))  # [BH, BN] float32
        if TAIL > 0:
            key_tail = _load_rows(
                data, scales, index, valid, TAIL, DIM, ROW, NARROW, GROUP, ROTARY, SCALES_BESIDE, PLACED
            )
            if WIDEN:
                logits = tl.dot(
                    q_tail.to(tl.float32), tl.trans(key_tail.to(tl.float32)), logits, input_precision="ieee"
                )
            else:
                logits = tl.dot(q_tail, tl.trans(key_tail), logits)
        logits = tl.where(valid[None, :], logits * scale_log2, float("-inf"))
        new_largest = tl.maximum(largest, tl.max(logits, axis=1))
        # of a row without an entry so far: any finite number, for −inf − −inf is no number
        shift = tl.where(new_largest == float("-inf"), 0.0, new_largest)
        fade = tl.exp2(largest - shift)
        weights = tl.exp2(logits - shift[:, None])
        total = total * fade + tl.sum(weights, axis=1)
        acc = acc * fade[:, None]
        if WIDEN:
            acc = tl.dot(to_bf16(weights, WIDEN).to(tl.float32), keys.to(tl.float32), acc, input_precision="ieee")
        else:
            acc = tl.dot(weights.to(tl.bfloat16), keys, acc)
        largest = new_largest
    nothing = total == 0.0
    largest = tl.where(nothing, 0.0, largest)
    total = tl.where(nothing, 1.0, total)
    result = ((part.to(tl.int64) * (tl.num_programs(0) // HEAD_BLOCKS) + token) * HEADS) + head
    if PARTIAL:
        tl.store(out + result[:, None] * DIM + dim[None, :], acc / total[:, None], mask=is_head[:, None])
        tl.store(lse + result, tl.where(nothing, float("-inf"), largest + tl.log2(total)), mask=is_head)
    else:
        if WANT_LSE:
            natural = (largest + tl.log2(total)) * _LN2
            tl.store(lse + result, tl.where(nothing, float("inf"), natural), mask=is_head)
        if HAS_SINK:
            logit = tl.load(sink + head, mask=is_head, other=float("-inf")) * (1.0 / _LN2)
            total += tl.exp2(logit - largest)
        acc = acc / total[:, None]
        tl.store(out + result[:, None] * DIM + dim[None, :], to_bf16(acc, WIDEN), mask=is_head[:, None])


@triton.jit(do_not_specialize=["tokens", "splits"], do_not_specialize_on_alignment=["sink", "lse"])
def combine_kernel(
    partial, partial_lse, sink, out, lse, tokens, splits,
    HEADS: tl.constexpr, BLOCK_HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK_DIMS: tl.constexpr,
    MOST_PARTS: tl.constexpr, HAS_SINK: tl.constexpr, WANT_LSE: tl.constexpr, DEPENDENT: tl.constexpr,
    WIDEN: tl.constexpr,
):  # fmt: skip
    """Parts of a split in order, and the sink. Grid: (tokens, head blocks, DIM / BLOCK_DIMS).

    partial: [splits, tokens, HEADS, DIM] float32; partial_lse: [splits, tokens, HEADS] in base 2; the rest as above.
    DEPENDENT: launched before what those wrote who make the parts is there.
    """
    if DEPENDENT:
        gdc_wait()
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    dim = tl.program_id(2) * BLOCK_DIMS + tl.arange(0, BLOCK_DIMS)
    is_head = head < HEADS
    place = token * HEADS + head
    step = tokens.to(tl.int64) * HEADS
    parts = tl.arange(0, MOST_PARTS)[:, None]
    known = (parts < splits) & is_head[None, :]
    logs = tl.load(partial_lse + parts * step + place[None, :], mask=known, other=float("-inf"))  # [parts, BH]
    largest = tl.max(logs, axis=0)
    nothing = largest == float("-inf")
    shift = tl.where(nothing, 0.0, largest)
    total = tl.zeros((BLOCK_HEADS,), tl.float32)
    acc = tl.zeros((BLOCK_HEADS, BLOCK_DIMS), tl.float32)
    for first in range(0, splits, 4):  # four parts under way; added up in their order
        for ahead in tl.static_range(4):
            part = first + ahead
            here = is_head & (part + 0 * head < splits)
            weight = tl.exp2(tl.load(partial_lse + part * step + place, mask=here, other=float("-inf")) - shift)
            values = tl.load(
                partial + (part * step + place)[:, None] * DIM + dim[None, :], mask=here[:, None], other=0.0
            )
            total += weight
            acc += weight[:, None] * values
    total = tl.where(nothing, 1.0, total)
    if WANT_LSE and tl.program_id(2) == 0:
        tl.store(lse + place, tl.where(nothing, float("inf"), (shift + tl.log2(total)) * _LN2), mask=is_head)
    if HAS_SINK:
        logit = tl.load(sink + head, mask=is_head, other=float("-inf")) * (1.0 / _LN2)
        total += tl.exp2(logit - shift)
    acc = acc / total[:, None]
    tl.store(out + place[:, None] * DIM + dim[None, :], to_bf16(acc, WIDEN), mask=is_head[:, None])


# The interpreter multiplies the raw bits of bfloat16 operands: there, and only there, the product takes float32 ones.
_INTERPRETED = not isinstance(attend_kernel, triton.JITFunction)


def compiled_variants() -> int:
    """How many kernel variants this process has compiled: flat once warm, whatever the lengths."""
    kernels = [ends_kernel, attend_kernel, combine_kernel]
    loaded = [sys.modules.get(f"{__package__}.{name}") for name in ("hopper", "hopper_few_heads")]
    return variants([*kernels, *(getattr(module, "attend_kernel", None) for module in loaded)])


def run_triton(problem: Problem, plan: Plan) -> None:
    """Fill the outputs, without waiting for the device."""
    if not problem.tokens:
        return
    assert plan.tiles is not None
    with torch.cuda.device_of(problem.q):  # kernels start on the current device, which need not be the tensors'
        ends = problem.ends
        if ends is None and plan.find_ends:
            ends = last_entries(problem)
        if plan.splits == 1:
            _launch(problem, plan, ends, problem.out, problem.out_lse)
            return
        step = min(plan.token_chunk, problem.tokens)
        shape = (plan.splits, step, problem.heads)
        partial = torch.empty((*shape, problem.value_dim), device=problem.q.device)
        partial_lse = torch.empty(shape, device=problem.q.device)
        for first in range(0, problem.tokens, step):
            chosen = slice(first, min(first + step, problem.tokens))
            part = problem if step == problem.tokens else _tokens_of(problem, chosen)
            # the last chunk may be smaller: its parts lie closer together
            room, room_lse = (_first(each, plan.splits, part.tokens) for each in (partial, partial_lse))
            _launch(part, plan, None if ends is None else ends[chosen], room, room_lse)
            combine(part, plan, room, room_lse)


def _tokens_of(problem: Problem, chosen: slice) -> Problem:
    """Some of the query tokens."""
    p = problem
    return replace(
        p, q=p.q[chosen], indices=p.indices[chosen], out=p.out[chosen],
        out_lse=None if p.out_lse is None else p.out_lse[chosen],
    )  # fmt: skip


def _first(partial: Tensor, parts: int, tokens: int) -> Tensor:
    """Room for the parts of so many tokens, [parts, tokens, ...], at the beginning of `partial`."""
    shape = (parts, tokens, *partial.shape[2:])
    return partial.view(-1)[: math.prod(shape)].view(shape)


def last_entries(problem: Problem) -> Tensor:
    """One past the last valid entry of each index row: [tokens] int32."""
    ends = torch.empty(problem.tokens, dtype=torch.int32, device=problem.q.device)
    ends_kernel[(problem.tokens,)](
        problem.indices, ends, problem.kv.rows, problem.width, BLOCK=_ENDS_BLOCK, num_warps=4
    )
    return ends


def format_constants(problem: Problem) -> dict[str, int | bool]:
    """What the kernels need to know of the rows' format."""
    packing = problem.kv.format.packed
    if packing is None:
        constants = {"ROW": problem.key_dim, "NARROW": 0, "GROUP": 1, "ROTARY": 0, "SCALES_BESIDE": False}
        return {**constants, "PLACED": problem.placed}
    return {
        "ROW": packing.row_bytes,
        "NARROW": packing.narrow,
        "GROUP": packing.group,
        "ROTARY": packing.rotary_offset,
        "SCALES_BESIDE": problem.kv.scales is not None,
        "PLACED": problem.placed,
    }


def _launch(problem: Problem, plan: Plan, ends: Tensor | None, out: Tensor, lse: Tensor | None) -> None:
    p, tiles = problem, plan.tiles
    partial = plan.splits > 1
    if tiles.kernel is AttentionKernel.HOPPER:
        # imported here: Gluon is an experimental part of Triton
        from streamindex_service.ops.sparse_attention import hopper

        hopper.launch(p, plan, ends, out, lse, _multiprocessors(p.q.device))
        return
    if tiles.kernel is AttentionKernel.HOPPER_FEW_HEADS:
        from streamindex_service.ops.sparse_attention import hopper_few_heads

        hopper_few_heads.launch(p, plan, ends, out, lse, _multiprocessors(p.q.device))
        return
    head_blocks = triton.cdiv(p.heads, tiles.block_heads)
    attend_kernel[(p.tokens * head_blocks, plan.splits)](
        p.q, p.kv.data, p.kv.data if p.kv.scales is None else p.kv.scales, p.indices,
        p.indices if ends is None else ends, p.indices if p.sink is None else p.sink, out,
        p.indices if lse is None else lse,
        p.kv.rows, p.width, plan.splits, p.scale * _LOG2E,
        HEADS=p.heads, BLOCK_HEADS=tiles.block_heads, DIM=p.value_dim, TAIL=p.key_dim - p.value_dim,
        BLOCK=tiles.block_entries, **format_constants(p),
        HAS_ENDS=ends is not None, HAS_SINK=p.sink is not None and not partial,
        WANT_LSE=lse is not None, PARTIAL=partial, STAGES=tiles.stages, WIDEN=_INTERPRETED,
        num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def combine(problem: Problem, plan: Plan, partial: Tensor, partial_lse: Tensor) -> None:
    """Fill the outputs from parts, see `combine_kernel`."""
    p = problem
    assert plan.tiles is not None
    dependent = plan.tiles.kernel in (AttentionKernel.HOPPER, AttentionKernel.HOPPER_FEW_HEADS)
    block_heads, block_dims = 8, min(_COMBINE_DIMS, p.value_dim)
    combine_kernel[(p.tokens, triton.cdiv(p.heads, block_heads), p.value_dim // block_dims)](
        partial, partial_lse, partial_lse if p.sink is None else p.sink, p.out,
        partial_lse if p.out_lse is None else p.out_lse, p.tokens, partial.shape[0],
        HEADS=p.heads, BLOCK_HEADS=block_heads, DIM=p.value_dim, BLOCK_DIMS=block_dims, MOST_PARTS=MAX_SPLITS,
        HAS_SINK=p.sink is not None, WANT_LSE=p.out_lse is not None, DEPENDENT=dependent, WIDEN=_INTERPRETED,
        num_warps=4, **({"launch_pdl": True} if dependent else {}),
    )  # fmt: skip
