"""Whether answers are right, and how much of the exact answer they hold."""

import sys
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.inputs import Prefill
from streamindex_service.ops import KeyFormat
from streamindex_service.ops.topk import check_topk, indexer_scores
from streamindex_service.ops.topk.check import score_error_bound

CHECKED_ROWS = 64
_TILE_KEYS = 2048
_ROWS_AT_A_TIME = 64


@dataclass(frozen=True)
class Judgement:
    """Of the rows that were looked at: how many, how many of them wrong, and their mean recall."""

    checked_rows: int
    wrong_rows: int
    recall: float


def judge(prefill: Prefill, indices: Tensor, sample: int = CHECKED_ROWS) -> Judgement:
    """Judge a sample of rows, spread over the search and always with its ends, by scoring them again in float64.

    indices: [rows, top_k] int32. A row is wrong by the rule of `check_topk`; its recall is that of `recall_of_rows`.
    """
    rows = sample_rows(prefill.rows, sample)
    part, found = prefill.select(rows), indices[rows.to(indices.device)]
    model = prefill.model
    report = check_topk(
        found, part.q, part.w, part.keys, part.positions, ratio=model.ratio, top_k=model.top_k
    )  # fmt: skip
    if report.wrong_rows:
        print(f"wrong rows: {report}", file=sys.stderr)
    return Judgement(len(rows), report.wrong_rows, float(recall_of_rows(part, found).mean()))


def sample_rows(rows: int, sample: int) -> Tensor:
    """Numbers of at most `sample` rows, evenly spread, with the first and the last: [n] int64."""
    spread = torch.linspace(0, rows - 1, min(sample, rows), dtype=torch.float64).long()
    distinct: Tensor = torch.unique(spread)
    return distinct


def recall_of_rows(prefill: Prefill, indices: Tensor) -> Tensor:
    """Share of each row's min(top_k, visible) places that hold a key of the exact answer: [rows] float64 on the CPU.

    A key counts if it is not below the worst key of the exact answer by more than the error bounds of both, so that
    the rounding of a correct float32 score costs nothing: a row that `check_topk` finds right has a recall of 1.
    """
    parts = []
    for start in range(0, prefill.rows, _ROWS_AT_A_TIME):
        rows = torch.arange(start, min(start + _ROWS_AT_A_TIME, prefill.rows))
        parts.append(_recall(prefill.select(rows), indices[start : start + _ROWS_AT_A_TIME].to(torch.int64)))
    return torch.cat(parts)


def _recall(prefill: Prefill, indices: Tensor) -> Tensor:
    visible = prefill.visible().to(indices.device)
    width, expected = int(visible.max()), visible.clamp(max=prefill.model.top_k)
    if not width:
        return torch.ones(prefill.rows, dtype=torch.float64)
    scores, bounds = _exact_scores(prefill, width)
    hidden = torch.arange(width, device=scores.device)[None, :] >= visible[:, None]
    scores.masked_fill_(hidden, -torch.inf)
    best = torch.topk(scores, min(prefill.model.top_k, width), dim=1).indices
    lowest = torch.gather(scores - bounds, 1, best)
    beyond = torch.arange(best.shape[1], device=scores.device)[None, :] >= expected[:, None]
    floor = lowest.masked_fill_(beyond, torch.inf).amin(dim=1)
    ordered, _ = torch.sort(indices, dim=1)
    counts = (ordered >= 0) & (ordered < visible[:, None])
    counts[:, 1:] &= ordered[:, 1:] != ordered[:, :-1]  # a key counts once
    reach = torch.gather(scores + bounds, 1, ordered.clamp(0, width - 1)) >= floor[:, None]
    hits = torch.minimum((counts & reach).sum(dim=1), expected)
    return torch.where(expected > 0, hits.double() / expected.clamp(min=1), 1.0).cpu()


def _exact_scores(prefill: Prefill, width: int) -> tuple[Tensor, Tensor]:
    """Float64 scores [rows, width] and the error bounds of computed ones."""
    rough = prefill.keys.format is KeyFormat.FP8_E4M3 and prefill.q.is_cuda
    scores, bounds = [], []
    for start in range(0, width, _TILE_KEYS):
        k, scales = prefill.keys.gather(start, min(start + _TILE_KEYS, width), torch.float64)
        scores.append(indexer_scores(prefill.q, prefill.w, k, scales))
        bounds.append(score_error_bound(prefill.q, prefill.w, k, scales, e4m3_matrix_unit=rough))
    return torch.cat(scores, dim=1), torch.cat(bounds, dim=1)
