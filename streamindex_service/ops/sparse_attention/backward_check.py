"""The judge of gradients: compared with float64, within what rounding may do.

Error bounds (Higham, Accuracy and Stability, §3.1; q, the rows, sink and dout are taken as they are; out and lse are
the forward's, so within the bounds of `check`). With u = 2^-23 and r = 2^-8 as there, p a weight, dp = ⟨dout, v⟩,
Δ = Σ_d out · dout, ds = p · (dp − Δ), and |·| of a product the sum of its terms' magnitudes:

- A weight errs by p·ρ, ρ = e^x − 1, x = δ + (the bound of the lse) + 8·u·(|lse| + |denominator| + 1) + 16·u, where δ is
  the bound of a logit. It is rounded to bf16: E_p = p·ρ + r·p·(1 + ρ).
- dp errs by value_dim·u·|dout|·|v|. Δ errs by |dout| times the bound of out, and by the rounding of its own sum,
  value_dim·u·|dout|·(|out| + its bound). With E the sum of both: ds, rounded to bf16, errs by
  E_s = p·(1 + ρ)·E + ρ·|ds| + (r + 8·u)·(|ds| + p·(1 + ρ)·E + ρ·|ds|).
- dq = scale · Σ_j ds·k: |scale|·Σ_j E_s·|k|, a float32 sum of `width` terms, and rounding to bf16.
- dkv of a row: Σ (|scale|·E_s·|q| + E_p·|dout|) over heads and the entries that name it, and a float32 sum of 2·heads
  terms for each entry, and of the entries.
- dsink = −Σ_t p_s·Δ, p_s the sink's share 1 / (1 + e^(lse − sink)), which errs by p_s·(1 − p_s)·(e^y − 1), at most 1,
  y = (the bound of the lse) + 8·u·(|lse| + |sink|), and by 8·u·p_s.

SECOND_ORDER covers products of errors that are left out.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from streamindex_service.ops.kv_rows import KvFormat, KvRows
from streamindex_service.ops.sparse_attention.backward import AttentionGradients, add_entries
from streamindex_service.ops.sparse_attention.backward_reference import ExactGradients, exact_gradients
from streamindex_service.ops.sparse_attention.check import error_bounds
from streamindex_service.ops.sparse_attention.problem import check_inputs
from streamindex_service.ops.sparse_attention.reference import Exact, exact_attention

_FLOAT32_UNIT = 2.0**-23
_BF16_UNIT = 2.0**-8
_SECOND_ORDER = 1.05
_SMALLEST = 2.0**-126  # below this, bf16 and float32 lose relative accuracy
_MOST_EXPONENT = 60.0  # e^60 is as good as any
_CHUNK_BYTES = 256 << 20


@dataclass(frozen=True)
class GradientReport:
    """The worst errors as shares of their bounds (1.0 is the limit). wrong_tokens: [tokens] bool, by dq; wrong_rows:
    [rows] bool, by dkv; wrong_sinks: [heads] bool. All on the CPU."""

    wrong_tokens: Tensor
    wrong_rows: Tensor
    wrong_sinks: Tensor
    dq_error: float
    dkv_error: float
    dsink_error: float

    @property
    def wrong(self) -> int:
        """Tokens, rows and heads with a gradient out of bounds."""
        return int(self.wrong_tokens.sum() + self.wrong_rows.sum() + self.wrong_sinks.sum())


@dataclass(frozen=True)
class GradientBounds:
    """Of one chunk of tokens, float64. dq: [tokens, heads, key_dim]; dkeys: [tokens, width, key_dim], of what each
    entry adds; magnitudes: the same, the sum of its terms' magnitudes; dsink: [heads]."""

    dq: Tensor
    dkeys: Tensor
    magnitudes: Tensor
    dsink: Tensor


