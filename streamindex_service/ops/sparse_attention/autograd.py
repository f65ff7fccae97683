"""Sparse attention that gradients flow through."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from streamindex_service.ops.kv_rows import KvFormat, KvRows
from streamindex_service.ops.sparse_attention.api import sparse_attention
from streamindex_service.ops.sparse_attention.backward import (
    DEFAULT_BACKWARD_WORKSPACE_BYTES,
    find_backward_implementation,
    sparse_attention_backward,
)


class SparseAttentionFunction(torch.autograd.Function):
    """The forward keeps out and lse, from which the backward makes the weights again."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, kv: Tensor, sink: Tensor | None, indices: Tensor, scale: float, value_dim: int,
        implementation: str, workspace_bytes: int,
    ) -> Tensor:  # fmt: skip
        """Output [tokens, heads, value_dim] bf16."""
        out, lse = sparse_attention(
            q, KvRows(KvFormat.BF16, kv), indices, scale=scale, sink=sink, value_dim=value_dim,
            implementation=implementation, workspace_bytes=workspace_bytes, want_lse=True,
        )  # fmt: skip
        ctx.save_for_backward(out, lse, q, kv, sink, indices)
        ctx.options = {"scale": scale, "implementation": implementation, "workspace_bytes": workspace_bytes}
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of q, kv and sink in their own types, None for the rest."""
        out, lse, q, kv, sink, indices = ctx.saved_tensors
        found = sparse_attention_backward(dout.contiguous(), out, lse, q, kv, indices, sink=sink, **ctx.options)
        gradients = (found.dq, found.dkv.to(kv.dtype), found.dsink)
        wanted = (each if need else None for each, need in zip(gradients, ctx.needs_input_grad, strict=False))
        return (*wanted, None, None, None, None, None)


def differentiable_sparse_attention(
    q: Tensor,
    kv: Tensor,
    indices: Tensor,
    *,
    scale: float,
    sink: Tensor | None = None,
    value_dim: int = 512,
    implementation: str,
    workspace_bytes: int = DEFAULT_BACKWARD_WORKSPACE_BYTES,
) -> Tensor:
    """`sparse_attention` as a function of q, kv and sink that autograd can go back through, once.

    Args:
        q: [tokens, heads, key_dim] bf16, contiguous. kv: [rows, key_dim] bf16, contiguous; packed rows have no
            gradients. sink: [heads] float32, or None.
        indices, scale, value_dim: as for `sparse_attention`; no gradient.
        implementation: a name in BACKWARD_IMPLEMENTATIONS, of both directions.
        workspace_bytes: device memory beside inputs, outputs and gradients that each direction may take, at least
            16 MiB. Beside it the backward holds the gradient of kv in float32 until it is rounded.

    Returns [tokens, heads, value_dim] bf16. The log-sum-exp is not returned, since no gradient flows through it; use
    `sparse_attention_backward` for the gradient of kv in float32.

    Raises what `sparse_attention` and `sparse_attention_backward` raise, the latter during the backward; an
    implementation without gradients is refused here.
    """
    find_backward_implementation(implementation, q.device)
    # apply is untyped in torch's own annotations
    return SparseAttentionFunction.apply(  # type: ignore[no-any-return, no-untyped-call]
        q, kv, sink, indices, scale, value_dim, implementation, workspace_bytes
    )
