"""What a tile of attention takes, before it runs: bytes in closed form, and operations."""

from __future__ import annotations

from dataclasses import dataclass

from streamindex_service.core.sizes import (
    BF16_BYTES,
    INDEX_BYTES,
    LSE_BYTES,
    PAGE_KEYS,
    POSITION_BYTES,
    align,
    pages_of,
)
from streamindex_service.core.specs import KvSpec

# Device memory of a list of rows to be copied, and of index rows on their way to places in the copy, each entry.
_COPIED_ROW_BYTES = 48
_ENTRY_BYTES = 48
# Window pages come in groups of so many, so that a stream of queries does not change its pages with every tile.
WINDOW_GROUP = 4


@dataclass(frozen=True, slots=True)
class AttentionTerms:
    """The least workspace for one query row, as the worker says; the fields are those of the message."""

    least_bytes: int = 0
    fixed_bytes: int = 0
    head_bytes: int = 0
    head_dim_bytes: int = 0
    entry_bytes: int = 0
    entry_head_bytes: int = 0
    entry_dim_bytes: int = 0

    def size_bytes(self, heads: int, key_dim: int, entries: int) -> int:
        """Of rows with so many entries, computed one at a time."""
        head = self.head_bytes + self.head_dim_bytes * key_dim
        entry = self.entry_bytes + self.entry_head_bytes * heads + self.entry_dim_bytes * key_dim
        return max(self.least_bytes, self.fixed_bytes + heads * head + entries * entry)


@dataclass(frozen=True, slots=True)
class AttentionWork:
    """Attention on one layer, query rows apart: everything that its cost depends on.

    width: indices of a query row; window: tokens of a window; kv_rows: of the layer.
    """

    kv: KvSpec
    kv_rows: int
    width: int
    window: int
    want_lse: bool
    terms: AttentionTerms

    def flop(self, rows: int) -> int:
        """Operations of query rows that attend all they may: two products of a product and a sum each."""
        entries = min(self.width, self.kv_rows) + self.window
        return max(1, 2 * rows * entries * self.kv.heads * (self.kv.key_dim + self.kv.value_dim))

    def staging_bytes(self, rows: int) -> int:
        """Device memory of the query rows and their answers."""
        heads = self.kv.heads
        sizes = (
            heads * self.kv.key_dim * BF16_BYTES,
            POSITION_BYTES,
            self.width * INDEX_BYTES,
            heads * self.kv.value_dim * BF16_BYTES,
            heads * LSE_BYTES * self.want_lse,
        )
        return sum(align(rows * size) for size in sizes)

    def copy_bytes(self, rows: int, span: int) -> int:
        """Device memory of the rows that are copied behind each other for so many query rows whose windows cover `span`
        tokens together, and of their index rows: each compressed row once, where not fewer are named."""
        copied = min(rows * self.width, self.kv_rows) + span
        form = self.kv.form
        row = form.row_bytes + form.scale_bytes + _COPIED_ROW_BYTES
        return copied * row + rows * (self.width + self.window) * _ENTRY_BYTES

    def workspace_bytes(self) -> int:
        """The least workspace of the attention itself. It takes one query row, and more of them one after the other."""
        return self.terms.size_bytes(self.kv.heads, self.kv.key_dim, self.width + self.window)

    def window_bytes(self, rows: int) -> int:
        """The most bytes of window pages that so many query rows need whose positions lie as close together."""
        if not self.window:
            return 0
        pages = pages_of(rows + self.window) + 2 * WINDOW_GROUP
        return pages * self.kv.form.page_bytes

    def rows_within(self, size_bytes: int, most: int) -> int:
        """The most query rows of a tile, up to `most`, for which copies, staging and window pages take no more than so
        many bytes; 0 when not even one row's do."""
        low, high = 0, most + 1
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.beside_bytes(middle) <= size_bytes else (low, middle)
        return low

    def beside_bytes(self, rows: int) -> int:
        """Of so many query rows, all that a tile takes beside the KV pages and the workspace."""
        span = rows + self.window if self.window else 0
        return self.staging_bytes(rows) + self.copy_bytes(rows, span) + self.window_bytes(rows)


def window_group(first_token: int, stop_token: int, pages: int) -> tuple[int, int]:
    """Pages [first, stop), of so many, that hold these tokens, in whole groups."""
    group = WINDOW_GROUP * PAGE_KEYS
    return min(pages, first_token // group * WINDOW_GROUP), min(pages, -(-stop_token // group) * WINDOW_GROUP)
