"""`topk` of rows that see the keys of several sequences, as a decode step has them: few rows of many layers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from streamindex_service.ops.paged_keys import PagedKeys
from streamindex_service.ops.topk.api import (
    DEFAULT_WORKSPACE_BYTES,
    TopkResult,
    checked_outputs,
    find_implementation,
    is_empty,
    plan_of,
    topk,
)
from streamindex_service.ops.topk.order import Order
from streamindex_service.ops.topk.parts import Parts
from streamindex_service.ops.topk.plan import Plan
from streamindex_service.ops.topk.problem import LIMITS, Problem, TopkInputError, check_inputs


@dataclass(frozen=True)
class KeySequence:
    """Query rows, which follow those of the sequence before, and the keys that they see."""

    rows: int
    keys: PagedKeys


def topk_sequences(
    q: Tensor,
    w: Tensor,
    sequences: Sequence[KeySequence],
    positions: Tensor,
    *,
    ratio: int,
    top_k: int,
    order: Order = Order.SCORE,
    implementation: str,
    workspace_bytes: int = DEFAULT_WORKSPACE_BYTES,
    want_scores: bool = False,
    out_indices: Tensor | None = None,
    out_scores: Tensor | None = None,
    plan: Plan | None = None,
) -> TopkResult:
    """What `topk` gives for the rows of each sequence and its keys, bit for bit, in one run where the implementation
    has one: one launch for the scores of all rows, each with the keys of its sequence, and one selection. Sequences
    whose positions do not go up by one have their scores by themselves.

    Args:
        q, w, ratio, top_k, order, implementation, want_scores, out_indices, out_scores: as of `topk`, all rows.
        sequences: at least one; their rows are those of q. Keys of one format and dimension.
        positions: [rows] int64, on the CPU.
        workspace_bytes: as of `topk`, for rows that see as many keys as the row that sees most.
        plan: tiles to use instead of the planned ones, for tests and benchmarks; of each run, where there are several.

    Raises: what `topk` raises; TopkInputError for `sequences` that do not go together.
    """
    _check_sequences(q, sequences)
    options: dict[str, Any] = {
        "ratio": ratio,
        "top_k": top_k,
        "order": order,
        "implementation": implementation,
        "plan": plan,
    }
    options["workspace_bytes"] = workspace_bytes
    if len(sequences) == 1:
        return topk(
            q, w, sequences[0].keys, positions, want_scores=want_scores, out_indices=out_indices,
            out_scores=out_scores, **options,
        )  # fmt: skip
    keys = max((sequence.keys for sequence in sequences), key=_length)
    found = find_implementation(implementation, q.device, keys.format)
    check_inputs(q, w, keys, positions, ratio, top_k)
    outputs = checked_outputs(q, top_k, want_scores, out_indices, out_scores)
    if found.of_parts is None:
        first = 0
        for sequence in sequences:
            rows = slice(first, first + sequence.rows)
            scores = None if outputs.scores is None else outputs.scores[rows]
            topk(
                q[rows], w[rows], sequence.keys, positions[rows], out_indices=outputs.indices[rows],
                out_scores=scores, **options,
            )  # fmt: skip
            first = rows.stop
        return outputs
    problem = Problem(q, w, keys, positions, ratio, top_k, Order(order), *outputs)
    parts = Parts(problem, [each.keys for each in sequences], [each.rows for each in sequences])
    if is_empty(parts.problem):
        return outputs
    plan = plan or plan_of(found, parts.problem, workspace_bytes)
    assert plan is not None
    found.of_parts(parts.problem, plan, parts)
    return outputs


def _length(keys: PagedKeys) -> int:
    return keys.length


def _check_sequences(q: Tensor, sequences: Sequence[KeySequence]) -> None:
    rows = sum(sequence.rows for sequence in sequences)
    if not sequences or rows != q.shape[0] or any(sequence.rows < 1 for sequence in sequences):
        raise TopkInputError("sequences", f"{q.shape[0]} rows must each be of one sequence, which have {rows}")
    first = sequences[0].keys
    for number, sequence in enumerate(sequences):
        keys = sequence.keys
        if (keys.format, keys.head_dim) != (first.format, first.head_dim):
            raise TopkInputError(f"sequences[{number}]", "its keys are of another format or dimension than the first's")
        if keys.length and keys.device != q.device:
            raise TopkInputError(f"sequences[{number}]", f"not on {q.device}, where q is")
        if keys.length > LIMITS.max_keys:
            raise TopkInputError(f"sequences[{number}]", f"{keys.length} keys, the most is {LIMITS.max_keys}")
