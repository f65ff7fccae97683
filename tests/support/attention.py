"""Caches with KV rows, queries of attention, and what every answer row must be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import streamindex_client
import torch

from streamindex_service.ops.kv_rows import KvFormat, KvRows, pack_rows
from streamindex_service.ops.sparse_attention import check_sparse_attention


@dataclass(frozen=True)
class Shape:
    """What a cache of one layer and the queries on it are."""

    kv_format: KvFormat = KvFormat.BF16
    key_dim: int = 64
    value_dim: int = 64
    heads: int = 4
    index_heads: int = 3
    index_dim: int = 32
    ratio: int = 4

    @property
    def scale(self) -> float:
        return self.key_dim**-0.5

    @property
    def kv(self) -> streamindex_client.KvSpec:
        return streamindex_client.KvSpec(self.kv_format.value, self.key_dim, self.value_dim, self.heads)

    def create(self, client: streamindex_client.Client, **others: Any) -> streamindex_client.KeyCache:
        arguments = {"layers": 1, "key_format": "bf16", "kv": self.kv, **others}
        return client.create_key_cache(heads=self.index_heads, head_dim=self.index_dim, ratio=self.ratio, **arguments)


@dataclass
class Rows:
    """Rows of one layer, on the CPU: keys [n, index_dim] bf16, n KV rows, and one window row a token."""

    keys: torch.Tensor
    kv: KvRows
    window: KvRows

    @classmethod
    def drawn(cls, shape: Shape, tokens: int, seed: int) -> Rows:
        generator = torch.Generator().manual_seed(seed)

        def rows(count: int, dim: int) -> torch.Tensor:
            return torch.randn((count, dim), generator=generator)

        keys = tokens // shape.ratio
        return cls(
            rows(keys, shape.index_dim).bfloat16(),
            pack_rows(rows(keys, shape.key_dim), shape.kv_format),
            pack_rows(rows(tokens, shape.key_dim), shape.kv_format),
        )

    def cut(self, keys: int, window: int) -> Rows:
        return Rows(self.keys[:keys], part(self.kv, slice(0, keys)), part(self.window, slice(0, window)))

    def upload(self, cache: Any, layer: int = 0) -> None:
        cache.append(layer=layer, keys=self.keys, first_row=0)
        cache.append(layer=layer, kv_rows=self.kv.data, scales=self.kv.scales, first_row=0)
        cache.append(layer=layer, window_rows=self.window.data, scales=self.window.scales, first_row=0)


def part(rows: KvRows, which: slice) -> KvRows:
    """Some of the rows."""
    return KvRows(rows.format, rows.data[which].clone(), None if rows.scales is None else rows.scales[which].clone())


def joined(one: KvRows, other: KvRows) -> KvRows:
    """The rows of both."""
    scales = None if one.scales is None or other.scales is None else torch.cat([one.scales, other.scales])
    return KvRows(one.format, torch.cat([one.data, other.data]), scales)


@dataclass
class Queries:
    """Query rows: q [rows, heads, key_dim] bf16, index_q, index_w, positions [rows]."""

    q: torch.Tensor
    index_q: torch.Tensor
    index_w: torch.Tensor
    positions: torch.Tensor

    @classmethod
    def drawn(cls, shape: Shape, positions: torch.Tensor, seed: int) -> Queries:
        generator = torch.Generator().manual_seed(seed)
        count = len(positions)
        return cls(
            torch.randn((count, shape.heads, shape.key_dim), generator=generator).bfloat16(),
            torch.randn((count, shape.index_heads, shape.index_dim), generator=generator).bfloat16(),
            torch.randn((count, shape.index_heads), generator=generator),
            positions,
        )

    def __len__(self) -> int:
        return len(self.q)


def wrong_rows(
    shape: Shape,
    rows: Rows,
    queries: Queries,
    indices: torch.Tensor,
    window: int,
    out: torch.Tensor,
    lse: torch.Tensor | None = None,
    sink: torch.Tensor | None = None,
    scale: float | None = None,
) -> int:
    """Answer rows that are not what float64 says of window ‖ indices, within the bounds of rounding. `scale`: another
    than the shape's."""
    keys, held = rows.kv.rows, rows.window.rows
    tokens = queries.positions[:, None] - window + 1 + torch.arange(window)
    recent = torch.where((tokens >= 0) & (tokens < held), tokens + keys, -1)
    named = torch.where((indices >= 0) & (indices < keys), indices.long(), -1)
    flat = torch.cat([recent, named], dim=1).to(torch.int32).contiguous()
    both = joined(rows.kv, rows.window)
    used = shape.scale if scale is None else scale
    report = check_sparse_attention(out, lse, queries.q, both, flat, scale=used, sink=sink)
    return report.wrong_rows
