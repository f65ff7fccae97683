"""The meaning of the operation: score everything, sort everything. Small sizes only."""

import torch
from torch import Tensor

from streamindex_service.ops.paged_keys import PagedKeys
from streamindex_service.ops.topk.order import Order, arrange
from streamindex_service.ops.topk.problem import Problem

# The products of every head are materialised; beyond this it is not a reference but an accident.
MAX_PRODUCT_BYTES = {"cpu": 8 << 30, "cuda": 128 << 30}


class ReferenceTooLargeError(ValueError):
    """The products do not fit the reference's bound; attributes give both in bytes."""

    def __init__(self, needed_bytes: int, limit_bytes: int) -> None:
        super().__init__(
            f"reference would materialise {needed_bytes} bytes of products, MAX_PRODUCT_BYTES is {limit_bytes}"
        )
        self.needed_bytes = needed_bytes
        self.limit_bytes = limit_bytes


def indexer_scores(
    q: Tensor, w: Tensor, k: Tensor, scales: Tensor | None, dtype: torch.dtype = torch.float64
) -> Tensor:
    """score[t, s] = scale[s] · Σ_h w[t, h] · ReLU(⟨q[t, h], k[s]⟩), every product in `dtype`.

    q: [rows, heads, head_dim]; w: [rows, heads]; k: [keys, head_dim]; scales: [keys] or None. Returns [rows, keys].
    Source: DeepSeek-V3.2, lightning indexer.
    """
    rows, heads, head_dim = q.shape
    products = torch.mm(q.to(dtype).reshape(rows * heads, head_dim), k.to(dtype).T).view(rows, heads, -1)
    scores = torch.bmm(w.to(dtype)[:, None, :], products.relu_())[:, 0]
    if scales is not None:
        scores *= scales.to(dtype)
    return scores.add_(0.0)  # −0.0 becomes +0.0, so that a sort cannot tell them apart


def run_reference(problem: Problem, dtype: torch.dtype = torch.float64) -> None:
    """Fill the outputs from a full sort in the total order. Raises ReferenceTooLargeError beyond MAX_PRODUCT_BYTES."""
    p = problem
    width = p.max_visible(0, p.rows) if p.rows else 0
    needed, limit = p.rows * p.heads * width * dtype.itemsize, MAX_PRODUCT_BYTES[p.q.device.type]
    if needed > limit:
        raise ReferenceTooLargeError(needed, limit)
    indices = torch.full((p.rows, p.top_k), -1, dtype=torch.int32, device=p.q.device)
    scores = torch.full((p.rows, p.top_k), -torch.inf, dtype=torch.float32, device=p.q.device)
    if width:
        found = _sorted_rows(p.q, p.w, p.keys, p.visible(0, p.rows).to(p.q.device), width, dtype)
        count = min(width, p.top_k)
        scores[:, :count] = found[0][:, :count]
        indices[:, :count] = torch.where(scores[:, :count] == -torch.inf, -1, found[1][:, :count].to(torch.int32))
    indices, scores = arrange(indices, scores, Order(p.order))
    p.out_indices.copy_(indices)
    if p.out_scores is not None:
        p.out_scores.copy_(scores)


def _sorted_rows(
    q: Tensor, w: Tensor, keys: PagedKeys, visible: Tensor, width: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    k, scales = keys.gather(0, width, dtype)
    scores = indexer_scores(q, w, k, scales, dtype)
    columns = torch.arange(width, device=q.device)
    scores.masked_fill_(columns[None, :] >= visible[:, None], -torch.inf)
    # stable: equal scores stay in index order, which is the rest of the total order
    values, indices = torch.sort(scores, dim=1, descending=True, stable=True)
    return values, indices
