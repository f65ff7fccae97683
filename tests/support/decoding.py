"""Sequences that are decoded: caches that get the rows of new tokens with the queries at their places."""

from __future__ import annotations

from typing import Any

import streamindex_client
import torch
from streamindex_client import AttendBatchItem, AttendBatchResult

from tests.support.attend_batch import ASKED, SCALE, WINDOW
from tests.support.attention import Queries, Rows, Shape, part, wrong_rows


class Decoding:
    """A sequence of which a cache has the first tokens."""

    def __init__(self, client: streamindex_client.Client, shape: Shape, tokens: int, held: int, seed: int) -> None:
        self.shape = shape
        self.seed = seed
        self.rows = Rows.drawn(shape, tokens, seed)
        self.held = held
        self.cache = shape.create(client)
        self.of(held).upload(self.cache)

    def of(self, tokens: int) -> Rows:
        """What a cache must have of so many tokens."""
        return self.rows.cut(tokens // self.shape.ratio, tokens)

    def new_rows(self, first: int, tokens: int) -> dict[str, Any]:
        """What the tokens [first, tokens) add, as an item appends it; some kinds may have nothing."""
        ratio, found = self.shape.ratio, dict[str, Any]()
        start, stop = first // ratio, tokens // ratio
        window = part(self.rows.window, slice(first, tokens))
        found |= {"window_rows": window.data, "window_scales": window.scales}
        if stop > start:
            kv = part(self.rows.kv, slice(start, stop))
            found |= {"keys": self.rows.keys[start:stop], "kv_rows": kv.data, "kv_scales": kv.scales}
        return found

    def queries(self, first: int, tokens: int) -> Queries:
        return Queries.drawn(self.shape, torch.arange(first, tokens), self.seed + tokens)

    def step(self, count: int, **others: Any) -> tuple[AttendBatchItem, Queries]:
        """The next tokens: their rows, and queries at their places."""
        first = self.held
        self.held += count
        queries = self.queries(first, self.held)
        fields = {"q": queries.q, "index_q": queries.index_q, "index_w": queries.index_w, "start_position": first}
        return AttendBatchItem(self.cache, 0, **{**fields, **self.new_rows(first, self.held), **others}), queries

    def check(self, client: streamindex_client.Client, result: AttendBatchResult, queries: Queries) -> None:
        """The bits that a cache gives which had all rows uploaded, and what float64 says."""
        assert result.error is None, result.error
        rows = self.of(self.held)
        lengths = (result.layer_keys, result.layer_kv_rows, result.layer_window_rows)
        assert lengths == (len(rows.keys), rows.kv.rows, rows.window.rows)
        uploaded = self.shape.create(client)
        rows.upload(uploaded)
        fields = {"q": queries.q, "index_q": queries.index_q, "index_w": queries.index_w}
        item = AttendBatchItem(uploaded, 0, **fields, positions=queries.positions)
        (wanted,) = client.sparse_attend_batch([item], **ASKED, want_indices=True)
        uploaded.delete()
        for name in ("out", "lse", "indices"):
            assert torch.equal(getattr(result, name), getattr(wanted, name)), name
        found = wrong_rows(self.shape, rows, queries, wanted.indices, WINDOW, result.out, result.lse, scale=SCALE)
        assert found == 0
