"""Gradients of sparse attention in Triton, without atomics.

A chunk of tokens at a time: (1) weights and gradients of logits, a program a token and 64 entries; (2) dq; (3) what
each entry adds to its row, in float32, each at the place that a stable sort of the chunk's indices gives it, so that
what belongs to one row lies together, in the order of tokens; (4) its sum, a program a row. Rows are added up one by
one and chunks follow each other, so the sum has one order, wherever chunks begin.

No token count, row count or width is a compile-time constant or specialised upon: a new length compiles nothing.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from streamindex_service.ops.compiled import variants
from streamindex_service.ops.sparse_attention.backward import ENTRY_BLOCK, BackwardPlan, BackwardProblem
from streamindex_service.ops.sparse_attention.triton import to_bf16

_LOG2E = tl.constexpr(1.4426950408889634)
_NOWHERE = 2**31 - 1  # no row: indices are below `rows`, which is at most this
_COLUMNS = 128
_DELTA_HEADS = 8


@triton.jit
def _dot(a, b, acc, WIDEN: tl.constexpr):
    """acc + a · b, in float32. WIDEN: the interpreter multiplies the raw bits of bfloat16 operands."""
    if WIDEN:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    return tl.dot(a, b, acc)


@triton.jit(do_not_specialize_on_alignment=["sink", "lse"])
def delta_kernel(
    dout, out, lse, sink, delta, denominator, sink_terms,
    HEADS: tl.constexpr, BLOCK_HEADS: tl.constexpr, VALUE: tl.constexpr, HAS_SINK: tl.constexpr,
):  # fmt: skip
    """Σ out · dout, log2 of the softmax's denominator with the sink, and what each token adds to dsink. Grid: (tokens,
    head blocks).

    dout, out: [tokens, HEADS, VALUE] bf16; the rest [tokens, HEADS] float32, sink [HEADS].
    """
    head = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    is_head = head < HEADS
    place = tl.program_id(0).to(tl.int64) * HEADS + head  # [BH]
    element = place[:, None] * VALUE + tl.arange(0, VALUE)[None, :]
    product = tl.load(dout + element, mask=is_head[:, None], other=0.0).to(tl.float32)
    product *= tl.load(out + element, mask=is_head[:, None], other=0.0).to(tl.float32)
    total = tl.sum(product, axis=1)
    tl.store(delta + place, total, mask=is_head)
    log = tl.load(lse + place, mask=is_head, other=0.0)
    if HAS_SINK:
        log = tl.where(log == float("inf"), float("-inf"), log)  # nothing to attend
        logit = tl.load(sink + head, mask=is_head, other=0.0)
        largest = tl.maximum(log, logit)
        # with a sink of +inf all weights are 0, with −inf and nothing to attend there are none
        finite = (largest > float("-inf")) & (largest < float("inf"))
        shift = tl.where(finite, largest, 0.0)
        # subtract, then scale: a fused multiply-add would leave the rounding of the product, 10^22 at a sink of 1e30
        share = tl.exp2(tl.where(finite, logit - shift, 0.0) * _LOG2E)
        parts = share + tl.exp2(tl.where(finite, log - shift, 0.0) * _LOG2E)
        tl.store(sink_terms + place, tl.where(finite, -total * (share / parts), 0.0), mask=is_head)
        log = tl.where(finite, largest * _LOG2E + tl.log2(parts), largest)
    else:
        log *= _LOG2E
    tl.store(denominator + place, log, mask=is_head)


@triton.jit(do_not_specialize=["first", "rows", "width", "blocks", "scale", "scale_log2"])
def scores_kernel(
    q, dout, kv, indices, delta, denominator, weights, dlogits, first, rows, width, blocks, scale, scale_log2,
    HEADS: tl.constexpr, BLOCK_HEADS: tl.constexpr, VALUE: tl.constexpr, TAIL: tl.constexpr, COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Weights and scaled gradients of logits of a block of heads and of entries. Grid: (tokens of the chunk × blocks,
    head blocks).

    q: [all tokens, HEADS, VALUE + TAIL], dout: [all tokens, HEADS, VALUE], kv: [rows, VALUE + TAIL], all bf16;
    delta, denominator: [all tokens, HEADS] float32. weights, dlogits: [tokens, blocks, HEADS, BLOCK] bf16.
    """
    DIM: tl.constexpr = VALUE + TAIL
    token = first + (tl.program_id(0) // blocks).to(tl.int64)
    head = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    is_head = head < HEADS
    place = token * HEADS + head
    entry = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    index = tl.load(indices + token * width + entry, mask=entry < width, other=-1)
    valid = (index >= 0) & (index < rows)
    row = tl.where(valid, index, 0).to(tl.int64) * DIM  # [BN]
    logits = tl.zeros((BLOCK_HEADS, BLOCK), tl.float32)
    dweights = tl.zeros((BLOCK_HEADS, BLOCK), tl.float32)
    for start in tl.range(0, VALUE, COLUMNS):
        dim = start + tl.arange(0, COLUMNS)
        keys = tl.load(kv + row[:, None] + dim[None, :], mask=valid[:, None], other=0.0)  # [BN, COLUMNS]
        query = tl.load(q + place[:, None] * DIM + dim[None, :], mask=is_head[:, None], other=0.0)
        grad = tl.load(dout + place[:, None] * VALUE + dim[None, :], mask=is_head[:, None], other=0.0)
        logits = _dot(query, tl.trans(keys), logits, WIDEN)
        dweights = _dot(grad, tl.trans(keys), dweights, WIDEN)
    if TAIL > 0:
        tail = VALUE + tl.arange(0, TAIL)
        keys = tl.load(kv + row[:, None] + tail[None, :], mask=valid[:, None], other=0.0)
        query = tl.load(q + place[:, None] * DIM + tail[None, :], mask=is_head[:, None], other=0.0)
        logits = _dot(query, tl.trans(keys), logits, WIDEN)
    log = tl.load(denominator + place, mask=is_head, other=0.0)
    wanted = valid[None, :] & is_head[:, None]
    weight = tl.exp2(tl.where(wanted, logits * scale_log2 - log[:, None], float("-inf")))
    dlogit = weight * (dweights - tl.load(delta + place, mask=is_head, other=0.0)[:, None]) * scale
    # a tile lies together, for those who read it
    target = (tl.program_id(0).to(tl.int64) * HEADS + head)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    tl.store(weights + target, to_bf16(weight, WIDEN), mask=is_head[:, None])
    tl.store(dlogits + target, to_bf16(dlogit, WIDEN), mask=is_head[:, None])


@triton.jit(do_not_specialize=["first", "rows", "width", "blocks"])
def dq_kernel(
    dlogits, kv, indices, dq, first, rows, width, blocks,
    HEADS: tl.constexpr, BLOCK_HEADS: tl.constexpr, DIM: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
    STAGES: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Some columns of dq, of a block of heads. Grid: (tokens of the chunk × head blocks, DIM / COLUMNS).

    dq: [all tokens, HEADS, DIM] bf16; the rest as above.
    """
    HEAD_BLOCKS: tl.constexpr = (HEADS + BLOCK_HEADS - 1) // BLOCK_HEADS
    here = (tl.program_id(0) // HEAD_BLOCKS).to(tl.int64)
    head = tl.program_id(0) % HEAD_BLOCKS * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    is_head = head < HEADS
    dim = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    is_dim = dim < DIM
    lane = tl.arange(0, BLOCK)
    entries = indices + (first + here) * width
    tile = dlogits + (here * blocks * HEADS + head)[:, None] * BLOCK + lane[None, :]
    acc = tl.zeros((BLOCK_HEADS, COLUMNS), tl.float32)
    for block in tl.range(0, blocks, num_stages=STAGES):
        entry = block * BLOCK + lane
        index = tl.load(entries + entry, mask=entry < width, other=-1)
        valid = (index >= 0) & (index < rows)
        row = tl.where(valid, index, 0).to(tl.int64) * DIM
        keys = tl.load(kv + row[:, None] + dim[None, :], mask=valid[:, None] & is_dim[None, :], other=0.0)
        dlogit = tl.load(tile, mask=is_head[:, None], other=0.0)  # [BH, BN]
        tile += HEADS * BLOCK
        acc = _dot(dlogit, keys, acc, WIDEN)
    target = ((first + here) * HEADS + head)[:, None] * DIM + dim[None, :]
    tl.store(dq + target, to_bf16(acc, WIDEN), mask=is_head[:, None] & is_dim[None, :])


@triton.jit(do_not_specialize=["first", "rows", "width", "blocks"])
def contributions_kernel(
    q, dout, weights, dlogits, indices, places, contributions, first, rows, width, blocks,
    HEADS: tl.constexpr, BLOCK_HEADS: tl.constexpr, VALUE: tl.constexpr, DIM: tl.constexpr, COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """What a block of entries adds to some columns of its rows. Grid: (tokens of the chunk × blocks, DIM / COLUMNS).

    places: [tokens, width] int32, where each entry's goes; contributions: [tokens · width, DIM] float32.
    """
    here = (tl.program_id(0) // blocks).to(tl.int64)
    entry = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    dim = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    lane = tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK, COLUMNS), tl.float32)
    for start in tl.range(0, HEADS, BLOCK_HEADS):
        head = start + tl.arange(0, BLOCK_HEADS)
        is_head = head < HEADS
        tile = (tl.program_id(0).to(tl.int64) * HEADS + head)[:, None] * BLOCK + lane[None, :]
        place = (first + here) * HEADS + head
        dlogit = tl.load(dlogits + tile, mask=is_head[:, None], other=0.0)  # [BH, BN]
        query = tl.load(
            q + place[:, None] * DIM + dim[None, :], mask=is_head[:, None] & (dim < DIM)[None, :], other=0.0
        )
        acc = _dot(tl.trans(dlogit), query, acc, WIDEN)
        if tl.program_id(1) * COLUMNS < VALUE:
            weight = tl.load(weights + tile, mask=is_head[:, None], other=0.0)
            grad = tl.load(dout + place[:, None] * VALUE + dim[None, :], mask=is_head[:, None], other=0.0)
            acc = _dot(tl.trans(weight), grad, acc, WIDEN)
    is_entry = entry < width
    index = tl.load(indices + (first + here) * width + entry, mask=is_entry, other=-1)
    target = tl.load(places + here * width + entry, mask=is_entry, other=0).to(tl.int64)
    valid = (index >= 0) & (index < rows)
    tl.store(contributions + target[:, None] * DIM + dim[None, :], acc, mask=valid[:, None] & (dim < DIM)[None, :])


@triton.jit(do_not_specialize=["rows"])
def sum_kernel(contributions, sorted_rows, ends, dkv, rows, DIM: tl.constexpr, COLUMNS: tl.constexpr):
    """Add what belongs to one row, in order, to what earlier chunks added. Grid: (entries of the chunk, DIM / COLUMNS).

    The program of a row's first entry does it. sorted_rows: [entries] int32; ends: [entries] int32, one past the last
    entry of the same row; dkv: [rows, DIM] float32.
    """
    place = tl.program_id(0)
    row = tl.load(sorted_rows + place)
    before = tl.load(sorted_rows + place - 1, mask=place > 0, other=-1)
    if (row < rows) & (row != before):
        dim = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        is_dim = dim < DIM
        target = dkv + row.to(tl.int64) * DIM + dim
        acc = tl.load(target, mask=is_dim, other=0.0)
        end = tl.load(ends + place)
        source = contributions + place.to(tl.int64) * DIM + dim
        for start in range(place, end, 4):  # four under way; added up in their order, nothing as zero
            for ahead in tl.static_range(4):
                wanted = is_dim & (start + ahead + 0 * dim < end)
                acc += tl.load(source + ahead * DIM, mask=wanted, other=0.0)
            source += 4 * DIM
        tl.store(target, acc, mask=is_dim)


_INTERPRETED = not isinstance(scores_kernel, triton.JITFunction)


def compiled_backward_variants() -> int:
    """How many kernel variants this process has compiled: flat once warm, whatever the lengths."""
    return variants((delta_kernel, scores_kernel, dq_kernel, contributions_kernel, sum_kernel))


def run_backward(problem: BackwardProblem, plan: BackwardPlan) -> None:
    """Fill the gradients, without waiting for the device. dkv and dsink must be zero."""
    p = problem
    tokens, heads, _ = p.q.shape
    with torch.cuda.device_of(p.q):  # kernels start on the current device, which need not be the tensors'
        delta, denominator, sink_terms = (torch.empty((tokens, heads), device=p.q.device) for _ in range(3))
        delta_kernel[(tokens, triton.cdiv(heads, _DELTA_HEADS))](
            p.dout, p.out, p.lse, p.lse if p.sink is None else p.sink, delta, denominator, sink_terms,
            HEADS=heads, BLOCK_HEADS=_DELTA_HEADS, VALUE=p.out.shape[2], HAS_SINK=p.sink is not None, num_warps=4,
        )  # fmt: skip
        if p.dsink is not None:
            p.dsink.copy_(sink_terms.sum(dim=0, dtype=torch.float64))
        for first in range(0, tokens, plan.token_chunk):
            _run_chunk(p, delta, denominator, first, min(plan.token_chunk, tokens - first))


def _run_chunk(problem: BackwardProblem, delta: Tensor, denominator: Tensor, first: int, tokens: int) -> None:
    """dq of `tokens` tokens from `first`, and what they add to dkv."""
    p = problem
    (_, heads, key_dim), value_dim = p.q.shape, p.out.shape[2]
    rows, width = p.kv.shape[0], p.indices.shape[1]
    blocks, columns = triton.cdiv(width, ENTRY_BLOCK), min(_COLUMNS, value_dim)
    block_heads = 16 if heads <= 16 else 32 if heads <= 32 else 64
    shape = {"HEADS": heads, "BLOCK_HEADS": block_heads, "COLUMNS": columns, "BLOCK": ENTRY_BLOCK}
    common = {**shape, "WIDEN": _INTERPRETED, "num_warps": 4, "num_stages": 2}
    weights, dlogits = (
        torch.empty((tokens, blocks, heads, ENTRY_BLOCK), dtype=torch.bfloat16, device=p.q.device) for _ in range(2)
    )
    scores_kernel[(tokens * blocks, triton.cdiv(heads, block_heads))](
        p.q, p.dout, p.kv, p.indices, delta, denominator, weights, dlogits, first, rows, width, blocks,
        p.scale, p.scale * _LOG2E.value, VALUE=value_dim, TAIL=key_dim - value_dim, **common,
    )  # fmt: skip
    column_blocks = triton.cdiv(key_dim, columns)
    dq_kernel[(tokens * triton.cdiv(heads, block_heads), column_blocks)](
        dlogits, p.kv, p.indices, p.dq, first, rows, width, blocks, DIM=key_dim, STAGES=2, **common
    )
    places, sorted_rows, ends = sort_entries(p.indices[first : first + tokens], rows)
    contributions = torch.empty((tokens * width, key_dim), device=p.q.device)
    contributions_kernel[(tokens * blocks, column_blocks)](
        p.q, p.dout, weights, dlogits, p.indices, places, contributions, first, rows, width, blocks,
        VALUE=value_dim, DIM=key_dim, **common,
    )  # fmt: skip
    sum_kernel[(tokens * width, triton.cdiv(key_dim, value_dim))](
        contributions, sorted_rows, ends, p.dkv, rows, DIM=key_dim, COLUMNS=value_dim, num_warps=4
    )


def sort_entries(indices: Tensor, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Entries by their rows, those of one row in the order of tokens: [entries] int32 each.

    Where each entry goes; the rows in that order, those that are none at the end; and for each place, one past the last
    of the same row.
    """
    flat = indices.flatten()
    flat = flat.masked_fill((flat < 0) | (flat >= rows), _NOWHERE)
    sorted_rows, order = flat.sort(stable=True)
    places = torch.empty_like(flat)
    places[order] = torch.arange(len(flat), dtype=torch.int32, device=flat.device)
    return places, sorted_rows, torch.searchsorted(sorted_rows, sorted_rows, right=True, out_int32=True)
