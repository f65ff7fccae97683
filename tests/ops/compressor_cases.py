"""Inputs that tests of the compressor share, on any device."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from streamindex_service.ops.compressor import CompressorState, CompressorWeights, compress


@dataclass(frozen=True)
class Sequence:
    """A whole sequence: kv, gate [tokens, width], and the weights."""

    kv: Tensor
    gate: Tensor
    weights: CompressorWeights

    def part(
        self, start: int, stop: int, state: CompressorState, implementation: str, out: Tensor | None = None
    ) -> Tensor:
        """Tokens start to stop, next."""
        return compress(
            self.kv[start:stop].contiguous(), self.gate[start:stop].contiguous(), self.weights, start, state,
            implementation=implementation, out=out,
        )  # fmt: skip

    def whole(self, implementation: str, rollback: int = 8) -> Tensor:
        """All of its entries, from one call."""
        return self.part(0, len(self.kv), CompressorState.empty(self.weights, rollback=rollback), implementation)

    def in_chunks(self, sizes: Iterable[int], implementation: str, rollback: int = 8) -> Tensor:
        """All of its entries, from calls of these sizes and one of the rest."""
        state, start, entries = CompressorState.empty(self.weights, rollback=rollback), 0, []
        for size in (*sizes, len(self.kv)):
            stop = min(start + size, len(self.kv))
            entries.append(self.part(start, stop, state, implementation))
            start = stop
        return torch.cat(entries)


def make_sequence(
    tokens: int,
    *,
    ratio: int,
    dim: int = 64,
    dtype: torch.dtype = torch.float32,
    amplitude: float = 1.0,
    device: str = "cpu",
    seed: int = 0,
) -> Sequence:
    """Random tokens and weights. amplitude: of the gates."""
    generator = torch.Generator().manual_seed(seed)
    width = dim * (2 if ratio == 4 else 1)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    weights = CompressorWeights(ratio, random(ratio, width).to(device), (1 + 0.1 * random(dim)).to(device))
    kv, gate = random(tokens, width), amplitude * random(tokens, width)
    return Sequence(kv.to(device, dtype), gate.to(device, dtype), weights)
