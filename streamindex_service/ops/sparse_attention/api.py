"""`sparse_attention`: attention of each query over the rows that its indices name, by an implementation chosen by
name."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import NamedTuple

import torch
from torch import Tensor

from streamindex_service.ops.implementations import Runnable, by_name, find
from streamindex_service.ops.kv_rows import KvFormat, KvRows
from streamindex_service.ops.paged_kv_rows import PlacedKvRows
from streamindex_service.ops.sparse_attention import plan as planning
from streamindex_service.ops.sparse_attention.plan import AttentionKernel, Plan, Shape, choose_attention_kernel
from streamindex_service.ops.sparse_attention.problem import (
    AttentionInputError,
    Problem,
    check_inputs,
    check_output,
)
from streamindex_service.ops.sparse_attention.reference import run_reference
from streamindex_service.ops.sparse_attention.torch_chunked import run_chunked

DEFAULT_WORKSPACE_BYTES = 256 << 20


class AttentionResult(NamedTuple):
    """out: [tokens, heads, value_dim] bf16; lse: [tokens, heads] float32, natural, without the sink, or None."""

    out: Tensor
    lse: Tensor | None


@dataclass(frozen=True, kw_only=True)
class Implementation(Runnable):
    """One way to compute the operation, and what it is good for.

    plan: (shape, workspace_bytes, device, parts) -> Plan, or None if nothing is tiled. takes_places: also takes rows
    that are named by places.
    """

    function: Callable[[Problem, Plan | None], None]
    formats: frozenset[KvFormat] = frozenset(KvFormat)
    plan: Callable[[Shape, int, torch.device, int | None], Plan] | None = None
    takes_places: bool = False

    def supports(self, device: torch.device | str, kv_format: KvFormat) -> bool:
        """Whether it runs here on that kind of device, and takes rows of that format."""
        return self.runs_on(device) and kv_format in self.formats


def _reference(problem: Problem, plan: Plan | None) -> None:
    run_reference(problem)


def _chunked(problem: Problem, plan: Plan | None) -> None:
    assert plan is not None
    run_chunked(problem, plan)


def _triton(problem: Problem, plan: Plan | None) -> None:
    # imported here: Triton need not be installed where it is not asked for
    from streamindex_service.ops.sparse_attention.triton import run_triton

    assert plan is not None
    run_triton(problem, plan)


def _plan_triton(shape: Shape, workspace_bytes: int, device: torch.device, parts: int | None) -> Plan:
    capability, processors = None, 1
    if device.type == "cuda" and torch.cuda.is_available():
        capability = torch.cuda.get_device_capability(device)
        processors = torch.cuda.get_device_properties(device).multi_processor_count
    kernel = choose_attention_kernel(
        shape.format_name, shape.heads, shape.value_dim, capability, gluon=() if capability is None else gluon_kernels()
    )
    return planning.plan_triton(shape, workspace_bytes, processors, kernel, parts)


@cache
def gluon_kernels() -> frozenset[AttentionKernel]:
    """The kernels for which this Triton has what they are written in; it is experimental, and changes between
    versions."""
    modules = {AttentionKernel.HOPPER: "hopper", AttentionKernel.HOPPER_FEW_HEADS: "hopper_few_heads"}
    return frozenset(kernel for kernel, name in modules.items() if _is_complete(name))


def _is_complete(name: str) -> bool:
    try:
        module = import_module(f"{__package__}.{name}")
    except (ImportError, AttributeError):
        return False
    return not module.MISSING


IMPLEMENTATIONS: Mapping[str, Implementation] = by_name(
    Implementation(name="reference", function=_reference),
    Implementation(
        name="chunked",
        function=_chunked,
        plan=lambda shape, budget, device, parts: planning.plan_chunked(shape, budget),
    ),
    Implementation(
        name="triton",
        function=_triton,
        plan=_plan_triton,
        takes_places=True,
        requires="triton",
        cpu_only_interpreted=True,
    ),
)


def find_implementation(name: str, device: torch.device | str, kv_format: KvFormat) -> Implementation:
    """The implementation of that name. Raises UnsupportedImplementationError if it is unknown or not for that device
    and format."""
    return find(
        IMPLEMENTATIONS,
        name,
        lambda implementation: implementation.supports(device, kv_format),
        f"not for {kv_format.value} rows on {device} here",
    )


def plan_for(
    implementation: str,
    device: torch.device | str,
    kv_format: KvFormat,
    *,
    tokens: int,
    heads: int,
    key_dim: int,
    value_dim: int,
    width: int,
    workspace_bytes: int = DEFAULT_WORKSPACE_BYTES,
    parts: int | None = None,
) -> Plan | None:
    """The plan that `sparse_attention` would run with, for a scheduler's estimate; None if the implementation has no
    tiles. width: entries of an index row. parts: of each index row, that different programs take, whatever the number
    of tokens: then a token's answer is the same sequence of operations whatever others are computed with it. None: as
    many as are fast.

    Raises UnsupportedImplementationError and WorkspaceTooSmallError.
    """
    found = find_implementation(implementation, device, kv_format)
    if found.plan is None:
        return None
    shape = Shape(tokens, heads, key_dim, value_dim, width, kv_format.value)
    return found.plan(shape, workspace_bytes, torch.device(device), parts)


def sparse_attention(
    q: Tensor,
    kv: KvRows | PlacedKvRows,
    indices: Tensor,
    *,
    scale: float,
    sink: Tensor | None = None,
    value_dim: int = 512,
    implementation: str,
    workspace_bytes: int = DEFAULT_WORKSPACE_BYTES,
    want_lse: bool = False,
    out: Tensor | None = None,
    out_lse: Tensor | None = None,
    plan: Plan | None = None,
    ends: Tensor | None = None,
) -> AttentionResult:
    """Attention of each query over the rows of one shared KV head that its indices name.

    o[t, h] = Σ_{j ∈ indices[t]} softmax_j(scale · ⟨q[t, h], kv[j]⟩ ⊕ sink[h]) · kv[j, :value_dim]

    Args:
        q: [tokens, heads, key_dim] bf16, contiguous.
        kv: the rows: key_dim elements each, of which the first value_dim are the value.
        indices: [tokens, width] int32. Entries that are negative or not below kv.rows are skipped; one that stands
            twice counts twice. Order matters to rounding alone. Of placed rows, int64 places: those that are not
            negative must be of rows that there are, for nothing here can tell.
        scale: of the logits.
        sink: [heads] float32, a logit that is not scaled and adds to the denominator alone; −inf is none, +inf makes
            the output 0.
        value_dim: elements of a value; a key may have 0, 16, 32 or 64 more.
        implementation: a name in IMPLEMENTATIONS; never replaced by another.
        workspace_bytes: device memory beside inputs and outputs that the run may take, at least 16 MiB.
        want_lse: also return the natural log-sum-exp of the scaled logits, without the sink (implied by `out_lse`).
        out, out_lse: [tokens, heads, value_dim] bf16 and [tokens, heads] float32, contiguous, to write into.
        plan: instead of the planned one.
        ends: [tokens] int32, if it is known: one past the last entry of each index row that is not to be skipped, 0 to
            width. Kernels pass over what follows, and share out what comes before.

    A row with nothing to attend has output 0 and lse +inf.

    Raises:
        AttentionInputError: an argument disagrees with another or with LIMITS; its `field` names it.
        UnsupportedImplementationError: unknown name, or not for this device and format.
        WorkspaceTooSmallError: below the floor. ReferenceTooLargeError: `reference` beyond its bound.

    Source: DeepSeek-V3.2 (sparse MLA) and DeepSeek-V4 (compressed sparse attention, sinks).
    """
    found = find_implementation(implementation, q.device, kv.format)
    if isinstance(kv, PlacedKvRows) and not found.takes_places:
        raise AttentionInputError("kv", f"{implementation} takes rows of one tensor, not places")
    check_inputs(q, kv, indices, sink, value_dim)
    tokens, heads, key_dim = q.shape
    if out is None:
        out = torch.empty((tokens, heads, value_dim), dtype=torch.bfloat16, device=q.device)
    if out_lse is None and want_lse:
        out_lse = torch.empty((tokens, heads), dtype=torch.float32, device=q.device)
    check_output("out", out, (tokens, heads, value_dim), torch.bfloat16, q.device)
    if out_lse is not None:
        check_output("out_lse", out_lse, (tokens, heads), torch.float32, q.device)
    if not tokens or not indices.shape[1] or not kv.rows:
        out.zero_()
        if out_lse is not None:
            out_lse.fill_(torch.inf)
        return AttentionResult(out, out_lse)
    if ends is not None:
        check_output("ends", ends, (tokens,), torch.int32, q.device)
    problem = Problem(q, kv, indices, scale, sink, out, out_lse, ends)
    if plan is None and found.plan is not None:
        shape = Shape(tokens, heads, key_dim, value_dim, indices.shape[1], kv.format.value)
        plan = found.plan(shape, workspace_bytes, q.device, None)
    found.function(problem, plan)
    return AttentionResult(out, out_lse)
