"""Gradients of sparse attention at real sizes on a CUDA device: answers, repeatability, memory, compilation, 64-bit
addresses."""

from dataclasses import replace

import pytest
import torch

from streamindex_service.core.meter import LARGE_BYTES
from streamindex_service.ops.kv_rows import KvFormat, KvRows
from streamindex_service.ops.sparse_attention import (
    BackwardPlan,
    differentiable_sparse_attention,
    plan_backward,
)
from tests.ops.attention_cases import Inputs, make_inputs
from tests.ops.gradient_cases import make_backward, same_bits
from tests.support.estimates import LEAST_RATIO

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.timeout(300),
]
# tokens, heads, width, key_dim
SHAPES = [
    (300, 64, 640, 512),
    (100, 128, 1152, 512),
    (100, 128, 2048, 576),
    (300, 16, 333, 512),
    (200, 33, 333, 576),
    (1, 64, 640, 512),
]


def _inputs(shape, **changes) -> Inputs:
    tokens, heads, width, key_dim = shape
    defaults = {"rows": 20_000, "value_dim": 512, "device": "cuda", "key_dim": key_dim}
    inputs = make_inputs(tokens=tokens, heads=heads, width=width, **defaults | changes)
    if tokens > 2:
        inputs.indices[0] = -1
        inputs.indices[1, width // 3 :] = -1
        inputs.indices[2, : width // 2] = 20_000
    return inputs


@pytest.mark.parametrize("sink", [True, False], ids=["sink", "no-sink"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"T{s[0]}-H{s[1]}-W{s[2]}-D{s[3]}")
def test_within_the_error_bound(shape, sink: bool) -> None:
    inputs = _inputs(shape, sink=sink)
    if inputs.sink is not None:
        inputs.sink[0], inputs.sink[1], inputs.sink[2] = torch.inf, -torch.inf, 1e30
    case = make_backward(inputs)
    report = case.judge(case.run("triton"))
    assert report.wrong == 0, f"of their bounds: {report.dq_error}, {report.dkv_error}, {report.dsink_error}"


def test_repeats_and_token_chunks_change_no_bit() -> None:
    case = make_backward(_inputs((300, 64, 640, 512), rows=1000))
    first = case.run("triton")
    for _ in range(10):
        assert same_bits(case.run("triton"), first)
    for chunk in (1, 7, 299):
        assert same_bits(case.run("triton", BackwardPlan(0, token_chunk=chunk)), first), chunk


def test_no_length_compiles_anything_new() -> None:
    from streamindex_service.ops.sparse_attention.backward_triton import compiled_backward_variants

    def run(tokens: int, width: int, rows: int) -> None:
        make_backward(_inputs((tokens, 64, width, 512), rows=rows)).run("triton")

    run(300, 640, 20_000)
    warm = compiled_backward_variants()
    assert warm > 0
    for tokens, width, rows in ((1, 1, 20_001), (16, 16, 20_016), (400, 128, 32_768), (255, 77, 20_003)):
        run(tokens, width, rows)
    assert compiled_backward_variants() == warm


@pytest.mark.parametrize("tokens", [1, 40, 1000])
def test_allocator_peak_stays_within_the_plan(tokens: int) -> None:
    case = make_backward(_inputs((tokens, 64, 640, 512)))
    plan = plan_backward(tokens, 64, 512, 640, 512 << 20)
    case.run("triton", plan)  # the library's own workspace, which stays
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    gradients = case.run("triton", plan)
    torch.cuda.synchronize()
    outputs = sum(each.nbytes for each in gradients if each is not None)
    peak = torch.cuda.max_memory_allocated() - before - outputs
    assert peak <= plan.workspace_bytes, f"peak {peak}, planned {plan.workspace_bytes}"
    if plan.workspace_bytes >= LARGE_BYTES:
        assert peak >= LEAST_RATIO * plan.workspace_bytes, f"peak {peak}, planned {plan.workspace_bytes}"


def test_autograd_goes_through() -> None:
    case = make_backward(_inputs((50, 64, 640, 512), poison=False))
    q, kv = case.inputs.q.clone().requires_grad_(), case.inputs.kv.data.clone().requires_grad_()
    out = differentiable_sparse_attention(
        q, kv, case.inputs.indices, scale=case.inputs.scale, sink=case.inputs.sink, implementation="triton"
    )
    out.backward(case.dout)
    expected = case.run("triton")
    assert torch.equal(q.grad, expected.dq)
    assert torch.equal(kv.grad, expected.dkv.bfloat16())


def test_more_than_two_to_the_31_elements() -> None:
    rows = 2**31 // 512 + 5000
    inputs = _inputs((40, 64, 64, 512))
    data = torch.empty((rows, 512), dtype=torch.bfloat16, device="cuda").normal_()
    indices = torch.randint(rows - 6000, rows + 10, (40, 64), dtype=torch.int32, device="cuda")
    far = make_backward(replace(inputs, kv=KvRows(KvFormat.BF16, data), indices=indices))
    found = far.run("triton")
    # the same rows, where addresses are small
    first = rows - 6000
    near_kv = KvRows(KvFormat.BF16, data[first:].clone())
    near = make_backward(replace(inputs, kv=near_kv, indices=indices - first))
    near_found = near.run("triton")
    assert near.judge(near_found).wrong == 0
    assert torch.equal(found.dq, near_found.dq)
    assert torch.equal(found.dkv[first:], near_found.dkv)
