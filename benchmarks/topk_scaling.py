"""Time and memory of a whole causal prefill against sequence length: the fused kernels, the StreamIndex algorithm,
the reference.

    python -m benchmarks.topk_scaling --quick --out benchmarks/results/topk_scaling.json

`chunked` runs at the best of several tilings, found at the largest length up to 65,536. `reference` runs in float32
until it is out of memory, which is reported as such. Every figure is of the whole operation; answers are checked on a
sample of rows.
"""

import argparse
import gc
import sys
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.harness import (
    MARKDOWN_HEAD,
    MODELS,
    Model,
    Prefill,
    Report,
    Row,
    Timing,
    make_prefill,
    measure,
    roof_tflops,
    wrong_rows,
)
from streamindex_service.ops import KeyFormat
from streamindex_service.ops.topk import Order, Plan, ReferenceTooLargeError, plan_for, topk
from streamindex_service.ops.topk.problem import Problem
from streamindex_service.ops.topk.reference import run_reference

TABLE = "topk_scaling"
SIZES = [32_768, 65_536, 131_072, 262_144, 524_288, 1_048_576]
QUICK_SIZES = [32_768, 262_144]
# query chunk × key tile of the StreamIndex algorithm; the products of a block are chunk · heads · tile · 4 bytes
TILINGS = [(32, 2048), (64, 1024), (64, 4096), (128, 2048), (256, 8192), (1024, 8192)]
TUNING_TOKENS = 65_536


class Scaling:
    """One run of the table."""

    def __init__(self, model: Model, device: str, report: Report, workspace_bytes: int) -> None:
        self.model, self.device, self.report, self.workspace_bytes = model, device, report, workspace_bytes
        self.roofs = {
            key_format: roof_tflops(key_format, device) for key_format in (KeyFormat.BF16, KeyFormat.FP8_E4M3)
        }
        for key_format, roof in self.roofs.items():
            report.header[f"roof_tflops_{key_format.value}"] = f"{roof:.1f}"
        self.tiling: tuple[int, int] | None = None

    def run_size(self, tokens: int, implementations: list[str]) -> None:
        """All implementations at one length, each against `chunked` in bf16 of the same length."""
        prefill = self._prefill(tokens, KeyFormat.BF16)
        baseline = None
        if "chunked" in implementations:
            baseline = self._chunked(prefill)
        if "reference" in implementations:
            self._reference(prefill, baseline)
        if "triton" in implementations:
            self._triton(prefill, baseline)
            del prefill
            self._triton(self._prefill(tokens, KeyFormat.FP8_E4M3), baseline)

    def _prefill(self, tokens: int, key_format: KeyFormat) -> Prefill:
        gc.collect()
        if self.device != "cpu":
            torch.cuda.empty_cache()
        return make_prefill(self.model, tokens, key_format, self.device)

    def _triton(self, prefill: Prefill, baseline: float | None) -> None:
        out = self._out(prefill)
        timing = measure(lambda: self._search(prefill, "triton", out), self.device)
        plan = plan_for(
            "triton", self.device, prefill.keys.format, rows=prefill.tokens, heads=self.model.heads,
            head_dim=self.model.head_dim, keys=prefill.keys.length, top_k=self.model.top_k,
            workspace_bytes=self.workspace_bytes,
        )  # fmt: skip
        note = f"workspace {self.workspace_bytes >> 20} MiB, {plan.name if plan else ''}"
        self._row(prefill, "triton", timing, out, baseline, note)

    def _chunked(self, prefill: Prefill) -> float:
        chunk, tile = self._best_tiling()
        out = self._out(prefill)
        plan = Plan(chunk, tile, 0)
        timing = measure(lambda: self._search(prefill, "chunked", out, plan), self.device)
        self._row(prefill, "chunked", timing, out, None, f"chunk {chunk} tile {tile}")
        return timing.seconds

    def _best_tiling(self) -> tuple[int, int]:
        if self.tiling is None:
            prefill = self._prefill(TUNING_TOKENS if self.device != "cpu" else 1024, KeyFormat.BF16)
            out, times = self._out(prefill), {}
            for chunk, tile in TILINGS:
                plan = Plan(chunk, tile, 0)
                timing = measure(partial(self._search, prefill, "chunked", out, plan), self.device, budget_s=1.0)
                times[chunk, tile] = timing.seconds
                self._row(prefill, "chunked", timing, out, None, f"chunk {chunk} tile {tile} (tuning)")
            self.tiling = min(times, key=lambda key: times[key])
        return self.tiling

    def _reference(self, prefill: Prefill, baseline: float | None) -> None:
        out = self._out(prefill)
        problem = Problem(
            prefill.q, prefill.w, prefill.keys, 0, self.model.ratio, self.model.top_k, Order.INDEX, out, None
        )
        try:
            timing = measure(lambda: run_reference(problem, torch.float32), self.device)
        except (torch.OutOfMemoryError, ReferenceTooLargeError) as error:
            note = "out of memory" if isinstance(error, torch.OutOfMemoryError) else "beyond the reference's bound"
            case = f"{self.model.name} S={prefill.tokens} reference"
            self.report.add(Row(TABLE, case, "bf16", None, None, None, None, None, None, None, note=note))
            return
        self._row(prefill, "reference", timing, out, baseline, "float32")

    def _out(self, prefill: Prefill) -> Tensor:
        return torch.empty((prefill.tokens, self.model.top_k), dtype=torch.int32, device=self.device)

    def _search(self, prefill: Prefill, implementation: str, out: Tensor, plan: Plan | None = None) -> None:
        topk(
            prefill.q,
            prefill.w,
            prefill.keys,
            0,
            ratio=self.model.ratio,
            top_k=self.model.top_k,
            order=Order.INDEX,
            implementation=implementation,
            workspace_bytes=self.workspace_bytes,
            out_indices=out,
            plan=plan,
        )

    def _row(self, prefill: Prefill, name: str, timing: Timing, out: Tensor, baseline: float | None, note: str) -> None:
        key_format = prefill.keys.format
        tflops = self.model.useful_flop(prefill.tokens) / timing.seconds / 1e12
        self.report.add(
            Row(
                table=TABLE,
                case=f"{self.model.name} S={prefill.tokens} {name}",
                dtype=key_format.value,
                seconds=timing.seconds,
                useful_tflops=tflops,
                roof_fraction=tflops / self.roofs[key_format],
                ratio=None if baseline is None else baseline / timing.seconds,
                ratio_to=None if baseline is None else "chunked bf16",
                peak_bytes=timing.peak_bytes,
                wrong_rows=wrong_rows(prefill, out),
                repeats=timing.repeats,
                note=note,
            )
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--model", choices=list(MODELS), default="V4-Flash")
    parser.add_argument("--quick", action="store_true", help=f"only the lengths {QUICK_SIZES}")
    parser.add_argument("--sizes", type=int, nargs="*")
    parser.add_argument("--implementations", nargs="*", default=["chunked", "reference", "triton"])
    parser.add_argument("--workspace-mib", type=int, default=256)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    report = Report(arguments.device)
    print(report.header, MARKDOWN_HEAD, sep="\n", flush=True)
    scaling = Scaling(MODELS[arguments.model], arguments.device, report, arguments.workspace_mib << 20)
    for tokens in arguments.sizes or (QUICK_SIZES if arguments.quick else SIZES):
        scaling.run_size(tokens, arguments.implementations)
    return report.finish(arguments.out)


if __name__ == "__main__":
    sys.exit(main())
