"""Compiling the Gluon kernels for compute capability 9.0 where there is no device: Triton brings the assembler.

A kernel is given the arguments of its own `launch`, tensors of the CPU, and ends where it would be sent to a device. In
a process of its own: one that runs Triton's interpreter compiles nothing. As a script: PATH, to which goes JSON of
variant → {"shared": bytes, "ptx": text} or {"error": text}.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

from streamindex_service.ops import KeyFormat
from streamindex_service.ops.kv_rows import KvFormat
from streamindex_service.ops.sparse_attention import AttentionKernel, Plan
from streamindex_service.ops.sparse_attention.plan import attention_tiles
from streamindex_service.ops.sparse_attention.problem import Problem
from streamindex_service.ops.topk import Order
from streamindex_service.ops.topk.plan import ScoreKernel, kernel_tiles
from streamindex_service.ops.topk.problem import Problem as Search
from tests.ops import cases
from tests.ops.attention_cases import in_pages, make_inputs

ROOT = Path(__file__).parents[2]


def compile_all(directory: Path) -> dict[str, dict[str, Any]]:
    """What comes of each variant, compiled in another process with nothing in its cache."""
    environment = {
        **{name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"},
        "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "client"), os.environ.get("PYTHONPATH", ""))),
        "TRITON_CACHE_DIR": str(directory / "cache"),
        "TRITON_DEFAULT_FP_FUSION": "1",  # Triton 3.9 warns where it is not said
    }
    path = directory / "variants.json"
    done = subprocess.run(
        [sys.executable, "-m", __name__, str(path)], cwd=ROOT, env=environment, capture_output=True, timeout=600
    )
    assert done.returncode == 0, done.stderr.decode()[-4000:]
    return json.loads(path.read_text())


def _variants() -> dict[str, Callable[[], tuple[ModuleType, str, Callable[[], None]]]]:
    return {
        "attend bf16": lambda: _attend(KvFormat.BF16, 64, 512, 1),
        "attend bf16 with a tail": lambda: _attend(KvFormat.BF16, 128, 576, 3),
        "attend fp8_d512": lambda: _attend(KvFormat.FP8_D512, 64, 512, 3),
        "attend fp8_d576": lambda: _attend(KvFormat.FP8_D576, 128, 576, 1),
        "attend bf16 in pages": lambda: _attend(KvFormat.BF16, 128, 576, 1, placed=True),
        "attend fp8_d512 in pages": lambda: _attend(KvFormat.FP8_D512, 64, 512, 1, placed=True),
        "attend fp8_d576 in pages": lambda: _attend(KvFormat.FP8_D576, 64, 576, 1, placed=True),
        "few heads fp8_d512 in pages": lambda: _attend(KvFormat.FP8_D512, 12, 512, 1, placed=True),
        "few heads fp8_d576 in pages": lambda: _attend(KvFormat.FP8_D576, 12, 576, 1, placed=True),
        "few heads fp8_d512": lambda: _attend(KvFormat.FP8_D512, 12, 512, 3),
        "few heads fp8_d576": lambda: _attend(KvFormat.FP8_D576, 12, 576, 1),
        "combine": lambda: _combine(AttentionKernel.PORTABLE),
        "combine for hopper": lambda: _combine(AttentionKernel.HOPPER),
        "scores bf16": lambda: _score(KeyFormat.BF16, None),
        "scores fp8_e4m3": lambda: _score(KeyFormat.FP8_E4M3, torch.tensor([290, 3, 299])),
    }


def _attend(
    kv_format: KvFormat, heads: int, key_dim: int, splits: int, *, placed: bool = False
) -> tuple[ModuleType, str, Callable[[], None]]:
    from streamindex_service.ops.sparse_attention import hopper, hopper_few_heads

    kernel = AttentionKernel.HOPPER_FEW_HEADS if heads < 64 else AttentionKernel.HOPPER
    inputs = make_inputs(
        tokens=2, heads=heads, width=128, rows=128, key_dim=key_dim, value_dim=512, kv_format=kv_format
    )
    shape = (splits, 2, heads)
    out = torch.zeros((*shape, 512), dtype=torch.bfloat16 if splits == 1 else torch.float32)
    lse, ends = torch.zeros(shape), torch.zeros(2, dtype=torch.int32)
    kv, entries = in_pages(inputs.kv, inputs.indices) if placed else (inputs.kv, inputs.indices)
    problem = Problem(inputs.q, kv, entries, inputs.scale, inputs.sink, out[0], lse[0])
    plan = Plan(0, splits=splits, tiles=attention_tiles(kv_format.value, heads, key_dim, 512, kernel))
    if kernel is AttentionKernel.HOPPER:
        return hopper, "attend_kernel", lambda: hopper.launch(problem, plan, ends, out, lse, 132)
    return hopper_few_heads, "attend_kernel", lambda: hopper_few_heads.launch(problem, plan, ends, out, lse, 132)


def _combine(kernel: AttentionKernel) -> tuple[ModuleType, str, Callable[[], None]]:
    from streamindex_service.ops.sparse_attention import triton

    inputs = make_inputs(tokens=2, heads=64, width=128, rows=128, key_dim=512, value_dim=512)
    out, lse = torch.zeros((2, 64, 512), dtype=torch.bfloat16), torch.zeros((2, 64))
    partial, partial_lse = torch.zeros((3, 2, 64, 512)), torch.zeros((3, 2, 64))
    problem = Problem(inputs.q, inputs.kv, inputs.indices, inputs.scale, inputs.sink, out, lse)
    plan = Plan(0, splits=3, tiles=attention_tiles("bf16", 64, 512, 512, kernel))
    return triton, "combine_kernel", lambda: triton.combine(problem, plan, partial, partial_lse)


def _score(key_format: KeyFormat, positions: torch.Tensor | None) -> tuple[ModuleType, str, Callable[[], None]]:
    from streamindex_service.ops.topk import hopper

    inputs = cases.make_inputs(
        rows=3, heads=64, head_dim=128, keys=300, key_format=key_format, top_k=16, positions=positions
    )
    indices, scores = torch.zeros((3, 16), dtype=torch.int32), torch.zeros(3, 512)
    problem = Search(inputs.q, inputs.w, inputs.keys, inputs.positions, 1, 16, Order.SCORE, indices, None)
    tiles = kernel_tiles(key_format.value, 64, 128, ScoreKernel.HOPPER)
    queries = hopper.describe_queries(problem, tiles)
    return (
        hopper,
        "score_kernel",
        lambda: hopper.launch_scores(problem, tiles, queries, scores, positions, 0, 3, 0, 300, 132),
    )


class _Compiled:
    """In a kernel's place: `kernel[grid](...)` compiles it and keeps what comes of that."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.result: Any = None

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def run(*arguments: Any, **constants: Any) -> None:
            self.result = self.kernel.warmup(*arguments, grid=grid, **constants)

        return run


def _compile(module: ModuleType, name: str, launch: Callable[[], None]) -> Any:
    kernel = getattr(module, name)
    compiled = _Compiled(kernel)
    setattr(module, name, compiled)
    try:
        launch()
    finally:
        setattr(module, name, kernel)
    return compiled.result


def _main(path: Path) -> None:
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    driver.set_active(
        SimpleNamespace(
            get_current_target=lambda: GPUTarget("cuda", 90, 32),
            get_current_device=lambda: 0,
            get_current_stream=lambda device: 0,
        )
    )
    found: dict[str, dict[str, Any]] = {}
    for variant, make in _variants().items():
        try:
            result = _compile(*make())
            found[variant] = {"shared": result.metadata.shared, "ptx": result.asm["ptx"]}
        except Exception as error:  # each is judged by a test of its own
            found[variant] = {"error": repr(error)[-2000:]}
    path.write_text(json.dumps(found))


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
