"""What a layer's compressor is made of."""

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from streamindex_service.ops.compressor.rotary import rotary_frequencies

CSA_RATIO = 4  # windows of this ratio overlap: an entry also pools the window before its own
HCA_RATIO = 128
ROTARY_DIM = 64


@dataclass(frozen=True)
class CompressorWeights:
    """Weights of one compressor.

    ratio: tokens an entry: 4 (overlapping), or a multiple of 8. ape: [ratio, width] float32, what is added to the gate
    of a token by its place in its window. norm: [dim] float32, of the RMSNorm. frequencies: [32] float64, of the rotary
    embedding (`rotary_frequencies`). dim: elements of an entry, a power of two from 64 to 1024.

    Raises ValueError if the parts disagree.
    Source: DeepSeek-V4 (compressed sparse attention, ratio 4; heavily compressed attention, ratio 128).
    """

    ratio: int
    ape: Tensor
    norm: Tensor
    eps: float = 1e-6
    frequencies: Tensor = field(default_factory=rotary_frequencies)

    def __post_init__(self) -> None:
        if self.ratio != CSA_RATIO and (self.ratio < 8 or self.ratio % 8):
            raise ValueError(f"ratio: {self.ratio}, expected 4 or a multiple of 8")
        if self.norm.dim() != 1 or not 64 <= self.dim <= 1024 or self.dim & (self.dim - 1):
            raise ValueError(f"norm: {list(self.norm.shape)}, expected [dim], a power of two from 64 to 1024")
        if tuple(self.ape.shape) != (self.ratio, self.width):
            raise ValueError(f"ape: expected [{self.ratio}, {self.width}], got {list(self.ape.shape)}")
        for name, tensor in (("ape", self.ape), ("norm", self.norm)):
            if tensor.dtype != torch.float32 or not tensor.is_contiguous() or tensor.device != self.ape.device:
                raise ValueError(f"{name}: expected contiguous float32, all on one device")
        if tuple(self.frequencies.shape) != (ROTARY_DIM // 2,) or self.frequencies.dtype != torch.float64:
            raise ValueError(f"frequencies: expected [{ROTARY_DIM // 2}] float64")

    @property
    def dim(self) -> int:
        """Elements of an entry."""
        return self.norm.shape[0]

    @property
    def windows(self) -> int:
        """Windows that an entry pools: its own, and at ratio 4 the one before."""
        return 2 if self.ratio == CSA_RATIO else 1

    @property
    def width(self) -> int:
        """Channels of a token's value and of its gate: `dim` for each window that pools it."""
        return self.windows * self.dim

    @property
    def slots(self) -> int:
        """Tokens that an entry pools."""
        return self.windows * self.ratio

    @cached_property
    def device_frequencies(self) -> Tensor:
        """The frequencies where the other weights are: [32] float64."""
        return self.frequencies.to(self.ape.device)
