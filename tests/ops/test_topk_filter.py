"""The sampled threshold of the kernels: it may mislead, it must never change an answer."""

from dataclasses import replace

import pytest
import torch

from streamindex_service.ops import KeyFormat
from streamindex_service.ops.topk import Order
from streamindex_service.ops.topk.plan import least_filtered
from streamindex_service.ops.topk.problem import Problem
from tests.ops.cases import SMALL, Inputs, kernel_device, make_inputs, poisoned_keys, same, small_plan

TOP_K = 20
LINE, EVERY = SMALL["sample_line"], SMALL["sample_every"]


def _column(kind: str) -> torch.Tensor:
    number = torch.arange(2000)
    return {
        "zeros": torch.full((2000,), -1.0),  # ReLU cuts all: too many survivors
        "rising": number.float(),
        "falling": (2000 - number).float(),
        "sampled lines high": ((number // LINE) % EVERY == 0) * 512.0
        + number % LINE,  # the sample sees nothing but the best
        "sampled lines low": ((number // LINE) % EVERY != 0) * 512.0 + number % LINE,  # and nothing of the best
        "one outlier": torch.where(number == 1033, 1000.0, (number % 7).float()),
    }[kind]


@pytest.mark.parametrize("tile", [2048, 768], ids=["one tile", "three tiles"])
@pytest.mark.parametrize(
    "kind", ["zeros", "rising", "falling", "sampled lines high", "sampled lines low", "one outlier"]
)
def test_adversarial_rows(kind: str, tile: int) -> None:
    device = kernel_device()
    k = torch.zeros(2000, 16, device=device)
    k[:, 0] = _column(kind).to(device)
    q = torch.zeros(3, 1, 16, device=device)
    q[:, :, 0] = 1
    inputs = Inputs(q.half(), torch.ones(3, 1, device=device), poisoned_keys(k.half(), None), 1997, 1, TOP_K)
    assert same(inputs.search("triton", plan=small_plan(inputs, 2, tile)), inputs.search("reference"))


def test_the_sample_misleads_and_the_fallback_is_taken() -> None:
    from streamindex_service.ops.topk.triton import survivor_counts

    def counts(kind: str) -> list[int]:
        device = kernel_device()
        k = torch.zeros(2000, 16, device=device)
        k[:, 0] = _column(kind).to(device)
        q = torch.zeros(1, 1, 16, device=device)
        q[:, :, 0] = 1
        inputs = Inputs(q.half(), torch.ones(1, 1, device=device), poisoned_keys(k.half(), None), 1999, 1, TOP_K)
        out = torch.empty((1, TOP_K), dtype=torch.int32, device=device)
        problem = Problem(inputs.q, inputs.w, inputs.keys, 1999, 1, TOP_K, Order.INDEX, out, None)
        return survivor_counts(problem, small_plan(inputs, 1, 2048)).tolist()

    assert counts("zeros") == [-1]
    assert counts("sampled lines low") == [-1]
    assert TOP_K <= counts("rising")[0] <= 1024


@pytest.mark.parametrize("values", ["normal", "integers"])
def test_filtered_equals_unfiltered(values: str) -> None:
    inputs = make_inputs(
        rows=3, heads=16, head_dim=32, keys=1177, key_format=KeyFormat.BF16, top_k=TOP_K, values=values,
        device=kernel_device(),
    )  # fmt: skip
    for tile in (1280, 512):
        filtered = inputs.search("triton", plan=small_plan(inputs, 3, tile))
        assert same(filtered, inputs.search("triton", plan=small_plan(inputs, 3, tile, filter_keys=1 << 30)))


def test_rows_too_short_for_the_filter_stay_apart_from_those_it_takes() -> None:
    """A chunk of both would leave the short ones to the kernel that is meant for a few."""
    from streamindex_service.ops.topk import triton as kernels

    rows = 300
    inputs = make_inputs(
        rows=rows, heads=1, head_dim=16, keys=rows, key_format=KeyFormat.BF16, top_k=TOP_K, positions=0,
        values="integers", device=kernel_device(),
    )  # fmt: skip
    plan = replace(small_plan(inputs, rows, 512), grow=True)
    assert plan.tiles is not None
    out = torch.empty((rows, TOP_K), dtype=torch.int32, device=kernel_device())
    run = kernels._Run(Problem(inputs.q, inputs.w, inputs.keys, 0, 1, TOP_K, Order.INDEX, out, None), plan)
    border = least_filtered(TOP_K, plan.tiles) - 1  # the first row that sees so many keys
    assert 0 < border < rows
    assert kernels._chunk_start(run, border) == 0
    assert kernels._chunk_start(run, rows) == border
    for order in Order:
        assert same(inputs.search("triton", plan=plan, order=order), inputs.search("reference", order=order))
