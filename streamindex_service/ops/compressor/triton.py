"""Fused kernels: one program an entry, one pass over its tokens; another kernel writes the state.

A token's value and gate are read once: of the two halves of its channels at ratio 4 each belongs to one entry. The
softmax over slots is the online one, four slots at a time, so that an entry is the same sequence of operations
wherever its tokens lie, in this call or in the state.

No token count and no position is a compile-time constant or specialised upon.
"""

import torch
import triton
import triton.language as tl

from streamindex_service.ops.compiled import variants
from streamindex_service.ops.compressor.problem import Problem
from streamindex_service.ops.compressor.weights import ROTARY_DIM
from streamindex_service.ops.sparse_attention.triton import to_bf16

_BLOCK = 4  # slots at a time: of 8, the registers leave too few programs on a multiprocessor
_LOAD_BYTES = 16  # of a thread
_TWO_PI = tl.constexpr(6.283185307179586)
_TURNS_PER_RADIAN = tl.constexpr(0.15915494309189535)


@triton.jit
def _rotate(one, other, position, frequencies, PAIRS: tl.constexpr, ROTARY: tl.constexpr):
    """Pairs of elements, the last ROTARY / 2 of them turned. The angle is reduced in float64: positions are long."""
    TURNED: tl.constexpr = ROTARY // 2
    # angles of the pairs that turn alone: a row of as many, that the last row of all pairs is multiplied by
    turns = position.to(tl.float64) * (tl.load(frequencies + tl.arange(0, TURNED)) * _TURNS_PER_RADIAN)
    angle = ((turns - tl.floor(turns)) * _TWO_PI).to(tl.float32)
    cosine, sine = tl.cos(angle)[None, :], tl.sin(angle)[None, :]
    turned = (tl.arange(0, PAIRS // TURNED) == PAIRS // TURNED - 1)[:, None]
    one, other = tl.reshape(one, (PAIRS // TURNED, TURNED)), tl.reshape(other, (PAIRS // TURNED, TURNED))
    first = tl.where(turned, one * cosine - other * sine, one)
    second = tl.where(turned, one * sine + other * cosine, other)
    return tl.reshape(first, (PAIRS,)), tl.reshape(second, (PAIRS,))


@triton.jit(do_not_specialize=["position", "first_entry", "eps"], do_not_specialize_on_alignment=["frequencies"])
def pool_kernel(
    kv, gate, ape, state_kv, state_gate, norm, frequencies, out, position, first_entry, eps,
    RATIO: tl.constexpr, WINDOWS: tl.constexpr, DIM: tl.constexpr, CAPACITY: tl.constexpr, ROTARY: tl.constexpr,
    BLOCK: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Grid: (entries,). kv, gate: [tokens, WINDOWS · DIM]; out: [entries, DIM] bf16; the rest as in Problem."""
    WIDTH: tl.constexpr = WINDOWS * DIM
    entry = first_entry.to(tl.int64) + tl.program_id(0)
    start = (entry - (WINDOWS - 1)) * RATIO
    dim = tl.arange(0, DIM)
    largest = tl.full((DIM,), float("-inf"), tl.float32)
    total = tl.zeros((DIM,), tl.float32)
    acc = tl.zeros((DIM,), tl.float32)
    for done in range(0, WINDOWS * RATIO, BLOCK):
        # the last slots come first: they are an entry's own tokens, while those of the window before may be none
        first = WINDOWS * RATIO - BLOCK - done
        slot = first + tl.arange(0, BLOCK)
        token = start + slot  # [BLOCK] int64
        channel = (slot // RATIO * DIM)[:, None] + dim[None, :]
        fresh = (token >= position)[:, None] & (dim >= 0)[None, :]
        row = ((token - position) * WIDTH)[:, None] + channel
        bias = tl.load(ape + (slot % RATIO * WIDTH)[:, None] + channel)
        g = tl.load(gate + row, mask=fresh, other=0.0).to(tl.float32) + bias
        v = tl.load(kv + row, mask=fresh, other=0.0).to(tl.float32)
        if start + first < position:  # else all of them are of this call, as nearly everywhere
            held = ((token >= 0) & (token < position))[:, None] & (dim >= 0)[None, :]
            old_row = (token % CAPACITY * WIDTH)[:, None] + channel
            g = tl.where(fresh, g, tl.load(state_gate + old_row, mask=held, other=float("-inf")))
            v = tl.where(fresh, v, tl.load(state_kv + old_row, mask=held, other=0.0))
        new_largest = tl.maximum(largest, tl.max(g, axis=0))
        fade = tl.exp(largest - new_largest)
        share = tl.exp(g - new_largest[None, :])
        total = total * fade + tl.sum(share, axis=0)
        acc = acc * fade + tl.sum(share * v, axis=0)
        largest = new_largest
    pooled = acc / total
    normed = pooled * tl.rsqrt(tl.sum(pooled * pooled, axis=0) / DIM + eps) * tl.load(norm + dim)
    one, other = tl.split(tl.reshape(normed, (DIM // 2, 2)))
    one, other = _rotate(one, other, entry * RATIO, frequencies, DIM // 2, ROTARY)
    turned = tl.reshape(tl.join(one, other), (DIM,))
    tl.store(out + tl.program_id(0).to(tl.int64) * DIM + dim, to_bf16(turned, WIDEN))


@triton.jit(do_not_specialize=["position", "skipped"])
def remember_kernel(
    kv, gate, ape, state_kv, state_gate, position, skipped,
    RATIO: tl.constexpr, WIDTH: tl.constexpr, CAPACITY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Tokens from `skipped` on to the state. Grid: (tokens − skipped, WIDTH / BLOCK)."""
    token = skipped.to(tl.int64) + tl.program_id(0)
    place = position.to(tl.int64) + token
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(gate + token * WIDTH + channel).to(tl.float32) + tl.load(ape + place % RATIO * WIDTH + channel)
    v = tl.load(kv + token * WIDTH + channel).to(tl.float32)
    tl.store(state_gate + place % CAPACITY * WIDTH + channel, g)
    tl.store(state_kv + place % CAPACITY * WIDTH + channel, v)


_INTERPRETED = not isinstance(pool_kernel, triton.JITFunction)


def compiled_variants() -> int:
    """How many kernel variants this process has compiled: flat once warm, whatever the lengths."""
    return variants((pool_kernel, remember_kernel))


def _warps(problem: Problem) -> int:
    """As many as one token's channels of an entry occupy: then each thread holds all slots of its channels, and the
    softmax over slots asks no other thread."""
    return max(1, problem.weights.dim * problem.kv.element_size() // (32 * _LOAD_BYTES))


def run_triton(problem: Problem) -> None:
    """Fill the output and the state, without waiting for the device."""
    p, weights = problem, problem.weights
    constants = {"RATIO": weights.ratio, "CAPACITY": p.state.capacity}
    with torch.cuda.device_of(p.kv):  # kernels start on the current device, which need not be the tensors'
        if p.entries:
            pool_kernel[(p.entries,)](
                p.kv, p.gate, weights.ape, p.state.kv, p.state.gate, weights.norm, weights.device_frequencies, p.out,
                p.position, p.first_entry, weights.eps, **constants, WINDOWS=weights.windows, DIM=weights.dim,
                ROTARY=ROTARY_DIM, BLOCK=_BLOCK, WIDEN=_INTERPRETED, num_warps=_warps(p),
            )  # fmt: skip
        skipped = max(0, p.tokens - p.state.capacity)
        block = min(weights.width, 512)
        remember_kernel[(p.tokens - skipped, weights.width // block)](
            p.kv, p.gate, weights.ape, p.state.kv, p.state.gate, p.position, skipped,
            **constants, WIDTH=weights.width, BLOCK=block, num_warps=4,
        )  # fmt: skip
