"""The operation in torch and float32, a bounded number of entries at a time."""

import torch

from streamindex_service.ops.compressor.pooling import pooled_entries, remember
from streamindex_service.ops.compressor.problem import Problem

_CHUNK_BYTES = 64 << 20  # of the tokens looked at together


def run_torch(problem: Problem) -> None:
    """Fill the output and the state."""
    p = problem
    step = max(1, _CHUNK_BYTES // (8 * p.weights.ratio * p.weights.width))
    for start in range(0, p.entries, step):
        count = min(step, p.entries - start)
        p.out[start : start + count] = pooled_entries(p, p.first_entry + start, count, torch.float32)
    remember(p)
