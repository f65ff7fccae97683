"""Attention over rows in scattered pages on a CUDA device: every kernel reads what lies there, bit for bit as if it
were one tensor, however far apart the pages are."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from streamindex_service.ops.cached_attention import ATTENTION_TERMS, AllVisible, CachedSequence, attend_cached
from streamindex_service.ops.extent_pages import ExtentPages
from streamindex_service.ops.kv_rows import KvFormat, KvRows, pack_rows
from streamindex_service.ops.paged_kv_rows import PagedKvRows
from streamindex_service.ops.sparse_attention import (
    AttentionResult,
    check_sparse_attention,
    plan_for,
    sparse_attention,
)
from tests.ops.attention_cases import device_case, paged, shape_name

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.timeout(300),
]
# tokens, heads, width, key_dim, format
SHAPES = [
    (300, 64, 640, 512, KvFormat.BF16),
    (150, 128, 2048, 576, KvFormat.BF16),
    (300, 33, 333, 576, KvFormat.BF16),
    (300, 5, 333, 512, KvFormat.BF16),
    (300, 64, 640, 512, KvFormat.FP8_D512),
    (150, 128, 2048, 576, KvFormat.FP8_D576),
    (300, 33, 333, 512, KvFormat.FP8_D512),
    (300, 33, 333, 576, KvFormat.FP8_D576),
    (33, 16, 640, 512, KvFormat.FP8_D512),
    (33, 20, 2048, 576, KvFormat.FP8_D576),
    (1, 8, 1152, 512, KvFormat.FP8_D512),
]


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("shape", SHAPES, ids=shape_name)
def test_rows_in_pages_give_the_bits_of_rows_in_one_tensor(shape, splits):
    inputs = device_case(shape)
    tokens, heads, width, key_dim, kv_format = shape
    plan = plan_for(
        "triton", "cuda", kv_format, tokens=tokens, heads=heads, key_dim=key_dim, value_dim=512, width=width,
    )  # fmt: skip
    assert plan is not None
    plan = replace(plan, splits=splits)
    expected = inputs.attend("triton", plan)
    report = inputs.judge(expected)
    assert report.wrong_rows == 0, report
    result = inputs.attend_in_pages(plan, allocations=3)
    assert torch.equal(result.out, expected.out)
    assert result.lse is not None
    assert expected.lse is not None
    assert torch.equal(result.lse, expected.lse)


def test_pages_that_lie_far_apart():
    """72 GiB between the first page and the last: no distance in rows or bytes fits 32 bits."""
    size_bytes = 72 << 30
    if torch.cuda.mem_get_info()[0] < size_bytes + (10 << 30):
        pytest.skip("needs 82 GiB of free device memory")
    extent = torch.empty(size_bytes, dtype=torch.uint8, device="cuda")
    try:
        for kv_format, key_dim, heads in [
            (KvFormat.BF16, 512, 64),
            (KvFormat.BF16, 512, 16),
            (KvFormat.FP8_D512, 512, 64),
            (KvFormat.FP8_D512, 512, 16),
            (KvFormat.FP8_D512, 512, 40),
            (KvFormat.FP8_D576, 576, 128),
            (KvFormat.FP8_D576, 576, 8),
        ]:
            _attend_far_apart(extent, kv_format, key_dim, heads)
    finally:
        del extent
        torch.cuda.empty_cache()


def _attend_far_apart(extent: torch.Tensor, kv_format: KvFormat, key_dim: int, heads: int) -> None:
    generator = torch.Generator().manual_seed(3)
    rows = pack_rows(torch.randn((512, key_dim), generator=generator), kv_format)
    kv = KvRows(kv_format, rows.data.cuda(), None if rows.scales is None else rows.scales.cuda())
    near = paged(kv, 1)
    starts = np.array([extent.numel() - near.page_bytes, 0], dtype=np.int64) // 512 * 512
    for page, start in zip(near.pages, starts.tolist(), strict=True):
        extent[start : start + near.page_bytes] = page
    pages = ExtentPages([extent], np.zeros(2, dtype=np.int64), starts, (near.page_bytes,), torch.uint8)
    sequence = CachedSequence(3, PagedKvRows(kv_format, key_dim, 512, pages), PagedKvRows(kv_format, key_dim, 0, ()))
    q = torch.randn((3, heads, key_dim), generator=generator).bfloat16().cuda()
    indices = torch.randint(-1, 520, (3, 200), generator=generator, dtype=torch.int32).cuda()
    answer = attend_cached(
        q, indices, torch.zeros(3, dtype=torch.int64), [sequence], window=0, scale=0.05, sink=None, value_dim=512,
        implementation="triton", workspace_bytes=16 << 20, want_lse=True,
    )  # fmt: skip
    plan = plan_for("triton", "cuda", kv_format, tokens=3, heads=heads, key_dim=key_dim, value_dim=512, width=200)
    assert plan is not None
    expected = sparse_attention(
        q, kv, indices, scale=0.05, value_dim=512, implementation="triton", want_lse=True, plan=replace(plan, splits=1)
    )
    assert torch.equal(answer.out, expected.out), (kv_format, heads)
    assert answer.lse is not None
    assert expected.lse is not None
    assert torch.equal(answer.lse, expected.lse), (kv_format, heads)


@pytest.mark.parametrize(
    ("kv_format", "key_dim", "heads", "ratio"),
    [
        (KvFormat.FP8_D512, 512, 16, 128),
        (KvFormat.FP8_D512, 512, 64, 128),
        (KvFormat.BF16, 512, 64, 128),
        (KvFormat.FP8_D576, 576, 128, 1),
        (KvFormat.BF16, 512, 16, 4),
    ],
)
def test_all_visible_rows_whatever_the_neighbours(kv_format, key_dim, heads, ratio):
    """Right, and the same bits as alone, whatever others see and whatever the layer has beyond."""
    most, window = 5000, 128
    generator = torch.Generator().manual_seed(11)

    def drawn(count: int) -> KvRows:
        packed = pack_rows(torch.randn((count, key_dim), generator=generator), kv_format)
        return KvRows(kv_format, packed.data.cuda(), None if packed.scales is None else packed.scales.cuda())

    rows, recent = drawn(most), drawn(ratio * most if ratio < 100 else 40_000)
    held = recent.rows
    seen = [most, 1, 0, 900, 333, 2048] + [17 * number for number in range(60)]
    positions = [min(max(ratio * count - 1, 0), held - 1) for count in seen]
    sequence = CachedSequence(1, paged(rows), paged(recent))
    q = torch.randn((len(seen), heads, key_dim), generator=generator).bfloat16().cuda()
    asked = {
        "window": window, "scale": key_dim**-0.5, "sink": None, "value_dim": 512, "implementation": "triton",
        "workspace_bytes": ATTENTION_TERMS["triton"].least_bytes, "want_lse": True, "parts": 4,
    }  # fmt: skip
    whole = AllVisible(ratio)
    answer = attend_cached(q, whole, torch.tensor(positions), [sequence] * len(seen), **asked)
    assert answer.lse is not None
    for row in (0, 1, 2, 3, 5, 6, 40, 65):
        few = (positions[row] + 1) // ratio + 1
        cut = KvRows(kv_format, rows.data[:few], None if rows.scales is None else rows.scales[:few])
        short = CachedSequence(1, paged(cut), paged(recent))
        alone = attend_cached(q[row : row + 1], whole, torch.tensor(positions[row : row + 1]), [short], **asked)
        assert torch.equal(alone.out[0], answer.out[row]), row
        assert torch.equal(alone.lse[0], answer.lse[row]), row
    at = torch.tensor(positions)
    row = torch.arange(most)
    visible = torch.where(row < ((at + 1) // ratio)[:, None], row, -1)
    tokens = at[:, None] - window + 1 + torch.arange(window)
    flat = torch.cat([torch.where(tokens >= 0, tokens + most, -1), visible], dim=1).to(torch.int32)
    scales = None if rows.scales is None else torch.cat([rows.scales, recent.scales])
    both = KvRows(kv_format, torch.cat([rows.data, recent.data]), scales)
    report = check_sparse_attention(
        answer.out, answer.lse, q, both, flat.cuda().contiguous(), scale=key_dim**-0.5, sink=None
    )
    assert report.wrong_rows == 0, report


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape[0] > 100], ids=shape_name)
def test_parts_are_the_same_bits_whatever_the_neighbours(shape):
    """Of so many tokens that the workspace does not hold the parts of all at once, and of a few."""
    inputs = device_case(shape)
    tokens, _, _, key_dim, kv_format = shape
    pages, none = paged(inputs.kv), PagedKvRows(kv_format, key_dim, 0, ())

    def attend(part: slice) -> AttentionResult:
        q = inputs.q[part].contiguous()
        return attend_cached(
            q, inputs.indices[part].contiguous(), torch.zeros(len(q), dtype=torch.int64),
            [CachedSequence(len(q), pages, none)], window=0, scale=inputs.scale, sink=inputs.sink, value_dim=512,
            implementation="triton", workspace_bytes=ATTENTION_TERMS["triton"].least_bytes, want_lse=True,
            parts=3,
        )  # fmt: skip

    whole = attend(slice(0, tokens))
    report = inputs.judge(whole)
    assert report.wrong_rows == 0, report
    assert whole.lse is not None
    for part in (slice(0, 1), slice(1, 3), slice(tokens - 1, tokens), slice(40, 75)):
        some = attend(part)
        assert torch.equal(some.out, whole.out[part])
        assert some.lse is not None
        assert torch.equal(some.lse, whole.lse[part])


def test_a_new_length_compiles_nothing():
    from streamindex_service.ops import compiled

    def attend(rows: int, tokens: int, width: int, parts: int = 1) -> None:
        kv = pack_rows(torch.randn((rows, 512)), KvFormat.FP8_D512)
        kv = KvRows(kv.format, kv.data.cuda(), None if kv.scales is None else kv.scales.cuda())
        q = torch.randn((tokens, 16, 512)).bfloat16().cuda()
        indices = torch.randint(0, rows, (tokens, width), dtype=torch.int32).cuda()
        attend_cached(
            q, indices, torch.arange(tokens), [CachedSequence(tokens, paged(kv), paged(kv))], window=20, scale=0.05,
            sink=None, value_dim=512, implementation="triton", workspace_bytes=16 << 20, parts=parts,
        )  # fmt: skip

    attend(300, 3, 17)
    attend(300, 300, 17)  # more rows than multiprocessors: where they end is looked for
    attend(300, 3, 17, 2)
    known = compiled.count()
    for rows, tokens, width, parts in [
        (1, 1, 1, 1),
        (256, 16, 16, 4),
        (5000, 33, 640, 1),
        (4096, 256, 64, 2),
        (300, 1, 1024, 1),
        (700, 700, 2048, 4),
        (90, 41, 1111, 3),
    ]:
        attend(rows, tokens, width, parts)
    assert compiled.count() == known
