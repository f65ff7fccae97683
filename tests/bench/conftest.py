"""Without a CUDA device the kernels run under Triton's interpreter, which must be chosen before Triton is first
imported."""

import os

import pytest
import torch

from benchmarks.harness import MODELS, Model

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

TINY = Model("Tiny", heads=4, head_dim=32, ratio=2, top_k=32)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Model:
    """A model so small that a CPU searches it in no time; `--models Tiny` finds it."""
    monkeypatch.setitem(MODELS, TINY.name, TINY)
    return TINY
