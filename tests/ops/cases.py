"""Inputs that tests of the topk operation share, on any device."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from streamindex_service.ops import KeyFormat, PagedKeys
from streamindex_service.ops.topk import KernelTiles, Order, Plan, TopkResult, topk
from streamindex_service.ops.topk.plan import kernel_tiles


def kernel_device() -> str:
    """Where the kernels run: the device if there is one, else the interpreter."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class Inputs:
    """Arguments of one search."""

    q: Tensor
    w: Tensor
    keys: PagedKeys
    positions: int | Tensor
    ratio: int = 1
    top_k: int = 64

    def search(
        self,
        implementation: str,
        *,
        order: Order = Order.SCORE,
        plan: Plan | None = None,
        want_scores: bool = True,
        workspace_bytes: int = 256 << 20,
    ) -> TopkResult:
        rows = self.q.shape[0]
        # a result must not depend on what its buffers held
        indices = torch.full((rows, self.top_k), -77, dtype=torch.int32, device=self.q.device)
        scores = torch.full((rows, self.top_k), torch.nan, device=self.q.device) if want_scores else None
        return topk(
            self.q,
            self.w,
            self.keys,
            self.positions,
            ratio=self.ratio,
            top_k=self.top_k,
            order=order,
            implementation=implementation,
            plan=plan,
            workspace_bytes=workspace_bytes,
            out_indices=indices,
            out_scores=scores,
        )

    def row(self, start: int, stop: int) -> "Inputs":
        """The same search for some of the rows."""
        positions = self.positions + start if isinstance(self.positions, int) else self.positions[start:stop]
        return replace(self, q=self.q[start:stop].contiguous(), w=self.w[start:stop].contiguous(), positions=positions)


def poisoned_keys(k: Tensor, scales: Tensor | None) -> PagedKeys:
    """Pages of `k` [keys, head_dim], each its own allocation, NaN in the rows past the length."""
    pages, scale_pages = [], []
    for start in range(0, k.shape[0], 256):
        page = torch.full((256, k.shape[1]), torch.nan, device=k.device).to(k.dtype)
        part = k[start : start + 256]
        page[: part.shape[0]].copy_(part)
        pages.append(page)
        if scales is not None:
            scale_page = torch.full((256,), torch.nan, device=k.device)
            scale_page[: part.shape[0]] = scales[start : start + 256]
            scale_pages.append(scale_page)
    key_format = KeyFormat.from_torch_dtype(k.dtype)
    return PagedKeys(
        key_format, k.shape[1], k.shape[0], tuple(pages), tuple(scale_pages) if scales is not None else None
    )


def make_inputs(
    *,
    rows: int,
    heads: int,
    head_dim: int,
    keys: int,
    key_format: KeyFormat,
    top_k: int,
    ratio: int = 1,
    positions: int | Tensor | None = None,
    values: str = "normal",
    gates: str = "mixed",
    device: str = "cpu",
    seed: int = 0,
) -> Inputs:
    """Random inputs. values: "normal", or "integers" whose scores are exact in float32 and tie often. gates: mixed,
    negative, positive.

    positions None: the last rows of the sequence, so that the last row sees every key.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        if values == "integers":
            return torch.randint(-2, 3, shape, generator=generator).float()
        return torch.randn(shape, generator=generator)

    dtype = key_format.torch_dtype
    w = draw(rows, heads)
    if gates != "mixed":
        w = w.abs().clamp(min=0.5) * (1 if gates == "positive" else -1)
    scales = None
    if key_format.has_scales:
        # not powers of two; exact with integers all the same: 0.75 and 1.25 have few bits
        steps = torch.randint(0, 2, (keys,), generator=generator)
        scales = (0.75 + 0.5 * steps) if values == "integers" else 0.3 + torch.rand(keys, generator=generator)
        scales = scales.to(device)
    if positions is None:
        positions = max(0, keys * ratio - rows)
    k, q = draw(keys, head_dim).to(dtype).to(device), draw(rows, heads, head_dim).to(dtype).to(device)
    return Inputs(q, w.to(device), poisoned_keys(k, scales), positions, ratio, top_k)


def small_plan(inputs: Inputs, query_chunk: int, key_tile: int, **changes: int) -> Plan:
    """A plan whose blocks are small, so that few rows and keys still make many blocks."""
    tiles = kernel_tiles(inputs.keys.format.value, inputs.q.shape[1], inputs.q.shape[2])
    return Plan(query_chunk, key_tile, 0, shrunk(tiles, **changes))


SMALL = {
    "query_group": 16, "select_lanes": 128, "select_block": 256, "filter_keys": 256, "sample_every": 4,
    "sample_line": 8, "sample_lanes": 512, "mark_block": 512, "collect_words": 4,
}  # fmt: skip


def shrunk(tiles: KernelTiles, **changes: int) -> KernelTiles:
    return replace(tiles, **SMALL | changes)


def same(left: TopkResult, right: TopkResult) -> bool:
    """Bitwise equality of indices and scores."""
    if not torch.equal(left.indices, right.indices):
        return False
    if left.scores is None or right.scores is None:
        return left.scores is right.scores
    return torch.equal(left.scores.view(torch.int32), right.scores.view(torch.int32))
