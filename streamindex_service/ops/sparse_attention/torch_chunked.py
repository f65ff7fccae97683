"""The operation in torch, a chunk of query tokens at a time: gather their rows in float32, two batched products.

On the CPU every token is computed by products of its own, whose shape does not depend on the chunk: no chunk and no
neighbour can change a bit of a result, nor can entries behind the end of its index row.
"""

from functools import partial

import torch
from torch import Tensor

from streamindex_service.ops.kv_rows import KvRows
from streamindex_service.ops.row_threads import share_rows
from streamindex_service.ops.sparse_attention.plan import Plan
from streamindex_service.ops.sparse_attention.problem import Problem


def run_chunked(problem: Problem, plan: Plan) -> None:
    """Fill the outputs, one chunk of tokens after another, within the plan's workspace."""
    if not problem.q.is_cuda:
        ends = None if problem.ends is None else problem.ends.tolist()
        share_rows(partial(_fill_one_by_one, problem, ends), 0, problem.tokens, most=plan.token_chunk)
        return
    for start in range(0, problem.tokens, plan.token_chunk):
        _fill(problem, start, min(start + plan.token_chunk, problem.tokens), problem.width)


def _fill_one_by_one(problem: Problem, ends: list[int] | None, start: int, stop: int) -> None:
    for token in range(start, stop):
        # one entry at least, for there is no largest of none; it is to be skipped then
        _fill(problem, token, token + 1, problem.width if ends is None else max(1, ends[token]))


def _fill(problem: Problem, start: int, stop: int, width: int) -> None:
    p = problem
    assert isinstance(p.kv, KvRows)
    indices = p.indices[start:stop, :width]
    valid = (indices >= 0) & (indices < p.kv.rows)
    keys = p.kv.gather(indices.long().masked_fill_(~valid, 0), torch.float32)
    keys.masked_fill_(~valid[:, :, None], 0.0)  # a row that is not asked for may hold anything
    logits = torch.bmm(p.q[start:stop].float(), keys.mT).mul_(p.scale)
    logits.masked_fill_(~valid[:, None, :], -torch.inf)
    weights, lse = _softmax(logits, p.sink)
    p.out[start:stop] = torch.bmm(weights, keys[:, :, : p.value_dim])
    if p.out_lse is not None:
        p.out_lse[start:stop] = lse


def _softmax(logits: Tensor, sink: Tensor | None) -> tuple[Tensor, Tensor]:
    """Weights in place of `logits` [tokens, heads, width], and their lse [tokens, heads], without the sink."""
    largest = logits.amax(dim=2)
    nothing = largest == -torch.inf
    largest.masked_fill_(nothing, 0.0)
    weights = logits.sub_(largest[:, :, None]).exp_()
    total = weights.sum(dim=2)
    lse = (total.log() + largest).masked_fill_(nothing, torch.inf)
    if sink is not None:
        total = total + torch.exp(sink[None, :] - largest)
    # nothing to attend and no sink: 0 / 1
    return weights.div_(total.masked_fill(nothing, 1.0)[:, :, None]), lse
