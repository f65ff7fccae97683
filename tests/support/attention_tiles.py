"""Tiles of attention whose memory is measured: on a CPU as on a GPU, and on a GPU."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np
import torch

from streamindex_service.core.attention_estimates import STEP_ROWS, AttentionTerms, AttentionWork, Padding, parts_of
from streamindex_service.core.sizes import KvFormat
from streamindex_service.core.specs import KvSpec
from streamindex_service.ops import kv_rows
from streamindex_service.ops.cached_attention import ATTENTION_TERMS, AllVisible, CachedSequence, attend_cached
from streamindex_service.ops.extent_pages import ExtentPages
from streamindex_service.ops.paged_kv_rows import PagedKvRows
from streamindex_service.ops.sparse_attention import AttentionResult

TERMS = AttentionTerms(**asdict(ATTENTION_TERMS["triton"]))
WORKSPACE_BYTES = TERMS.least_bytes
V4, V4_PACKED = KvSpec(KvFormat.BF16, 512, 512, 64), KvSpec(KvFormat.FP8_D512, 512, 512, 128)
GLM, SMALL = KvSpec(KvFormat.FP8_D576, 576, 512, 64), KvSpec(KvFormat.BF16, 80, 64, 5)
NARROW = KvSpec(KvFormat.BF16, 16, 16, 1)
FORMATS = {
    KvFormat.BF16: kv_rows.KvFormat.BF16,
    KvFormat.FP8_D512: kv_rows.KvFormat.FP8_D512,
    KvFormat.FP8_D576: kv_rows.KvFormat.FP8_D576,
}

# spec, width, window, (query rows, tokens of the sequence, rows of its KV) of each part
TILES = [
    (V4, 512, 128, [(1, 9000, 2250)]),
    (V4, 512, 128, [(200, 200_000, 50_000)]),  # fewer named than there are
    (V4, 512, 128, [(300, 16_000, 4_000)]),  # more
    (V4, 512, 0, [(300, 300_000, 75_000)]),
    (V4, 2048, 128, [(1000, 40_000, 10_000)]),
    (V4_PACKED, 512, 128, [(400, 800_000, 200_000)]),
    (V4_PACKED, 1024, 128, [(900, 4_000, 1_000)]),
    (GLM, 2048, 0, [(64, 200_000, 200_000)]),
    (GLM, 2048, 0, [(1024, 200_000, 200_000)]),
    (SMALL, 300, 128, [(4000, 60_000, 15_000)]),  # the lists of rows are most of it
    (SMALL, 2048, 128, [(500, 3_000_000, 750_000)]),
    (NARROW, 2048, 0, [(2000, 2_200_000, 2_200_000)]),
    (V4, 512, 128, [(1, 4000 + 5000 * number, 1000 + 1250 * number) for number in range(128)]),  # a decode step
    (V4, 512, 128, [(2, 900_000, 225_000)] * 50 + [(40, 8_000, 2_000)] * 3),
    (GLM, 2048, 128, [(4, 100_000, 100_000)] * 16),
]


# Of layers of ratio 128, whose queries attend all that they see: as above, without a width
ALL_VISIBLE = [
    (V4_PACKED, 128, [(1, 1_048_576, 8192)]),
    (V4_PACKED, 128, [(250, 1_048_576, 8192)]),
    (V4, 128, [(900, 262_144, 2048)]),
    (GLM, 0, [(2, 131_072 + 128 * number, 1024 + number) for number in range(32)]),
    # one that is much longer than the others, for which all of them have index rows as long
    (V4, 128, [(1, 2_097_152, 16_384), *[(1, 1024, 8)] * 255]),
    (NARROW, 0, [*[(2, 1024, 8)] * 255, (1, 2_097_152, 16_384)]),
]
RATIO = 128


@dataclass(frozen=True)
class Tile:
    """Parts of a tile in the order of its rows; `want_lse` as of `attend_cached`. width: None for all visible rows."""

    spec: KvSpec
    width: int | None
    window: int
    parts: list[tuple[int, int, int]]
    want_lse: bool

    @property
    def row_parts(self) -> int:
        """Of each index row."""
        return parts_of(self.spec, None if self.width is None else self.width + self.window, STEP_ROWS)

    @property
    def rows(self) -> int:
        return sum(count for count, _, _ in self.parts)

    def estimate_bytes(self, terms: AttentionTerms = TERMS, workspace_bytes: int = WORKSPACE_BYTES) -> int:
        """What it is expected to take, as the frontend adds it up."""
        total = 0
        for count, _, held in self.parts:
            width = held if self.width is None else self.width
            named = self.width is not None
            parts = self.row_parts if terms.splits else 1
            work = AttentionWork(self.spec, held, width, self.window, self.want_lse, terms, named, parts)
            total += work.tile_bytes(count, count + self.window - 1 if self.window else 0)
        padding = Padding.of((count, held if self.width is None else self.width) for count, _, held in self.parts)
        total += padding.entries * terms.index_entry_bytes
        return total + work.used_bytes(self.rows, workspace_bytes)

    def sequences(self, device: str) -> list[CachedSequence]:
        """Rows that hold anything. A layer of that length is made once, whoever has it."""
        made: dict[int, PagedKvRows] = {}

        def paged(rows: int) -> PagedKvRows:
            if rows not in made:
                made[rows] = _paged(self.spec, rows, device)
            return made[rows]

        found = []
        for count, tokens, held in self.parts:
            first = max(0, (tokens - count - self.window) // 1024 * 1024)
            found.append(CachedSequence(count, paged(held), paged(tokens - first if self.window else 0), first))
        return found

    def inputs(self) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """q, indices and positions, in host memory."""
        q = torch.zeros((self.rows, self.spec.heads, self.spec.key_dim), dtype=torch.bfloat16)
        indices = None if self.width is None else torch.zeros((self.rows, self.width), dtype=torch.int32)
        return q, indices, torch.cat([torch.arange(tokens - count, tokens) for count, tokens, _ in self.parts])

    def attend(
        self,
        q: torch.Tensor,
        indices: torch.Tensor | None,
        positions: torch.Tensor,
        sequences: list[CachedSequence],
        implementation: str = "triton",
    ) -> AttentionResult:
        """The operation, as the worker asks for it."""
        return attend_cached(
            q, AllVisible(RATIO) if indices is None else indices, positions, sequences,
            window=self.window, scale=1.0, sink=None, want_lse=self.want_lse,
            value_dim=self.spec.value_dim, implementation=implementation, workspace_bytes=WORKSPACE_BYTES,
            parts=self.row_parts,
        )  # fmt: skip


def _paged(spec: KvSpec, rows: int, device: str) -> PagedKvRows:
    kv_format, pages, size = FORMATS[spec.kv_format], -(-rows // 256), spec.form.page_bytes
    if not pages:
        return PagedKvRows(kv_format, spec.key_dim, 0, ())
    extents = [torch.empty(pages * size, dtype=torch.uint8, device=device)]
    starts, which = size * np.arange(pages, dtype=np.int64), np.zeros(pages, dtype=np.int64)
    return PagedKvRows(kv_format, spec.key_dim, rows, ExtentPages(extents, which, starts, (size,), torch.uint8))
