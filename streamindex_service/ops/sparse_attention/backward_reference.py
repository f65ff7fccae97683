"""The meaning of the gradients: the closed form, in float64, with every gathered row materialised. Small sizes only."""

from typing import NamedTuple

import torch
from torch import Tensor

from streamindex_service.ops.sparse_attention.reference import Exact


class ExactGradients(NamedTuple):
    """Gradients of each token by itself, and what they are made of. All float64.

    dq: [tokens, heads, key_dim]; dkeys: [tokens, width, key_dim], of each entry of an index row (zero where skipped);
    dsink: [tokens, heads], to be summed over tokens. dlogits: [tokens, heads, width], of the scaled logits;
    dweights: [tokens, heads, width], of the weights; delta: [tokens, heads], the sum of out · dout; share:
    [tokens, heads], the sink's part of the denominator.
    """

    dq: Tensor
    dkeys: Tensor
    dsink: Tensor
    dlogits: Tensor
    dweights: Tensor
    delta: Tensor
    share: Tensor


def exact_gradients(dout: Tensor, q: Tensor, exact: Exact, *, scale: float, sink: Tensor | None) -> ExactGradients:
    """Gradients of Σ out · dout in float64, from an attention in float64.

    With p the weights, s the scaled logits and Δ = Σ_d out · dout:

        ds_j = p_j · (⟨dout, v_j⟩ − Δ),   dq = scale · Σ_j ds_j · k_j,   dsink = −p_sink · Δ,
        dk_j = scale · Σ_h ds_j · q,   dv_j = Σ_h p_j · dout, which is added to the first value_dim elements of dk_j.

    dout: [tokens, heads, value_dim], q: [tokens, heads, key_dim], of any float type. A sink of +inf or −inf, and a row
    with nothing to attend, have gradients of zero. Source: FlashAttention-2, section 3.1.2, and the chain rule for the
    sink.
    """
    dout, q, value_dim = dout.double(), q.double(), exact.out.shape[2]
    dweights = torch.bmm(dout, exact.keys[:, :, :value_dim].mT)
    delta = (exact.out * dout).sum(dim=2)
    dlogits = exact.weights * (dweights - delta[:, :, None])
    dkeys = scale * torch.bmm(dlogits.mT, q)
    dkeys[:, :, :value_dim] += torch.bmm(exact.weights.mT, dout)
    share = torch.zeros_like(delta)
    if sink is not None:
        lse = exact.lse.masked_fill(exact.lse == torch.inf, -torch.inf)  # nothing to attend: the sink has it all
        share = torch.sigmoid(sink.double()[None, :] - lse).nan_to_num(nan=0.0)
    return ExactGradients(
        scale * torch.bmm(dlogits, exact.keys), dkeys, -share * delta, dlogits, dweights, delta, share
    )
