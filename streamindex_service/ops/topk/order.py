"""The total order of results: score descending, key index ascending, −0.0 equal to +0.0."""

from enum import StrEnum

import torch
from torch import Tensor

_LOW_WORD = 0xFFFFFFFF


class Order(StrEnum):
    """How one row of a result is arranged. Padding (−1) is always last."""

    SCORE = "score"  # score descending, ties by index ascending
    INDEX = "index"  # index ascending


def pack(scores: Tensor, first_index: int, out: Tensor) -> None:
    """Write one int64 per score whose integer order is the total order, best largest.

    scores: [rows, n] float32, column j being key `first_index` + j; −inf stands for "no key". out: [rows, n] int64.
    The upper word is the score's bits made monotonic, the lower word the inverted index, so no two entries are equal.
    """
    bits = (scores + 0.0).view(torch.int32)  # −0.0 + 0.0 is +0.0: equal scores get equal bits
    # a negative float's magnitude bits are reversed: flip them, and signed integers order as the floats do
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    out.copy_(ordered)
    out <<= 32
    count = scores.shape[1]
    out += torch.arange(
        _LOW_WORD - first_index, _LOW_WORD - first_index - count, -1, dtype=torch.int64, device=out.device
    )


def unpack(packed: Tensor) -> tuple[Tensor, Tensor]:
    """The (indices int32, scores float32) that `pack` wrote, of the same shape; index −1 where the score is −inf."""
    ordered = (packed >> 32).to(torch.int32)
    bits = torch.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered)
    scores = bits.view(torch.float32)
    indices = (_LOW_WORD - (packed & _LOW_WORD)).to(torch.int32)
    return torch.where(scores == -torch.inf, -1, indices), scores


def arrange(indices: Tensor, scores: Tensor, order: Order) -> tuple[Tensor, Tensor]:
    """Rows that stand in score order, put in `order`. indices, scores: [rows, top_k], padding −1 and −inf."""
    if order is Order.SCORE:
        return indices, scores
    unsigned = torch.where(indices < 0, torch.iinfo(torch.int32).max, indices)  # padding goes last
    _, permutation = torch.sort(unsigned, dim=1)
    return indices.gather(1, permutation), scores.gather(1, permutation)
