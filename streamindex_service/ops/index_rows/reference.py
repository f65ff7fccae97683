"""The operation in torch: the meaning of it, on any device."""

import torch

from streamindex_service.ops.index_rows.problem import Problem


def run_reference(problem: Problem) -> None:
    """Fill the output."""
    p = problem
    positions = p.positions
    if isinstance(positions, int):
        positions = torch.arange(positions, positions + p.tokens, device=p.found.device)
    position = positions[:, None] - p.window + 1 + torch.arange(p.window, device=p.found.device)
    row = position + (p.window_row if isinstance(p.window_row, int) else p.window_row[:, None])
    p.out[:, : p.window] = torch.where((position >= 0) & (row >= 0), row, -1)
    p.out[:, p.window :] = torch.where(p.found >= 0, p.found + p.compressed_row, -1)
