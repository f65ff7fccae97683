"""The sorting network that puts results in order of score, at a size that can be interpreted."""

import pytest
import torch

from tests.ops.cases import kernel_device


@pytest.mark.parametrize("top_k", [1, 7, 31, 32])
def test_ties_and_padding_keep_index_order(top_k: int) -> None:
    from streamindex_service.ops.topk.selection import order_kernel  # Triton is imported once its mode is set

    rows, lanes = 3, 32
    generator = torch.Generator().manual_seed(top_k)
    scores = torch.randint(-2, 3, (rows, top_k), generator=generator).float() * 1e30
    indices = torch.arange(rows * top_k, dtype=torch.int32).view(rows, top_k) * 3
    scores[1, top_k // 2 :] = -torch.inf
    indices[1, top_k // 2 :] = -1
    expected_scores, permutation = torch.sort(scores, dim=1, descending=True, stable=True)
    expected = indices.gather(1, permutation)

    scores, indices = scores.to(kernel_device()), indices.to(kernel_device())
    found, found_scores = torch.full_like(indices, -7), torch.full_like(scores, torch.nan)
    order_kernel[(rows,)](scores, indices, found_scores, found, top_k, LANES=lanes, WANT_SCORES=True, num_warps=1)
    assert torch.equal(found.cpu(), expected)
    assert torch.equal(found_scores.cpu(), expected_scores)
    order_kernel[(rows,)](scores, indices, scores, found.fill_(-7), top_k, LANES=lanes, WANT_SCORES=False, num_warps=1)
    assert torch.equal(found.cpu(), expected)
