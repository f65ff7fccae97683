"""Keys and queries of a demo: the data set that ships with the service, or seeded random ones of any size."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from streamindex_service.demo.options import DemoOptions
from streamindex_service.ops.formats import KeyFormat

DATA = Path(__file__).parents[1] / "data"
# Random queries are made once and repeat, at other positions, beyond this: memory stays bounded for any number.
_DISTINCT_QUERY_BYTES = 64 << 20
_MADE_AT_A_TIME_ELEMENTS = 8 << 20
_BLOCK_BYTES = 4 << 20
_E4M3_MAX = 448.0


@dataclass(frozen=True)
class Text:
    """Where the keys come from: key s is the token at characters `spans[s]`."""

    text: str
    spans: list[tuple[int, int]]
    source: str


@dataclass(frozen=True)
class Workload:
    """What is uploaded and what is searched.

    k: [keys, head_dim] and q: [distinct, heads, head_dim] in the key format; scales: [keys] float32 or None;
    w: [distinct, heads] float32; positions: [queries] int64. Row i of the search has query i modulo `distinct`.
    """

    k: Tensor
    scales: Tensor | None
    q: Tensor
    w: Tensor
    positions: Tensor
    ratio: int
    key_format: KeyFormat
    text: Text | None = None

    @property
    def rows(self) -> int:
        """Query rows of the search."""
        return len(self.positions)

    @property
    def key_bytes(self) -> int:
        """Bytes of keys and scales."""
        return self.k.nbytes + (self.scales.nbytes if self.scales is not None else 0)

    @property
    def repeats(self) -> bool:
        """Whether queries come more than once."""
        return self.rows > len(self.q)

    def select(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, w and positions of some rows of the search."""
        which = rows % len(self.q)
        return self.q[which], self.w[which], self.positions[rows]

    def blocks(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """The whole search as consecutive (q, w, positions) views of a few MiB."""
        step = max(1, _BLOCK_BYTES // self.q[0].nbytes)
        start = 0
        while start < self.rows:
            first = start % len(self.q)
            count = min(step, len(self.q) - first, self.rows - start)
            part = slice(first, first + count)
            yield self.q[part], self.w[part], self.positions[start : start + count]
            start += count


def load_workload(options: DemoOptions) -> Workload:
    """The keys and queries that the options ask for."""
    return _synthetic(options) if options.synthetic or options.pipeline else _real(options)


def quantise_keys(k: Tensor) -> tuple[Tensor, Tensor]:
    """float32 keys [keys, head_dim] to e4m3 and one power-of-two scale a row (the reference quantiser)."""
    scales = _scales(k)
    values = (k / scales[:, None]).clamp(-_E4M3_MAX, _E4M3_MAX).to(torch.float8_e4m3fn)
    return values, scales


def quantise_queries(q: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """float32 queries [rows, heads, head_dim] to e4m3; each head's scale goes into its gate."""
    scales = _scales(q)
    values = (q / scales[..., None]).clamp(-_E4M3_MAX, _E4M3_MAX).to(torch.float8_e4m3fn)
    return values, w * scales


def _scales(values: Tensor) -> Tensor:
    return torch.exp2(torch.ceil(torch.log2(values.abs().amax(dim=-1).clamp(min=1e-4) / _E4M3_MAX)))


def _convert(k: Tensor, key_format: KeyFormat) -> tuple[Tensor, Tensor | None]:
    if key_format.has_scales:
        return quantise_keys(k.float())
    return k.to(key_format.torch_dtype), None


def _convert_queries(q: Tensor, w: Tensor, key_format: KeyFormat) -> tuple[Tensor, Tensor]:
    if key_format.has_scales:
        return quantise_queries(q.float(), w)
    return q.to(key_format.torch_dtype), w


def _real(options: DemoOptions) -> Workload:
    key_format = KeyFormat(options.key_format)
    tensors = load_file(DATA / "demo_16k.safetensors")
    described = json.loads((DATA / "demo_16k_text.json").read_text())
    rows = slice(0, options.query_count)
    k, scales = _convert(tensors["k"][: options.key_count].contiguous(), key_format)
    q, w = _convert_queries(tensors["q"][rows].contiguous(), tensors["w"][rows].contiguous(), key_format)
    text = Text(described["text"], [(a, b) for a, b in described["token_spans"]], described["source"])
    return Workload(k, scales, q, w, tensors["position"][rows].to(torch.int64), 1, key_format, text)


def _synthetic(options: DemoOptions) -> Workload:
    key_format = KeyFormat(options.key_format)
    generator = torch.Generator().manual_seed(options.seed)
    heads, head_dim, keys, rows = options.heads, options.head_dim, options.key_count, options.query_count
    row_bytes = heads * head_dim * key_format.element_bytes
    distinct = min(rows, max(1, _DISTINCT_QUERY_BYTES // row_bytes))
    k = torch.empty((keys, head_dim), dtype=key_format.torch_dtype)
    scales = torch.empty(keys) if key_format.has_scales else None
    for part in _parts(keys, head_dim):
        values, part_scales = _convert(torch.randn((part.stop - part.start, head_dim), generator=generator), key_format)
        k[part] = values
        if scales is not None and part_scales is not None:
            scales[part] = part_scales
    q = torch.empty((distinct, heads, head_dim), dtype=key_format.torch_dtype)
    w = torch.empty((distinct, heads))
    for part in _parts(distinct, heads * head_dim):
        count = part.stop - part.start
        gates = torch.randn((count, heads), generator=generator) * (heads * head_dim) ** -0.5
        q[part], w[part] = _convert_queries(
            torch.randn((count, heads, head_dim), generator=generator), gates, key_format
        )
    # spread evenly over the whole sequence, so that short and long rows both occur
    tokens = keys * options.tokens_per_key
    positions = (torch.arange(1, rows + 1) * tokens // rows - 1).clamp(min=0)
    return Workload(k, scales, q, w, positions, options.tokens_per_key, key_format)


def _parts(rows: int, row_elements: int) -> Iterator[slice]:
    step = max(1, _MADE_AT_A_TIME_ELEMENTS // row_elements)
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))
