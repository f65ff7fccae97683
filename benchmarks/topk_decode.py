"""Search of a decode step: one query token, or two, of each of several sequences with keys of their own.

    python -m benchmarks.topk_decode --quick --out benchmarks/results/topk_decode.json

`together` is one run of `topk_sequences`, `apart` a run of `topk` for each sequence; both are called as a service calls
them, one after another, so that what the host needs to launch them counts. Ratios are to `apart`. Sequences have from
half of the keys to all of them. The note tells the bytes of keys that are read a second, and their share of what a copy
of 1 GiB reads and writes in the same run.
"""

import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks.harness import MODELS, Model
from benchmarks.inputs import Prefill, make_prefill
from benchmarks.judge import judge
from benchmarks.searches import UNWRITTEN, Bench, TopkRow, begin, formats_of, options, run_topk, usable
from benchmarks.timing import copy_bytes_s, measure
from streamindex_service.ops import KeyFormat
from streamindex_service.ops.topk import KeySequence, Order, topk_sequences

TABLE = "topk_decode"
SEQUENCES, QUICK_SEQUENCES, CPU_SEQUENCES = [1, 8, 32, 128], [8, 32], [3]
KEYS, CPU_KEYS = 65_536, 600
CHECKED_ROWS = 4  # of each sequence, of which it has fewer


@dataclass(frozen=True)
class DecodeRow(TopkRow):
    """A measured step. key_bytes_s: of keys that are read; copy_fraction: as a share of the copy's bytes."""

    sequences: int = 0
    key_bytes_s: float = 0.0
    copy_fraction: float = 0.0


@dataclass(frozen=True)
class Step:
    """A few rows of some sequences; `q`, `w` and `positions` of all."""

    sequences: list[Prefill]
    q: Tensor
    w: Tensor
    positions: Tensor

    @classmethod
    def drawn(cls, model: Model, count: int, tokens: int, keys: int, key_format: KeyFormat, device: str) -> "Step":
        sequences = []
        for number in range(count):
            length = keys - number * keys // (2 * count)
            at = length * model.ratio - tokens
            sequence = make_prefill(model, tokens, key_format, device, keys=length, first_position=at, seed=number)
            sequences.append(replace(sequence, positions=torch.arange(at, at + tokens)))
        q, w = torch.cat([each.q for each in sequences]), torch.cat([each.w for each in sequences])
        return cls(sequences, q, w, torch.cat([torch.as_tensor(each.positions) for each in sequences]))

    def together(self, implementation: str, out: Tensor) -> None:
        model = self.sequences[0].model
        topk_sequences(
            self.q, self.w, [KeySequence(each.rows, each.keys) for each in self.sequences], self.positions,
            ratio=model.ratio, top_k=model.top_k, order=Order.INDEX, implementation=implementation, out_indices=out,
        )  # fmt: skip

    def apart(self, implementation: str, out: Tensor) -> None:
        for sequence, rows in zip(self.sequences, out.split([each.rows for each in self.sequences]), strict=True):
            run_topk(sequence, implementation, rows)

    def key_bytes(self) -> int:
        """Bytes of all keys and scales."""
        per_key = [(each.keys.format.element_bytes * each.model.head_dim, each.keys) for each in self.sequences]
        return sum(keys.length * (size + 4 * keys.format.has_scales) for size, keys in per_key)


def run_one(
    bench: Bench, step: Step, way: str, work: Callable[[Tensor], None], name: str, baseline: DecodeRow | None
) -> DecodeRow:
    """Measure, judge and add one row."""
    first, rows = step.sequences[0], len(step.q)
    model, key_format = first.model, first.keys.format
    out = torch.full((rows, model.top_k), UNWRITTEN, dtype=torch.int32, device=bench.device)
    roofs, copies = list[float](), list[float]()

    def note_roofs() -> None:
        roofs.append(bench.measure_roof(key_format))
        copies.append(copy_bytes_s(bench.device))

    timing = measure(
        lambda: work(out), bench.device, budget_s=bench.budget_s, max_repeats=bench.max_repeats, when_warm=note_roofs
    )
    note_roofs()
    judged = [
        judge(each, part, CHECKED_ROWS)
        for each, part in zip(step.sequences, out.split([each.rows for each in step.sequences]), strict=True)
    ]
    checked = sum(each.checked_rows for each in judged)
    tflops = sum(each.useful_flop() for each in step.sequences) / timing.seconds / 1e12
    key_bytes_s = step.key_bytes() / timing.seconds
    share = key_bytes_s / statistics.mean(copies)
    row = DecodeRow(
        table=TABLE,
        case=f"{model.name} {len(step.sequences)} × {first.rows} keys={first.keys.length} {name} {way}",
        dtype=key_format.value,
        seconds=timing.seconds,
        useful_tflops=tflops,
        roof_fraction=tflops / statistics.mean(roofs),
        ratio=None if baseline is None or baseline.seconds is None else baseline.seconds / timing.seconds,
        ratio_to=None if baseline is None else f"{name} apart",
        peak_bytes=timing.peak_bytes,
        wrong_rows=sum(each.wrong_rows for each in judged),
        repeats=timing.repeats,
        note=f"{key_bytes_s / 1e12:.3f} TB/s of keys, {share:.3f} of a copy",
        model=model.name,
        tokens=rows,
        implementation=name,
        top_k=model.top_k,
        checked_rows=checked,
        recall=sum(each.recall * each.checked_rows for each in judged) / checked,
        roof_tflops=statistics.mean(roofs),
        sequences=len(step.sequences),
        key_bytes_s=key_bytes_s,
        copy_fraction=share,
    )
    bench.report.add(row)
    return row


def main(argv: list[str] | None = None) -> int:
    quick = f"{QUICK_SEQUENCES} sequences, one model"
    parser = options(__doc__, quick=quick)
    parser.add_argument("--tokens-per-sequence", type=int, nargs="+", default=[1, 2], metavar="TOKENS")
    parser.add_argument("--keys", type=int, metavar="KEYS", help=f"of the longest sequence (default {KEYS})")
    arguments = parser.parse_args(argv)
    bench = begin(TABLE, arguments)
    on_cpu = bench.device == "cpu"
    names = arguments.models or (["V4-Flash"] if arguments.quick else ["V4-Flash", "V3.2"])
    counts = arguments.sizes or (CPU_SEQUENCES if on_cpu else QUICK_SEQUENCES if arguments.quick else SEQUENCES)
    keys = arguments.keys or (CPU_KEYS if on_cpu else KEYS)
    for model in (MODELS[name] for name in names):
        for key_format in formats_of(arguments, [KeyFormat.FP8_E4M3, KeyFormat.BF16]):
            for count, tokens in ((count, each) for count in counts for each in arguments.tokens_per_sequence):
                bench.give_back()
                step = Step.drawn(model, count, tokens, keys, key_format, bench.device)
                for name in usable(arguments.implementations or ["triton"], bench.device, key_format):
                    apart = run_one(bench, step, "apart", lambda out, s=step, n=name: s.apart(n, out), name, None)
                    run_one(bench, step, "together", lambda out, s=step, n=name: s.together(n, out), name, apart)
                del step  # before the next one is made
    return bench.report.finish()


if __name__ == "__main__":
    sys.exit(main())
