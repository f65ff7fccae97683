"""`compress`: key-value entries of a sequence from its tokens, by an implementation chosen by name."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from streamindex_service.ops.compressor.problem import Problem, check_inputs, check_output
from streamindex_service.ops.compressor.reference import run_reference
from streamindex_service.ops.compressor.state import CompressorState
from streamindex_service.ops.compressor.torch_pooled import run_torch
from streamindex_service.ops.compressor.weights import CompressorWeights
from streamindex_service.ops.implementations import Runnable, by_name, find


@dataclass(frozen=True, kw_only=True)
class Implementation(Runnable):
    """One way to compute the operation, and where it runs."""

    function: Callable[[Problem], None]


def _triton(problem: Problem) -> None:
    # imported here: Triton need not be installed where it is not asked for
    from streamindex_service.ops.compressor.triton import run_triton

    run_triton(problem)


IMPLEMENTATIONS: Mapping[str, Implementation] = by_name(
    Implementation(name="reference", function=run_reference),
    Implementation(name="torch", function=run_torch),
    Implementation(name="triton", function=_triton, requires="triton", cpu_only_interpreted=True),
)


def find_implementation(name: str, device: torch.device | str) -> Implementation:
    """The implementation of that name. Raises UnsupportedImplementationError if it is unknown or not for that
    device."""
    return find(IMPLEMENTATIONS, name, lambda implementation: implementation.runs_on(device), f"not on {device} here")


def compress(
    kv: Tensor,
    gate: Tensor,
    weights: CompressorWeights,
    position: int,
    state: CompressorState,
    *,
    implementation: str,
    out: Tensor | None = None,
) -> Tensor:
    """The entries that these tokens complete: [(position + tokens) // ratio − position // ratio, dim] bf16.

    Entry i, completed by token (i + 1) · ratio − 1, is a softmax pool of its window's values, channel by channel, then
    RMSNorm, then the rotary embedding of its last 64 elements at position i · ratio. Windows of ratio 4 overlap. The
    same bits whatever chunks the sequence comes in, within one implementation.

    Args:
        kv, gate: [tokens, width] bf16 or float32, contiguous: the projections x·Wkv and x·Wgate of consecutive tokens.
            Finite values only.
        weights: of the compressor.
        position: absolute, of the first token; a lower one than the state's end goes back and replaces what follows.
        state: what the sequence's tokens before left; updated in place. Of a new sequence: `CompressorState.empty`.
        implementation: a name in IMPLEMENTATIONS; never replaced by another.
        out: contiguous bf16, to write into.

    Raises:
        CompressorInputError: an argument disagrees with another; its `field` names it.
        StateError: the state lacks tokens that the first entry pools; nothing was changed.
        UnsupportedImplementationError: unknown name, or not for this device.

    Source: DeepSeek-V4, Compressor (CSA, ratio 4; HCA, ratio 128).
    """
    found = find_implementation(implementation, kv.device)
    check_inputs(kv, gate, weights, position, state)
    tokens = kv.shape[0]
    entries = (position + tokens) // weights.ratio - position // weights.ratio
    if out is None:
        out = torch.empty((entries, weights.dim), dtype=torch.bfloat16, device=kv.device)
    check_output(out, entries, weights.dim, kv.device)
    if tokens:
        found.function(Problem(kv, gate, weights, position, state, out))
    state.advance(position, tokens)
    return out
