"""`assemble_index_rows`: what a token attends, its window and what a search found, as rows of one KV tensor."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from streamindex_service.ops.implementations import Runnable, by_name, find
from streamindex_service.ops.index_rows.problem import Problem, check_problem
from streamindex_service.ops.index_rows.reference import run_reference


@dataclass(frozen=True, kw_only=True)
class Implementation(Runnable):
    """One way to compute the operation, and where it runs."""

    function: Callable[[Problem], None]


def _triton(problem: Problem) -> None:
    # imported here: Triton need not be installed where it is not asked for
    from streamindex_service.ops.index_rows.triton import run_triton

    run_triton(problem)


IMPLEMENTATIONS: Mapping[str, Implementation] = by_name(
    Implementation(name="reference", function=run_reference),
    Implementation(name="triton", function=_triton, requires="triton", cpu_only_interpreted=True),
)


def assemble_index_rows(
    found: Tensor,
    positions: int | Tensor,
    *,
    window: int,
    window_row: int | Tensor = 0,
    compressed_row: int,
    implementation: str,
    out: Tensor | None = None,
) -> Tensor:
    """Index rows for `sparse_attention`: [tokens, window + top_k] int32, −1 where there is nothing to attend.

    A row is the `window` most recent uncompressed rows, that of the token itself last, followed by what the search
    found, in its order. A token at position p < window − 1 has fewer.

    Args:
        found: [tokens, top_k] int32, contiguous: compressed entries of the sequence, −1 for none, as `topk` gives
            them. top_k may be 0.
        positions: the first token's absolute position, or one per token ([tokens] int64 on the device of `found`).
        window: uncompressed rows that a token sees, its own among them; 0 for a model without.
        window_row: row of the KV tensor at which the uncompressed row of position 0 lies. Negative where the first
            positions are no longer held: what would lie before row 0 is −1. One for all, or, where the tokens are of
            several sequences, one per token ([tokens] int64 on the device of `found`).
        compressed_row: row at which the sequence's compressed entry 0 lies.
        implementation: a name in IMPLEMENTATIONS; never replaced by another.
        out: contiguous int32, to write into.

    Raises:
        IndexRowsInputError: an argument disagrees with another; its `field` names it.
        UnsupportedImplementationError: unknown name, or not for this device.

    Source: DeepSeek-V4 (a sliding window beside compressed sparse attention).
    """
    device = found.device
    chosen = find(IMPLEMENTATIONS, implementation, lambda each: each.runs_on(device), f"not on {device} here")
    if out is None:
        shape = (found.shape[0], max(window, 0) + found.shape[-1])
        out = torch.empty(shape, dtype=torch.int32, device=device)
    problem = Problem(found, positions, window, window_row, compressed_row, out)
    check_problem(problem)
    if out.numel():
        chosen.function(problem)
    return out
