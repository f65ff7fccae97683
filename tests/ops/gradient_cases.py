"""Gradients of the shared inputs of sparse attention, on any device."""

from dataclasses import dataclass

import torch
from torch import Tensor

from streamindex_service.ops.sparse_attention import (
    AttentionGradients,
    AttentionResult,
    BackwardPlan,
    GradientReport,
    check_gradients,
    sparse_attention_backward,
)
from tests.ops.attention_cases import Inputs


@dataclass(frozen=True)
class Backward:
    """An attention, its result and the gradient of its output."""

    inputs: Inputs
    result: AttentionResult
    dout: Tensor

    def run(self, implementation: str, plan: BackwardPlan | None = None) -> AttentionGradients:
        case = self.inputs
        assert self.result.lse is not None
        return sparse_attention_backward(
            self.dout, self.result.out, self.result.lse, case.q, case.kv.data, case.indices, scale=case.scale,
            sink=case.sink, implementation=implementation, plan=plan,
        )  # fmt: skip

    def judge(self, gradients: AttentionGradients) -> GradientReport:
        case = self.inputs
        return check_gradients(
            gradients, self.dout, case.q, case.kv.data, case.indices, scale=case.scale, sink=case.sink
        )


def make_backward(inputs: Inputs, forward: str = "triton", *, amplitude: float = 1.0, seed: int = 9) -> Backward:
    """A random gradient of the output of `inputs`, and the output as that implementation of the forward gives it."""
    generator = torch.Generator().manual_seed(seed)
    tokens, heads, _ = inputs.q.shape
    dout = amplitude * torch.randn((tokens, heads, inputs.value_dim), generator=generator)
    return Backward(inputs, inputs.attend(forward), dout.bfloat16().to(inputs.q.device))


def same_bits(a: AttentionGradients, b: AttentionGradients) -> bool:
    """Whether all gradients are equal, bit for bit."""
    pairs = ((a.dq.view(torch.int16), b.dq.view(torch.int16)), (a.dkv.view(torch.int32), b.dkv.view(torch.int32)))
    if a.dsink is not None and b.dsink is not None:
        pairs += ((a.dsink.view(torch.int32), b.dsink.view(torch.int32)),)
    return (a.dsink is None) == (b.dsink is None) and all(torch.equal(x, y) for x, y in pairs)
