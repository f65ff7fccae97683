"""Gradients of sparse attention, of prefill chunks: V4-Flash, V4-Pro and V3.2, bf16 rows.

    python -m benchmarks.attention_backward --quick --out benchmarks/results/attention_backward.json

Useful work is five products for each entry of an index row that names a row: logits, gradients of weights, dq, and both
parts of dkv, 2 · heads · (3 · key_dim + 2 · value_dim); the forward's two are not in it, and what an implementation
computes again does not count. The time is of the backward alone. All gradients are judged, of every token and row.
StreamIndex published 4.1 TFLOP/s.
"""

import statistics
import sys
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.attention import MODELS, Attention, AttentionBench, AttentionModel, begin, make_attention, options
from benchmarks.harness import Row
from benchmarks.timing import measure
from streamindex_service.ops import KvFormat
from streamindex_service.ops.sparse_attention import (
    BACKWARD_IMPLEMENTATIONS,
    IMPLEMENTATIONS,
    AttentionGradients,
    AttentionResult,
    GradientReport,
    check_gradients,
    sparse_attention,
    sparse_attention_backward,
)

TABLE = "attention_backward"
TOKENS, QUICK_TOKENS, CPU_TOKENS = [4096, 16_384], [4096], [16]
CONTEXT, CPU_CONTEXT = 65_536, 512
PUBLISHED_TFLOPS = 4.1


@dataclass(frozen=True)
class BackwardRow(Row):
    """Measured gradients. wrong_rows: tokens, KV rows and sinks with a wrong gradient. dq_error, dkv_error,
    dsink_error: the worst errors as shares of their bounds."""

    model: str = ""
    tokens: int = 0
    implementation: str = ""
    dq_error: float | None = None
    dkv_error: float | None = None
    dsink_error: float | None = None
    roof_tflops: float | None = None


def entry_flop(model: AttentionModel) -> int:
    """Floating-point operations of the five products for one entry of an index row."""
    return 2 * model.heads * (3 * model.key_dim + 2 * model.value_dim)


def run_forward(attention: Attention) -> AttentionResult:
    """Output and log-sum-exp, by the fastest implementation there is."""
    fast = IMPLEMENTATIONS["triton"].supports(attention.q.device, KvFormat.BF16)
    return sparse_attention(
        attention.q, attention.kv, attention.indices, scale=attention.scale, sink=attention.sink,
        value_dim=attention.model.value_dim, implementation="triton" if fast else "chunked", want_lse=True,
    )  # fmt: skip


def make_dout(out: Tensor, seed: int = 1) -> Tensor:
    """A random gradient of `out`, of its shape and type."""
    generator = torch.Generator(out.device).manual_seed(seed)
    dout = torch.empty_like(out)
    for token in range(len(dout)):  # one at a time: no float32 twin of the whole
        dout[token] = torch.randn(dout.shape[1:], generator=generator, device=out.device)
    return dout


def judge(attention: Attention, dout: Tensor, gradients: AttentionGradients) -> GradientReport:
    """All gradients against float64."""
    report = check_gradients(
        gradients, dout, attention.q, attention.kv.data, attention.indices, scale=attention.scale, sink=attention.sink
    )
    if report.wrong:
        print(f"wrong: {report.dq_error}, {report.dkv_error}, {report.dsink_error} of their bounds", file=sys.stderr)
    return report


def run_one(
    bench: AttentionBench, attention: Attention, result: AttentionResult, dout: Tensor, name: str,
    baseline: BackwardRow | None,
) -> BackwardRow:  # fmt: skip
    """Measure, judge and add one row."""
    model, found, roofs = attention.model, list[AttentionGradients](), list[float]()
    assert result.lse is not None
    lse = result.lse

    def backward() -> None:
        found.clear()  # before the next ones are made
        made = sparse_attention_backward(
            dout, result.out, lse, attention.q, attention.kv.data, attention.indices, scale=attention.scale,
            sink=attention.sink, implementation=name,
        )  # fmt: skip
        found.append(made)

    timing = measure(
        backward, bench.device, budget_s=bench.budget_s, max_repeats=bench.max_repeats,
        when_warm=lambda: roofs.append(bench.measure_roof()),
    )  # fmt: skip
    roofs.append(bench.measure_roof())
    report = judge(attention, dout, found[0])
    tflops = entry_flop(model) * attention.entries() / timing.seconds / 1e12
    same = baseline is not None and baseline.seconds is not None
    row = BackwardRow(
        table=TABLE, case=f"{model.name} T={attention.tokens} W={model.width} {name}", dtype="bf16",
        seconds=timing.seconds, useful_tflops=tflops, roof_fraction=tflops / statistics.mean(roofs),
        ratio=baseline.seconds / timing.seconds if same else None, ratio_to=baseline.implementation if same else None,
        peak_bytes=timing.peak_bytes, wrong_rows=report.wrong, repeats=timing.repeats,
        note="" if bench.device == "cpu" else f"{tflops / PUBLISHED_TFLOPS:.1f} × the published figure",
        model=model.name, tokens=attention.tokens, implementation=name, dq_error=report.dq_error,
        dkv_error=report.dkv_error, dsink_error=report.dsink_error, roof_tflops=statistics.mean(roofs),
    )  # fmt: skip
    bench.report.add(row)
    return row


def run_model(bench: AttentionBench, model: AttentionModel, arguments) -> None:
    """All rows of one model."""
    on_cpu = bench.device == "cpu"
    # the reference takes thousands of tokens in no memory there is, the kernels run on no CPU
    names = arguments.implementations or (["reference"] if on_cpu else ["triton"])
    for tokens in arguments.sizes or (CPU_TOKENS if on_cpu else QUICK_TOKENS if arguments.quick else TOKENS):
        context = max(tokens, CPU_CONTEXT if on_cpu else CONTEXT)
        attention = make_attention(model, tokens, context, KvFormat.BF16, bench.device)
        result = run_forward(attention)
        dout = make_dout(result.out)
        baseline = None
        for name in names:
            row = run_one(bench, attention, result, dout, name, baseline)
            baseline = baseline or row
        del attention, result, dout  # before the next ones are made


def main(argv: list[str] | None = None) -> int:
    parser = options(
        __doc__, quick=f"{QUICK_TOKENS} tokens", models=list(MODELS), formats=["bf16"],
        implementations=list(BACKWARD_IMPLEMENTATIONS), usual=[],
    )  # fmt: skip
    arguments = parser.parse_args(argv)
    bench = begin(TABLE, arguments)
    for name in arguments.models:
        run_model(bench, MODELS[name], arguments)
    return bench.report.finish()


if __name__ == "__main__":
    sys.exit(main())
