"""A layer's compressed sparse attention from end to end: compressor, top-k, index rows, attention, of whole prefills.

    python -m benchmarks.csa_pipeline --quick --out benchmarks/results/csa_pipeline.json

The layer's projections, queries and window rows are inputs; its compressed rows and index keys are computed, and stay
in the caller's caches. Queries pass in chunks, so that what is held beside inputs, caches and output does not grow.
`triton` is the product's operations, on one stream and with the attention of a chunk beside the search of the next;
`chunked` the same composition in torch; `materialised` holds all scores and all gathered rows, until it is out of
memory, which is reported as such. KV rows are bf16; index keys and queries bf16 or fp8. StreamIndex published 1.97 s
at 262,144 tokens in bf16.

Useful work is 16,384 FLOP for each (token, key) pair that is seen and 2 · heads · (key_dim + value_dim) for each entry
of an index row that names a row. `of the roof` is the time that these take at the roofs of their element types,
measured beside the row, as a share of the row's.
"""

import argparse
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import attention, compressor
from benchmarks.attention import Attention, judge_attention
from benchmarks.harness import MODELS, Row
from benchmarks.judge import judge, sample_rows
from benchmarks.pipeline import (
    STAGES,
    CsaLayer,
    StageClock,
    Way,
    chunked_way,
    make_layer,
    materialised_way,
    product_way,
    run_layer,
)
from benchmarks.searches import UNWRITTEN, Bench, begin, formats_of, without_figures
from benchmarks.timing import Timing, measure
from streamindex_service.ops import KeyFormat
from streamindex_service.ops.index_rows import assemble_index_rows
from streamindex_service.ops.topk import IMPLEMENTATIONS, ReferenceTooLargeError

TABLE = "csa_pipeline"
SIZES, QUICK_SIZES, CPU_SIZES = [8192, 16_384, 32_768, 65_536, 131_072, 262_144], [8192, 262_144], [256]
QUICK_CHUNKED_MOST_TOKENS = 65_536
WAYS = ["materialised", "chunked", "triton"]
_CHECKED_TOKENS = 64


@dataclass(frozen=True)
class PipelineRow(Row):
    """A measured layer.

    checked_rows: tokens whose search and output were judged; checked_entries: compressed rows and index keys that were.
    `wrong_rows` counts all three, `recall` is of the searches, largest_error the worst error of an output as a share of
    its bound. chunk: query tokens at a time. compressor_s, topk_s, index_rows_s, attention_s: what the stages of one
    run took, None where they overlap. roof_s: the useful work at the roofs.
    """

    model: str = ""
    tokens: int = 0
    implementation: str = ""
    chunk: int = 0
    checked_rows: int = 0
    checked_entries: int = 0
    recall: float | None = None
    largest_error: float | None = None
    compressor_s: float | None = None
    topk_s: float | None = None
    index_rows_s: float | None = None
    attention_s: float | None = None
    roof_s: float | None = None

    def __post_init__(self) -> None:
        if self.seconds is not None and (self.wrong_rows is None or not self.checked_rows):
            raise ValueError(f"{self.case}: a time, and no judgement of the answers")


@dataclass(frozen=True)
class Judgement:
    """See PipelineRow."""

    wrong: int
    checked_rows: int
    checked_entries: int
    recall: float
    largest_error: float


def judge_layer(layer: CsaLayer, way: Way, out: Tensor) -> Judgement:
    """Judge a sample of tokens of `out`, which a run left there.

    The layer runs once more, to tell what its searches find for these tokens: that is judged by scoring again, and the
    output that was there before against exact attention over these very rows.
    """
    rows = sample_rows(layer.tokens, _CHECKED_TOKENS)
    on_device = rows.to(out.device)
    output = out[on_device]
    found = torch.full((len(rows), layer.index.top_k), UNWRITTEN, dtype=torch.int32, device=out.device)

    def keep(start: int, results: Tensor) -> None:
        here = (rows >= start) & (rows < start + len(results))
        found[here.to(found.device)] = results[on_device[here.to(found.device)] - start]

    run_layer(layer, way, out, seen=keep)
    whole = layer.searched(layer.paged_keys(), slice(0, layer.tokens))
    of_search = judge(whole.select(rows), found)
    indices = assemble_index_rows(
        found, on_device, window=layer.attention.window, compressed_row=layer.tokens, implementation="reference"
    )
    sampled = Attention(layer.attention, layer.q[on_device], layer.kv, indices, layer.sink)
    _, wrong_outputs, largest_error = judge_attention(sampled, output)
    entries, keys = (
        compressor.judge(tokens, made)
        for tokens, made in ((layer.pooled, layer.rows[layer.tokens :]), (layer.index_pooled, layer.keys))
    )
    wrong_entries = entries[1] + keys[1]
    if wrong_entries:
        print(f"wrong entries: {entries[1]} rows, {keys[1]} keys", file=sys.stderr)
    wrong = of_search.wrong_rows + wrong_outputs + wrong_entries
    return Judgement(wrong, len(rows), entries[0] + keys[0], of_search.recall, largest_error)


