"""What `attend_calls` measures: layers of models, the caches and queries of one, and whether its answers are right.

A case's packed rows, fp8 keys and queries are random. Sequence i stands 128 · i tokens before the end of the context,
so that lengths differ and windows share no row; window rows are uploaded once and the caches are forks of that, all
other rows are each sequence's own.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from streamindex_client import Client, KeyCache, KvSpec
from torch import Tensor

from benchmarks import attention, attention_decode, harness
from benchmarks.attend_steps import CALLERS, Arrays
from benchmarks.attention import AttentionModel
from benchmarks.attention_decode import make_rows
from benchmarks.harness import Model
from streamindex_service.demo.workload import quantise_keys, quantise_queries
from streamindex_service.ops import KvRows, PagedKeys
from streamindex_service.ops.paged_keys import PAGE_KEYS
from streamindex_service.ops.sparse_attention import check_sparse_attention
from streamindex_service.ops.topk import check_topk

STRIDE = 128  # tokens from the end of one sequence to that of the next
NO_INDEX = Model("none", heads=1, head_dim=16, ratio=1, top_k=1)  # of a cache that no search reads


@dataclass(frozen=True)
class Case:
    """A layer of a model. index: its indexer, None if a token attends all rows that it sees; steps: sequences of each
    kind of step; rows: of the prefill, 0 for none."""

    attention: AttentionModel
    index: Model | None
    context: int
    steps: tuple[int, ...] = (1, 32)
    rows: int = 0

    @property
    def name(self) -> str:
        return f"{self.attention.name} H={self.attention.heads} S={self.context}"

    @property
    def sequences(self) -> int:
        """Caches that it needs: four callers of single sequences have one each."""
        return max(CALLERS, *self.steps) if self.steps else 1

    @property
    def scale(self) -> float:
        return float(self.attention.key_dim**-0.5)


def cases_of(device: str, *, quick: bool) -> list[Case]:
    """What is measured there."""
    flash, v3_2, hca = attention.V4_FLASH, attention.V3_2, attention_decode.V4_HCA
    if device == "cpu":
        index = Model("tiny", heads=4, head_dim=32, ratio=4, top_k=24)
        return [
            Case(replace(flash, heads=4, top_k=24, window=16), index, 1024, steps=(1, 4), rows=96),
            Case(replace(v3_2, heads=4, top_k=24), replace(index, ratio=1), 768, steps=(4,), rows=64),
            Case(replace(hca, heads=4, top_k=8, window=16), None, 1024, steps=(4,)),
        ]
    context, rows = (16_384, 1024) if quick else (65_536, 4096)
    few, whole = replace(v3_2, heads=16), replace(hca, top_k=4 * context // hca.ratio)
    found = [
        Case(flash, harness.V4_FLASH, context, rows=rows),
        Case(few, harness.V3_2, context, rows=rows),
        Case(replace(whole, heads=16), None, 4 * context),
    ]
    if not quick:
        found += [
            Case(v3_2, harness.V3_2, context),
            Case(whole, None, 4 * context),
            Case(replace(v3_2, heads=8), harness.V3_2, 262_144, steps=(), rows=rows),
        ]
    return found


@dataclass(frozen=True)
class Held:
    """A sequence: its cache, and what was uploaded, on the judge's device. position: of its last token."""

    cache: KeyCache
    position: int
    kv: KvRows
    window: KvRows | None
    keys: PagedKeys | None


@dataclass(frozen=True)
class Queries:
    """q [rows, heads, key_dim] bf16; index_q [rows, index heads, head_dim] e4m3 and index_w [rows, index heads] float32
    if there is an indexer; sink [heads] float32 if there is a window."""

    q: Tensor
    index_q: Tensor | None
    index_w: Tensor | None
    sink: Tensor | None

    @classmethod
    def drawn(cls, case: Case, rows: int, device: str, seed: int) -> Queries:
        generator = torch.Generator(device).manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device)

        model, index = case.attention, case.index
        q, sink = normal(rows, model.heads, model.key_dim).bfloat16(), normal(model.heads) if model.window else None
        if index is None:
            return cls(q, None, None, sink)
        gates = normal(rows, index.heads) * (index.heads * index.head_dim) ** -0.5
        return cls(q, *quantise_queries(normal(rows, index.heads, index.head_dim), gates), sink)

    def select(self, rows: Tensor) -> Queries:
        """Some rows, on the CPU or on the queries' device."""
        which = rows.to(self.q.device)
        if self.index_q is None or self.index_w is None:
            return replace(self, q=self.q[which])
        index_q = self.index_q.view(torch.uint8)[which].view(self.index_q.dtype)  # fp8 cannot be indexed
        return replace(self, q=self.q[which], index_q=index_q, index_w=self.index_w[which])

    def arrays(self) -> Arrays:
        """As a caller sends them."""
        tensors = {"q": self.q, "index_q": self.index_q, "index_w": self.index_w, "sink": self.sink}
        return {name: bits(tensor) for name, tensor in tensors.items() if tensor is not None}


def bits(tensor: Tensor) -> npt.NDArray[Any]:
    """On the host, with bf16 and fp8 as unsigned integers: a client that gets numpy arrays copies no answer."""
    if tensor.dtype is torch.bfloat16:
        return tensor.view(torch.int16).cpu().numpy().view(np.uint16)
    if tensor.dtype is torch.float8_e4m3fn:
        tensor = tensor.view(torch.uint8)
    found: npt.NDArray[Any] = tensor.cpu().numpy()
    return found


