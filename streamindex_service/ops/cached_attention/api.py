"""`attend_cached`: attention of query rows over a window of recent rows ‖ the compressed rows that indices name."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch
from torch import Tensor

from streamindex_service.ops.cached_attention.gather import gather_rows
from streamindex_service.ops.index_rows import assemble_index_rows
from streamindex_service.ops.kv_rows import KvRows
from streamindex_service.ops.paged_kv_rows import PagedKvRows
from streamindex_service.ops.sparse_attention import AttentionResult, plan_for, sparse_attention
from streamindex_service.ops.sparse_attention.plan import MIN_WORKSPACE_BYTES

# Which way of copying rows, and of assembling index rows, goes with which implementation of attention.
_GATHERS = {"reference": "torch", "chunked": "torch", "triton": "triton"}
_INDEX_ROWS = {"reference": "reference", "chunked": "reference", "triton": "triton"}


@dataclass(frozen=True)
class AttentionTerms:
    """The least workspace of an implementation for one query row, as terms of a sum; beside rows and outputs.

    Of anything, of each head, of each (head, element of a key), of each entry of an index row, of each (entry, head),
    of each (entry, element of a key). `least_bytes` is what it takes in any case.
    """

    least_bytes: int = MIN_WORKSPACE_BYTES
    fixed_bytes: int = 0
    head_bytes: int = 0
    head_dim_bytes: int = 0
    entry_bytes: int = 0
    entry_head_bytes: int = 0
    entry_dim_bytes: int = 0


# Upper bounds of what `sparse_attention.plan` computes; a value has no more elements than its key.
ATTENTION_TERMS: Mapping[str, AttentionTerms] = MappingProxyType(
    {
        "chunked": AttentionTerms(
            fixed_bytes=1 << 20, head_bytes=32, head_dim_bytes=8, entry_bytes=32, entry_head_bytes=8, entry_dim_bytes=14
        ),
        "triton": AttentionTerms(fixed_bytes=1 << 20),
    }
)


def attend_cached(
    q: Tensor,
    compressed: PagedKvRows,
    indices: Tensor,
    window_rows: PagedKvRows,
    positions: Tensor,
    *,
    window: int,
    first_window_row: int,
    scale: float,
    sink: Tensor | None,
    value_dim: int,
    implementation: str,
    workspace_bytes: int,
    out: Tensor | None = None,
    out_lse: Tensor | None = None,
    want_lse: bool = False,
) -> AttentionResult:
    """Attention of each query row over its window and over the compressed rows that its indices name.

    Args:
        q: [tokens, heads, key_dim] bf16.
        compressed: rows that `indices` [tokens, width] int32 name; −1 and what is out of range contribute nothing.
        window_rows: uncompressed rows, of which row 0 is token `first_window_row`: they must hold what the window of
            every query needs as far as it exists.
        positions: [tokens] int64 on the CPU, the queries' own; the window of the query at p is the `window` tokens up
            to p, its own among them. 0: no window.
        scale, sink, value_dim, implementation, out, out_lse, want_lse: as for `sparse_attention`.
        workspace_bytes: for the attention itself. The rows are copied behind each other beside it:
            min(tokens · width, compressed.length) and those of the window, each once.

    Index rows are never split over programs: a query's answer is then the same sequence of operations whatever other
    queries are computed with it. Raises what `sparse_attention` raises.
    """
    tokens, width = indices.shape
    device = q.device
    first, stop = 0, 0
    if window and tokens:
        first = max(0, int(positions.min()) - window + 1)
        stop = max(first, min(first_window_row + window_rows.length, int(positions.max()) + 1))
    picked = tokens * width < compressed.length
    count = tokens * width if picked else compressed.length
    data = torch.empty((count + stop - first, compressed.row_bytes), dtype=torch.uint8, device=device)
    scales = None
    if compressed.scale_bytes:
        scales = torch.empty((len(data), compressed.scale_bytes), dtype=torch.uint8, device=device)
    wide = indices.to(torch.int64)
    order = torch.arange(count, device=device)
    if picked:
        valid = (wide >= 0) & (wide < compressed.length)
        _copy(compressed, wide.flatten(), data, scales, 0, implementation)
        wide = torch.where(valid, order.view(tokens, width), -1)
    else:
        _copy(compressed, order, data, scales, 0, implementation)
    recent = torch.arange(first - first_window_row, stop - first_window_row, device=device)
    _copy(window_rows, recent, data, scales, count, implementation)
    entries = assemble_index_rows(
        torch.where((wide >= 0) & (wide < count), wide, -1).to(torch.int32), positions.to(device, non_blocking=True),
        window=window, window_row=count - first, compressed_row=0, implementation=_INDEX_ROWS[implementation],
    )  # fmt: skip
    if compressed.format.packed is None:
        data = data.view(torch.bfloat16)
    kv = KvRows(compressed.format, data, scales)
    heads, key_dim = q.shape[1:]
    plan = plan_for(
        implementation, device, kv.format,
        tokens=tokens, heads=heads, key_dim=key_dim, value_dim=value_dim, width=entries.shape[1], rows=kv.rows,
        workspace_bytes=workspace_bytes,
    )  # fmt: skip
    return sparse_attention(
        q, kv, entries, scale=scale, sink=sink, value_dim=value_dim, implementation=implementation,
        workspace_bytes=workspace_bytes, want_lse=want_lse, out=out, out_lse=out_lse,
        plan=None if plan is None else replace(plan, splits=1),
    )  # fmt: skip


def _copy(
    rows: PagedKvRows, wanted: Tensor, data: Tensor, scales: Tensor | None, place: int, implementation: str
) -> None:
    part = slice(place, place + len(wanted))
    gather_rows(
        rows, wanted, data[part], None if scales is None else scales[part], implementation=_GATHERS[implementation]
    )
