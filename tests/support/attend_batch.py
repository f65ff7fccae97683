"""Sequences of a ragged decode step of attention, and what every item's answer must be."""

from __future__ import annotations

from typing import Any

import streamindex_client
import torch
from streamindex_client import AttendBatchItem, AttendBatchResult

from tests.support.attention import Queries, Rows, Shape, wrong_rows

TOP_K, WINDOW, SCALE = 40, 100, 0.125
ASKED: dict[str, Any] = {"top_k": TOP_K, "window": WINDOW, "scale": SCALE, "want_lse": True}


class Sequence:
    """A cache with rows of so many tokens, and queries, by default at its end. `asked`: otherwise than ASKED."""

    def __init__(
        self,
        client: streamindex_client.Client,
        shape: Shape,
        tokens: int,
        rows: int,
        seed: int,
        positions: torch.Tensor | None = None,
        **asked: Any,
    ) -> None:
        self.shape = shape
        self.asked = ASKED | asked
        self.rows = Rows.drawn(shape, tokens, seed)
        self.cache = shape.create(client)
        self.rows.upload(self.cache)
        at = torch.arange(tokens - rows, tokens) if positions is None else positions
        self.queries = Queries.drawn(shape, at, seed + 1000)

    def item(self, **others: Any) -> AttendBatchItem:
        """What a pipeline sends."""
        q = self.queries
        fields = {"q": q.q, "index_q": q.index_q, "index_w": q.index_w, "positions": q.positions}
        return AttendBatchItem(self.cache, 0, **{**fields, **others})

    def given(self, indices: torch.Tensor) -> AttendBatchItem:
        """With indices."""
        return self.item(index_q=None, index_w=None, indices=indices)

    def found(self) -> torch.Tensor:
        """The indices that a search of these queries finds."""
        q, top_k = self.queries, self.asked["top_k"]
        return self.cache.search_all(
            layer=0, q=q.index_q, w=q.index_w, top_k=top_k, positions=q.positions, order="index"
        ).indices

    def alone(self, **others: Any) -> Any:
        """The same by SparseAttend."""
        q = self.queries
        fields = {"q": q.q, "index_q": q.index_q, "index_w": q.index_w, "positions": q.positions, **self.asked}
        return self.cache.sparse_attend_all(layer=0, **{**fields, **others})

    def check(self, result: AttendBatchResult, **others: Any) -> None:
        """The bits of SparseAttend, and what float64 says."""
        assert result.error is None, result.error
        alone = self.alone(**others)
        assert torch.equal(result.out, alone.out)
        assert torch.equal(result.lse, alone.lse)
        self.check_right(result, self.found() if "indices" not in others else others["indices"], others.get("sink"))

    def check_right(self, result: AttendBatchResult, indices: torch.Tensor, sink: torch.Tensor | None = None) -> None:
        """What float64 says."""
        assert result.error is None, result.error
        window, scale = self.asked["window"], self.asked["scale"]
        wrong = wrong_rows(
            self.shape, self.rows, self.queries, indices, window, result.out, result.lse, sink, scale=scale
        )
        assert wrong == 0