def check_gradients(
    gradients: AttentionGradients, dout: Tensor, q: Tensor, kv: Tensor, indices: Tensor, *, scale: float,
    sink: Tensor | None,
) -> GradientReport:  # fmt: skip
    """Judge the gradients of a whole attention, within about 1 GiB and 24 bytes an element of kv.

    Arguments as for `sparse_attention_backward`. Raises AttentionInputError for inputs that disagree.
    """
    rows = KvRows(KvFormat.BF16, kv)
    check_inputs(q, rows, indices, sink, dout.shape[2])
    (tokens, heads, key_dim), width = q.shape, indices.shape[1]
    step = max(1, _CHUNK_BYTES // (8 * max(width, 1) * (6 * key_dim + 12 * heads)))
    dq_shares = torch.zeros(tokens, dtype=torch.float64, device=q.device)
    dkv, spread, magnitudes = (torch.zeros(kv.shape, dtype=torch.float64, device=q.device) for _ in range(3))
    dsink, dsink_bound = (torch.zeros(heads, dtype=torch.float64, device=q.device) for _ in range(2))
    for start in range(0, tokens, step):
        part = slice(start, start + step)
        exact = exact_attention(q[part], rows, indices[part], scale=scale, sink=sink, value_dim=dout.shape[2])
        found = exact_gradients(dout[part], q[part], exact, scale=scale, sink=sink)
        bounds = gradient_bounds(exact, found, dout[part], q[part], scale, sink)
        dq_shares[part] = _share(gradients.dq[part], found.dq, bounds.dq).amax(dim=(1, 2))
        for total, entries in ((dkv, found.dkeys), (spread, bounds.dkeys), (magnitudes, bounds.magnitudes)):
            add_entries(total, entries, indices[part])
        dsink += found.dsink.sum(dim=0)
        dsink_bound += bounds.dsink
    terms = torch.full((rows.rows, 1), 2.0 * heads + 8, dtype=torch.float64, device=q.device)
    add_entries(terms, terms.new_ones((*indices.shape, 1)), indices)  # of the float32 sums of a row
    dkv_shares = _share(gradients.dkv, dkv, _limit(spread + _FLOAT32_UNIT * terms * magnitudes)).amax(dim=1)
    bound = _limit(dsink_bound + _FLOAT32_UNIT * dsink.abs())
    sink_shares = torch.zeros_like(dsink) if gradients.dsink is None else _share(gradients.dsink, dsink, bound)
    shares = (dq_shares, dkv_shares, sink_shares)
    tokens_wrong, rows_wrong, sinks_wrong = ((each > 1.0).cpu() for each in shares)
    dq_error, dkv_error, dsink_error = (float(each.max()) if len(each) else 0.0 for each in shares)
    return GradientReport(tokens_wrong, rows_wrong, sinks_wrong, dq_error, dkv_error, dsink_error)


def gradient_bounds(
    exact: Exact, found: ExactGradients, dout: Tensor, q: Tensor, scale: float, sink: Tensor | None
) -> GradientBounds:
    """Bounds of the module's text, without the float32 sums of dkv, which depend on all tokens."""
    dout, q, value_dim, width = dout.double().abs(), q.double().abs(), exact.out.shape[2], exact.keys.shape[1]
    keys, u = exact.keys.abs(), _FLOAT32_UNIT
    out_bound, lse_bound = error_bounds(exact, q, scale)
    rho = _weight_errors(exact, q, scale, sink, lse_bound)
    grown = exact.weights * (1 + rho)
    weight_error = exact.weights * rho + _BF16_UNIT * grown + _SMALLEST
    delta_error = (dout * (out_bound + value_dim * u * (exact.out.abs() + out_bound))).sum(dim=2)
    product_error = value_dim * u * torch.bmm(dout, keys[:, :, :value_dim].mT)
    unrounded = grown * (product_error + delta_error[:, :, None]) + rho * found.dlogits.abs()
    rounding = (_BF16_UNIT + 8 * u) * (found.dlogits.abs() + unrounded)
    dlogit_error = (
        unrounded + rounding + _SMALLEST / max(abs(scale), _SMALLEST)
    )  # the product with scale is what is rounded
    largest = found.dlogits.abs() + dlogit_error
    dq = abs(scale) * torch.bmm(dlogit_error + (width + 8) * u * largest, keys)
    dkeys = abs(scale) * torch.bmm(dlogit_error.mT, q)
    dkeys[:, :, :value_dim] += torch.bmm(weight_error.mT, dout)
    magnitudes = abs(scale) * torch.bmm(largest.mT, q)
    magnitudes[:, :, :value_dim] += torch.bmm((exact.weights + weight_error).mT, dout)
    dsink = _sink_errors(exact, found, sink, lse_bound, delta_error)
    return GradientBounds(_limit(dq + _BF16_UNIT * found.dq.abs()), dkeys, magnitudes, dsink.sum(dim=0))


def _weight_errors(exact: Exact, q: Tensor, scale: float, sink: Tensor | None, lse_bound: Tensor) -> Tensor:
    """ρ of each weight: [tokens, heads, width]."""
    u = _FLOAT32_UNIT
    logits = abs(scale) * torch.bmm(q, exact.keys.abs().mT)  # not below the logit itself
    lse = exact.lse.masked_fill(exact.lse == torch.inf, 0.0)
    denominator = lse if sink is None else torch.logaddexp(lse, sink.double()[None, :].expand_as(lse))
    row = lse_bound + 8 * u * (lse.abs() + denominator.abs() + 1) + 16 * u
    return torch.expm1(((q.shape[2] + 8) * u * logits + row[:, :, None]).clamp(max=_MOST_EXPONENT))


def _sink_errors(
    exact: Exact, found: ExactGradients, sink: Tensor | None, lse_bound: Tensor, delta_error: Tensor
) -> Tensor:
    """What each token may add to the error of dsink: [tokens, heads]."""
    if sink is None:
        return torch.zeros_like(delta_error)
    lse = exact.lse.masked_fill(exact.lse == torch.inf, 0.0)
    exponent = lse_bound + 8 * _FLOAT32_UNIT * (lse.abs() + sink.double().abs())
    moved = found.share * (1 - found.share) * torch.expm1(exponent.clamp(max=_MOST_EXPONENT))
    share_error = moved.clamp(max=1.0) + 8 * _FLOAT32_UNIT * found.share
    return share_error * found.delta.abs() + (found.share + share_error) * delta_error


def _limit(bound: Tensor) -> Tensor:
    return _SECOND_ORDER * bound + _SMALLEST


def _share(found: Tensor, exact: Tensor, bound: Tensor) -> Tensor:
    """|found − exact| as a share of the bound: 0 where they are equal, and +inf for NaN."""
    error = (found.double() - exact).abs() / bound
    return torch.where(found.double() == exact, 0.0, error.nan_to_num(nan=torch.inf))
