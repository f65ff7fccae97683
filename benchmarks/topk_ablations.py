"""What each part of the algorithm is for: the same search with one part left out.

    python -m benchmarks.topk_ablations --quick --out benchmarks/results/topk_ablations.json

Two parts save time, and leaving them out changes no answer; a wrong row is an error:
- tile skipping: rows come in random order, so that hardly a key is hidden from all queries of a block;
- threshold filter: the selection reads every score of a row.

Two parts make the answer right. Without them wrong rows and the loss of recall are the result:
- merge: each of several key tiles gives its share of the top_k, and nothing is compared across tiles;
- float32 accumulation: products, gates and sums are rounded to bfloat16 or float16.

Ratios are to the whole algorithm of the same implementation and element type; a half-precision one is held against
`chunked`, which multiplies by the same library.
"""

import argparse
import sys
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from benchmarks.harness import MODELS, Model
from benchmarks.inputs import Prefill
from benchmarks.searches import (
    Bench,
    Search,
    TopkRow,
    begin,
    chunked_search,
    formats_of,
    options,
    planned,
    product_search,
    usable,
)
from benchmarks.variants.half_precision import search_in_half
from benchmarks.variants.no_merge import search_without_merge
from streamindex_service.ops import KeyFormat
from streamindex_service.ops.paged_keys import PAGE_KEYS

TABLE = "topk_ablations"
SIZES, QUICK_SIZES = [65_536, 262_144], [65_536]
QUERY_CHUNK = 1024
TILES = [2, 8]
HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}
_NEVER = 1 << 30  # keys: no tile is so large
_SHUFFLE_SEED = 7


def shuffled(prefill: Prefill) -> Prefill:
    """The same rows in random order, each at its own position."""
    generator = torch.Generator().manual_seed(_SHUFFLE_SEED)
    return prefill.select(torch.randperm(prefill.rows, generator=generator))


def without_filter(prefill: Prefill) -> Search:
    """The fused kernels, with every row selected from all its scores."""
    plan = planned(prefill, "triton")
    assert plan.tiles is not None
    unfiltered = replace(plan, tiles=replace(plan.tiles, filter_keys=_NEVER))
    return product_search("triton", plan=unfiltered, name="triton, no filter", left_out="threshold filter")


def without_merge(implementation: str, tiles: int, query_chunk: int) -> Search:
    """Each of `tiles` key tiles gives its share."""
    work = partial(search_without_merge, implementation=implementation, query_chunk=query_chunk, tiles=tiles)
    return Search(
        f"{implementation}, no merge", implementation, work, query_chunk=query_chunk, note=f"{tiles} key tiles",
        left_out="merge", exact=False,
    )  # fmt: skip


def in_half(name: str, query_chunk: int) -> Search:
    """Scores rounded to 16 bits."""

    def work(prefill: Prefill, out: Tensor) -> None:
        search_in_half(prefill, out, dtype=HALVES[name], query_chunk=query_chunk)

    return Search(
        f"half precision {name}", "half precision", work, query_chunk=query_chunk, note=f"sums in {name}",
        left_out="float32 accumulation", exact=False,
    )  # fmt: skip


def run_size(bench: Bench, prefill: Prefill, names: list[str], query_chunk: int) -> None:
    """All rows of one model, length and element type."""
    whole: dict[str, TopkRow] = {}
    if "triton" in names:
        whole["triton"] = bench.run(prefill, product_search("triton"))
        bench.run(prefill, without_filter(prefill), whole["triton"])
    if "chunked" in names:
        whole["chunked"] = bench.run(prefill, _chunked(prefill, query_chunk))
        for name in HALVES:
            bench.run(prefill, in_half(name, query_chunk), whole["chunked"])
    for name, row in whole.items():
        for tiles in TILES:
            bench.run(prefill, without_merge(name, tiles, query_chunk), row)
    run_without_skipping(bench, shuffled(prefill), whole, query_chunk)


def run_without_skipping(bench: Bench, rows: Prefill, whole: dict[str, TopkRow], query_chunk: int) -> None:
    """The same searches of shuffled rows."""
    left_out, note = "tile skipping", "rows in random order"
    if "triton" in whole:
        search = product_search("triton", name="triton, no tile skipping", left_out=left_out, note=note)
        bench.run(rows, search, whole["triton"])
    if "chunked" in whole:
        bench.run(rows, _chunked(rows, query_chunk, "chunked, no tile skipping", left_out, note), whole["chunked"])


def _chunked(prefill: Prefill, query_chunk: int, name: str = "", left_out: str = "", note: str = "") -> Search:
    # all keys in one tile: what it is fastest with
    tile = -(-prefill.keys.length // PAGE_KEYS) * PAGE_KEYS
    return chunked_search(query_chunk, tile, note, name, left_out)


def run_model(bench: Bench, model: Model, arguments: argparse.Namespace) -> None:
    """All rows of one model."""
    for tokens in arguments.sizes or (QUICK_SIZES if arguments.quick else SIZES):
        for key_format in formats_of(arguments, [KeyFormat.BF16, KeyFormat.FP8_E4M3]):
            names = usable(arguments.implementations, bench.device, key_format)
            run_size(bench, bench.prefill(model, tokens, key_format), names, arguments.query_chunk)


def main(argv: list[str] | None = None) -> int:
    parser = options(__doc__, quick=f"only the lengths {QUICK_SIZES}, few repeats")
    parser.add_argument("--query-chunk", type=int, default=QUERY_CHUNK, help="rows, of what is not planned")
    parser.set_defaults(models=["V4-Flash"], implementations=["triton", "chunked"])
    arguments = parser.parse_args(argv)
    bench = begin(TABLE, arguments)
    for name in arguments.models:
        run_model(bench, MODELS[name], arguments)
    return bench.report.finish()


if __name__ == "__main__":
    sys.exit(main())
