"""Searching a part of a layer's keys, and merging what was found with the best of the parts before it."""

from __future__ import annotations

import torch
from torch import Tensor

from streamindex_service.ops.topk.order import Order, arrange

_LOW_WORD = 0xFFFFFFFF


def shift_positions(positions: Tensor, first_key: int, ratio: int) -> tuple[Tensor, Tensor]:
    """Positions from which the keys from `first_key` on are seen as a layer of their own, and which rows see any.

    positions: [rows] int64. Returns [rows] int64 and [rows] bool. A row that sees none is given position 0, at which a
    key may be seen where the ratio is 1: what it finds is not to be used.
    """
    sees = (positions + 1) // ratio > first_key
    return (positions - first_key * ratio).clamp_(min=0), sees


def merge(
    best: tuple[Tensor, Tensor], found: tuple[Tensor, Tensor], sees: Tensor, first_key: int, order: Order
) -> tuple[Tensor, Tensor]:
    """The best of two parts: (indices int32, scores float32), each [rows, top_k] in score order, −1 and −inf padded.

    `found` has indices from `first_key` on; rows that do not see that part keep their best. Exact: the total order is
    that of a search of both parts at once, and scores keep every bit.
    """
    top_k = best[0].shape[1]
    indices, scores = found
    valid = (indices >= 0) & sees[:, None]
    indices = torch.where(valid, indices + first_key, -1)
    scores = torch.where(valid, scores, -torch.inf)
    all_indices, all_scores = torch.cat((best[0], indices), 1), torch.cat((best[1], scores), 1)
    bits = (all_scores + 0.0).view(torch.int32)  # −0.0 and +0.0 are equal in the order
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(torch.int64)
    # padding has −inf and the largest index: no entry of a row is equal to another, but padding to padding
    packed = (ordered << 32) + (_LOW_WORD - (all_indices.to(torch.int64) & _LOW_WORD))
    places = torch.topk(packed, top_k, dim=1, sorted=True).indices
    return arrange(all_indices.gather(1, places), all_scores.gather(1, places), order)
