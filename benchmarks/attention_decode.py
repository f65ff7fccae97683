"""Sparse attention of decode: one query token, or two, of each of several sequences with caches of their own.

    python -m benchmarks.attention_decode --quick --out benchmarks/results/attention_decode.json

`seconds` are those of one step within a graph of many, in which nothing waits for the host; every step attends other
rows, so that together they come from memory and not from the cache, and has queries of its own. `call_s` are those of a
step when each is called. Useful work is 2 · heads · (key_dim + value_dim) for each entry of an index row, `of the roof`
its share of a dense product in bf16. The note tells the bytes of gathered rows a second, and their share of what a copy
of 1 GiB reads and writes in the same run. `--heads 8 16 32` measures one device of several that share out the heads of
a model (tensor parallel) and hold all of its rows. The tokens of a sequence choose rows independently: a real search,
whose draft tokens share rows, gathers less. V4-HCA is a layer of ratio 128 after a million tokens: the window and all
8,192 compressed rows; as a sequence's tokens attend the same, each step has sequences of its own, and bytes that two
tokens of a step share count for both.
"""

import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks.attention import (
    MODELS,
    Attention,
    AttentionBench,
    AttentionModel,
    AttentionRow,
    begin,
    formats_of,
    judge_attention,
    options,
    usable,
)
from benchmarks.timing import copy_bytes_s, measure
from streamindex_service.ops import KvFormat, KvRows
from streamindex_service.ops.kv_rows import pack_rows

TABLE = "attention_decode"
SEQUENCES, QUICK_SEQUENCES, CPU_SEQUENCES = [1, 8, 32, 128], [1, 32], [2]
TOKENS_A_SEQUENCE, QUICK_TOKENS_A_SEQUENCE = [1, 2], [1]
CONTEXT, CPU_CONTEXT = 16_384, 1024
V4_HCA = AttentionModel("V4-HCA", 64, 512, 512, 128, 8192, 128, KvFormat.FP8_D512, all_visible=True)
# of gathered rows in a graph: five times the cache of an H200
_GRAPH_BYTES = 256 << 20
_LEAST_STEPS, _MOST_STEPS, _CPU_STEPS = 4, 512, 2
_CALLS = 16
_FILL_ROWS = 65_536


@dataclass(frozen=True)
class DecodeRow(AttentionRow):
    """A measured step. heads: of a query; tokens: of all sequences together; steps: of the graph. copy_fraction:
    gathered bytes a second as a share of the copy's; call_s: seconds of a step that is called by itself."""

    heads: int = 0
    sequences: int = 0
    steps: int = 0
    copy_fraction: float | None = None
    call_s: float | None = None


@dataclass(frozen=True)
class Decode:
    """Inputs of several steps: those of `whole`, one step's tokens after another's."""

    whole: Attention
    sequences: int
    steps: int

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.whole.tokens // self.steps

    def run_step(self, number: int, implementation: str, out: Tensor) -> None:
        """One step into its part of `out` [steps · tokens, heads, value_dim]."""
        w, part = self.whole, slice(number * self.tokens, (number + 1) * self.tokens)
        Attention(w.model, w.q[part], w.kv, w.indices[part], w.sink).run(implementation, out[part])

    def run(self, implementation: str, out: Tensor, steps: int | None = None) -> None:
        """All steps, or the first of them."""
        for number in range(self.steps if steps is None else steps):
            self.run_step(number, implementation, out)


def make_rows(model: AttentionModel, rows: int, kv_format: KvFormat, generator: torch.Generator) -> KvRows:
    """Random rows of that format, made a part at a time."""
    parts = []
    for start in range(0, rows, _FILL_ROWS):
        shape = (min(_FILL_ROWS, rows - start), model.key_dim)
        keys = torch.randn(shape, generator=generator, device=generator.device)
        parts.append(pack_rows(keys.to(torch.bfloat16), kv_format))
    scales = None if parts[0].scales is None else torch.cat([part.scales for part in parts if part.scales is not None])
    return KvRows(kv_format, torch.cat([part.data for part in parts]), scales)


