"""Where the time of the top-k operation goes: every kernel of the last chunk of a causal prefill, between events.

    python -m benchmarks.topk_profile --out benchmarks/results/topk_profile.json

One row for each kernel, and one for the chunk as a whole (its kernels without the events between them); for each score
kernel that the device has. `note` gives the chunk, the plan's kernels, and of the chunk's rows how many the sample
misled.
"""

import argparse
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import MARKDOWN_HEAD, MODELS, Model, Report, Row, make_prefill, measure, roof_tflops, wrong_rows
from benchmarks.harness import Prefill as HarnessPrefill
from streamindex_service.ops import KeyFormat, PagedKeys
from streamindex_service.ops.topk import Order, api
from streamindex_service.ops.topk.plan import Plan, ScoreKernel, Shape, choose_score_kernel, plan_triton
from streamindex_service.ops.topk.problem import Problem

TABLE = "topk_profile"
SIZES = [32_768, 65_536, 262_144, 1_048_576]
QUICK_SIZES = [32_768, 262_144]
WORKSPACE_BYTES = 256 << 20
REPEATS = 7
KERNELS = ("_score_kernel", "threshold_kernel", "mark_kernel", "collect_kernel", "select_kernel")
HOPPER_KERNEL = "score_kernel"


class _Timed:
    """A kernel that records an event before and after each of its launches."""

    def __init__(self, kernel: Any, name: str, events: list[tuple[str, Any, Any]]) -> None:
        self.kernel, self.name, self.events = kernel, name, events

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def launch(*arguments: object, **options: object) -> None:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            self.kernel[grid](*arguments, **options)
            end.record()
            many = {True: " of many", False: " of few"}.get(options.get("MANY"), "")  # type: ignore[arg-type]
            self.events.append((self.name.strip("_").removesuffix("_kernel") + many, start, end))

        return launch


@contextmanager
def _timed_kernels(events: list[tuple[str, Any, Any]], with_hopper: bool) -> Iterator[None]:
    from streamindex_service.ops.topk import triton as portable

    places: list[tuple[Any, str]] = [(portable, name) for name in KERNELS]
    if with_hopper:
        from streamindex_service.ops.topk import hopper

        places.append((hopper, HOPPER_KERNEL))
    kept = [(module, name, getattr(module, name)) for module, name in places]
    try:
        for module, name, kernel in kept:
            setattr(module, name, _Timed(kernel, name, events))
        yield
    finally:
        for module, name, kernel in kept:
            setattr(module, name, kernel)


def last_chunk(model: Model, tokens: int, key_format: KeyFormat, kernel: ScoreKernel) -> tuple[Problem, Plan]:
    """The last chunk of a prefill as the operation would cut it, and its plan."""
    keys = model.keys(tokens)
    shape = Shape(
        tokens, model.heads, model.head_dim, keys, model.top_k, key_format.value, key_format.element_bytes
    )  # fmt: skip
    plan = plan_triton(shape, WORKSPACE_BYTES, kernel)
    rows = plan.query_chunk
    part = make_prefill(model, rows, key_format, "cuda")
    generator = torch.Generator("cuda").manual_seed(1)
    k = torch.randn((keys, model.head_dim), generator=generator, device="cuda").to(key_format.torch_dtype)
    scales = 0.5 + torch.rand(keys, generator=generator, device="cuda") if key_format.has_scales else None
    out = torch.empty((rows, model.top_k), dtype=torch.int32, device="cuda")
    paged = PagedKeys.from_contiguous(k, scales)
    problem = Problem(part.q, part.w, paged, tokens - rows, model.ratio, model.top_k, Order.INDEX, out, None)
    return problem, plan


def profile(report: Report, model: Model, tokens: int, key_format: KeyFormat, roof: float, kernel: ScoreKernel) -> None:
    """Rows of one chunk."""
    from streamindex_service.ops.topk.triton import run_triton, survivor_counts

    problem, plan = last_chunk(model, tokens, key_format, kernel)
    run_triton(problem, plan)  # compiles
    times: dict[str, list[float]] = defaultdict(list)
    for _ in range(REPEATS):
        events: list[tuple[str, Any, Any]] = []
        with _timed_kernels(events, kernel is ScoreKernel.HOPPER):
            torch.cuda._sleep(2_000_000)  # the host gets ahead, so that nothing waits for it between events
            run_triton(problem, plan)
        torch.cuda.synchronize()
        sums: dict[str, float] = defaultdict(float)
        for name, start, end in events:
            sums[name] += start.elapsed_time(end) / 1e3
        for name, seconds in sums.items():
            times[name].append(seconds)
    whole = measure(lambda: run_triton(problem, plan), "cuda", budget_s=0.5)
    flop = 2 * model.heads * model.head_dim * int(problem.visible(0, problem.rows).sum())
    prefill = HarnessPrefill(model, problem.rows, problem.q, problem.w, problem.keys)
    wrong = wrong_rows(prefill, problem.out_indices, first_position=tokens - problem.rows)
    misled = "none filtered"
    if "mark" in times:
        misled = f"{int((survivor_counts(problem, plan) < 0).sum())} misled rows"
    case = f"{model.name} S={tokens} {kernel.value}"
    note = f"{problem.rows} rows × {plan.key_tile} keys, {misled}"

    def row(part: str, seconds: float, useful: float | None, repeats: int) -> Row:
        fraction = None if useful is None else useful / roof
        figures = (seconds, useful, fraction, None, None, None, wrong, repeats, note)
        return Row(TABLE, f"{case}, {part}", key_format.value, *figures)

    report.add(row("chunk", whole.seconds, flop / whole.seconds / 1e12, whole.repeats))
    for name, samples in times.items():
        seconds = statistics.median(samples)
        report.add(row(name, seconds, flop / seconds / 1e12 if name == "score" else None, len(samples)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(MODELS), default="V4-Flash")
    parser.add_argument("--quick", action="store_true", help=f"only the lengths {QUICK_SIZES}")
    parser.add_argument("--sizes", type=int, nargs="*")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    report, model = Report("cuda"), MODELS[arguments.model]
    print(report.header, MARKDOWN_HEAD, sep="\n", flush=True)
    for key_format in (KeyFormat.FP8_E4M3, KeyFormat.BF16):
        roof = roof_tflops(key_format, "cuda")
        report.header[f"roof_tflops_{key_format.value}"] = f"{roof:.1f}"
        chosen = choose_score_kernel(
            key_format.value, model.heads, model.head_dim, torch.cuda.get_device_capability(), gluon=api.has_gluon()
        )
        for tokens in arguments.sizes or (QUICK_SIZES if arguments.quick else SIZES):
            for kernel in dict.fromkeys((chosen, ScoreKernel.PORTABLE)):
                profile(report, model, tokens, key_format, roof, kernel)
                torch.cuda.empty_cache()
    return report.finish(arguments.out)


if __name__ == "__main__":
    sys.exit(main())
