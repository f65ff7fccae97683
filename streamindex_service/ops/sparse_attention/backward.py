"""Gradients of `sparse_attention`, by an implementation chosen by name: for those who fine-tune. It is not served."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from streamindex_service.ops.implementations import Runnable, by_name, find
from streamindex_service.ops.kv_rows import KvFormat, KvRows
from streamindex_service.ops.sparse_attention.backward_reference import exact_gradients
from streamindex_service.ops.sparse_attention.plan import MIN_WORKSPACE_BYTES, WorkspaceTooSmallError
from streamindex_service.ops.sparse_attention.problem import check_inputs, check_output
from streamindex_service.ops.sparse_attention.reference import (
    MAX_GATHERED_BYTES,
    ReferenceTooLargeError,
    exact_attention,
)

DEFAULT_BACKWARD_WORKSPACE_BYTES = 512 << 20
ENTRY_BLOCK = 64
_SORT_BYTES = 64  # of an entry: index, order and place, each twice, and where the run of its row ends
_SLACK_BYTES = 1 << 20


class AttentionGradients(NamedTuple):
    """dq: [tokens, heads, key_dim] bf16; dkv: [rows, key_dim] float32; dsink: [heads] float32, or None without a
    sink."""

    dq: Tensor
    dkv: Tensor
    dsink: Tensor | None


@dataclass(frozen=True)
class BackwardProblem:
    """Checked inputs and the places for the gradients; see `sparse_attention_backward`. dsink is None without a
    sink."""

    dout: Tensor
    out: Tensor
    lse: Tensor
    q: Tensor
    kv: Tensor
    indices: Tensor
    scale: float
    sink: Tensor | None
    dq: Tensor
    dkv: Tensor
    dsink: Tensor | None


@dataclass(frozen=True)
class BackwardPlan:
    """token_chunk: query tokens at a time. workspace_bytes: the peak beside inputs and gradients."""

    workspace_bytes: int
    token_chunk: int


@dataclass(frozen=True, kw_only=True)
class BackwardImplementation(Runnable):
    """One way to compute the gradients."""

    function: Callable[[BackwardProblem, BackwardPlan], None]


def plan_backward(tokens: int, heads: int, key_dim: int, width: int, workspace_bytes: int) -> BackwardPlan:
    """The most tokens at a time that fit. Raises WorkspaceTooSmallError if not even one does, or below 16 MiB."""
    fixed = 12 * tokens * heads + _SLACK_BYTES  # Δ, denominators and the sink's terms
    entries = -(-width // ENTRY_BLOCK) * ENTRY_BLOCK
    token = 4 * heads * entries + width * (4 * key_dim + _SORT_BYTES)
    most = max(1, 2**30 // max(width, 1))  # places are 32 bits
    chunk = min(max(tokens, 1), most, (workspace_bytes - fixed) // max(token, 1))
    if workspace_bytes < MIN_WORKSPACE_BYTES or chunk < 1:
        raise WorkspaceTooSmallError(workspace_bytes, max(MIN_WORKSPACE_BYTES, fixed + token))
    return BackwardPlan(fixed + chunk * token, chunk)


def _reference(problem: BackwardProblem, plan: BackwardPlan) -> None:
    p = problem
    (tokens, heads, key_dim), width = p.q.shape, p.indices.shape[1]
    needed, limit = 8 * tokens * width * (2 * key_dim + 5 * heads), MAX_GATHERED_BYTES[p.q.device.type]
    if needed > limit:
        raise ReferenceTooLargeError(needed, limit)
    rows = KvRows(KvFormat.BF16, p.kv)
    exact = exact_attention(p.q, rows, p.indices, scale=p.scale, sink=p.sink, value_dim=p.out.shape[2])
    found = exact_gradients(p.dout, p.q, exact, scale=p.scale, sink=p.sink)
    p.dq.copy_(found.dq)
    dkv = torch.zeros(p.dkv.shape, dtype=torch.float64, device=p.dkv.device)
    add_entries(dkv, found.dkeys, p.indices)
    p.dkv.copy_(dkv)
    if p.dsink is not None:
        p.dsink.copy_(found.dsink.sum(dim=0))


def add_entries(total: Tensor, entries: Tensor, indices: Tensor) -> None:
    """Add `entries` [tokens, width, n] to the rows of `total` [rows, n] that `indices` [tokens, width] name."""
    valid = (indices >= 0) & (indices < len(total))
    total.index_add_(0, indices[valid].long(), entries[valid])


def _triton(problem: BackwardProblem, plan: BackwardPlan) -> None:
    # imported here: Triton need not be installed where it is not asked for
    from streamindex_service.ops.sparse_attention.backward_triton import run_backward

    run_backward(problem, plan)


BACKWARD_IMPLEMENTATIONS: Mapping[str, BackwardImplementation] = by_name(
    BackwardImplementation(name="reference", function=_reference),
    BackwardImplementation(name="triton", function=_triton, requires="triton", cpu_only_interpreted=True),
)


def find_backward_implementation(name: str, device: torch.device) -> BackwardImplementation:
    """The implementation of that name. Raises UnsupportedImplementationError if it is unknown or not for that
    device."""
    return find(BACKWARD_IMPLEMENTATIONS, name, lambda each: each.runs_on(device), f"not on {device} here")


def sparse_attention_backward(
    dout: Tensor,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    kv: Tensor,
    indices: Tensor,
    *,
    scale: float,
    sink: Tensor | None = None,
    implementation: str,
    workspace_bytes: int = DEFAULT_BACKWARD_WORKSPACE_BYTES,
    plan: BackwardPlan | None = None,
) -> AttentionGradients:
    """Gradients of Σ out · dout in q, kv and sink, of one `sparse_attention` over bf16 rows.

    Deterministic: what the entries of a row add to it is summed in float32 in the order of tokens and, within a token,
    of entries. Neither the workspace nor the token chunk changes a bit.

    Args:
        dout: [tokens, heads, value_dim] bf16, contiguous.
        out, lse: [tokens, heads, value_dim] bf16 and [tokens, heads] float32, what `sparse_attention` returned with
            `want_lse`. No gradient flows through lse.
        q, indices, scale, sink: as given to it. kv: [rows, key_dim] bf16, contiguous: the data of its rows.
        implementation: a name in BACKWARD_IMPLEMENTATIONS; never replaced by another. `reference` is float64.
        workspace_bytes: device memory beside inputs and gradients that the run may take, at least 16 MiB; an entry of
            an index row takes 4 · key_dim + 4 · heads + 64 bytes while its tokens are under way. `reference` ignores
            it.
        plan: instead of the planned one, for tests.

    Rows that no entry names, and tokens with nothing to attend, have gradients of zero; a sink of ±inf has one of zero.

    Raises:
        AttentionInputError: an argument disagrees with another or with LIMITS; its `field` names it.
        UnsupportedImplementationError: unknown name, or not for this device. ValueError: kv is not such rows.
        WorkspaceTooSmallError: not even one token fits. ReferenceTooLargeError: `reference` beyond its bound.

    Source: FlashAttention-2, section 3.1.2 (Δ and the saved log-sum-exp); the chain rule for the sink.
    """
    found = find_backward_implementation(implementation, q.device)
    value_dim = out.shape[-1]
    rows = KvRows(KvFormat.BF16, kv)
    check_inputs(q, rows, indices, sink, value_dim)
    (tokens, heads, key_dim), width = q.shape, indices.shape[1]
    for name, tensor in (("dout", dout), ("out", out)):
        check_output(name, tensor, (tokens, heads, value_dim), torch.bfloat16, q.device)
    check_output("lse", lse, (tokens, heads), torch.float32, q.device)
    dq = torch.zeros_like(q)
    dkv = torch.zeros(kv.shape, dtype=torch.float32, device=kv.device)
    dsink = None if sink is None else torch.zeros_like(sink)
    if tokens and width and rows.rows:
        problem = BackwardProblem(dout, out, lse, q, kv, indices, scale, sink, dq, dkv, dsink)
        plan = plan or plan_backward(tokens, heads, key_dim, width, workspace_bytes)
        found.function(problem, plan)
    return AttentionGradients(dq, dkv, dsink)
