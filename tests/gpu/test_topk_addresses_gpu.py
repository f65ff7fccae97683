"""Addresses beyond 2^31 elements in the workspace; those of keys and queries are in test_topk_gpu.py."""

import gc

import pytest
import torch

from streamindex_service.ops import KeyFormat
from streamindex_service.ops.topk import Order, Plan, check_topk, plan_for
from tests.ops.cases import make_inputs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(autouse=True)
def _give_memory_back():
    yield
    gc.collect()
    torch.cuda.empty_cache()


@pytest.mark.parametrize("key_format", [KeyFormat.BF16, KeyFormat.FP8_E4M3], ids=lambda key_format: key_format.value)
def test_more_than_two_to_the_31_scores_in_one_chunk(key_format: KeyFormat) -> None:
    rows, keys, top_k = 8192, 270_080, 64
    assert rows * keys > 2**31
    inputs = make_inputs(
        rows=rows, heads=64, head_dim=128, keys=keys, key_format=key_format, top_k=top_k, device="cuda"
    )
    planned = plan_for(
        "triton", "cuda", key_format, rows=rows, heads=64, head_dim=128, keys=keys, top_k=top_k
    )  # fmt: skip
    assert planned is not None
    plan = Plan(rows, -(-keys // 256) * 256, 0, planned.tiles)
    result = inputs.search("triton", order=Order.INDEX, plan=plan)
    for start in (0, rows - 100):
        part = inputs.row(start, start + 100)
        window = slice(start, start + 100)
        assert result.scores is not None
        report = check_topk(
            result.indices[window], part.q, part.w, part.keys, part.positions,
            ratio=1, top_k=top_k, order=Order.INDEX, scores=result.scores[window],
        )  # fmt: skip
        assert report.wrong_rows == 0, str(report)
