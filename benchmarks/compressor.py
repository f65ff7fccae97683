"""The compressor: prompts whole and token by token, CSA and HCA, against a plain copy of the device's memory.

    python -m benchmarks.compressor --quick --out benchmarks/results/compressor.json

Bytes are those of the inputs and of the entries, each counted once. `of the roof` is the share of the bytes a second
that a copy of 1 GiB reads and writes in the same run. A prompt is larger than the cache; decode is of one sequence,
where starting kernels is what takes time.
"""

import argparse
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.harness import Report, Row
from benchmarks.timing import copy_bytes_s, measure
from streamindex_service.ops.compressor import (
    IMPLEMENTATIONS,
    CompressorState,
    CompressorWeights,
    check_compressed,
    compress,
)

TABLE = "compressor"
TOKENS, QUICK_TOKENS, CPU_TOKENS = [65_536, 262_144], [65_536], [1024]
_CHECKED_PARTS = 16
_FILL_ROWS = 16_384


@dataclass(frozen=True)
class Layer:
    """A compressor of a layer (as public model code gives them)."""

    name: str
    ratio: int
    dim: int


LAYERS = {layer.name: layer for layer in (Layer("CSA", 4, 512), Layer("CSA-indexer", 4, 128), Layer("HCA", 128, 512))}


@dataclass(frozen=True)
class CompressorRow(Row):
    """A measured compression. bytes_s: of inputs and entries; checked_rows: entries that were judged."""

    implementation: str = ""
    tokens: int = 0
    bytes_s: float | None = None
    checked_rows: int = 0


@dataclass(frozen=True)
class Tokens:
    """kv, gate: [tokens, width]."""

    kv: Tensor
    gate: Tensor
    weights: CompressorWeights

    def run(self, implementation: str, out: Tensor, state: CompressorState) -> None:
        """All entries, from a sequence's beginning."""
        compress(self.kv, self.gate, self.weights, 0, state, implementation=implementation, out=out)


def make_tokens(layer: Layer, tokens: int, dtype: torch.dtype, device: str, seed: int = 0) -> Tokens:
    """Random projections and weights."""
    generator = torch.Generator(device).manual_seed(seed)
    width = layer.dim * (2 if layer.ratio == 4 else 1)
    weights = CompressorWeights(
        layer.ratio,
        torch.randn((layer.ratio, width), generator=generator, device=device),
        1 + 0.1 * torch.randn(layer.dim, generator=generator, device=device),
    )
    kv, gate = (torch.empty((tokens, width), dtype=dtype, device=device) for _ in range(2))
    for whole in (kv, gate):
        for start in range(0, tokens, _FILL_ROWS):
            part = whole[start : start + _FILL_ROWS]
            part.copy_(torch.randn(part.shape, generator=generator, device=device))
    return Tokens(kv, gate, weights)


def judge(tokens: Tokens, out: Tensor) -> tuple[int, int]:
    """Entries of parts spread over the sequence, with its ends, against float64: how many, and how many were wrong."""
    weights = tokens.weights
    checked = wrong = 0
    for first in torch.linspace(0, max(len(out) - 2, 0), _CHECKED_PARTS).long().unique().tolist():
        skipped = 1 if first and weights.windows == 2 else 0
        rows = slice(first * weights.ratio, (first + 2) * weights.ratio)
        entries = out[first + skipped : first + 2]
        report = check_compressed(entries, tokens.kv[rows], tokens.gate[rows], weights, start=rows.start)
        checked, wrong = checked + len(entries), wrong + report.wrong_rows
    return checked, wrong