def from_bits(array: npt.NDArray[np.uint16]) -> Tensor:
    """Such bits as bf16."""
    return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)


def upload(case: Case, client: Client, device: str) -> Iterator[Held]:
    """Make and fill the caches of a case; the last stands at the end of the context."""
    model, index = case.attention, case.index or replace(NO_INDEX, ratio=case.attention.ratio)
    generator = torch.Generator(device).manual_seed(1)
    first = client.create_key_cache(
        heads=index.heads, head_dim=index.head_dim, ratio=model.ratio, key_format="fp8_e4m3", layers=1,
        kv=KvSpec(model.packed.value, model.key_dim, model.value_dim, model.heads),
    )  # fmt: skip
    window = make_rows(model, case.context, model.packed, generator) if model.window else None
    if window is not None:
        first.append(layer=0, window_rows=window.data, scales=window.scales, first_row=0)
    caches = [first.fork() for _ in range(1, case.sequences)]
    for number, cache in enumerate([*caches, first]):  # what is forked must be without keys
        position = case.context - 1 - STRIDE * (case.sequences - 1 - number)
        seen = (position + 1) // model.ratio
        kv, keys = make_rows(model, seen, model.packed, generator), None
        if case.index is not None:
            drawn = torch.randn((seen, index.head_dim), generator=generator, device=device)
            values, scales = quantise_keys(drawn)
            keys = PagedKeys.from_contiguous(values, scales)
            cache.append(layer=0, keys=values, scales=scales, first_row=0)
        cache.append(layer=0, kv_rows=kv.data, scales=kv.scales, first_row=0)
        yield Held(cache, position, kv, window, keys)


def appended(case: Case, some: Sequence[Held]) -> Arrays:
    """What items append that bring the rows of their tokens again, which are there already: the last KV row and key,
    of which a token has `1 / ratio`, and its window row."""
    last = np.array([(held.position + 1) // case.attention.ratio - 1 for held in some])
    found: Arrays = {"first_kv_row": last, **_rows_at("kv", [held.kv for held in some], last)}
    windows = [held.window for held in some if held.window is not None]
    if windows:
        positions = np.array([held.position for held in some])
        found |= {"first_window_row": positions, **_rows_at("window", windows, positions)}
    if case.index is not None:
        keys, scales = zip(*(_last_key(held) for held in some), strict=True)
        found |= {"first_key": last, "keys": np.concatenate(keys), "key_scales": np.concatenate(scales)}
    return found


def _rows_at(kind: str, rows: Sequence[KvRows], which: npt.NDArray[np.int64]) -> Arrays:
    """One of each: [sequences, 1, bytes], and its scales if it has such."""
    found = {f"{kind}_rows": np.stack([bits(each.data[at : at + 1]) for each, at in zip(rows, which, strict=True)])}
    scales = [each.scales[at : at + 1] for each, at in zip(rows, which, strict=True) if each.scales is not None]
    return found | ({f"{kind}_scales": np.stack([bits(each) for each in scales])} if scales else {})


def _last_key(held: Held) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32]]:
    """[1, 1, head_dim] the bits of e4m3, and [1, 1] its scale."""
    assert held.keys is not None
    assert held.keys.scale_pages is not None
    page, row = divmod(held.keys.length - 1, PAGE_KEYS)
    which = slice(row, row + 1)
    return bits(held.keys.pages[page][which])[None], bits(held.keys.scale_pages[page][which])[None]


@dataclass(frozen=True)
class Judged:
    """Rows that were looked at, how many were wrong, and the largest error."""

    rows: int = 0
    wrong: int = 0
    largest: float = 0.0

    def __add__(self, other: Judged) -> Judged:
        return Judged(self.rows + other.rows, self.wrong + other.wrong, max(self.largest, other.largest))


def judge(
    case: Case,
    held: Held,
    queries: Queries,
    positions: Tensor,
    indices: npt.NDArray[np.int32],
    out: npt.NDArray[np.uint16],
) -> Judged:
    """Indices [rows, entries] and outputs [rows, heads, value_dim], the bits of bf16, of one sequence against float64.
    positions: [rows] int64 on the CPU."""
    device, window = held.kv.device, case.attention.window
    entries = torch.from_numpy(indices).to(device)
    wrong = torch.zeros(len(out), dtype=torch.bool)
    if case.index is not None:
        assert held.keys is not None
        assert queries.index_q is not None
        assert queries.index_w is not None
        found = check_topk(
            entries, queries.index_q, queries.index_w, held.keys, positions, ratio=case.index.ratio,
            top_k=case.index.top_k,
        )  # fmt: skip
        wrong |= found.verdicts.cpu() != 0
    rows = held.kv
    if held.window is not None:
        tokens = positions[:, None] - window + 1 + torch.arange(window)
        recent = torch.where(tokens >= 0, rows.rows + tokens, -1).to(device, torch.int32)
        entries, rows = torch.cat([recent, entries], dim=1), joined(rows, held.window)
    answers = from_bits(out).to(device)
    report = check_sparse_attention(answers, None, queries.q, rows, entries, scale=case.scale, sink=queries.sink)
    wrong |= report.wrong
    if wrong.any():
        print(f"{case.name}: {int(wrong.sum())} wrong rows, error {report.largest_error} of its bound", file=sys.stderr)
    return Judged(len(out), int(wrong.sum()), report.largest_error)


def joined(one: KvRows, other: KvRows) -> KvRows:
    """The rows of both."""
    scales = None if one.scales is None or other.scales is None else torch.cat([one.scales, other.scales])
    return KvRows(one.format, torch.cat([one.data, other.data]), scales)
