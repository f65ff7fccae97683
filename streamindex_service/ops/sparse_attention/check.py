"""The judge of every implementation: outputs are compared with float64, within what rounding may do.

Error bound of a computed output (Higham, Accuracy and Stability, §3.1; q and the rows are taken as they are, already
rounded). With u = 2^-23, because matrix units truncate rather than round:

- A logit is a float32 sum of key_dim products, scaled: its error is at most

      δ[t, h, j] = (key_dim + 4) · u · scale · Σ_d |q[t, h, d]·k[j, d]|  +  4 · u · |logit|

  and the relative error of a weight before it is rounded is δ and what exp2 adds (4 u).
- Weights are rounded to bf16 (2^-8 of each) for the second product; the denominator sums them unrounded. Both are
  float32 sums of `width` terms, rescaled at most once for each block: (2·width + 8) · u.
- The output is rounded to bf16: 2^-8 of it.

So |o − exact| ≤ 2^-8·|exact| + Σ_j p_j·|v_j|·(2^-8 + δ_j + δ_max + (4·width + 24)·u), where δ_max = max_j δ_j stands
for the denominator's error, to first order; SECOND_ORDER covers products of errors.

Some kernels widen packed rows to bf16 before they multiply (`rounds_rows`). It is exact where a scale is a power of
two. Where an element k[j, d] is no bf16 number, it is rounded, 2^-8·|k[j, d]|, which adds

      2^-8 · scale · Σ_d |q[t, h, d]·k[j, d]|  over such elements to δ[t, h, j],  and 2^-8 to those values' 2^-8.

The lse errs by at most δ_max + (2·width + 8) · u + 4·u·|lse|.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from streamindex_service.ops.kv_rows import KvRows
from streamindex_service.ops.sparse_attention.problem import check_inputs
from streamindex_service.ops.sparse_attention.reference import Exact, exact_attention

_FLOAT32_UNIT = 2.0**-23
_BF16_UNIT = 2.0**-8
_SECOND_ORDER = 1.05
_SMALLEST = 2.0**-126  # below this, bf16 and float32 lose relative accuracy
_CHUNK_BYTES = 256 << 20


@dataclass(frozen=True)
class CheckReport:
    """wrong: [tokens] bool on the CPU. largest_error: the worst error as a share of its bound (1.0 is the limit)."""

    wrong: Tensor
    largest_error: float

    @property
    def wrong_rows(self) -> int:
        """Tokens with an element, or an lse, out of bounds."""
        return int(self.wrong.sum())


def check_sparse_attention(
    out: Tensor,
    lse: Tensor | None,
    q: Tensor,
    kv: KvRows,
    indices: Tensor,
    *,
    scale: float,
    sink: Tensor | None,
    rounds_rows: bool = False,
) -> CheckReport:
    """Judge `out` [tokens, heads, value_dim] and `lse` [tokens, heads] of an attention, within about 1 GiB.

    q, kv, indices, scale, sink: as for `sparse_attention`. rounds_rows: whether rows may be rounded to bf16 first, as
    the kernels of `triton` do but that for few heads. Raises AttentionInputError for inputs that disagree.
    """
    check_inputs(q, kv, indices, sink, out.shape[2])
    tokens, heads, key_dim = q.shape
    step = max(1, _CHUNK_BYTES // (8 * max(indices.shape[1], 1) * (4 * key_dim + 4 * heads)))
    wrong, largest = torch.zeros(tokens, dtype=torch.bool), 0.0
    for start in range(0, tokens, step):
        part = slice(start, start + step)
        exact = exact_attention(q[part], kv, indices[part], scale=scale, sink=sink, value_dim=out.shape[2])
        bound, lse_bound = error_bounds(exact, q[part], scale, rounds_rows=rounds_rows)
        errors = [_share(out[part], exact.out, bound).amax(dim=2)]
        if lse is not None:
            errors.append(_share(lse[part], exact.lse, lse_bound))
        worst = torch.stack(errors).amax(dim=(0, 2))
        wrong[part] = (worst > 1.0).cpu()
        largest = max(largest, float(worst.max()))
    return CheckReport(wrong, largest)


def error_bounds(exact: Exact, q: Tensor, scale: float, *, rounds_rows: bool = False) -> tuple[Tensor, Tensor]:
    """Bounds of the module's text: of outputs [tokens, heads, value_dim] and of lse [tokens, heads], float64."""
    value_dim, width = exact.out.shape[2], exact.keys.shape[1]
    logits = scale * torch.bmm(q.double(), exact.keys.mT).abs()
    sums = abs(scale) * torch.bmm(q.double().abs(), exact.keys.abs().mT)
    delta = _FLOAT32_UNIT * ((q.shape[2] + 4) * sums + 4 * logits)
    values = exact.keys[:, :, :value_dim].abs()
    spread = torch.zeros_like(exact.out)
    if rounds_rows:
        rounded = exact.keys.abs() * (exact.keys != exact.keys.to(torch.bfloat16))  # 0 where that is exact
        delta += _BF16_UNIT * abs(scale) * torch.bmm(q.double().abs(), rounded.mT)
        spread += _BF16_UNIT * torch.bmm(exact.weights, rounded[:, :, :value_dim])
    largest = delta.amax(dim=2) if width else torch.zeros_like(exact.lse)
    relative = _BF16_UNIT + delta + largest[:, :, None] + (4 * width + 24) * _FLOAT32_UNIT
    spread += torch.bmm(exact.weights * relative, values)
    bound = _SECOND_ORDER * (_BF16_UNIT * exact.out.abs() + spread) + _SMALLEST
    lse = exact.lse.abs().masked_fill(exact.lse == torch.inf, 0.0)
    return bound, _SECOND_ORDER * (largest + (2 * width + 8) * _FLOAT32_UNIT + 4 * _FLOAT32_UNIT * lse) + _SMALLEST


def _share(found: Tensor, exact: Tensor, bound: Tensor) -> Tensor:
    """|found − exact| as a share of the bound: 0 where they are equal, infinities too, and +inf for NaN."""
    error = (found.double() - exact).abs() / bound
    return torch.where(found.double() == exact, 0.0, error.nan_to_num(nan=torch.inf))
