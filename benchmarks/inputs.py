"""Queries, gates and keys that benchmarks search."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks.harness import Model
from streamindex_service.ops import KeyFormat, PagedKeys
from streamindex_service.ops.topk.problem import visible_keys

_FILL_ROWS = 4096
_INTEGERS = (-2, 3)  # small enough that every score is exact in float32, and that many tie


@dataclass(frozen=True)
class Prefill:
    """Query rows of one sequence and the keys before them; by default a whole causal prefill.

    q: [rows, heads, head_dim] in the keys' format; w: [rows, heads] float32.
    positions: the first row's position, or one per row ([rows] int64 on the CPU).
    """

    model: Model
    q: Tensor
    w: Tensor
    keys: PagedKeys
    positions: int | Tensor = 0

    @property
    def rows(self) -> int:
        return self.q.shape[0]

    @property
    def device(self) -> torch.device:
        return self.q.device

    def visible(self) -> Tensor:
        """Keys that each row sees: [rows] int64 on the CPU."""
        return visible_keys(self.positions, 0, self.rows, self.model.ratio, self.keys.length)

    def useful_flop(self) -> int:
        """Operations of the products of every pair that is seen."""
        return self.model.pair_flop * int(self.visible().sum())

    def select(self, rows: Tensor) -> "Prefill":
        """Some of the rows, in any order, as copies. rows: [n] int64 on the CPU."""
        positions = rows + self.positions if isinstance(self.positions, int) else self.positions[rows]
        on_device = rows.to(self.device)
        # not every float format can be indexed
        q = self.q.view(torch.uint8)[on_device].view(self.q.dtype)
        return replace(self, q=q, w=self.w[on_device], positions=positions)


def make_prefill(
    model: Model,
    tokens: int,
    key_format: KeyFormat,
    device: str,
    *,
    keys: int | None = None,
    first_position: int = 0,
    values: str = "normal",
    seed: int = 0,
) -> Prefill:
    """Independent random inputs, drawn in parts so that nothing larger than the inputs is ever allocated.

    tokens: query rows, at positions from `first_position` on. keys: as many as the last row sees, unless given.
    values: "normal", or "integers" whose scores are exact in float32 and tie often.
    """
    generator = torch.Generator(device).manual_seed(seed)
    keys = model.keys(first_position + tokens) if keys is None else keys
    draw = _Draw(generator, values == "integers", key_format.torch_dtype)
    q, k = draw.whole(tokens, model.heads, model.head_dim), draw.whole(keys, model.head_dim)
    w = draw.part(tokens, model.heads)
    if not draw.integers:
        w *= model.head_dim**-0.5 * model.heads**-0.5
    scales = draw.scales(keys) if key_format.has_scales else None
    return Prefill(model, q, w, PagedKeys.from_contiguous(k, scales), first_position)


@dataclass(frozen=True)
class _Draw:
    generator: torch.Generator
    integers: bool
    dtype: torch.dtype

    def part(self, *shape: int) -> Tensor:
        """float32 of that shape."""
        device = self.generator.device
        if self.integers:
            return torch.randint(*_INTEGERS, shape, generator=self.generator, device=device).float()
        return torch.randn(shape, generator=self.generator, device=device)

    def whole(self, *shape: int) -> Tensor:
        """That shape in the format's element type, drawn a few thousand rows at a time."""
        whole = torch.empty(shape, dtype=self.dtype, device=self.generator.device)
        for start in range(0, shape[0], _FILL_ROWS):
            part = whole[start : start + _FILL_ROWS]
            part.copy_(self.part(*part.shape))
        return whole

    def scales(self, keys: int) -> Tensor:
        """[keys] float32, not powers of two; with few bits where scores are to be exact."""
        uniform = torch.rand(keys, generator=self.generator, device=self.generator.device)
        return 0.75 + 0.5 * (uniform < 0.5) if self.integers else 0.5 + uniform