def make_decode(
    model: AttentionModel, sequences: int, each: int, context: int, kv_format: KvFormat, device: str, seed: int = 0
) -> Decode:
    """Steps of `each` consecutive tokens of every sequence, at places between the middle and the end of its context, or
    in its last 64th if all rows are visible.

    A sequence has its own rows: if the model has a window those of its context, but no more than CONTEXT, then one for
    each `ratio` tokens.
    """
    generator = torch.Generator(device).manual_seed(seed)
    local = min(context, CONTEXT) if model.window else 0
    rows_each = local + context // model.ratio
    tokens = sequences * each
    steps = _CPU_STEPS
    if device != "cpu":
        one = pack_rows(torch.zeros((1, model.key_dim), dtype=torch.bfloat16), kv_format)
        step_bytes = tokens * model.width * one.row_bytes
        steps = min(max(-(-_GRAPH_BYTES // step_bytes), _LEAST_STEPS), _MOST_STEPS)
    caches = sequences * (steps if model.all_visible else 1)
    kv = make_rows(model, caches * rows_each, kv_format, generator)
    shape = (steps, sequences, each)
    earliest = min(context - context // 64, context - each) if model.all_visible else context // 2
    first = torch.randint(earliest, context - each + 1, (steps, sequences, 1), generator=generator, device=device)
    position = (first + torch.arange(each, device=device))[..., None]
    cache = torch.arange(caches, device=device).view(-1, sequences).expand(steps, sequences)
    base = rows_each * cache[..., None, None]
    indices = torch.empty((*shape, model.width), dtype=torch.int32, device=device)
    if model.window:
        newest = position if context <= local else model.window + position % (local - model.window)
        indices[..., : model.window] = base + newest - model.window + 1 + torch.arange(model.window, device=device)
    seen = (position + 1) // model.ratio
    if model.all_visible:
        row = torch.arange(model.top_k, device=device)
        indices[..., model.window :] = torch.where(row < seen, base + local + row, -1)
    else:
        chosen = torch.rand((*shape, model.top_k), generator=generator, device=device).sort(dim=-1).values
        indices[..., model.window :] = base + local + (chosen * seen).long()
    q = torch.empty((steps * tokens, model.heads, model.key_dim), dtype=torch.bfloat16, device=device)
    for part in q.split(tokens):
        part.copy_(torch.randn(part.shape, generator=generator, device=device))
    sink = torch.randn(model.heads, generator=generator, device=device) if model.window else None
    return Decode(Attention(model, q, kv, indices.view(-1, model.width), sink), sequences, steps)


def in_one_go(work: Callable[[], None], device: str) -> Callable[[], None]:
    """The work as one graph of kernels; on a CPU as it is."""
    if device == "cpu":
        return work
    work()  # a graph takes up nothing that has yet to be compiled
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def named(model: AttentionModel) -> str:
    """The model's name, and the heads if they are not all of its own."""
    return model.name if model.heads == models()[model.name].heads else f"{model.name} {model.heads} heads"


def models() -> dict[str, AttentionModel]:
    """All that can be measured, by name."""
    return {**MODELS, V4_HCA.name: V4_HCA}


def run_one(bench: AttentionBench, decode: Decode, name: str, baseline: DecodeRow | None) -> DecodeRow:
    """Measure, judge and add one row."""
    whole, model, device = decode.whole, decode.whole.model, bench.device
    # no answer: memory given back by the last row may hold a right one
    shape = (whole.tokens, model.heads, model.value_dim)
    out = torch.full(shape, torch.nan, dtype=torch.bfloat16, device=device)
    calls = min(_CALLS, decode.steps)
    decode.run(name, out, 1)  # what is compiled first may take so long that a run would count itself
    called = measure(lambda: decode.run(name, out, calls), device, budget_s=bench.budget_s / 4)
    out.fill_(torch.nan)
    roofs, copies = list[float](), list[float]()

    def note_roofs() -> None:
        roofs.append(bench.measure_roof())
        copies.append(copy_bytes_s(device))

    replay = in_one_go(lambda: decode.run(name, out), device)
    timing = measure(
        replay, device, budget_s=bench.budget_s, max_repeats=bench.max_repeats, when_warm=note_roofs
    )  # fmt: skip
    note_roofs()
    checked, wrong_rows, largest_error = judge_attention(whole, out)
    entries = whole.entries()
    tflops = model.entry_flop * entries / timing.seconds / 1e12
    gathered_bytes_s = entries * whole.kv.row_bytes / timing.seconds
    share = gathered_bytes_s / statistics.mean(copies)
    same = baseline is not None and baseline.seconds is not None
    step_s, call_s = timing.seconds / decode.steps, called.seconds / calls
    planned = Attention(model, whole.q[: decode.tokens], whole.kv, whole.indices[: decode.tokens], whole.sink)
    used = planned.planned(name)
    row = DecodeRow(
        table=TABLE,
        case=f"{named(model)} {decode.sequences} × {decode.tokens // decode.sequences} W={model.width} {name}",
        dtype=whole.kv.format.value,
        seconds=step_s,
        useful_tflops=tflops,
        roof_fraction=tflops / statistics.mean(roofs),
        ratio=baseline.seconds / step_s if same else None,
        ratio_to=f"{baseline.implementation} {baseline.dtype}" if same else None,
        peak_bytes=called.peak_bytes,
        wrong_rows=wrong_rows,
        repeats=timing.repeats,
        note=f"{gathered_bytes_s / 1e12:.3f} TB/s, {share:.3f} of a copy; called {call_s * 1e6:.0f} µs",
        model=model.name,
        tokens=decode.tokens,
        implementation=name,
        plan="" if used is None else f"{used.name}, {used.splits} parts",
        checked_rows=checked,
        largest_error=largest_error,
        roof_tflops=statistics.mean(roofs),
        gathered_bytes_s=gathered_bytes_s,
        heads=model.heads,
        sequences=decode.sequences,
        steps=decode.steps,
        copy_fraction=share,
        call_s=call_s,
    )
    bench.report.add(row)
    return row


def run_model(bench: AttentionBench, model: AttentionModel, arguments) -> None:
    """All rows of one model."""
    on_cpu = bench.device == "cpu"
    sequences = arguments.sizes or (CPU_SEQUENCES if on_cpu else QUICK_SEQUENCES if arguments.quick else SEQUENCES)
    tokens = arguments.tokens_per_sequence or (QUICK_TOKENS_A_SEQUENCE if arguments.quick else TOKENS_A_SEQUENCE)
    for kv_format in formats_of(arguments, model):
        for count, each in ((count, each) for count in sequences for each in tokens):
            context = CPU_CONTEXT if on_cpu else model.top_k * model.ratio if model.all_visible else CONTEXT
            decode = make_decode(model, count, each, context, kv_format, bench.device)
            baseline = None
            for name in usable(arguments, kv_format):
                row = run_one(bench, decode, name, baseline)
                baseline = baseline or row
            del decode  # before the next one is made


def main(argv: list[str] | None = None) -> int:
    quick = f"{QUICK_SEQUENCES} sequences of one token"
    parser = options(__doc__, quick=quick, models=list(models()), sizes="SEQUENCES")
    parser.add_argument("--tokens-per-sequence", type=int, nargs="+", metavar="TOKENS")
    parser.add_argument("--heads", type=int, nargs="+", help="of one device; all of the model's if not given")
    arguments = parser.parse_args(argv)
    bench = begin(TABLE, arguments)
    for name in arguments.models:
        model = models()[name]
        for heads in arguments.heads or [model.heads]:
            run_model(bench, replace(model, heads=heads), arguments)
    return bench.report.finish()


if __name__ == "__main__":
    sys.exit(main())
