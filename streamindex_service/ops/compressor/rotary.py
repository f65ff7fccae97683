"""Frequencies of the rotary embedding with YaRN's correction for long contexts."""

import math

import torch
from torch import Tensor


def rotary_frequencies(
    dim: int = 64,
    *,
    base: float = 160_000.0,
    factor: float = 16.0,
    original_length: int = 65_536,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
) -> Tensor:
    """Radians a position of each pair of elements: [dim / 2] float64 on the CPU.

    Pairs that turn more than beta_fast times within original_length keep their frequency, those that turn less than
    beta_slow times have it divided by `factor`, and between the two it goes over linearly. With original_length 0 all
    keep it.
    Raises ValueError for an odd dim. Source: YaRN (Peng et al. 2023), as DeepSeek-V3 and V4 apply it.
    """
    if dim < 2 or dim % 2:
        raise ValueError(f"dim: {dim}, expected an even number")
    frequencies = base ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    if not original_length:
        return frequencies

    def pair_that_turns(times: float) -> float:
        return dim * math.log(original_length / (times * 2 * math.pi)) / (2 * math.log(base))

    low = max(math.floor(pair_that_turns(beta_fast)), 0)
    high = min(math.ceil(pair_that_turns(beta_slow)), dim - 1)
    ramp = ((torch.arange(dim // 2, dtype=torch.float64) - low) / max(high - low, 0.001)).clamp(0, 1)
    return frequencies * (1 - ramp) + frequencies / factor * ramp
