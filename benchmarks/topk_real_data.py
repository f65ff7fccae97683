"""Real data: time, re-scored answers, and how often the sampled threshold misleads.

    python -m benchmarks.topk_real_data --data indexer_docs_64k.safetensors --out benchmarks/results/topk_real_data.json

The data set is a safetensors file of an indexer of one key a token: `k` [keys, head_dim], `position` [rows], and either
`q` [rows, heads, head_dim] with scaled gates `w` [rows, heads], or query states `x` [rows, width] with the weights
`w_q` [width, heads · head_dim], `w_w` [width, heads] and `b_w` [heads] that make them. Without --data it is the one
that ships with the service. `fallback_rows` are those that were read whole because the sample misled.
"""

import argparse
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.harness import Model
from benchmarks.inputs import Prefill
from benchmarks.judge import judge
from benchmarks.searches import (
    Bench,
    begin,
    chunked_search,
    formats_of,
    options,
    planned,
    product_search,
    usable,
)
from streamindex_service.ops import KeyFormat, PagedKeys
from streamindex_service.ops.topk import Order
from streamindex_service.ops.topk.plan import is_filtered
from streamindex_service.ops.topk.problem import Problem

TABLE = "topk_real_data"
TOP_KS, QUICK_TOP_KS = [512, 1024, 2048], [512, 2048]
CHECKED_ROWS = 1 << 20  # all
QUICK_CHECKED_ROWS_CPU = 16
_ONE_CHUNK_BYTES = 16 << 30  # so that all rows are one chunk and all keys one tile
_CHUNKED_TILES = (512, 16_384)


def load(path: Path | None) -> dict[str, Tensor]:
    """Keys `k` bf16, queries `q` bf16, gates `w` float32 and `position` int64 of the data set, on the CPU."""
    from safetensors.torch import load_file

    if path is None:
        from streamindex_service.demo.workload import DATA

        path = DATA / "demo_16k.safetensors"
    tensors = load_file(path)
    if "q" not in tensors:
        heads, head_dim = tensors["w_w"].shape[1], tensors["k"].shape[1]
        x = tensors["x"].float()
        tensors["q"] = (x @ tensors["w_q"].float()).view(-1, heads, head_dim).bfloat16()
        gates = x @ tensors["w_w"].float() + tensors["b_w"]
        tensors["w"] = gates * (heads * head_dim) ** -0.5
    tensors["position"] = tensors["position"].to(torch.int64)
    return tensors


def real_prefill(tensors: dict[str, Tensor], name: str, key_format: KeyFormat, device: str) -> Prefill:
    """The data set as a search in that format; 8-bit keys and queries by the reference quantiser."""
    q, k, w, scales = tensors["q"], tensors["k"], tensors["w"], None
    if key_format.has_scales:
        from streamindex_service.demo.workload import quantise_keys, quantise_queries

        k, scales = quantise_keys(k.float())
        q, w = quantise_queries(q.float(), w)
        scales = scales.to(device)
    dtype = key_format.torch_dtype
    keys = PagedKeys.from_contiguous(k.to(dtype).to(device), scales)
    model = Model(name, q.shape[1], q.shape[2], ratio=1, top_k=TOP_KS[0])
    return Prefill(model, q.to(dtype).to(device), w.contiguous().to(device), keys, tensors["position"])


def fallback_rows(prefill: Prefill) -> int | None:
    """Rows that the sampled threshold misled, so that the selection read them whole; None where nothing is sampled."""
    from streamindex_service.ops.topk.triton import survivor_counts

    model, plan = prefill.model, planned(prefill, "triton", _ONE_CHUNK_BYTES)
    assert plan.tiles is not None
    if not is_filtered(int(prefill.visible().max()), model.top_k, plan.tiles):
        return None
    out = torch.empty((prefill.rows, model.top_k), dtype=torch.int32, device=prefill.device)
    problem = Problem(
        prefill.q, prefill.w, prefill.keys, prefill.positions, model.ratio, model.top_k, Order.INDEX, out, None
    )
    return int((survivor_counts(problem, plan) == -1).sum())


def run_top_k(bench: Bench, prefill: Prefill, names: list[str], checked_rows: int) -> None:
    """A row for each implementation."""
    baseline = None
    judged = partial(judge, sample=checked_rows)
    if "chunked" in names:
        baseline = bench.run(prefill, chunked_search(*_CHUNKED_TILES), judged=judged)
    if "triton" in names:
        misled = fallback_rows(prefill)
        note = "not filtered"
        if misled is not None:
            note = f"{misled} of {prefill.rows} rows fell back ({misled / prefill.rows:.2%})"
        bench.run(prefill, product_search("triton", note=note, fallback_rows=misled), baseline, judged)


def run(bench: Bench, arguments: argparse.Namespace) -> None:
    """All rows."""
    tensors = load(arguments.data)
    name = arguments.data.stem if arguments.data else "demo_16k"
    default = [KeyFormat.BF16, KeyFormat.FP8_E4M3]
    if arguments.quick and bench.device == "cpu":
        default = default[:1]
    for key_format in formats_of(arguments, default):
        prefill = real_prefill(tensors, name, key_format, bench.device)
        names = usable(arguments.implementations, bench.device, key_format)
        for top_k in arguments.top_ks:
            part = replace(prefill, model=replace(prefill.model, top_k=top_k))
            run_top_k(bench, part, names, arguments.checked_rows)


def main(argv: list[str] | None = None) -> int:
    parser = options(__doc__, quick="fewer top_k, few repeats; on a CPU few rows are checked", any_model=False)
    parser.add_argument("--data", type=Path, metavar="FILE", help="safetensors; the one that ships, if not given")
    parser.add_argument("--top-ks", type=int, nargs="+")
    parser.add_argument("--checked-rows", type=int, help="all, if not given")
    parser.set_defaults(implementations=["triton", "chunked"])
    arguments = parser.parse_args(argv)
    few = arguments.quick and arguments.device == "cpu"
    arguments.top_ks = arguments.top_ks or (QUICK_TOP_KS[:1] if few else QUICK_TOP_KS if arguments.quick else TOP_KS)
    arguments.checked_rows = arguments.checked_rows or (QUICK_CHECKED_ROWS_CPU if few else CHECKED_ROWS)
    bench = begin(TABLE, arguments)
    run(bench, arguments)
    return bench.report.finish()


if __name__ == "__main__":
    sys.exit(main())
