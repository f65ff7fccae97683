"""Time and memory of a whole causal prefill against sequence length: the fused kernels, the StreamIndex algorithm,
the reference.

    python -m benchmarks.topk_scaling --quick --out benchmarks/results/topk_scaling.json

`triton` runs in bf16 and fp8, in each of several workspaces. `chunked` runs in bf16, up to a length, at the best of
several tilings, found at each length (quick: once). `reference` materialises every score in float32 until it is out of
memory, which is reported as such. Ratios are to `chunked` in bf16 of the same length.
"""

import argparse
import sys
from dataclasses import dataclass
from functools import partial

import torch

from benchmarks.harness import MODELS, Model
from benchmarks.inputs import Prefill
from benchmarks.searches import (
    MIB,
    Bench,
    TopkRow,
    begin,
    chunked_search,
    formats_of,
    options,
    planned,
    product_search,
    reference_search,
    usable,
)
from benchmarks.timing import seconds_of
from streamindex_service.ops import KeyFormat
from streamindex_service.ops.paged_keys import PAGE_KEYS

TABLE = "topk_scaling"
DEFAULT_MODELS = ["V4-Flash", "V4-Pro"]
SIZES = [32_768, 65_536, 131_072, 262_144, 524_288, 1_048_576]
QUICK_SIZES = [32_768, 262_144]
CHUNKED_MOST_TOKENS = 1_048_576
QUICK_TUNING_TOKENS = 65_536
WORKSPACES_MIB = [256, 64, 16]
# query chunk × key tile; the products of a block are chunk · heads · tile · 4 bytes: 0.5 to 17 GB
TILINGS = [(256, 8192), (1024, 8192), (2048, 8192), (512, 16_384), (1024, 16_384), (512, 65_536), (1024, 65_536)]
_LONG_S = 1.0


@dataclass
class Chunked:
    """The baseline: its tilings, and the best found so far."""

    bench: Bench
    most_tokens: int
    tilings: list[tuple[int, int]]
    tune_once: bool
    best: tuple[int, int] | None = None

    def run(self, prefill: Prefill) -> TopkRow | None:
        """A row at the best tiling, or None for a prefill that is too long."""
        if prefill.rows > self.most_tokens:
            return None
        if self.best is None or not self.tune_once:
            self.best = self.fastest(prefill)
        return self.bench.run(prefill, chunked_search(*self.best, note=f"best of {len(self.tilings)}"))

    def fastest(self, prefill: Prefill) -> tuple[int, int]:
        """The fastest tiling by one run of each; those that differ only beyond the last key are tried once."""
        out = torch.empty((prefill.rows, prefill.model.top_k), dtype=torch.int32, device=prefill.device)
        times: dict[tuple[int, int], float] = {}
        all_keys = -(-prefill.keys.length // PAGE_KEYS) * PAGE_KEYS
        for chunk, tile in dict.fromkeys((chunk, min(tile, all_keys)) for chunk, tile in self.tilings):
            work = partial(chunked_search(chunk, tile).work, prefill, out)
            try:
                seconds = seconds_of(work, self.bench.device)
                # a short run says more when the library has loaded what it needs
                times[chunk, tile] = seconds if seconds > _LONG_S else seconds_of(work, self.bench.device)
            except torch.OutOfMemoryError:
                continue
        return min(times, key=lambda tiling: times[tiling])


def run_model(bench: Bench, model: Model, sizes: list[int], chunked: Chunked, arguments: argparse.Namespace) -> None:
    """All rows of one model."""
    if "chunked" in arguments.implementations and chunked.tune_once and chunked.best is None:
        tokens = min(QUICK_TUNING_TOKENS, max(sizes))
        chunked.best = chunked.fastest(bench.prefill(model, tokens, KeyFormat.BF16))
    for tokens in sizes:
        baseline = None
        for key_format in formats_of(arguments, [KeyFormat.BF16, KeyFormat.FP8_E4M3]):
            prefill = bench.prefill(model, tokens, key_format)
            names = usable(arguments.implementations, bench.device, key_format)
            if key_format is KeyFormat.BF16:
                if "chunked" in names:
                    baseline = chunked.run(prefill)
                if "reference" in names:
                    bench.run(prefill, reference_search(), baseline)
            if "triton" in names:
                for mebibytes in arguments.workspaces_mib:
                    run_triton(bench, prefill, mebibytes, baseline)
            del prefill  # before the next one is made


def run_triton(bench: Bench, prefill: Prefill, workspace_mib: int, baseline: TopkRow | None) -> None:
    """One row in that workspace."""
    plan = planned(prefill, "triton", workspace_mib * MIB)
    note = f"workspace {workspace_mib} MiB, {plan.name}"
    bench.run(prefill, product_search("triton", workspace_bytes=workspace_mib * MIB, note=note), baseline)


def main(argv: list[str] | None = None) -> int:
    parser = options(__doc__, quick=f"only the lengths {QUICK_SIZES}, few repeats, one tuning")
    parser.add_argument("--workspaces-mib", type=int, nargs="+", default=WORKSPACES_MIB)
    parser.add_argument("--chunked-most", type=int, default=CHUNKED_MOST_TOKENS, metavar="TOKENS")
    parser.set_defaults(models=DEFAULT_MODELS, implementations=["chunked", "reference", "triton"])
    arguments = parser.parse_args(argv)
    bench = begin(TABLE, arguments)
    chunked = Chunked(bench, arguments.chunked_most, TILINGS, tune_once=arguments.quick)
    for name in arguments.models:
        sizes = arguments.sizes or (QUICK_SIZES if arguments.quick else SIZES)
        run_model(bench, MODELS[name], sizes, chunked, arguments)
    return bench.report.finish()


if __name__ == "__main__":
    sys.exit(main())