def prompt_row(tokens: Tokens, layer: Layer, implementation: str, baseline: CompressorRow | None) -> CompressorRow:
    """A whole prompt, measured and judged."""
    device, count = tokens.kv.device.type, len(tokens.kv)
    # no answer: memory given back by the last row may hold a right one
    out = torch.full((count // layer.ratio, layer.dim), torch.nan, dtype=torch.bfloat16, device=device)
    state = CompressorState.empty(tokens.weights)
    roofs: list[float] = []
    timing = measure(
        lambda: tokens.run(implementation, out, state), device, budget_s=0.5, max_repeats=20,
        when_warm=lambda: roofs.append(copy_bytes_s(device)),
    )  # fmt: skip
    roofs.append(copy_bytes_s(device))
    checked, wrong = judge(tokens, out)
    bytes_s = (tokens.kv.nbytes + tokens.gate.nbytes + out.nbytes) / timing.seconds
    same = baseline is not None and baseline.seconds is not None
    return CompressorRow(
        table=TABLE, case=f"{layer.name} T={count} {implementation}", dtype=str(tokens.kv.dtype)[6:],
        seconds=timing.seconds, useful_tflops=None, roof_fraction=bytes_s / statistics.mean(roofs),
        ratio=baseline.seconds / timing.seconds if same else None,
        ratio_to=baseline.implementation if same else None,
        peak_bytes=timing.peak_bytes, wrong_rows=wrong, repeats=timing.repeats, note=f"{bytes_s / 1e12:.3f} TB/s",
        implementation=implementation, tokens=count, bytes_s=bytes_s, checked_rows=checked,
    )  # fmt: skip


def decode_row(tokens: Tokens, layer: Layer, implementation: str) -> CompressorRow:
    """Seconds of one token of a decode, over two windows of them, all entries judged."""
    device, count = tokens.kv.device.type, 2 * layer.ratio
    parts = [(tokens.kv[at : at + 1].clone(), tokens.gate[at : at + 1].clone()) for at in range(count)]
    made: list[Tensor] = []

    def step_by_step() -> None:
        state = CompressorState.empty(tokens.weights)
        made[:] = [
            compress(kv, gate, tokens.weights, at, state, implementation=implementation)
            for at, (kv, gate) in enumerate(parts)
        ]

    timing = measure(step_by_step, device, budget_s=0.3)
    report = check_compressed(torch.cat(made), tokens.kv[:count], tokens.gate[:count], tokens.weights)
    return CompressorRow(
        table=TABLE, case=f"{layer.name} decode {implementation}", dtype=str(tokens.kv.dtype)[6:],
        seconds=timing.seconds / count, useful_tflops=None, roof_fraction=None, ratio=None, ratio_to=None,
        peak_bytes=timing.peak_bytes, wrong_rows=report.wrong_rows, repeats=timing.repeats,
        note="one token of one sequence", implementation=implementation, tokens=1, checked_rows=2,
    )  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--layers", nargs="+", choices=list(LAYERS), default=list(LAYERS))
    parser.add_argument("--sizes", type=int, nargs="+", metavar="TOKENS")
    parser.add_argument("--formats", nargs="+", choices=["bf16", "fp32"], default=["bf16", "fp32"])
    parser.add_argument("--implementations", nargs="+", choices=list(IMPLEMENTATIONS), default=["torch", "triton"])
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_TOKENS} tokens")
    parser.add_argument("--out", type=Path, metavar="FILE", help="where the JSON goes")
    arguments = parser.parse_args(argv)
    report = Report(arguments.device, arguments.out)
    report.start()
    sizes = arguments.sizes or (
        CPU_TOKENS if arguments.device == "cpu" else QUICK_TOKENS if arguments.quick else TOKENS
    )
    names = [name for name in arguments.implementations if IMPLEMENTATIONS[name].runs_on(arguments.device)]
    for layer in (LAYERS[name] for name in arguments.layers):
        for dtype in (torch.bfloat16 if name == "bf16" else torch.float32 for name in arguments.formats):
            for count in sizes:
                tokens, baseline = make_tokens(layer, count, dtype, arguments.device), None
                for name in names:
                    row = prompt_row(tokens, layer, name, baseline)
                    baseline = baseline or row
                    report.add(row)
            for name in names:
                report.add(decode_row(tokens, layer, name))
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
