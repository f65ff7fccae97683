"""Gradients of sparse attention against float64, on ordinary and on adversarial rows."""

from dataclasses import replace

import pytest
import torch

from streamindex_service.ops.kv_rows import KvFormat, KvRows, pack_rows
from streamindex_service.ops.sparse_attention import (
    MIN_WORKSPACE_BYTES,
    AttentionGradients,
    AttentionInputError,
    BackwardPlan,
    ReferenceTooLargeError,
    UnsupportedImplementationError,
    WorkspaceTooSmallError,
    differentiable_sparse_attention,
    plan_backward,
    reference,
    sparse_attention_backward,
)
from streamindex_service.ops.sparse_attention.backward_reference import exact_gradients
from streamindex_service.ops.sparse_attention.reference import attend_gathered
from tests.ops.attention_cases import Inputs, make_inputs
from tests.ops.cases import kernel_device
from tests.ops.gradient_cases import Backward, make_backward, same_bits

EVERY = ["reference", "triton"]
# tokens, heads, width, key_dim, value_dim
SHAPES = [
    (3, 5, 66, 64, 64),
    (2, 1, 1, 16, 16),
    (2, 16, 33, 80, 64),
    (1, 33, 129, 128, 64),
    (1, 65, 65, 192, 128),
    (1, 64, 65, 512, 512),
    (2, 16, 40, 576, 512),
]


def _inputs(shape, **changes) -> Inputs:
    tokens, heads, width, key_dim, value_dim = shape
    return make_inputs(
        tokens=tokens, heads=heads, width=width, key_dim=key_dim, value_dim=value_dim, device=kernel_device(), **changes
    )


def _right(case: Backward, implementation: str) -> AttentionGradients:
    gradients = case.run(implementation)
    report = case.judge(gradients)
    assert report.wrong == 0, f"of their bounds: {report.dq_error}, {report.dkv_error}, {report.dsink_error}"
    return gradients


