"""`topk`: the lightning indexer's scores and the exact top-k of each row, by an implementation chosen by name."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from streamindex_service.ops.formats import KeyFormat
from streamindex_service.ops.implementations import ANY_DEVICE, Runnable, by_name, find
from streamindex_service.ops.paged_keys import PagedKeys
from streamindex_service.ops.topk import plan as planning
from streamindex_service.ops.topk.order import Order
from streamindex_service.ops.topk.parts import Parts
from streamindex_service.ops.topk.plan import Plan, Shape, WorkspaceTerms, choose_score_kernel
from streamindex_service.ops.topk.problem import LIMITS, Limits, Problem, check_inputs, check_output
from streamindex_service.ops.topk.reference import run_reference
from streamindex_service.ops.topk.torch_chunked import run_chunked

DEFAULT_WORKSPACE_BYTES = 256 << 20


class TopkResult(NamedTuple):
    """indices: [rows, top_k] int32, −1 where there is no key; scores: [rows, top_k] float32, −inf there, or None."""

    indices: Tensor
    scores: Tensor | None


@dataclass(frozen=True, kw_only=True)
class Implementation(Runnable):
    """One way to compute the operation, and what it is good for.

    repeatable: the device types on which chunk, tile, workspace and neighbours cannot change a bit of the answer.
    plan: (shape, workspace_bytes, device) -> Plan, or None if nothing is tiled.
    terms: device type -> what its plans take, in closed form.
    of_parts: the same, for rows that see the keys of several sequences; None if each is a run of its own.
    """

    function: Callable[[Problem, Plan | None], None]
    of_parts: Callable[[Problem, Plan, Parts], None] | None = None
    formats: frozenset[KeyFormat] = frozenset(KeyFormat)
    repeatable: frozenset[str] = ANY_DEVICE
    limits: Limits = LIMITS
    plan: Callable[[Shape, int, torch.device], Plan] | None = None
    terms: Callable[[str], WorkspaceTerms] = lambda device_type: planning.any_terms()

    def supports(self, device: torch.device | str, key_format: KeyFormat) -> bool:
        """Whether it runs here on that kind of device, and takes keys of that format."""
        return self.runs_on(device) and key_format in self.formats


def _reference(problem: Problem, plan: Plan | None) -> None:
    run_reference(problem)


def _chunked(problem: Problem, plan: Plan | None) -> None:
    assert plan is not None
    run_chunked(problem, plan)


def _triton(problem: Problem, plan: Plan | None) -> None:
    assert plan is not None
    _triton_of_parts(problem, plan, None)


def _triton_of_parts(problem: Problem, plan: Plan, parts: Parts | None) -> None:
    # imported here: Triton need not be installed where it is not asked for
    from streamindex_service.ops.topk.triton import run_triton

    run_triton(problem, plan, parts)


def _plan_triton(shape: Shape, workspace_bytes: int, device: torch.device) -> Plan:
    capability = None
    if device.type == "cuda" and torch.cuda.is_available():
        capability = torch.cuda.get_device_capability(device)
    kernel = choose_score_kernel(
        shape.format_name, shape.heads, shape.head_dim, capability, gluon=capability is not None and has_gluon()
    )
    return planning.plan_triton(shape, workspace_bytes, kernel)


@cache
def has_gluon() -> bool:
    """Whether this Triton has what the Hopper kernel is written in; it is experimental, and changes between
    versions."""
    try:
        from streamindex_service.ops.topk.hopper import MISSING
    except (ImportError, AttributeError):
        return False
    return not MISSING


IMPLEMENTATIONS: Mapping[str, Implementation] = by_name(
    Implementation(name="reference", function=_reference),
    Implementation(
        name="chunked",
        function=_chunked,
        repeatable=frozenset({"cpu"}),
        plan=lambda shape, budget, device: planning.plan_chunked(shape, budget, on_cuda=device.type == "cuda"),
        terms=lambda device_type: planning.chunked_terms(on_cuda=device_type == "cuda"),
    ),
    Implementation(
        name="triton",
        function=_triton,
        of_parts=_triton_of_parts,
        plan=_plan_triton,
        terms=lambda device_type: planning.triton_terms(),
        requires="triton",
        cpu_only_interpreted=True,
    ),
)


def find_implementation(name: str, device: torch.device | str, key_format: KeyFormat) -> Implementation:
    """The implementation of that name. Raises UnsupportedImplementationError if it is unknown or not for that device
    and format."""
    return find(
        IMPLEMENTATIONS,
        name,
        lambda implementation: implementation.supports(device, key_format),
        f"not for {key_format.value} keys on {device} here",
    )


def plan_for(
    implementation: str,
    device: torch.device | str,
    key_format: KeyFormat,
    *,
    rows: int,
    heads: int,
    head_dim: int,
    keys: int,
    top_k: int,
    workspace_bytes: int = DEFAULT_WORKSPACE_BYTES,
) -> Plan | None:
    """The plan that `topk` would run with, for a scheduler's estimate; None if the implementation has no tiles.

    keys: the most that any row sees. Raises UnsupportedImplementationError and WorkspaceTooSmallError.
    """
    found = find_implementation(implementation, device, key_format)
    if found.plan is None:
        return None
    shape = Shape(rows, heads, head_dim, keys, top_k, key_format.value, key_format.element_bytes)
    return found.plan(shape, workspace_bytes, torch.device(device))


def topk(
    q: Tensor,
    w: Tensor,
    keys: PagedKeys,
    positions: int | Tensor,
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
    """The `top_k` best keys of each query row under (score descending, index ascending), exactly.

    score[t, s] = Σ_h w[t, h] · ReLU(⟨q[t, h], k[s]⟩) (times the key's scale), row t seeing s < min((p + 1) // ratio,
    length).

    Args:
        q: [rows, heads, head_dim] in the keys' format, contiguous.
        w: [rows, heads] float32, any sign, already scaled.
        keys: one layer's keys.
        positions: the first row's absolute position, or one per row ([rows] int64). The host needs them: a tensor on
            the CPU costs nothing, one on the device a synchronising copy.
        ratio: tokens per key.
        top_k: results per row.
        order: arrangement of each row; padding −1 is last in both.
        implementation: a name in IMPLEMENTATIONS; never replaced by another.
        workspace_bytes: device memory beside inputs and outputs that the run may take, at least 16 MiB.
        want_scores: also return scores (implied by `out_scores`).
        out_indices, out_scores: [rows, top_k] int32 and float32, contiguous, to write into.
        plan: tiles to use instead of the planned ones, for tests and benchmarks.

    Raises:
        TopkInputError: an argument disagrees with another or with LIMITS; its `field` names it.
        UnsupportedImplementationError: unknown name, or not for this device and format.
        WorkspaceTooSmallError: below the floor. ReferenceTooLargeError: `reference` beyond its bound.

    Source: DeepSeek-V3.2 and V4 (lightning indexer); StreamIndex (chunked selection).
    """
    found = find_implementation(implementation, q.device, keys.format)
    host_positions = positions if isinstance(positions, int) else positions.cpu()
    host_positions = check_inputs(q, w, keys, host_positions, ratio, top_k)
    outputs = checked_outputs(q, top_k, want_scores, out_indices, out_scores)
    problem = Problem(q, w, keys, host_positions, ratio, top_k, Order(order), *outputs)
    if is_empty(problem):
        return outputs
    found.function(problem, plan or plan_of(found, problem, workspace_bytes))
    return outputs


def checked_outputs(
    q: Tensor, top_k: int, want_scores: bool, out_indices: Tensor | None, out_scores: Tensor | None
) -> TopkResult:
    """Where the answers go: what was given, if it is right, else memory of their own. Raises TopkInputError."""
    rows, device = q.shape[0], q.device
    if out_indices is None:
        out_indices = torch.empty((rows, top_k), dtype=torch.int32, device=device)
    if out_scores is None and want_scores:
        out_scores = torch.empty((rows, top_k), dtype=torch.float32, device=device)
    check_output("out_indices", out_indices, rows, top_k, torch.int32, device)
    if out_scores is not None:
        check_output("out_scores", out_scores, rows, top_k, torch.float32, device)
    return TopkResult(out_indices, out_scores)


def is_empty(problem: Problem) -> bool:
    """Whether no row sees any key; then the answers are written."""
    if problem.rows and problem.max_visible(0, problem.rows):
        return False
    problem.out_indices.fill_(-1)
    if problem.out_scores is not None:
        problem.out_scores.fill_(-torch.inf)
    return True


def plan_of(implementation: Implementation, problem: Problem, workspace_bytes: int) -> Plan | None:
    """Its plan of a problem; None if it has none. Raises WorkspaceTooSmallError."""
    if implementation.plan is None:
        return None
    p, width = problem, problem.max_visible(0, problem.rows)
    shape = Shape(p.rows, p.heads, p.head_dim, width, p.top_k, p.format.value, p.format.element_bytes)
    return implementation.plan(shape, workspace_bytes, p.q.device)
