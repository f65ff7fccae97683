"""Search of several sequences in one run at real sizes on a CUDA device: each as if it were alone, bit for bit."""

import pytest
import torch

from streamindex_service.ops import KeyFormat, compiled
from streamindex_service.ops.topk import MIN_WORKSPACE_BYTES, Order, check_topk, plan_for
from tests.ops.cases import same
from tests.ops.sequence_cases import Step

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(300),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

BF16, FP8 = KeyFormat.BF16, KeyFormat.FP8_E4M3
# Hopper's score kernel takes 64 and 32 heads of 128; the portable one the rest.
SHAPES = [(FP8, 64, 128), (BF16, 64, 128), (FP8, 32, 128), (BF16, 48, 64)]
SHAPE = pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape[0].value}-{shape[1]}x{shape[2]}")
LENGTHS = [65_536, 9000, 0, 300, 40_001, 2049, 600, 70_000]


def _step(shape, tokens, top_k, ratio, values="normal"):
    positions = [
        list(range(max(0, length * ratio - tokens), max(0, length * ratio - tokens) + tokens)) for length in LENGTHS
    ]
    positions[3] = [5, 900, 44][:tokens]  # in no order
    return Step.drawn(shape, LENGTHS, positions, "cuda", top_k=top_k, ratio=ratio, values=values)


@SHAPE
@pytest.mark.parametrize(("tokens", "top_k", "ratio"), [(1, 512, 4), (3, 2048, 1)])
@pytest.mark.parametrize("order", list(Order), ids=lambda order: order.value)
def test_a_ragged_step(shape, tokens, top_k, ratio, order):
    step = _step(shape, tokens, top_k, ratio)
    together = step.together("triton", order=order)
    assert same(together, step.alone("triton", order=order))
    for sequence, rows in zip(step.sequences, together.indices.split(tokens), strict=True):
        report = check_topk(
            rows, sequence.q, sequence.w, sequence.keys, sequence.positions, ratio=ratio, top_k=top_k, order=order
        )
        assert report.wrong_rows == 0, str(report)


@SHAPE
def test_exact_inputs_equal_the_reference(shape):
    step = _step(shape, 2, 512, 4, values="integers")
    assert same(step.together("triton"), step.alone("reference"))


def test_the_least_workspace_cuts_the_rows_and_changes_no_bit():
    step = _step(SHAPES[0], 2, 512, 1)
    plan = plan_for(
        "triton", "cuda", FP8, rows=2 * len(LENGTHS), heads=64, head_dim=128, keys=70_000, top_k=512,
        workspace_bytes=MIN_WORKSPACE_BYTES,
    )  # fmt: skip
    assert same(step.together("triton", plan=plan), step.together("triton"))


def test_another_step_compiles_nothing():
    _step(SHAPES[0], 1, 512, 4).together("triton")
    _step(SHAPES[0], 2, 512, 4).together("triton")
    before = compiled.count()
    for tokens in (1, 2, 3):
        _step(SHAPES[0], tokens, 512, 4).together("triton")
    assert compiled.count() == before
