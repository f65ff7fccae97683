"""Where the time of the top-k operation goes: every kernel of the last chunk of a causal prefill, between events.

    python -m benchmarks.topk_profile --out benchmarks/results/topk_profile.json

One row for each kernel, and one for the chunk as a whole (its kernels without the events between them); for each score
kernel that the device has. `note` gives the chunk and of its rows how many the sample misled.
"""

import argparse
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.harness import MODELS, Model
from benchmarks.inputs import Prefill, make_prefill
from benchmarks.judge import Judgement, judge
from benchmarks.searches import UNWRITTEN, Bench, TopkRow, begin, formats_of, options
from benchmarks.timing import Timing, measure
from streamindex_service.ops import KeyFormat
from streamindex_service.ops.topk import DEFAULT_WORKSPACE_BYTES, Order, api
from streamindex_service.ops.topk.plan import Plan, ScoreKernel, Shape, choose_score_kernel, is_filtered, plan_triton
from streamindex_service.ops.topk.problem import Problem

TABLE = "topk_profile"
SIZES = [32_768, 65_536, 262_144, 1_048_576]
QUICK_SIZES = [32_768, 262_144]
REPEATS = 7
_HEAD_START_CYCLES = 2_000_000  # the host gets ahead, so that nothing waits for it between events
_PARTS = {True: " of many", False: " of few"}


@dataclass(frozen=True)
class ProfileRow(TopkRow):
    """`part`: the kernel, or "chunk" for all of them."""

    part: str = ""


@contextmanager
def timed_kernels(events: list[tuple[str, Any, Any]]) -> Iterator[None]:
    """Every launch of a Triton or Gluon kernel appends (its name, the event before, the event after)."""
    from triton.runtime.jit import JITFunction

    run = JITFunction.run

    def timed(kernel: Any, *arguments: Any, **named: Any) -> Any:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        launched = run(kernel, *arguments, **named)
        end.record()
        events.append((part_name(kernel.fn.__name__, named), start, end))
        return launched

    try:
        JITFunction.run = timed
        yield
    finally:
        JITFunction.run = run


def part_name(kernel: str, named: dict[str, Any]) -> str:
    """What a table calls a launch; a selection is two of them."""
    return kernel.strip("_").removesuffix("_kernel") + _PARTS.get(named.get("MANY", ""), "")


def last_chunk(model: Model, tokens: int, key_format: KeyFormat, kernel: ScoreKernel) -> tuple[Prefill, Plan]:
    """The last chunk of a prefill as the operation would cut it, and its plan."""
    keys = model.keys(tokens)
    shape = Shape(
        tokens, model.heads, model.head_dim, keys, model.top_k, key_format.value, key_format.element_bytes
    )  # fmt: skip
    plan = plan_triton(shape, DEFAULT_WORKSPACE_BYTES, kernel)
    rows = plan.query_chunk
    return make_prefill(model, rows, key_format, "cuda", first_position=tokens - rows), plan


def kernel_seconds(problem: Problem, plan: Plan) -> dict[str, float]:
    """Median seconds of each kernel of one run, its launches added up."""
    from streamindex_service.ops.topk.triton import run_triton

    times: dict[str, list[float]] = defaultdict(list)
    for _ in range(REPEATS):
        events: list[tuple[str, Any, Any]] = []
        with timed_kernels(events):
            torch.cuda._sleep(_HEAD_START_CYCLES)  # type: ignore[no-untyped-call]
            run_triton(problem, plan)
        torch.cuda.synchronize()
        sums: dict[str, float] = defaultdict(float)
        for name, start, end in events:
            sums[name] += start.elapsed_time(end) / 1e3
        for name, seconds in sums.items():
            times[name].append(seconds)
    return {name: statistics.median(samples) for name, samples in times.items()}


