"""The judge of every implementation: returned indices are scored again in float64, and compared with all keys that
were left out.

A result is right if some scores within the error bound of the exact ones have it as their top-k:

- every returned index is visible, none twice, their count is min(top_k, visible), padding is last;
- for every returned key i and every visible key j that was left out, s[i] + e[i] ≥ s[j] − e[j].

The second rule is stronger than comparing the smallest returned score with the k-th best: it also catches a key far
above the threshold that was missed in favour of one just below it.

Error bound e[t, s] of a computed score (Higham, Accuracy and Stability, §3.1; inputs are taken as they are, already
rounded): a float32 sum of n products errs by at most n·u·Σ|products|. The inner product of head h has n = head_dim and
Σ|products| ≤ ‖q[t,h]‖·‖k[s]‖; the gate, the sum over heads and the scale add heads + 3 roundings of terms bounded
alike. So

    e[t, s] = (head_dim + heads + 3) · u · (Σ_h |w[t,h]|·‖q[t,h]‖) · scale[s]·‖k[s]‖

with u = 2^-23, because matrix units truncate rather than round. Matrix units that multiply e4m3 align the 32 products
of a step and the running sum to the largest of them and keep 13 bits below it. That is n = 33·head_dim/32 truncations
of at most 2^-13·‖q[t,h]‖·‖k[s]‖ each, of either sign and independent over elements and heads; their sum exceeds λ
root-sum-squares with a probability below 2·exp(−λ²/2) (Hoeffding), which λ = 6 makes 3e-8, and which adds

    6 · 2^-13 · √n · √(Σ_h w[t,h]²·‖q[t,h]‖²) · scale[s]·‖k[s]‖.
"""

from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

from streamindex_service.ops.formats import KeyFormat
from streamindex_service.ops.paged_keys import PagedKeys
from streamindex_service.ops.topk.order import Order
from streamindex_service.ops.topk.problem import check_inputs, visible_keys
from streamindex_service.ops.topk.reference import indexer_scores

_FLOAT32_UNIT = 2.0**-23
_E4M3_MATRIX_UNIT = 2.0**-13
_DEVIATIONS = 6.0
# Bounds of the check's own memory: float64 scores of a chunk of rows, and products of one tile of keys.
_SCORE_BYTES = 256 << 20
_PRODUCT_BYTES = 256 << 20
_TILE_KEYS = 2048


class Verdict(IntEnum):
    """What the check found of one row."""

    RIGHT = 0
    OUT_OF_RANGE = 1  # an index below −1, or of a key the row does not see
    WRONG_COUNT = 2  # not min(top_k, visible) indices, or padding before an index
    DUPLICATE = 3
    WRONG_SET = 4  # a key left out is better than a returned one by more than the error bound
    WRONG_ORDER = 5  # not arranged as asked
    WRONG_SCORE = 6  # a returned score differs from the exact one by more than the error bound


@dataclass(frozen=True)
class CheckReport:
    """verdicts: [rows] int8 `Verdict` codes on the CPU. largest_excess: by how much the worst left-out key beats a
    returned one, as a share of the error bound (1.0 is the limit, at most 0 means exactly right)."""

    verdicts: Tensor
    largest_excess: float

    @property
    def wrong_rows(self) -> int:
        """Rows that are not right."""
        return int((self.verdicts != Verdict.RIGHT).sum())

    def __str__(self) -> str:
        counts = {verdict.name: int((self.verdicts == verdict).sum()) for verdict in Verdict}
        return ", ".join(f"{name} {count}" for name, count in counts.items() if count)


