"""The meaning of the operation: every logit and every gathered row materialised, in float64. Small sizes only."""

from typing import NamedTuple

import torch
from torch import Tensor

from streamindex_service.ops.kv_rows import KvRows
from streamindex_service.ops.sparse_attention.problem import Problem

# The gathered rows are materialised; beyond this it is not a reference but an accident.
MAX_GATHERED_BYTES = {"cpu": 4 << 30, "cuda": 64 << 30}


class ReferenceTooLargeError(ValueError):
    """The gathered rows do not fit the reference's bound; attributes give both in bytes."""

    def __init__(self, needed_bytes: int, limit_bytes: int) -> None:
        super().__init__(f"reference would gather {needed_bytes} bytes, MAX_GATHERED_BYTES is {limit_bytes}")
        self.needed_bytes = needed_bytes
        self.limit_bytes = limit_bytes


class Exact(NamedTuple):
    """out: [tokens, heads, value_dim]; lse: [tokens, heads]; weights: [tokens, heads, width], of each entry of the
    row; keys: [tokens, width, key_dim], zero where an entry is skipped. All float64."""

    out: Tensor
    lse: Tensor
    weights: Tensor
    keys: Tensor


def exact_attention(
    q: Tensor, kv: KvRows, indices: Tensor, *, scale: float, sink: Tensor | None, value_dim: int
) -> Exact:
    """o[t, h] = Σ_j softmax_j(scale · ⟨q[t, h], k[j]⟩ ⊕ sink[h]) · v[j] over the entries j of indices[t], in float64.

    Entries that are negative or not below kv.rows are skipped; one that stands twice counts twice. The sink adds to
    the denominator alone. lse excludes it, and is +inf for a row with nothing to attend, whose output is 0.
    Source: DeepSeek-V4 (attention sinks, K = V), DeepSeek-V3.2 (MLA, V the first 512 elements of K).
    """
    valid = (indices >= 0) & (indices < kv.rows)
    if kv.rows:
        keys = kv.gather(indices.long().masked_fill(~valid, 0), torch.float64)
        keys = keys.masked_fill(~valid[:, :, None], 0.0)  # a row that is not asked for may hold anything
    else:
        keys = torch.zeros((*indices.shape, kv.key_dim), dtype=torch.float64, device=q.device)
    return attend_gathered(q, keys, valid, scale=scale, sink=sink, value_dim=value_dim)


def attend_gathered(
    q: Tensor, keys: Tensor, valid: Tensor, *, scale: float, sink: Tensor | None, value_dim: int
) -> Exact:
    """The same from gathered `keys` [tokens, width, key_dim] float64, zero where `valid` [tokens, width] is not."""
    logits = scale * torch.bmm(q.double(), keys.mT)
    logits.masked_fill_(~valid[:, None, :], -torch.inf)
    lse = torch.logsumexp(logits, dim=2) if valid.shape[1] else logits.new_full(q.shape[:2], -torch.inf)
    denominator = lse if sink is None else torch.logaddexp(lse, sink.double()[None, :].expand_as(lse))
    nothing = lse == -torch.inf
    weights = torch.exp(logits - denominator.masked_fill(nothing, 0.0)[:, :, None])
    out = torch.bmm(weights, keys[:, :, :value_dim])
    return Exact(out, lse.masked_fill(nothing, torch.inf), weights, keys)


def run_reference(problem: Problem) -> None:
    """Fill the outputs. Raises ReferenceTooLargeError beyond MAX_GATHERED_BYTES."""
    p = problem
    assert isinstance(p.kv, KvRows)
    needed, limit = 8 * p.tokens * p.width * (p.key_dim + 2 * p.heads), MAX_GATHERED_BYTES[p.q.device.type]
    if needed > limit:
        raise ReferenceTooLargeError(needed, limit)
    exact = exact_attention(p.q, p.kv, p.indices, scale=p.scale, sink=p.sink, value_dim=p.value_dim)
    p.out.copy_(exact.out)
    if p.out_lse is not None:
        p.out_lse.copy_(exact.lse)
