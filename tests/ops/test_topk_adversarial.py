"""Rows made to mislead a selection, seen in part, whole and not at all: every implementation against the reference."""

import pytest
import torch
from torch import Tensor

from streamindex_service.ops.topk import Order
from streamindex_service.ops.topk.problem import Problem
from tests.ops.cases import SMALL, Inputs, kernel_device, poisoned_keys, same, small_plan

KEYS, TOP_K, RATIO = 1600, 24, 4
# none, one, on both sides of top_k, few enough not to be filtered, and all
VISIBLE = [0, 1, TOP_K - 1, TOP_K, TOP_K + 1, 4 * TOP_K, 1025, KEYS]
LINE, EVERY = SMALL["sample_line"], SMALL["sample_every"]  # what `small_plan` samples


def _column(kind: str) -> Tensor:
    """[KEYS] scores that float16 holds exactly."""
    number = torch.arange(KEYS)
    line = number // LINE
    columns = {
        "all equal": torch.full((KEYS,), 3.0),
        "all zero": torch.full((KEYS,), -1.0),  # after ReLU
        "rising": number.float(),
        "falling": (KEYS - number).float(),
        "one outlier": torch.where(number == 1033, 2000.0, (number % 7).float()),
        "best where sampled": (line % EVERY == 0) * 512.0 + number % LINE,
        "best where not sampled": (line % EVERY != 0) * 512.0 + number % LINE,
        "period of a line": (number % LINE == 0).float(),
        "period of the sample": (number % (LINE * EVERY)).float(),
        "two plateaus": (number % 3 == 0).float(),
    }
    return columns[kind]


KINDS = [
    "all equal", "all zero", "rising", "falling", "one outlier", "best where sampled", "best where not sampled",
    "period of a line", "period of the sample", "two plateaus",
]  # fmt: skip


def _inputs(column: Tensor, gate: float, query: float, implementation: str) -> Inputs:
    """Rows whose scores are gate · ReLU(query · column)."""
    device = kernel_device() if implementation == "triton" else "cpu"
    k = torch.zeros(KEYS, 16, device=device)
    k[:, 0] = column.to(device)
    q = torch.zeros(len(VISIBLE), 1, 16, device=device)
    q[:, :, 0] = query
    positions = torch.tensor([seen * RATIO - 1 if seen else RATIO - 2 for seen in VISIBLE])
    w = torch.full((len(VISIBLE), 1), gate, device=device)
    return Inputs(q.half(), w, poisoned_keys(k.half(), None), positions, RATIO, TOP_K)


@pytest.mark.parametrize("implementation", ["chunked", "triton"])
@pytest.mark.parametrize(("tile", "order"), [(1792, Order.SCORE), (512, Order.INDEX)], ids=["one tile", "four tiles"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_row(kind: str, tile: int, order: Order, implementation: str) -> None:
    inputs = _inputs(_column(kind), 1.0, 1.0, implementation)
    found = inputs.search(implementation, order=order, plan=small_plan(inputs, 5, tile))
    assert same(found, inputs.search("reference", order=order))
    assert (found.indices >= 0).sum(dim=1).tolist() == [min(seen, TOP_K) for seen in VISIBLE]


@pytest.mark.parametrize(
    ("kind", "misled"),
    [("best where not sampled", True), ("period of the sample", True), ("all zero", True), ("rising", False)],
)
def test_what_misleads_the_sample(kind: str, misled: bool) -> None:
    """Or the rows above would be rows like any other."""
    from streamindex_service.ops.topk.triton import survivor_counts

    inputs = _inputs(_column(kind), 1.0, 1.0, "triton")
    out = torch.empty((len(VISIBLE), TOP_K), dtype=torch.int32, device=kernel_device())
    problem = Problem(inputs.q, inputs.w, inputs.keys, inputs.positions, RATIO, TOP_K, Order.INDEX, out, None)
    survivors = survivor_counts(problem, small_plan(inputs, len(VISIBLE), 1792))[-1].item()
    assert (survivors == -1) == misled


# scores far from 1 but exact: powers of two times what a column holds
@pytest.mark.parametrize("implementation", ["chunked", "triton"])
@pytest.mark.parametrize("gate", [2.0**-120, 2.0**100, -1.0, -(2.0**100)])
@pytest.mark.parametrize("kind", ["rising", "two plateaus", "all zero"])
def test_magnitudes_and_negative_gates(kind: str, gate: float, implementation: str) -> None:
    inputs = _inputs(_column(kind), gate, 1.0, implementation)
    expected = inputs.search("reference")
    assert same(inputs.search(implementation, plan=small_plan(inputs, 5, 1792)), expected)
    if gate < 0 and kind == "rising":  # the lowest product is the best score
        assert expected.indices[-1, :3].tolist() == [0, 1, 2]
    if kind == "all zero":  # a negative gate makes −0.0 of it, which is no less
        assert expected.indices[-1].tolist() == list(range(TOP_K))
        assert not torch.signbit(expected.scores[1:, 0]).any()


@pytest.mark.parametrize("query", [2.0**-14, 2.0**15])
def test_magnitudes_of_queries(query: float) -> None:
    inputs = _inputs(_column("rising"), 1.0, query, "triton")
    assert same(inputs.search("triton", plan=small_plan(inputs, 5, 1792)), inputs.search("reference"))