@pytest.mark.parametrize("implementation", EVERY)
@pytest.mark.parametrize("sink", [True, False], ids=["sink", "no-sink"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"T{s[0]}-H{s[1]}-W{s[2]}-D{s[3]}-V{s[4]}")
def test_within_the_error_bound(shape, sink: bool, implementation: str) -> None:
    _right(make_backward(_inputs(shape, sink=sink)), implementation)


class _Float64(torch.autograd.Function):
    """The float64 attention with the closed form as its gradient, so that both can be held against each other."""

    @staticmethod
    def forward(ctx, q, kv, sink, indices):
        ctx.save_for_backward(q, kv, sink, indices)
        return _attend(q, kv, sink, indices).out

    @staticmethod
    def backward(ctx, dout):
        q, kv, sink, indices = ctx.saved_tensors
        found = exact_gradients(dout, q, _attend(q, kv, sink, indices), scale=0.7, sink=sink)
        valid = (indices >= 0) & (indices < len(kv))
        dkv = torch.zeros_like(kv).index_add_(0, indices[valid].long(), found.dkeys[valid])
        return found.dq, dkv, found.dsink.sum(dim=0), None


def _attend(q, kv, sink, indices):
    valid = (indices >= 0) & (indices < len(kv))
    keys = kv[indices.long().masked_fill(~valid, 0)] * valid[:, :, None]
    return attend_gathered(q, keys, valid, scale=0.7, sink=sink, value_dim=4)


def test_the_closed_form_is_the_derivative() -> None:
    generator = torch.Generator().manual_seed(1)
    q = torch.randn((3, 2, 6), generator=generator, dtype=torch.float64, requires_grad=True)
    kv = torch.randn((5, 6), generator=generator, dtype=torch.float64, requires_grad=True)
    sink = torch.randn(2, generator=generator, dtype=torch.float64, requires_grad=True)
    indices = torch.tensor([[0, 1, 1, -1], [4, 9, 2, 0], [3, -7, 5, 5]], dtype=torch.int32)
    assert torch.autograd.gradcheck(_Float64.apply, (q, kv, sink, indices))
    found = torch.autograd.grad(_Float64.apply(q, kv, sink, indices).square().sum(), (q, kv, sink))
    expected = torch.autograd.grad(_attend(q, kv, sink, indices).out.square().sum(), (q, kv, sink))
    for each, wanted in zip(found, expected, strict=True):
        assert torch.allclose(each, wanted, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("implementation", EVERY)
def test_rows_with_nothing_to_attend(implementation: str) -> None:
    inputs = _inputs((4, 4, 20, 64, 64))
    inputs.indices[0] = -1
    inputs.indices[1] = 300
    inputs.indices[2, 1:] = -(2**31)
    inputs.indices[2, 0] = 2**31 - 1
    for sink in (inputs.sink, torch.full_like(inputs.sink, -torch.inf), None):
        gradients = _right(make_backward(replace(inputs, sink=sink)), implementation)
        assert (gradients.dq[:3] == 0).all()
        assert (gradients.dq[3] != 0).any()
    inputs.indices[3] = -1
    gradients = make_backward(inputs).run(implementation)
    assert all((each == 0).all() for each in gradients if each is not None)


# the interpreter's exp2 says so when a sink takes everything
@pytest.mark.filterwarnings("ignore:overflow encountered in exp2")
@pytest.mark.parametrize("implementation", EVERY)
def test_sinks_at_their_ends(implementation: str) -> None:
    inputs = _inputs((2, 6, 20, 64, 64))
    inputs.indices[1] = -1
    sink = torch.tensor([torch.inf, -torch.inf, 1e30, -1e30, 8.0, 0.0], device=inputs.q.device)
    inputs = replace(inputs, sink=sink)
    gradients = _right(make_backward(inputs), implementation)
    assert gradients.dsink is not None
    assert (gradients.dsink[:4] == 0).all()
    assert (gradients.dsink[4:] != 0).all()
    assert (gradients.dq[:, 0] == 0).all()
    assert (gradients.dq[:, 2] == 0).all()
    without = make_backward(replace(inputs, sink=None)).run(implementation)
    assert torch.equal(gradients.dq[:, 1], without.dq[:, 1])  # −inf is none
    assert torch.equal(gradients.dq[:, 3], without.dq[:, 3])


@pytest.mark.parametrize("implementation", EVERY)
@pytest.mark.parametrize("amplitude", [0.0, 1e-30, 30.0, 1e6], ids=str)
def test_extreme_logits(amplitude: float, implementation: str) -> None:
    _right(make_backward(_inputs((2, 4, 30, 64, 64), amplitude=amplitude, sink=False)), implementation)


@pytest.mark.parametrize("implementation", EVERY)
@pytest.mark.parametrize("amplitude", [0.0, 1e-20, 1e15], ids=str)
def test_extreme_gradients(amplitude: float, implementation: str) -> None:
    _right(make_backward(_inputs((2, 4, 30, 64, 64)), amplitude=amplitude), implementation)


@pytest.mark.parametrize("implementation", EVERY)
def test_an_entry_that_stands_twice_adds_twice(implementation: str) -> None:
    keys = torch.zeros(3, 64)
    q = torch.zeros(1, 2, 64, dtype=torch.bfloat16)  # all weights equal
    indices = torch.tensor([[0, 1, 1, 1, -1, 2, 2, 7]], dtype=torch.int32)
    kv = pack_rows(keys.to(kernel_device()), KvFormat.BF16)
    inputs = Inputs(
        q.to(kernel_device()), kv, indices.to(kernel_device()), torch.log(torch.tensor([2.0, 10.0])), 1.0, 64
    )
    inputs = replace(inputs, sink=inputs.sink.to(kernel_device()))
    case = make_backward(inputs)
    case.dout.fill_(1.0)
    dkv = _right(case, implementation).dkv
    # two heads, whose denominators are 6 + 2 and 6 + 10
    expected = torch.tensor([1.0, 3.0, 2.0], device=dkv.device) * (1 / 8 + 1 / 16)
    assert torch.allclose(dkv, expected[:, None].expand(3, 64), rtol=2.0**-8)


def test_repeats_and_token_chunks_change_no_bit() -> None:
    inputs = _inputs((6, 3, 21, 80, 64), rows=12)  # rows that many tokens share
    case = make_backward(inputs)
    whole = _right(case, "triton")
    assert same_bits(case.run("triton"), whole)
    for chunk in (1, 4):
        assert same_bits(case.run("triton", BackwardPlan(0, token_chunk=chunk)), whole), chunk


def test_other_tokens_change_no_bit_of_dq() -> None:
    case = make_backward(_inputs((4, 5, 20, 64, 64)))
    whole = case.run("triton")
    assert case.result.lse is not None
    part = Backward(
        case.inputs.part(1, 3),
        type(case.result)(case.result.out[1:3], case.result.lse[1:3]),
        case.dout[1:3],
    )
    assert torch.equal(part.run("triton").dq, whole.dq[1:3])


@pytest.mark.parametrize("implementation", EVERY)
def test_no_rows_no_entries_no_tokens(implementation: str) -> None:
    inputs = _inputs((2, 4, 8, 64, 64))
    empty = replace(inputs, kv=KvRows(KvFormat.BF16, inputs.kv.data[:0]))
    for case in (empty, replace(inputs, indices=inputs.indices[:, :0].contiguous()), inputs.part(0, 0)):
        gradients = make_backward(case).run(implementation)
        assert gradients.dkv.shape == case.kv.data.shape
        assert gradients.dq.shape == case.q.shape
        assert all((each == 0).all() for each in gradients if each is not None)


@pytest.mark.parametrize("implementation", EVERY)
def test_autograd_goes_through(implementation: str) -> None:
    inputs = _inputs((2, 3, 12, 80, 64), poison=False)
    q, kv = inputs.q.clone().requires_grad_(), inputs.kv.data.clone().requires_grad_()
    sink = None if inputs.sink is None else inputs.sink.clone().requires_grad_()

    def attend() -> torch.Tensor:
        return differentiable_sparse_attention(
            q, kv, inputs.indices, scale=inputs.scale, sink=sink, value_dim=64, implementation=implementation
        )

    case = make_backward(inputs, implementation)
    out = attend()
    assert torch.equal(out, case.result.out)
    out.backward(case.dout.transpose(0, 1).contiguous().transpose(0, 1))  # a gradient may lie as it likes
    expected = case.run(implementation)
    assert torch.equal(q.grad, expected.dq)
    assert torch.equal(kv.grad, expected.dkv.bfloat16())
    assert torch.equal(sink.grad, expected.dsink)
    kv.requires_grad_(False)
    sink = None
    (dq,) = torch.autograd.grad(attend().float().sum(), q)
    assert dq.shape == q.shape


def test_the_judge_sees_a_wrong_gradient() -> None:
    case = make_backward(_inputs((3, 5, 70, 64, 64)))
    good = case.run("reference")
    assert good.dsink is not None
    for change in (0.2, torch.nan, torch.inf):
        dq, dkv, dsink = good.dq.clone(), good.dkv.clone(), good.dsink.clone()
        dq[1, 2, 3] += change
        dkv[7, 0] += change
        dsink[4] += change
        report = case.judge(AttentionGradients(dq, dkv, dsink))
        assert report.wrong_tokens.tolist() == [False, True, False]
        assert report.wrong_rows.nonzero().tolist() == [[7]]
        assert report.wrong_sinks.tolist() == [False] * 4 + [True]


def test_an_entry_left_out_is_seen() -> None:
    case = make_backward(_inputs((3, 5, 70, 64, 64)))
    fewer = case.inputs.indices.clone()
    fewer[2, int((fewer[2] == 7).nonzero()[0])] = -1
    assert case.judge(replace(case, inputs=replace(case.inputs, indices=fewer)).run("triton")).wrong_rows[7]


def test_refusals() -> None:
    case = make_backward(_inputs((2, 4, 8, 64, 64)), "reference")
    wrong = {
        "dout": replace(case, dout=case.dout.float()),
        "out": replace(case, result=case.result._replace(out=case.result.out[:1])),
        "lse": replace(case, result=case.result._replace(lse=case.result.lse.double())),
        "indices": replace(case, inputs=replace(case.inputs, indices=case.inputs.indices.long())),
    }
    for field, each in wrong.items():
        with pytest.raises(AttentionInputError) as refusal:
            each.run("reference")
        assert refusal.value.field == field
    with pytest.raises(ValueError, match="bfloat16"):
        sparse_attention_backward(
            case.dout, case.result.out, case.result.lse, case.inputs.q, case.inputs.kv.data.float(),
            case.inputs.indices, scale=1.0, implementation="reference",
        )  # fmt: skip
    for name in ("chunked", "fastest"):
        with pytest.raises(UnsupportedImplementationError, match="reference"):
            case.run(name)
    with pytest.raises(UnsupportedImplementationError, match="unknown; valid names are reference, triton"):
        differentiable_sparse_attention(
            case.inputs.q, case.inputs.kv.data, case.inputs.indices, scale=1.0, implementation="chunked"
        )


def test_the_reference_has_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_backward(_inputs((2, 4, 8, 64, 64)), "reference")
    monkeypatch.setitem(reference.MAX_GATHERED_BYTES, case.dout.device.type, 1000)
    with pytest.raises(ReferenceTooLargeError):
        case.run("reference")


def test_plans_stay_within_the_workspace() -> None:
    for budget in (MIN_WORKSPACE_BYTES, 512 << 20):
        plan = plan_backward(4096, 64, 512, 640, budget)
        assert plan.workspace_bytes <= budget
        assert 1 <= plan.token_chunk < 4096
    assert plan_backward(3, 64, 512, 640, 512 << 20).token_chunk == 3
    with pytest.raises(WorkspaceTooSmallError):
        plan_backward(1, 64, 512, 640, MIN_WORKSPACE_BYTES - 1)
    with pytest.raises(WorkspaceTooSmallError) as refusal:
        plan_backward(1, 128, 576, 100_000, MIN_WORKSPACE_BYTES)
    assert plan_backward(1, 128, 576, 100_000, refusal.value.floor_bytes).token_chunk == 1
    assert plan_backward(2**20, 1, 16, 2**13, 1 << 50).token_chunk * 2**13 < 2**31
