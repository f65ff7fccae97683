"""The judge of every implementation: entries are compared with float64, within what rounding may do.

With u = 2^-23, e[c] the error of a pooled channel c, r the root mean square of an entry and p_j the softmax's weights:

- A gate with its ape is one float32 sum, so a weight errs by δ = 2·u·max_j |gate_j + ape_j| + 4·u of itself, and so
  does the denominator. The sums over slots are rescaled at most once for each:
  e ≤ Σ_j p_j·|v_j| · (2·δ + (2·slots + 16)·u).
- The norm errs, as a share, by at most √(mean e²) / r + (dim + 8)·u.
- A rotated pair takes over both errors, and what cosine and sine add: 8·u of both elements.
- The output is rounded to bf16: 2^-8 of it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from streamindex_service.ops.compressor.reference import exact_entries
from streamindex_service.ops.compressor.weights import ROTARY_DIM, CompressorWeights

_FLOAT32_UNIT = 2.0**-23
_BF16_UNIT = 2.0**-8
_SECOND_ORDER = 1.05
_SMALLEST = 2.0**-126  # below this, bf16 and float32 lose relative accuracy


@dataclass(frozen=True)
class CheckReport:
    """wrong: [entries] bool on the CPU. largest_error: the worst error as a share of its bound (1.0 is the limit)."""

    wrong: Tensor
    largest_error: float

    @property
    def wrong_rows(self) -> int:
        """Entries with an element out of bounds."""
        return int(self.wrong.sum())


def check_compressed(out: Tensor, kv: Tensor, gate: Tensor, weights: CompressorWeights, start: int = 0) -> CheckReport:
    """Judge `out` [entries, dim], of a sequence or a part of it, in float64 and one by one: hundreds, not more.

    kv, gate: [tokens, width] from position `start` on, a window's first; see `exact_entries` for what of a part is an
    entry. Raises ValueError if `out` has not as many.
    """
    exact = exact_entries(kv, gate, weights, start)
    if out.shape != exact.shape:
        raise ValueError(f"out: expected {list(exact.shape)}, got {list(out.shape)}")
    error = (out.double() - exact).abs() / error_bounds(exact, kv, gate, weights)
    worst = error.nan_to_num(nan=torch.inf).amax(dim=1) if len(error) else error.new_empty(0)
    return CheckReport((worst > 1.0).cpu(), float(worst.max()) if len(worst) else 0.0)


def error_bounds(exact: Tensor, kv: Tensor, gate: Tensor, weights: CompressorWeights) -> Tensor:
    """The bounds of the module's text: [entries, dim] float64."""
    ratio, dim = weights.ratio, weights.dim
    windows = kv.shape[0] // ratio
    tokens, skipped = windows * ratio, windows - exact.shape[0]
    logits = gate[:tokens].double() + weights.ape.double().repeat(windows, 1)
    values, logits = (_slots(x, weights) for x in (kv[:tokens].double(), logits))
    if weights.windows == 2 and windows:
        logits[0, :ratio] = -torch.inf
    values, logits = values[skipped:], logits[skipped:]
    share = logits.softmax(dim=1)
    delta = _FLOAT32_UNIT * (2 * logits.masked_fill(logits == -torch.inf, 0).abs().amax(dim=1) + 4)
    spread = (share * values.abs()).sum(dim=1)
    pooled = (share * values).sum(dim=1)
    error = spread * (2 * delta + (2 * weights.slots + 16) * _FLOAT32_UNIT)
    scale = (pooled.square().mean(dim=1, keepdim=True) + weights.eps).rsqrt()
    of_norm = error.square().mean(dim=1, keepdim=True).sqrt() * scale + (dim + 8) * _FLOAT32_UNIT
    bound = weights.norm.double().abs() * scale * (error + pooled.abs() * of_norm)
    rotated = bound[:, -ROTARY_DIM:].reshape(-1, ROTARY_DIM // 2, 2).sum(dim=2)
    moved = exact[:, -ROTARY_DIM:].abs().reshape(-1, ROTARY_DIM // 2, 2).sum(dim=2)
    bound[:, -ROTARY_DIM:] = (rotated + 8 * _FLOAT32_UNIT * moved).repeat_interleave(2, dim=1)
    return _SECOND_ORDER * (bound + _BF16_UNIT * exact.abs()) + _SMALLEST


def _slots(rows: Tensor, weights: CompressorWeights) -> Tensor:
    """What each entry pools of `rows` [tokens, width], whole windows: [entries, slots, dim], zero before the first."""
    by_window = rows.view(-1, weights.ratio, weights.width)
    if weights.windows == 1:
        return by_window
    before = torch.cat([torch.zeros_like(by_window[:1]), by_window[:-1]])
    return torch.cat([before[:, :, : weights.dim], by_window[:, :, weights.dim :]], dim=1)
