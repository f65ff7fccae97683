"""Rows of several sequences, for tests of `topk_sequences` on any device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from streamindex_service.ops import KeyFormat, PagedKeys
from streamindex_service.ops.topk import KeySequence, Order, Plan, TopkResult, topk_sequences
from tests.ops.cases import Inputs, make_inputs


@dataclass(frozen=True)
class Step:
    """Rows of some sequences."""

    sequences: list[Inputs]

    @classmethod
    def drawn(
        cls,
        shape: tuple[KeyFormat, int, int],
        lengths: Sequence[int],
        positions: Sequence[Sequence[int]],
        device: str,
        *,
        top_k: int,
        ratio: int,
        seed: int = 0,
        values: str = "normal",
    ) -> Step:
        """shape: format, heads, head_dim; lengths: keys of each sequence; positions: of the rows of each."""
        key_format, heads, head_dim = shape
        sequences = []
        for number, (length, own) in enumerate(zip(lengths, positions, strict=True)):
            inputs = make_inputs(
                rows=len(own), heads=heads, head_dim=head_dim, keys=max(1, length), key_format=key_format, top_k=top_k,
                ratio=ratio, positions=torch.tensor(own), device=device, seed=seed + number, values=values,
            )  # fmt: skip
            if not length:
                none: tuple[torch.Tensor, ...] | None = () if key_format.has_scales else None
                inputs = replace(inputs, keys=PagedKeys(key_format, head_dim, 0, (), none))
            sequences.append(inputs)
        return cls(sequences)

    def alone(self, implementation: str, **options: Any) -> TopkResult:
        """Each by itself."""
        found = [each.search(implementation, **options) for each in self.sequences]
        scores = None if found[0].scores is None else torch.cat([each.scores for each in found])
        return TopkResult(torch.cat([each.indices for each in found]), scores)

    def together(
        self, implementation: str, *, order: Order = Order.SCORE, plan: Plan | None = None, want_scores: bool = True
    ) -> TopkResult:
        """All in one run."""
        q, w = (torch.cat([getattr(each, name) for each in self.sequences]) for name in ("q", "w"))
        first = self.sequences[0]
        # a result must not depend on what its buffers held
        indices = torch.full((len(q), first.top_k), -77, dtype=torch.int32, device=q.device)
        scores = torch.full((len(q), first.top_k), torch.nan, device=q.device) if want_scores else None
        return topk_sequences(
            q, w, [KeySequence(len(each.q), each.keys) for each in self.sequences],
            torch.cat([torch.as_tensor(each.positions) for each in self.sequences]), ratio=first.ratio,
            top_k=first.top_k, order=order, implementation=implementation, plan=plan,
            out_indices=indices, out_scores=scores,
        )  # fmt: skip
