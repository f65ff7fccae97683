"""Parity at small lengths: every model, format and implementation against the reference, bit for bit.

    python -m benchmarks.topk_parity --out benchmarks/results/topk_parity.json

Inputs are small integers, whose scores are exact in float32 and tie often. A row is wrong unless its indices and the
bits of its scores are the reference's, in both orders. Lengths: below top_k visible keys, above, and so far above that
the sampled threshold takes part. On a CPU lengths are short, and so is top_k.
"""

import argparse
import sys
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from benchmarks.harness import MODELS, Model
from benchmarks.inputs import Prefill
from benchmarks.judge import Judgement, recall_of_rows
from benchmarks.searches import Bench, begin, formats_of, options, product_search, run_topk, usable
from streamindex_service.ops import KeyFormat
from streamindex_service.ops.topk import Order

TABLE = "topk_parity"
CPU_SIZES = [257, 1040]
CPU_TOP_K = 64


def sizes_of(model: Model) -> list[int]:
    """Tokens, of which the last one sees half of top_k, twice, and four and a half times top_k keys; none a multiple
    of a tile."""
    span = model.top_k * model.ratio
    return [span // 2 + 1, 2 * span + 13, 9 * span // 2 + 7]


class Parity:
    """Judges one implementation by the reference of the same prefill."""

    def __init__(self, prefill: Prefill) -> None:
        self.expected = {order: both(prefill, "reference", order) for order in Order}

    def judge(self, implementation: str, prefill: Prefill, _: Tensor) -> Judgement:
        """All rows, searched again in both orders."""
        equal = torch.ones(prefill.rows, dtype=torch.bool, device=prefill.device)
        for order, (indices, scores) in self.expected.items():
            found_indices, found_scores = both(prefill, implementation, order)
            equal &= (found_indices == indices).all(dim=1)
            equal &= (found_scores.view(torch.int32) == scores.view(torch.int32)).all(dim=1)
        wrong = int((~equal).sum())
        # equal rows hold the exact answer; looking at the others again is for a run that fails anyhow
        recall = 1.0 if not wrong else float(recall_of_rows(prefill, found_indices).mean())
        return Judgement(prefill.rows, wrong, recall)


def both(prefill: Prefill, implementation: str, order: Order) -> tuple[Tensor, Tensor]:
    """Indices [rows, top_k] int32 and scores [rows, top_k] float32, into buffers that held something else."""
    shape = (prefill.rows, prefill.model.top_k)
    indices = torch.full(shape, -77, dtype=torch.int32, device=prefill.device)
    scores = torch.full(shape, torch.nan, device=prefill.device)
    run_topk(prefill, implementation, indices, order=order, out_scores=scores)
    return indices, scores


def run_size(bench: Bench, prefill: Prefill, names: list[str]) -> None:
    """A row for each implementation."""
    parity = Parity(prefill)
    for name in names:
        search = product_search(name, note="indices and scores, both orders")
        bench.run(prefill, search, judged=partial(parity.judge, name))


def run_model(bench: Bench, model: Model, arguments: argparse.Namespace) -> None:
    """All rows of one model."""
    if bench.device == "cpu":
        model = replace(model, top_k=min(model.top_k, CPU_TOP_K))
    few, more, filtered = sizes_of(model)
    on_device = [few, filtered] if arguments.quick else [few, more, filtered]
    sizes = arguments.sizes or (CPU_SIZES if bench.device == "cpu" else on_device)
    quick_formats = [KeyFormat.BF16, KeyFormat.FP8_E4M3]
    for key_format in formats_of(arguments, quick_formats if arguments.quick else list(KeyFormat)):
        names = usable(arguments.implementations, bench.device, key_format)
        for tokens in sizes:
            run_size(bench, bench.prefill(model, tokens, key_format, values="integers"), names)


def main(argv: list[str] | None = None) -> int:
    parser = options(__doc__, quick="only bf16 and fp8, fewer lengths")
    parser.set_defaults(models=list(MODELS), implementations=["triton", "chunked"])
    arguments = parser.parse_args(argv)
    bench = begin(TABLE, arguments)
    bench.budget_s = min(bench.budget_s, 0.2)  # the answers are the point
    for name in arguments.models:
        run_model(bench, MODELS[name], arguments)
    return bench.report.finish()


if __name__ == "__main__":
    sys.exit(main())
