"""What a compressor remembers of a sequence between calls, addressed by position."""

from dataclasses import dataclass

import torch
from torch import Tensor

from streamindex_service.ops.compressor.weights import CompressorWeights


class StateError(ValueError):
    """The state does not hold the tokens that a call at `position` needs."""

    def __init__(self, position: int, message: str) -> None:
        super().__init__(f"position {position}: {message}")
        self.position = position


@dataclass
class CompressorState:
    """The last tokens' values and gates, those of position p in row p mod capacity.

    kv, gate: [capacity, width] float32, the gate with its `ape`. end: one past the last position that counts. oldest:
    the first of the positions before `end` that are all held.

    A state goes back by being told a lower position in the next call: tokens from there on are replaced, and entries
    that they completed are completed again. It can go back `capacity − slots` positions, and to any window's beginning
    that pools nothing before it.
    """

    kv: Tensor
    gate: Tensor
    end: int = 0
    oldest: int = 0

    @classmethod
    def empty(cls, weights: CompressorWeights, *, rollback: int = 8) -> "CompressorState":
        """The state of a sequence without tokens. rollback: positions that it can go back, draft tokens say.

        Raises ValueError if rollback is negative.
        """
        if rollback < 0:
            raise ValueError(f"rollback: {rollback}, expected 0 or more")
        shape = (weights.slots + rollback, weights.width)
        device = weights.ape.device
        return cls(torch.zeros(shape, device=device), torch.zeros(shape, device=device))

    @property
    def capacity(self) -> int:
        """Positions that are held."""
        return self.kv.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        return self.kv.nbytes + self.gate.nbytes

    def fork(self) -> "CompressorState":
        """A copy that goes on by itself."""
        return CompressorState(self.kv.clone(), self.gate.clone(), self.end, self.oldest)

    def check(self, weights: CompressorWeights, position: int) -> None:
        """Raise StateError unless a call at `position` finds every token that its first entry pools."""
        if position < 0 or position > self.end:
            raise StateError(position, f"the state ends at {self.end}: tokens between are missing")
        needed = max(0, (position // weights.ratio - weights.windows + 1) * weights.ratio)
        if needed < min(position, self.oldest):
            raise StateError(position, f"needs tokens from {needed} on, {self.oldest} is the oldest that is held")

    def advance(self, position: int, tokens: int) -> None:
        """Note that `tokens` tokens from `position` on were written."""
        self.end = position + tokens
        # what lies before a position that is not held itself is of no use
        self.oldest = max(min(position, self.oldest), self.end - self.capacity)
