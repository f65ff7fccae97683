"""The design space: time and recall of every query chunk × key tile × top_k, of the fused kernels and of the
StreamIndex algorithm.

    python -m benchmarks.topk_design --quick --out benchmarks/results/topk_design.json

Tiles decide time and memory, never an answer: the recall of every row is 1. Ratios are to the fused kernels as
planned within the default workspace, of the same element type and top_k.
"""

import argparse
import sys
from dataclasses import replace
from itertools import product

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
from streamindex_service.ops import KeyFormat

TABLE = "topk_design"
TOKENS, QUICK_TOKENS = 131_072, 65_536
QUERY_CHUNKS, QUICK_QUERY_CHUNKS = [256, 1024, 4096], [256, 2048]
KEY_TILES, QUICK_KEY_TILES = [2048, 8192, 32_768], [4096, 16_384]
TOP_KS, QUICK_TOP_KS = [512, 1024, 2048], [512, 2048]


def tiled_search(prefill: Prefill, implementation: str, query_chunk: int, key_tile: int) -> Search:
    """A search by exactly those tiles."""
    if implementation == "chunked":
        return chunked_search(query_chunk, key_tile)
    plan = planned(prefill, implementation)
    tiled = replace(plan, query_chunk=query_chunk, key_tile=key_tile, workspace_bytes=0, grow=False)
    return product_search(implementation, plan=tiled, note=f"chunk {query_chunk} tile {key_tile}")


def run_model(bench: Bench, model: Model, arguments: argparse.Namespace) -> None:
    """All rows of one model."""
    for key_format in formats_of(
        arguments, [KeyFormat.BF16] if arguments.quick else [KeyFormat.BF16, KeyFormat.FP8_E4M3]
    ):
        prefill = bench.prefill(model, arguments.sizes[0], key_format)
        names = usable(arguments.implementations, bench.device, key_format)
        for top_k in arguments.top_ks:
            run_tiles(bench, replace(prefill, model=replace(model, top_k=top_k)), names, arguments)
        del prefill  # before the next one is made


def run_tiles(bench: Bench, prefill: Prefill, names: list[str], arguments: argparse.Namespace) -> None:
    """All tiles of one top_k."""
    baseline: TopkRow | None = None
    if "triton" in names:
        baseline = bench.run(prefill, product_search("triton", note="as planned"))
    for name in names:
        # keys of 8 bits are widened by it, which tells nothing new
        if name == "chunked" and prefill.keys.format is KeyFormat.FP8_E4M3:
            continue
        for query_chunk, key_tile in product(arguments.query_chunks, arguments.key_tiles):
            bench.run(prefill, tiled_search(prefill, name, query_chunk, key_tile), baseline)


def main(argv: list[str] | None = None) -> int:
    parser = options(__doc__, quick=f"{QUICK_TOKENS} tokens in bf16, fewer tiles")
    parser.add_argument("--query-chunks", type=int, nargs="+", help="rows")
    parser.add_argument("--key-tiles", type=int, nargs="+", help="keys, multiples of 256")
    parser.add_argument("--top-ks", type=int, nargs="+")
    parser.set_defaults(models=["V4-Flash"], implementations=["triton", "chunked"])
    arguments = parser.parse_args(argv)
    quick = arguments.quick
    arguments.sizes = arguments.sizes or [QUICK_TOKENS if quick else TOKENS]
    arguments.query_chunks = arguments.query_chunks or (QUICK_QUERY_CHUNKS if quick else QUERY_CHUNKS)
    arguments.key_tiles = arguments.key_tiles or (QUICK_KEY_TILES if quick else KEY_TILES)
    arguments.top_ks = arguments.top_ks or (QUICK_TOP_KS if quick else TOP_KS)
    bench = begin(TABLE, arguments)
    for name in arguments.models:
        run_model(bench, MODELS[name], arguments)
    return bench.report.finish()


if __name__ == "__main__":
    sys.exit(main())
