"""Inputs that tests of sparse attention share, on any device."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from streamindex_service.ops.kv_rows import KvFormat, KvRows, pack_rows
from streamindex_service.ops.paged_kv_rows import JoinedKvRows, PagedKvRows, PlacedKvRows
from streamindex_service.ops.sparse_attention import (
    AttentionResult,
    CheckReport,
    Plan,
    check_sparse_attention,
    sparse_attention,
)


@dataclass(frozen=True)
class Inputs:
    """Arguments of one attention."""

    q: Tensor
    kv: KvRows
    indices: Tensor
    sink: Tensor | None
    scale: float
    value_dim: int

    def attend(self, implementation: str, plan: Plan | None = None) -> AttentionResult:
        tokens, heads, _ = self.q.shape
        # a result must not depend on what its buffers held
        out = torch.full((tokens, heads, self.value_dim), torch.nan, dtype=torch.bfloat16, device=self.q.device)
        lse = torch.full((tokens, heads), torch.nan, device=self.q.device)
        return sparse_attention(
            self.q, self.kv, self.indices, scale=self.scale, sink=self.sink, value_dim=self.value_dim,
            implementation=implementation, out=out, out_lse=lse, plan=plan,
        )  # fmt: skip

    def attend_in_pages(self, plan: Plan | None = None, allocations: int = 1) -> AttentionResult:
        """By the kernels, of the same rows in scattered pages."""
        tokens, heads, _ = self.q.shape
        kv, places = in_pages(self.kv, self.indices, allocations)
        out = torch.full((tokens, heads, self.value_dim), torch.nan, dtype=torch.bfloat16, device=self.q.device)
        lse = torch.full((tokens, heads), torch.nan, device=self.q.device)
        return sparse_attention(
            self.q, kv, places, scale=self.scale, sink=self.sink, value_dim=self.value_dim, implementation="triton",
            out=out, out_lse=lse, plan=plan,
        )  # fmt: skip

    def judge(self, result: AttentionResult, *, rounds_rows: bool = False) -> CheckReport:
        return check_sparse_attention(
            result.out, result.lse, self.q, self.kv, self.indices, scale=self.scale, sink=self.sink,
            rounds_rows=rounds_rows,
        )  # fmt: skip

    def part(self, start: int, stop: int) -> "Inputs":
        """The same attention of some of the tokens."""
        return replace(self, q=self.q[start:stop].contiguous(), indices=self.indices[start:stop].contiguous())


def make_inputs(
    *,
    tokens: int,
    heads: int,
    width: int,
    rows: int = 300,
    key_dim: int = 64,
    value_dim: int = 64,
    kv_format: KvFormat = KvFormat.BF16,
    sink: bool = True,
    amplitude: float = 1.0,
    poison: bool = True,
    device: str = "cpu",
    seed: int = 0,
) -> Inputs:
    """Random inputs: a twentieth of the entries −1, another out of range, some twice. amplitude: of the queries.

    poison: bf16 rows that no entry names are NaN, as memory of somebody else's may be.
    """
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn((rows, key_dim), generator=generator)
    indices = torch.randint(0, rows, (tokens, width), generator=generator, dtype=torch.int32)
    fate = torch.rand((tokens, width), generator=generator)
    indices[fate < 0.05] = -1
    indices[(fate > 0.05) & (fate < 0.1)] = rows + 3
    indices[fate > 0.9] = 7
    if poison and kv_format is KvFormat.BF16:
        unused = torch.ones(rows + 4, dtype=torch.bool)
        unused[indices.long().clamp(min=0)] = False
        keys[unused[:rows]] = torch.nan
    kv = pack_rows(keys, kv_format)
    kv = KvRows(kv.format, kv.data.to(device), None if kv.scales is None else kv.scales.to(device))
    q = amplitude * torch.randn((tokens, heads, key_dim), generator=generator)
    logits = torch.randn(heads, generator=generator).to(device) if sink else None
    return Inputs(q.bfloat16().to(device), kv, indices.to(device), logits, key_dim**-0.5, value_dim)


DeviceShape = tuple[int, int, int, int, KvFormat]  # tokens, heads, width, key_dim, format


def shape_name(shape: DeviceShape) -> str:
    """Of a case of a device."""
    tokens, heads, width, key_dim, kv_format = shape
    return f"T{tokens}-H{heads}-W{width}-D{key_dim}-{kv_format.value}"


def device_case(shape: DeviceShape, **changes: Any) -> Inputs:
    """Inputs of real sizes, with a token that has nothing to attend, one that ends early and one that begins late."""
    tokens, heads, width, key_dim, kv_format = shape
    defaults = {"rows": 20_000, "value_dim": 512, "device": "cuda", "kv_format": kv_format, "key_dim": key_dim}
    inputs = make_inputs(tokens=tokens, heads=heads, width=width, **defaults | changes)
    if tokens > 2:
        inputs.indices[0] = -1
        inputs.indices[1, width // 3 :] = -1
        inputs.indices[2, : width // 2] = 20_000
    return inputs


def with_scales(inputs: Inputs, least: int, most: int, *, powers: bool = True, seed: int = 9) -> Inputs:
    """The same 8-bit numbers with other scales, between these powers of two. powers: scales that are powers of two,
    else any. Of float32 scales half are negative, and a fifth zero."""
    kv, generator = inputs.kv, torch.Generator().manual_seed(seed)
    packing = kv.format.packed
    assert packing is not None
    shape = (kv.rows, packing.scale_bytes or packing.narrow // packing.group)
    exponents = torch.randint(least, most + 1, shape, generator=generator)
    if packing.scale_bytes:
        return replace(inputs, kv=replace(kv, scales=(exponents + 127).to(torch.uint8).to(kv.device)))
    wide = torch.exp2(exponents.double()) * (1.0 if powers else 1.0 + torch.rand(shape, generator=generator))
    fate = torch.rand(shape, generator=generator)
    wide = torch.where(fate < 0.5, -wide, wide).masked_fill(fate > 0.8, 0.0)
    data = kv.data.clone()
    data[:, packing.narrow : packing.rotary_offset] = wide.float().contiguous().view(torch.uint8).to(kv.device)
    return replace(inputs, kv=replace(kv, data=data))


def with_one_large_scale(inputs: Inputs, apart: int) -> Inputs:
    """The same 8-bit numbers, scales of the first group 1 and all others 2^-apart."""
    kv, packing = inputs.kv, inputs.kv.format.packed
    assert packing is not None
    scales = torch.full((kv.rows, packing.scale_bytes or packing.narrow // packing.group), 2.0**-apart)
    scales[:, 0] = 1.0
    if packing.scale_bytes:
        return replace(inputs, kv=replace(kv, scales=(scales.log2() + 127).to(torch.uint8).to(kv.device)))
    data = kv.data.clone()
    data[:, packing.narrow : packing.rotary_offset] = scales.view(torch.uint8).to(kv.device)
    return replace(inputs, kv=replace(kv, data=data))


def with_scales_by_amax(inputs: Inputs, seed: int = 3) -> Inputs:
    """Rows of 656 bytes as some model servers pack them: amax / 448 is the scale, which is no power of two."""
    packing = KvFormat.FP8_D576.packed
    assert packing is not None
    keys = torch.randn((inputs.kv.rows, packing.key_dim), generator=torch.Generator().manual_seed(seed))
    groups = keys[:, : packing.narrow].reshape(len(keys), -1, packing.group)
    scales = groups.abs().amax(dim=2) / 448.0
    data = pack_rows(keys, KvFormat.FP8_D576).data
    narrow = (groups / scales[:, :, None]).clamp(-448.0, 448.0).flatten(1).to(torch.float8_e4m3fn)
    data[:, : packing.narrow] = narrow.view(torch.uint8)
    data[:, packing.narrow : packing.rotary_offset] = scales.contiguous().view(torch.uint8)
    return replace(inputs, kv=KvRows(KvFormat.FP8_D576, data.to(inputs.kv.device)))


def one_row_each(
    kv_format: KvFormat, *, heads: int, device: str, powers: bool = True, spread: int | None = None
) -> Inputs:
    """Tokens that attend to one row each, so that an output is that row's value: rows of every 8-bit number with scales
    far apart. powers: scales that are powers of two, else any; spread: the most powers of two between two of them."""
    packing = kv_format.packed
    assert packing is not None
    generator = torch.Generator().manual_seed(5)
    codes = torch.arange(256, dtype=torch.uint8)
    codes = codes[(codes & 0x7F) != 0x7F]  # NaN
    rows = 70
    kv = pack_rows(torch.randn((rows, packing.key_dim), generator=generator), kv_format)
    data, scales = kv.data.clone(), kv.scales
    chosen = torch.randint(0, len(codes), (rows, packing.narrow), generator=generator)
    chosen[0, : len(codes)] = torch.arange(len(codes))
    data[:, : packing.narrow] = codes[chosen]
    if scales is not None:
        least, above = (40, 200) if spread is None else (120, 121 + spread)
        scales = torch.randint(least, above, scales.shape, generator=generator, dtype=torch.uint8)
    else:
        least, above = (-60, 60) if spread is None else (-7, spread - 6)
        exponents = torch.randint(least, above, (rows, packing.narrow // packing.group), generator=generator).float()
        wide = torch.exp2(exponents) * (1.0 if powers else 1.0 + torch.rand(exponents.shape, generator=generator))
        data[:, packing.narrow : packing.rotary_offset] = wide.contiguous().view(torch.uint8)
    kv = KvRows(kv_format, data.to(device), None if scales is None else scales.to(device))
    indices = torch.full((rows, 3), -1, dtype=torch.int32)
    indices[:, 1] = torch.arange(rows)
    q = torch.zeros((rows, heads, packing.key_dim), dtype=torch.bfloat16)
    return Inputs(q.to(device), kv, indices.to(device), None, 1.0, 512)


def paged(rows: KvRows, allocations: int = 2) -> PagedKvRows:
    """The rows in pages that lie scattered, in so many allocations, with nonsense behind the last row."""
    data = rows.data.contiguous().view(torch.uint8)
    size = 256 * rows.row_bytes
    count = -(-rows.rows // 256)
    extents = [torch.full((count * size,), 0xFF, dtype=torch.uint8, device=rows.device) for _ in range(allocations)]
    pages = []
    for number in range(count):
        page = extents[number % allocations][(count - 1 - number) * size :][:size]
        part = slice(256 * number, 256 * (number + 1))
        held = data[part]
        page[: held.numel()] = held.flatten()
        if rows.scales is not None:
            beside = rows.scales[part]
            page[256 * data.shape[1] :][: beside.numel()] = beside.flatten()
        pages.append(page)
    return PagedKvRows(rows.format, rows.key_dim, rows.rows, tuple(pages))


def in_pages(rows: KvRows, indices: Tensor, allocations: int = 1) -> tuple[PlacedKvRows, Tensor]:
    """The rows in scattered pages, and the places of what the indices name."""
    joined = JoinedKvRows((paged(rows, allocations),))
    valid = (indices >= 0) & (indices < rows.rows)
    row = torch.where(valid, indices, 0).long()
    places = joined.unit_table(rows.device)[row >> 8] << 8 | row & 255
    return joined.placed(rows.device), torch.where(valid, places, indices.long().clamp(max=-1))
