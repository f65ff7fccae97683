"""One checked problem of the compressor, as every implementation receives it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from streamindex_service.ops.compressor.state import CompressorState
from streamindex_service.ops.compressor.weights import CompressorWeights


class CompressorInputError(ValueError):
    """An argument the operation cannot take; `field` names it."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field


@dataclass(frozen=True)
class Problem:
    """Checked inputs and the place for the output.

    kv, gate: [tokens, width] bf16 or float32 from `position` on; the gate without its ape. out: [entries, dim] bf16.
    """

    kv: Tensor
    gate: Tensor
    weights: CompressorWeights
    position: int
    state: CompressorState
    out: Tensor

    @property
    def tokens(self) -> int:
        """Tokens of this call."""
        return self.kv.shape[0]

    @property
    def entries(self) -> int:
        """Entries that this call completes."""
        return self.out.shape[0]

    @property
    def first_entry(self) -> int:
        """The first of them."""
        return self.position // self.weights.ratio


def check_inputs(kv: Tensor, gate: Tensor, weights: CompressorWeights, position: int, state: CompressorState) -> None:
    """Raise CompressorInputError for the first argument that disagrees with another one, and StateError if the state
    lacks tokens."""
    for name, tensor in (("kv", kv), ("gate", gate)):
        if tensor.dim() != 2 or tensor.shape[1] != weights.width or not tensor.is_contiguous():
            raise CompressorInputError(name, f"expected contiguous [tokens, {weights.width}], got {list(tensor.shape)}")
        if tensor.dtype not in (torch.bfloat16, torch.float32):
            raise CompressorInputError(name, f"expected bf16 or float32, got {tensor.dtype}")
        if tensor.device != weights.ape.device:
            raise CompressorInputError(name, f"not on {weights.ape.device}, where the weights are")
    if gate.shape != kv.shape or gate.dtype != kv.dtype:
        raise CompressorInputError("gate", f"expected {list(kv.shape)} {kv.dtype} as kv")
    if state.kv.shape[1] != weights.width or state.capacity < weights.slots or state.kv.device != kv.device:
        raise CompressorInputError("state", "made for other weights")
    state.check(weights, position)


def check_output(out: Tensor, entries: int, dim: int, device: torch.device) -> None:
    """Raise CompressorInputError unless `out` is contiguous [entries, dim] bf16 on `device`."""
    shape = (entries, dim)
    if tuple(out.shape) != shape or out.dtype != torch.bfloat16 or out.device != device or not out.is_contiguous():
        raise CompressorInputError("out", f"expected contiguous {list(shape)} bf16 on {device}, got {list(out.shape)}")
