"""The judge itself: it must pass what is right, and name what is wrong."""

import pytest
import torch

from streamindex_service.ops import KeyFormat
from streamindex_service.ops.topk import Order, check_topk
from streamindex_service.ops.topk.check import Verdict, score_error_bound
from streamindex_service.ops.topk.reference import indexer_scores
from tests.ops.cases import Inputs, make_inputs

TOP_K = 40


@pytest.fixture(scope="module")
def inputs() -> Inputs:
    return make_inputs(rows=6, heads=8, head_dim=32, keys=500, key_format=KeyFormat.BF16, top_k=TOP_K, positions=30)


@pytest.fixture
def late(inputs: Inputs) -> Inputs:
    return Inputs(inputs.q, inputs.w, inputs.keys, 490, 1, TOP_K)


def _verdicts(inputs: Inputs, indices, **more) -> list[Verdict]:
    report = check_topk(
        indices, inputs.q, inputs.w, inputs.keys, inputs.positions, ratio=1, top_k=inputs.top_k, **more
    )  # fmt: skip
    assert report.wrong_rows == int((report.verdicts != 0).sum())
    return [Verdict(int(code)) for code in report.verdicts]


def test_right_rows_pass(inputs: Inputs, late: Inputs) -> None:
    for case in (inputs, late):
        result = case.search("reference")
        assert _verdicts(case, result.indices, order=Order.SCORE, scores=result.scores) == [Verdict.RIGHT] * 6


def test_a_missed_best_key_is_found(late: Inputs) -> None:
    # the smallest returned score is as good as the k-th best, up to rounding: only the key left out tells
    more = Inputs(late.q, late.w, late.keys, 490, 1, TOP_K + 1).search("reference").indices
    assert _verdicts(late, more[:, 1:].contiguous()) == [Verdict.WRONG_SET] * 6


@pytest.mark.parametrize(
    ("spoil", "verdict"),
    [
        (lambda rows: rows[:, 0].copy_(rows[:, 1]), Verdict.DUPLICATE),
        (lambda rows: rows[:, -1].fill_(-1), Verdict.WRONG_COUNT),
        (lambda rows: rows[:, 0].fill_(-1), Verdict.WRONG_COUNT),
        (lambda rows: rows[:, 3].fill_(499), Verdict.OUT_OF_RANGE),
        (lambda rows: rows[:, 3].fill_(-2), Verdict.OUT_OF_RANGE),
        (lambda rows: rows.copy_(rows.flip(1)), Verdict.WRONG_ORDER),
    ],
)
def test_faults_are_named(late: Inputs, spoil, verdict: Verdict) -> None:
    early = Inputs(late.q, late.w, late.keys, 480, 1, TOP_K)
    indices = early.search("reference").indices.clone()
    spoil(indices)
    assert _verdicts(early, indices, order=Order.SCORE) == [verdict] * 6


def test_order_by_index_and_scores_are_judged(late: Inputs) -> None:
    result = late.search("reference")
    assert _verdicts(late, result.indices, order=Order.INDEX) == [Verdict.WRONG_ORDER] * 6
    off = result.scores + 0.01
    assert _verdicts(late, result.indices, scores=off) == [Verdict.WRONG_SCORE] * 6


def test_rounding_within_the_bound_is_accepted_and_no_more(late: Inputs) -> None:
    # rank by scores that are off by a known share of the bound
    k, _ = late.keys.gather(0, 491, torch.float64)
    exact = indexer_scores(late.q, late.w, k, None)[:1]
    bound = score_error_bound(late.q, late.w, k, None, e4m3_matrix_unit=False)[:1]
    one = Inputs(late.q[:1], late.w[:1], late.keys, 490, 1, TOP_K)
    sign = torch.where(torch.arange(491) % 2 == 0, 1.0, -1.0)
    near = torch.topk(exact + 0.9 * sign * bound, TOP_K).indices.int()
    assert _verdicts(one, near) == [Verdict.RIGHT]
    far = torch.topk(exact + 1e4 * sign * bound, TOP_K).indices.int()
    assert _verdicts(one, far) == [Verdict.WRONG_SET]


@pytest.mark.parametrize("key_format", list(KeyFormat), ids=lambda key_format: key_format.value)
def test_float32_scores_stay_far_within_the_bound(key_format: KeyFormat) -> None:
    inputs = make_inputs(rows=4, heads=64, head_dim=128, keys=512, key_format=key_format, top_k=8)
    k, scales = inputs.keys.gather(0, 512, torch.float64)
    exact = indexer_scores(inputs.q, inputs.w, k, scales)
    rough = indexer_scores(inputs.q, inputs.w, k, scales, torch.float32)
    bound = score_error_bound(inputs.q, inputs.w, k, scales, e4m3_matrix_unit=False)
    share = ((rough - exact).abs() / bound).max().item()
    assert 0 < share < 1
    # and the bound is of use: far below the spread of the scores
    assert bound.max() < 0.02 * exact.std()
