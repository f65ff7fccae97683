"""Sparse attention of prefill chunks: V4-Flash, V4-Pro and V3.2, bf16 rows and packed ones.

    python -m benchmarks.attention_prefill --quick --out benchmarks/results/attention_prefill.json

Useful work is 2 · heads · (key_dim + value_dim) for each entry of an index row that names a row. Index rows are a
window and top_k random rows of the context in order, so hardly any row is shared by neighbours: a real search shares
more.
"""

import sys

from benchmarks.attention import (
    MODELS,
    AttentionBench,
    AttentionModel,
    begin,
    formats_of,
    make_attention,
    options,
    usable,
)

TABLE = "attention_prefill"
TOKENS, QUICK_TOKENS, CPU_TOKENS = [4096, 16_384], [4096], [16]
CONTEXT, CPU_CONTEXT = 131_072, 4096


def run_model(bench: AttentionBench, model: AttentionModel, arguments) -> None:
    """All rows of one model."""
    on_cpu = bench.device == "cpu"
    for kv_format in formats_of(arguments, model):
        for tokens in arguments.sizes or (CPU_TOKENS if on_cpu else QUICK_TOKENS if arguments.quick else TOKENS):
            context = max(tokens, CPU_CONTEXT if on_cpu else CONTEXT)
            attention = make_attention(model, tokens, context, kv_format, bench.device)
            baseline = None
            for name in usable(arguments, kv_format):
                row = bench.run(attention, name, baseline=baseline)
                baseline = baseline or row
            del attention  # before the next one is made


def main(argv: list[str] | None = None) -> int:
    arguments = options(__doc__, quick=f"{QUICK_TOKENS} tokens", models=list(MODELS)).parse_args(argv)
    bench = begin(TABLE, arguments)
    for name in arguments.models:
        run_model(bench, MODELS[name], arguments)
    return bench.report.finish()


if __name__ == "__main__":
    sys.exit(main())
