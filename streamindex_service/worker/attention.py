"""One tile of attention: its tensors in host memory, and the operation on them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from streamindex_service.ipc.v1 import worker_pb2 as pb
from streamindex_service.ops.cached_attention import AllVisible, CachedSequence, attend_cached
from streamindex_service.ops.paged_kv_rows import PagedKvRows
from streamindex_service.ops.sparse_attention import AttentionResult
from streamindex_service.worker.key_store import KeyStore, SegmentMap


@dataclass(frozen=True)
class AttendTensors:
    """What a tile reads and writes in host memory.

    q: [rows, heads, key_dim] bf16; positions: [rows] int64; indices: [rows, width] int32, or None: see
    `AttendTile.visible_ratio`; out: [rows, heads, value_dim]
    bf16; lse: [rows, heads] float32 or None.
    """

    q: torch.Tensor
    positions: torch.Tensor
    indices: torch.Tensor | None
    out: torch.Tensor
    lse: torch.Tensor | None

    @classmethod
    def of(cls, message: pb.AttendTile, key_dim: int, segments: SegmentMap) -> AttendTensors:
        """The tensors that a message names."""
        at, rows, heads = segments.tensor_at, message.rows, message.heads
        return cls(
            at(message.q, torch.bfloat16, (rows, heads, key_dim)),
            at(message.positions, torch.int64, (rows,)),
            None if message.visible_ratio else at(message.indices, torch.int32, (rows, message.width)),
            at(message.out, torch.bfloat16, (rows, heads, message.value_dim)),
            at(message.lse, torch.float32, (rows, heads)) if message.HasField("lse") else None,
        )

    def answers(self, result: AttentionResult) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Where each part of an answer goes, and the part."""
        yield self.out, result.out
        if self.lse is not None:
            assert result.lse is not None
            yield self.lse, result.lse


def sequences_of(message: pb.AttendTile, store: KeyStore) -> list[CachedSequence]:
    """What the rows of a tile attend. Raises MissingMemoryError."""
    return [_sequence(each, store) for each in message.sequences]


def _sequence(message: pb.AttendSequence, store: KeyStore) -> CachedSequence:
    compressed = store.kv_view(message.view_id)
    if message.HasField("window_view_id"):
        window_rows = store.kv_view(message.window_view_id)
    else:
        window_rows = PagedKvRows(compressed.format, compressed.key_dim, 0, ())
    return CachedSequence(message.rows, compressed, window_rows, message.first_window_row)


def attend(
    message: pb.AttendTile,
    sequences: Sequence[CachedSequence],
    q: torch.Tensor,
    indices: torch.Tensor | None,
    positions: torch.Tensor,
    implementation: str,
    out: torch.Tensor | None = None,
    out_lse: torch.Tensor | None = None,
) -> AttentionResult:
    """Compute a tile on the device of `q` and `indices`, if there are any; `positions` are on the CPU."""
    sink = torch.tensor(list(message.sink), dtype=torch.float32) if message.sink else None
    return attend_cached(
        q, AllVisible(message.visible_ratio) if indices is None else indices, positions, sequences,
        window=message.window, scale=message.scale, sink=None if sink is None else sink.to(q.device, non_blocking=True),
        value_dim=message.value_dim, implementation=implementation, workspace_bytes=message.workspace_bytes,
        parts=message.parts, want_lse=message.HasField("lse"), out=out, out_lse=out_lse,
    )  # fmt: skip
