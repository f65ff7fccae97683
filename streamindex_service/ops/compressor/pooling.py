"""The operation in torch, in any precision: what an entry is, written once for the reference and for `torch`.

Sums run over slots one after the other and over channels by halves: elementwise operations alone, so that no chunk and
no number of entries can change a bit of an entry.
"""

import torch
from torch import Tensor

from streamindex_service.ops.compressor.problem import Problem
from streamindex_service.ops.compressor.weights import ROTARY_DIM


def token_rows(problem: Problem, start: int, stop: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Values and gates of positions start to stop: [stop − start, width]; before the sequence values are 0 and gates
    −inf. The sum of a gate and its ape is one of float32, as in a state, and then widened."""
    p, weights = problem, problem.weights
    shape = (stop - start, weights.width)
    kv = torch.zeros(shape, dtype=dtype, device=p.kv.device)
    gate = torch.full(shape, -torch.inf, dtype=dtype, device=p.kv.device)
    known = range(max(start, 0), min(p.position, stop))
    if known:
        rows = torch.arange(known.start, known.stop, device=p.kv.device) % p.state.capacity
        kv[known.start - start : known.stop - start] = p.state.kv[rows].to(dtype)
        gate[known.start - start : known.stop - start] = p.state.gate[rows].to(dtype)
    fresh = range(max(start, p.position), stop)
    if fresh:
        part = slice(fresh.start - p.position, fresh.stop - p.position)
        kv[fresh.start - start :] = p.kv[part].float().to(dtype)
        gate[fresh.start - start :] = gates_with_ape(problem, fresh).to(dtype)
    return kv, gate


def gates_with_ape(problem: Problem, positions: range) -> Tensor:
    """Gates of positions of this call with their ape: [len(positions), width] float32."""
    p = problem
    place = torch.arange(positions.start, positions.stop, device=p.gate.device) % p.weights.ratio
    return p.gate[positions.start - p.position : positions.stop - p.position].float() + p.weights.ape[place]


def slot(rows: Tensor, problem: Problem, entries: int, number: int) -> Tensor:
    """What slot `number` of each entry holds: [entries, dim] of `rows`, which begin with the first entry's first."""
    weights = problem.weights
    window, place = divmod(number, weights.ratio)
    by_window = rows.view(-1, weights.ratio, weights.width)
    return by_window[window : window + entries, place, window * weights.dim : (window + 1) * weights.dim]


def pooled_entries(problem: Problem, first: int, entries: int, dtype: torch.dtype) -> Tensor:
    """Entries `first` to first + entries, pooled, normed and rotated: [entries, dim] of `dtype`."""
    weights = problem.weights
    start = (first - weights.windows + 1) * weights.ratio
    kv, gate = token_rows(problem, start, (first + entries) * weights.ratio, dtype)
    largest = slot(gate, problem, entries, 0).clone()
    for number in range(1, weights.slots):
        torch.maximum(largest, slot(gate, problem, entries, number), out=largest)
    total, pooled = torch.zeros_like(largest), torch.zeros_like(largest)
    for number in range(weights.slots):
        share = torch.exp(slot(gate, problem, entries, number) - largest)
        total += share
        pooled += share * slot(kv, problem, entries, number)
    pooled /= total
    squares = pooled.square()
    while squares.shape[1] > 1:
        squares = squares[:, : squares.shape[1] // 2] + squares[:, squares.shape[1] // 2 :]
    normed = pooled * torch.rsqrt(squares / weights.dim + weights.eps) * weights.norm.to(dtype)
    return rotate(normed, problem, first)


def rotate(entries: Tensor, problem: Problem, first: int) -> Tensor:
    """The last 64 elements of each entry turned, pair by pair, by the entry's position times the frequencies."""
    weights = problem.weights
    position = weights.ratio * torch.arange(first, first + entries.shape[0], device=entries.device, dtype=torch.float64)
    angle = position[:, None] * weights.device_frequencies
    cosine, sine = angle.cos().to(entries.dtype), angle.sin().to(entries.dtype)
    one, other = entries[:, -ROTARY_DIM::2], entries[:, -ROTARY_DIM + 1 :: 2]
    turned = torch.stack([one * cosine - other * sine, one * sine + other * cosine], dim=2)
    return torch.cat([entries[:, :-ROTARY_DIM], turned.flatten(1)], dim=1)


def remember(problem: Problem) -> None:
    """Write this call's last tokens to the state."""
    p = problem
    stop = p.position + p.tokens
    kept = range(max(p.position, stop - p.state.capacity), stop)
    rows = torch.arange(kept.start, kept.stop, device=p.kv.device) % p.state.capacity
    p.state.kv[rows] = p.kv[kept.start - p.position :].float()
    p.state.gate[rows] = gates_with_ape(problem, kept)