def check_topk(
    indices: Tensor,
    q: Tensor,
    w: Tensor,
    keys: PagedKeys,
    positions: int | Tensor,
    *,
    ratio: int,
    top_k: int,
    order: Order | None = None,
    scores: Tensor | None = None,
) -> CheckReport:
    """Judge `indices` [rows, top_k] int32 of a search by re-scoring, row by row, on the inputs' device and within 1
    GiB.

    q, w, keys, positions, ratio, top_k: the search's inputs, as for `topk`. To judge a sample of rows, pass those
    rows of `indices`, `q`, `w`, and their positions as a tensor.
    order: also require this arrangement (score order: up to the error bound). scores: also require these returned
    scores.
    Raises TopkInputError for inputs that disagree.
    """
    check_inputs(q, w, keys, positions, ratio, top_k)
    rows = q.shape[0]
    visible = visible_keys(positions, 0, rows, ratio, keys.length)
    width = int(visible.max()) if rows else 0
    step = max(1, min(_SCORE_BYTES // (8 * max(width, 1)), _PRODUCT_BYTES // (8 * q.shape[1] * _TILE_KEYS)))
    verdicts, excess = torch.zeros(rows, dtype=torch.int8), 0.0
    for start in range(0, rows, step):
        part = slice(start, start + step)
        found, bound = _exact_scores(q[part], w[part], keys, max(1, int(visible[part].max())))
        judge = _RowJudge(indices[part].to(torch.int64), found, bound, visible[part].to(q.device), top_k)
        verdicts[part] = judge.verdicts(order, None if scores is None else scores[part]).cpu()
        excess = max(excess, judge.largest_excess)
    return CheckReport(verdicts, excess)


def score_error_bound(q: Tensor, w: Tensor, k: Tensor, scales: Tensor | None, *, e4m3_matrix_unit: bool) -> Tensor:
    """e[t, s] of the module's text: [rows, keys] float64. q: [rows, heads, head_dim]; w: [rows, heads]; k: [keys,
    head_dim]."""
    heads, head_dim = q.shape[1:]
    gated = w.double().abs() * torch.linalg.vector_norm(q.double(), dim=2)
    key_norm = torch.linalg.vector_norm(k.double(), dim=1)
    if scales is not None:
        key_norm = key_norm * scales.double().abs()
    row = (head_dim + heads + 3) * _FLOAT32_UNIT * gated.sum(dim=1)
    if e4m3_matrix_unit:
        row = row + _DEVIATIONS * _E4M3_MATRIX_UNIT * (33 * head_dim / 32) ** 0.5 * torch.linalg.vector_norm(
            gated, dim=1
        )
    bound: Tensor = row[:, None] * key_norm[None, :]
    return bound


def _exact_scores(q: Tensor, w: Tensor, keys: PagedKeys, width: int) -> tuple[Tensor, Tensor]:
    """Float64 scores [rows, width] and their error bounds, tile by tile of keys."""
    width = min(width, keys.length)
    scores = torch.empty((q.shape[0], width), dtype=torch.float64, device=q.device)
    bounds = torch.empty((q.shape[0], width), dtype=torch.float64, device=q.device)
    rough = keys.format is KeyFormat.FP8_E4M3 and q.is_cuda
    for start in range(0, width, _TILE_KEYS):
        stop = min(start + _TILE_KEYS, width)
        k, scales = keys.gather(start, stop, torch.float64)
        scores[:, start:stop] = indexer_scores(q, w, k, scales)
        bounds[:, start:stop] = score_error_bound(q, w, k, scales, e4m3_matrix_unit=rough)
    return scores, bounds


class _RowJudge:
    """The rules, for one chunk of rows. indices: [rows, top_k] int64; scores, bounds: [rows, width] float64; visible:
    [rows]."""

    def __init__(self, indices: Tensor, scores: Tensor, bounds: Tensor, visible: Tensor, top_k: int) -> None:
        self._indices, self._scores, self._bounds, self._visible = indices, scores, bounds, visible
        self._expected = visible.clamp(max=top_k)
        self._given = indices >= 0
        self.largest_excess = 0.0

    def verdicts(self, order: Order | None, returned_scores: Tensor | None) -> Tensor:
        """[rows] int8 codes; the first rule that a row breaks."""
        verdict = torch.zeros(self._indices.shape[0], dtype=torch.int8, device=self._indices.device)
        rules = [
            (Verdict.OUT_OF_RANGE, self._out_of_range()),
            (Verdict.WRONG_COUNT, self._wrong_count()),
            (Verdict.DUPLICATE, self._duplicate()),
        ]
        if self._scores.shape[1]:
            rules.append((Verdict.WRONG_SET, self._wrong_set()))
            if order is not None:
                rules.append((Verdict.WRONG_ORDER, self._wrong_order(order)))
            if returned_scores is not None:
                rules.append((Verdict.WRONG_SCORE, self._wrong_score(returned_scores)))
        for code, broken in rules:
            verdict = torch.where((verdict == Verdict.RIGHT) & broken, int(code), verdict)
        return verdict

    def _out_of_range(self) -> Tensor:
        return ((self._indices < -1) | (self._indices >= self._visible[:, None])).any(dim=1)

    def _wrong_count(self) -> Tensor:
        places = torch.arange(self._indices.shape[1], device=self._indices.device)
        return (self._given != (places[None, :] < self._expected[:, None])).any(dim=1)

    def _duplicate(self) -> Tensor:
        ordered, _ = torch.sort(self._indices, dim=1)
        return ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any(dim=1)

    def _chosen(self, values: Tensor) -> Tensor:
        return values.gather(1, self._indices.clamp(0, values.shape[1] - 1))

    def _wrong_set(self) -> Tensor:
        worst = torch.where(self._given, self._chosen(self._scores + self._bounds), torch.inf).amin(dim=1)
        columns = torch.arange(self._scores.shape[1], device=self._scores.device)
        left_out = (columns[None, :] < self._visible[:, None]).to(torch.int8)
        left_out.scatter_reduce_(
            1, self._indices.clamp(0, left_out.shape[1] - 1), (~self._given).to(torch.int8), reduce="amin"
        )
        best, where = torch.where(left_out > 0, self._scores - self._bounds, -torch.inf).max(dim=1)
        slack = 2 * self._bounds.gather(1, where[:, None])[:, 0].clamp(min=torch.finfo(torch.float64).tiny)
        # best − worst is already net of both bounds: +1 makes it a share of the whole allowance
        excess = torch.where(torch.isfinite(best) & torch.isfinite(worst), (best - worst) / slack + 1.0, 0.0)
        self.largest_excess = max(0.0, float(excess.max()))
        return best > worst

    def _wrong_order(self, order: Order) -> Tensor:
        both = self._given[:, 1:] & self._given[:, :-1]
        if order is Order.INDEX:
            return (both & (self._indices[:, 1:] <= self._indices[:, :-1])).any(dim=1)
        high, low = self._chosen(self._scores + self._bounds), self._chosen(self._scores - self._bounds)
        return (both & (low[:, 1:] > high[:, :-1])).any(dim=1)

    def _wrong_score(self, returned: Tensor) -> Tensor:
        exact, bound = self._chosen(self._scores), self._chosen(self._bounds)
        # one more rounding, to the float32 that was returned
        off = ~((returned.double() - exact).abs() <= bound + exact.abs() * _FLOAT32_UNIT)
        padding_wrong = ~self._given & (returned != -torch.inf)
        return ((self._given & off) | padding_wrong).any(dim=1)