def run_one(bench: Bench, layer: CsaLayer, way: Way, baseline: PipelineRow | None) -> PipelineRow:
    """Measure, judge and add one row. Out of memory is a result: a row without figures."""
    row = partial(
        PipelineRow,
        table=TABLE, case=f"{layer.index.name} S={layer.tokens} {way.name}", dtype=layer.key_format.value,
        model=layer.index.name, tokens=layer.tokens, implementation=way.name, chunk=way.chunk,
    )  # fmt: skip
    shape = (layer.tokens, layer.attention.heads, layer.attention.value_dim)
    # no answer: memory given back by the last row may hold a right one
    out = torch.full(shape, torch.nan, dtype=torch.bfloat16, device=bench.device)
    roofs: list[float] = []
    clock = StageClock(bench.device)

    def work() -> None:
        nonlocal clock
        clock = StageClock(bench.device)
        run_layer(layer, way, out, clock=None if way.overlapped else clock)

    def note_roof() -> None:
        roofs.append(roof_seconds(bench, layer))

    if way.compressor == "triton":  # what is compiled first may take so long that the run would count itself
        work()
    timing, reason = _measure(bench, work, note_roof)
    if timing is None:
        bench.give_back()
        done = row(**dict.fromkeys(_FIGURES), note=reason)
    else:
        note_roof()
        stages = {} if way.overlapped else clock.seconds()
        verdict = judge_layer(layer, way, out)
        roof_s = statistics.mean(roofs)
        same = baseline is not None and baseline.seconds is not None
        done = row(
            seconds=timing.seconds,
            useful_tflops=(layer.index_flop + layer.attention_flop) / timing.seconds / 1e12,
            roof_fraction=roof_s / timing.seconds,
            ratio=baseline.seconds / timing.seconds if same else None,
            ratio_to=f"{baseline.implementation} {baseline.dtype}" if same else None,
            peak_bytes=timing.peak_bytes,
            wrong_rows=verdict.wrong,
            repeats=timing.repeats,
            note=_note(stages, roof_s),
            checked_rows=verdict.checked_rows,
            checked_entries=verdict.checked_entries,
            recall=verdict.recall,
            largest_error=verdict.largest_error,
            roof_s=roof_s,
            **{f"{name.replace(' ', '_')}_s": seconds for name, seconds in stages.items()},
        )
    bench.report.add(done)
    return done


_FIGURES = (
    "seconds", "useful_tflops", "roof_fraction", "ratio", "ratio_to", "peak_bytes", "wrong_rows"
)  # fmt: skip


def roof_seconds(bench: Bench, layer: CsaLayer) -> float:
    """Seconds of the layer's useful work at the roofs as they are now; attention is bf16 whatever the keys are."""
    of_attention = layer.attention_flop / bench.measure_roof(KeyFormat.BF16)
    return (layer.index_flop / bench.measure_roof(layer.key_format) + of_attention) / 1e12


def _measure(bench: Bench, work, when_warm) -> tuple[Timing | None, str]:
    """A timing, or why there is none."""
    try:
        timing = measure(
            work, bench.device, budget_s=bench.budget_s, max_repeats=bench.max_repeats, when_warm=when_warm
        )
        return timing, ""
    except (torch.OutOfMemoryError, ReferenceTooLargeError) as error:
        return None, without_figures(error, bench.device)


def _note(stages: dict[str, float], roof_s: float) -> str:
    parts = [f"{name} {stages[name] * 1e3:.3g}" for name in STAGES if name in stages]
    return ", ".join([*parts, f"at the roof {roof_s * 1e3:.3g} ms"])


def ways_of(arguments: argparse.Namespace, tokens: int, key_format: KeyFormat) -> Iterator[Way]:
    """The ways asked for that make sense at that length and format: what ours is held against runs in bf16."""
    most = arguments.chunked_most or (QUICK_CHUNKED_MOST_TOKENS if arguments.quick else max(SIZES))
    if key_format is KeyFormat.BF16:
        if "materialised" in arguments.implementations:
            yield materialised_way(tokens)
        if "chunked" in arguments.implementations and tokens <= most:
            yield chunked_way(tokens)
    if "triton" in arguments.implementations and IMPLEMENTATIONS["triton"].runs_on(arguments.device):
        for streams in arguments.streams:
            yield product_way(tokens, overlapped=streams == 2, chunk=arguments.chunk)


def run_size(bench: Bench, name: str, tokens: int, arguments: argparse.Namespace) -> None:
    """All rows of one model and length. Ratios are to the first way that fits, in bf16."""
    baseline = None
    for key_format in formats_of(arguments, [KeyFormat.BF16, KeyFormat.FP8_E4M3]):
        bench.give_back()
        layer = make_layer(MODELS[name], attention.MODELS[name], tokens, key_format, bench.device)
        for way in ways_of(arguments, tokens, key_format):
            row = run_one(bench, layer, way, baseline)
            if baseline is None and row.seconds is not None:
                baseline = row
        del layer  # before the next one is made


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    models = [name for name, model in attention.MODELS.items() if model.window and name in MODELS]
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--models", nargs="+", choices=models, default=["V4-Flash"])
    parser.add_argument("--sizes", type=int, nargs="+", metavar="TOKENS")
    parser.add_argument("--formats", nargs="+", choices=["bf16", "fp8_e4m3"], help="of index keys and queries")
    parser.add_argument("--implementations", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--streams", type=int, nargs="+", choices=[1, 2], default=[1, 2], help="of triton")
    parser.add_argument("--chunk", type=int, metavar="TOKENS", help="query tokens at a time, of triton")
    parser.add_argument("--chunked-most", type=int, metavar="TOKENS", help="the longest that `chunked` runs")
    quick = f"only the lengths {QUICK_SIZES}, few repeats, `chunked` up to {QUICK_CHUNKED_MOST_TOKENS}"
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--out", type=Path, metavar="FILE", help="where the JSON goes")
    arguments = parser.parse_args(argv)
    bench = begin(TABLE, arguments)
    sizes = CPU_SIZES if bench.device == "cpu" else QUICK_SIZES if arguments.quick else SIZES
    for name in arguments.models:
        for tokens in arguments.sizes or sizes:
            run_size(bench, name, tokens, arguments)
    return bench.report.finish()


if __name__ == "__main__":
    sys.exit(main())
