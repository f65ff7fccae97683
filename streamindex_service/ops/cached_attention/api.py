"""`attend_cached`: attention of query rows over a window of recent rows ‖ the compressed rows that indices name.

The kernels read rows in their pages, which a table of the pages of all sequences tells them. Implementations in torch
read rows of one tensor: for them the rows are copied behind each other. Both attend in one run: what is launched does
not depend on how many sequences there are.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from streamindex_service.ops.cached_attention.copies import lay_out
from streamindex_service.ops.cached_attention.gather import gather_rows
from streamindex_service.ops.cached_attention.places import Places
from streamindex_service.ops.cached_attention.sequences import AllVisible, CachedSequence
from streamindex_service.ops.extent_pages import to_device
from streamindex_service.ops.index_rows import assemble_index_rows
from streamindex_service.ops.kv_rows import KvRows
from streamindex_service.ops.paged_kv_rows import PlacedKvRows
from streamindex_service.ops.sparse_attention import AttentionResult, find_implementation, plan_for, sparse_attention
from streamindex_service.ops.sparse_attention.plan import MIN_WORKSPACE_BYTES


@dataclass(frozen=True)
class AttentionTerms:
    """The least workspace of an implementation for one query row, as terms of a sum; beside rows and outputs.

    Of anything, of each head, of each (head, element of a key), of each entry of an index row, of each (entry, head),
    of each (entry, element of a key). `least_bytes` is what it takes in any case. Beside the workspace, of each entry
    of an index row (the row itself among it), and unless rows are read in their pages, of each row that is copied,
    while it is (the copy itself apart). splits: an index row may be split into parts, of which each has an output and a
    log-sum-exp in float32.
    """

    least_bytes: int = MIN_WORKSPACE_BYTES
    fixed_bytes: int = 0
    head_bytes: int = 0
    head_dim_bytes: int = 0
    entry_bytes: int = 0
    entry_head_bytes: int = 0
    entry_dim_bytes: int = 0
    copied_row_bytes: int = 0
    index_entry_bytes: int = 0
    reads_pages: bool = False
    splits: bool = False


# Upper bounds of what `sparse_attention.plan` computes; a value has no more elements than its key.
ATTENTION_TERMS: Mapping[str, AttentionTerms] = MappingProxyType(
    {
        "chunked": AttentionTerms(
            fixed_bytes=1 << 20,
            head_bytes=32,
            head_dim_bytes=8,
            entry_bytes=32,
            entry_head_bytes=8,
            entry_dim_bytes=14,
            copied_row_bytes=96,
            index_entry_bytes=48,
        ),
        # A block of the allocator may be larger by up to 1 MiB than the tensor that has it, and a tile has about ten.
        # The least has room for the parts of a usual block's index rows.
        "triton": AttentionTerms(
            least_bytes=32 << 20,
            fixed_bytes=10 << 20,
            index_entry_bytes=8,
            reads_pages=True,
            splits=True,
        ),
    }
)


def attend_cached(
    q: Tensor,
    indices: Tensor | AllVisible,
    positions: Tensor,
    sequences: Sequence[CachedSequence],
    *,
    window: int,
    scale: float,
    sink: Tensor | None,
    value_dim: int,
    implementation: str,
    workspace_bytes: int,
    parts: int = 1,
    out: Tensor | None = None,
    out_lse: Tensor | None = None,
    want_lse: bool = False,
) -> AttentionResult:
    """Attention of each query row over its window and over the compressed rows that its indices name.

    Args:
        q: [tokens, heads, key_dim] bf16.
        indices: [tokens, width] int32, rows of the sequence's own compressed rows; −1 and what is out of range
            contribute nothing. Or all rows that a query sees.
        positions: [tokens] int64 on the CPU, the queries' own; the window of the query at p is the `window` tokens up
            to p, its own among them. 0: no window.
        sequences: at least one, of one format; their query rows, in this order, are those of `q`.
        scale, sink, value_dim, implementation, out, out_lse, want_lse: as for `sparse_attention`.
        workspace_bytes: for the attention itself. Where rows are copied, they are beside it, of each sequence
            min(tokens · width, compressed.length) and those of its window, each once.
        parts: of an index row, that different programs take; implementations in torch never split.

    A query's answer is the same sequence of operations whatever other queries are computed with it (of implementations
    in torch on a CPU alone): what is split into parts is its index row as it is given, or of all visible rows those
    that it sees itself. Raises ValueError for indices, positions, parts or a window that are not as above, or if the
    sequences disagree, and what `sparse_attention` raises.
    """
    _check(q, indices, positions, sequences, window, parts)
    tokens, heads, key_dim = q.shape
    visible, width = None, 0
    if isinstance(indices, Tensor):
        width = indices.shape[1]
    else:
        visible = indices.counts(sequences, positions)
        width = int(visible.max(initial=0))
    kv: KvRows | PlacedKvRows
    if find_implementation(implementation, q.device, sequences[0].compressed.format).takes_places:
        places = Places.of(sequences, positions, window, q.device, visible)
        kv, ends = places.rows, places.ends
        entries = places.entries(indices if isinstance(indices, Tensor) else None, width)
        # what the allocator may take beyond is part of the workspace
        workspace_bytes = max(MIN_WORKSPACE_BYTES, workspace_bytes - ATTENTION_TERMS[implementation].fixed_bytes)
    else:
        ends = None
        if visible is not None:
            ends = to_device((window + visible).astype(np.int32), q.device)
        named = indices if isinstance(indices, Tensor) else _first_rows(visible, width, q.device)
        kv, entries = _copy(sequences, positions, named, window)
    plan = plan_for(
        implementation, q.device, kv.format,
        tokens=tokens, heads=heads, key_dim=key_dim, value_dim=value_dim, width=entries.shape[1],
        workspace_bytes=workspace_bytes,
        parts=parts,
    )  # fmt: skip
    return sparse_attention(
        q, kv, entries, scale=scale, sink=sink, value_dim=value_dim, implementation=implementation,
        workspace_bytes=workspace_bytes, want_lse=want_lse, out=out, out_lse=out_lse, plan=plan, ends=ends,
    )  # fmt: skip


def _first_rows(counts: npt.NDArray[np.int64] | None, width: int, device: torch.device) -> Tensor:
    """Index rows of the first rows, so many of each query, −1 behind them: [queries, width] int32."""
    assert counts is not None
    row = torch.arange(width, dtype=torch.int32, device=device)
    return torch.where(row < to_device(counts, device)[:, None], row, -1)


def _check(
    q: Tensor,
    indices: Tensor | AllVisible,
    positions: Tensor,
    sequences: Sequence[CachedSequence],
    window: int,
    parts: int,
) -> None:
    tokens = len(q)
    if not sequences:
        raise ValueError("sequences: there are none")
    if parts < 1:
        raise ValueError(f"parts: {parts}, expected 1 or more")
    if window < 0:
        raise ValueError(f"window: {window}, expected 0 or more")
    given = [("positions", positions, 1, torch.int64, torch.device("cpu"))]
    if isinstance(indices, Tensor):
        given.append(("indices", indices, 2, torch.int32, q.device))
    for name, tensor, dimensions, dtype, device in given:
        if tensor.dim() != dimensions or len(tensor) != tokens or tensor.dtype != dtype or tensor.device != device:
            raise ValueError(
                f"{name}: expected {dimensions} dimensions of {tokens} rows, {dtype} on {device}, got "
                f"{list(tensor.shape)} {tensor.dtype} on {tensor.device}"
            )
        if not tensor.is_contiguous():
            raise ValueError(f"{name}: not contiguous")


def _copy(
    sequences: Sequence[CachedSequence], positions: Tensor, indices: Tensor, window: int
) -> tuple[KvRows, Tensor]:
    """The rows that are attended as one tensor, and index rows of it."""
    device = indices.device
    copies = lay_out(sequences, positions, indices.shape[1], window, device)
    wanted, found = copies.rows(indices)
    source = copies.source
    data = torch.empty((len(wanted), source.row_bytes), dtype=torch.uint8, device=device)
    scales = None
    if source.scale_bytes:
        scales = torch.empty((len(wanted), source.scale_bytes), dtype=torch.uint8, device=device)
    gather_rows(source, wanted, data, scales)
    del wanted  # before there are index rows
    kv_format = source.parts[0].format
    if kv_format.packed is None:
        data = data.view(torch.bfloat16)
    entries = assemble_index_rows(
        found, positions.to(device, non_blocking=True),
        window=window, window_row=copies.window_row, compressed_row=0, implementation="reference",
    )  # fmt: skip
    copies.leave_out_what_is_not_held(entries[:, :window])
    return KvRows(kv_format, data, scales), entries