def profile(bench: Bench, model: Model, tokens: int, key_format: KeyFormat, kernel: ScoreKernel) -> None:
    """Rows of one chunk."""
    from streamindex_service.ops.topk.triton import run_triton, survivor_counts

    bench.give_back()
    prefill, plan = last_chunk(model, tokens, key_format, kernel)
    out = torch.full((prefill.rows, model.top_k), UNWRITTEN, dtype=torch.int32, device="cuda")
    problem = Problem(
        prefill.q, prefill.w, prefill.keys, prefill.positions, model.ratio, model.top_k, Order.INDEX, out, None
    )
    before = bench.measure_roof(prefill.keys.format)
    whole = measure(lambda: run_triton(problem, plan), "cuda", budget_s=bench.budget_s)
    roof = (before + bench.measure_roof(prefill.keys.format)) / 2
    parts = kernel_seconds(problem, plan)
    judgement = judge(prefill, out)
    misled, note = None, "not filtered"
    assert plan.tiles is not None
    if is_filtered(prefill.keys.length, model.top_k, plan.tiles):
        misled = int((survivor_counts(problem, plan) == -1).sum())
        note = f"{misled} rows fell back"
    chunk = Chunk(bench, prefill, tokens, kernel, judgement, note, misled, roof)
    chunk.add("chunk", whole)
    for name, seconds in parts.items():
        chunk.add(name, Timing(seconds, 0, REPEATS))


@dataclass(frozen=True)
class Chunk:
    """What the rows of one chunk share."""

    bench: Bench
    prefill: Prefill
    tokens: int
    kernel: ScoreKernel
    judgement: Judgement
    note: str
    fallback_rows: int | None
    roof_tflops: float

    def add(self, part: str, timing: Timing) -> None:
        """The row of one part. Only products are useful work: the other kernels have no share of the roof."""
        model, key_format = self.prefill.model, self.prefill.keys.format
        tflops = self.prefill.useful_flop() / timing.seconds / 1e12 if part in ("chunk", "score") else None
        self.bench.report.add(
            ProfileRow(
                table=TABLE,
                case=f"{model.name} S={self.tokens} {self.kernel.value}, {part}",
                dtype=key_format.value,
                seconds=timing.seconds,
                useful_tflops=tflops,
                roof_fraction=None if tflops is None else tflops / self.roof_tflops,
                roof_tflops=None if tflops is None else self.roof_tflops,
                ratio=None,
                ratio_to=None,
                peak_bytes=timing.peak_bytes if part == "chunk" else None,
                wrong_rows=self.judgement.wrong_rows,
                repeats=timing.repeats,
                note=f"{self.prefill.rows} rows × {self.prefill.keys.length} keys, {self.note}",
                model=model.name,
                tokens=self.tokens,
                implementation="triton",
                top_k=model.top_k,
                query_chunk=self.prefill.rows,
                workspace_bytes=DEFAULT_WORKSPACE_BYTES,
                checked_rows=self.judgement.checked_rows,
                recall=self.judgement.recall,
                fallback_rows=self.fallback_rows,
                part=part,
            )
        )


def main(argv: list[str] | None = None) -> int:
    parser = options(__doc__, quick=f"only the lengths {QUICK_SIZES}")
    parser.set_defaults(models=["V4-Flash"])
    arguments: argparse.Namespace = parser.parse_args(argv)
    if arguments.device == "cpu":
        parser.error("a profile of the kernels needs a CUDA device")
    bench = begin(TABLE, arguments)
    bench.budget_s = 0.5  # a chunk takes milliseconds
    for model in (MODELS[name] for name in arguments.models):
        for key_format in formats_of(arguments, [KeyFormat.FP8_E4M3, KeyFormat.BF16]):
            chosen = choose_score_kernel(
                key_format.value, model.heads, model.head_dim, torch.cuda.get_device_capability(), gluon=api.has_gluon()
            )
            for tokens in arguments.sizes or (QUICK_SIZES if arguments.quick else SIZES):
                for kernel in dict.fromkeys((chosen, ScoreKernel.PORTABLE)):
                    profile(bench, model, tokens, key_format, kernel)
    return bench.report.finish()


if __name__ == "__main__":
    sys.exit(main())
