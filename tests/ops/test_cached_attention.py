"""Attention over a cache's pages: the same rows, wherever they lie, and the same bits, however the work is cut."""

from __future__ import annotations

import os

import pytest
import torch

from streamindex_service.ops.cached_attention import CachedSequence, attend_cached, gather_rows
from streamindex_service.ops.kv_rows import KvFormat, KvRows, pack_rows
from streamindex_service.ops.paged_kv_rows import PagedKvRows
from streamindex_service.ops.sparse_attention import check_sparse_attention

FORMATS = [(KvFormat.BF16, 64), (KvFormat.BF16, 576), (KvFormat.FP8_D512, 512), (KvFormat.FP8_D576, 576)]
BY_FORMAT = pytest.mark.parametrize(("kv_format", "key_dim"), FORMATS, ids=[f"{f.value}-D{d}" for f, d in FORMATS])
GATHER = pytest.mark.parametrize(
    "implementation",
    [
        "torch",
        pytest.param(
            "triton",
            marks=pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs Triton's interpreter"),
        ),
    ],
)


def paged(rows: KvRows) -> PagedKvRows:
    """The rows in pages that lie scattered, in two allocations, with nonsense behind the last row."""
    data = rows.data.contiguous().view(torch.uint8)
    size = 256 * rows.row_bytes
    count = -(-rows.rows // 256)
    extents = [torch.full((count * size,), 0xFF, dtype=torch.uint8) for _ in range(2)]
    pages = []
    for number in range(count):
        page = extents[number % 2][(count - 1 - number) * size :][:size]
        part = slice(256 * number, 256 * (number + 1))
        held = data[part]
        page[: held.numel()] = held.flatten()
        if rows.scales is not None:
            beside = rows.scales[part]
            page[256 * data.shape[1] :][: beside.numel()] = beside.flatten()
        pages.append(page)
    return PagedKvRows(rows.format, rows.key_dim, rows.rows, tuple(pages))


def drawn(rows: int, key_dim: int, kv_format: KvFormat, seed: int) -> KvRows:
    return pack_rows(torch.randn((rows, key_dim), generator=torch.Generator().manual_seed(seed)), kv_format)


@BY_FORMAT
@GATHER
def test_rows_are_copied_out_of_their_pages(kv_format, key_dim, implementation):
    rows = drawn(700, key_dim, kv_format, 1)
    wanted = torch.tensor([699, 0, 256, 255, -1, 511, 700, 2**40, 3, 3])
    source = paged(rows)
    data = torch.full((len(wanted), source.row_bytes), 7, dtype=torch.uint8)
    scales = torch.full((len(wanted), 8), 7, dtype=torch.uint8) if source.scale_bytes else None
    gather_rows(source, wanted, data, scales, implementation=implementation)
    flat = rows.data.contiguous().view(torch.uint8).view(700, -1)
    for place, row in enumerate(wanted.tolist()):
        held = 0 <= row < 700
        assert torch.equal(data[place], flat[row] if held else torch.full_like(data[place], 7))
        if scales is not None:
            assert torch.equal(scales[place], rows.scales[row] if held else torch.full_like(scales[place], 7))


@BY_FORMAT
@pytest.mark.parametrize("window", [0, 1, 100], ids=lambda w: f"W{w}")
def test_answers_over_pages_are_right(kv_format, key_dim, window):
    value_dim = 512 if key_dim >= 512 else key_dim
    tokens, heads, width = 9, 3, 20
    compressed, recent = drawn(600, key_dim, kv_format, 2), drawn(800, key_dim, kv_format, 3)
    generator = torch.Generator().manual_seed(4)
    q = torch.randn((tokens, heads, key_dim), generator=generator).to(torch.bfloat16)
    sink = torch.tensor([0.5, -torch.inf, 2.0])
    indices = torch.randint(-3, 640, (tokens, width), generator=generator, dtype=torch.int32)
    indices[4] = -1
    positions = torch.tensor([520, 790, 799, 640, 641, 642, 643, 700, 601])
    pages = paged(recent)
    first_page = 1  # the first page is not needed: the smallest position less the window is in the second
    held = PagedKvRows(kv_format, key_dim, 800 - 256 * first_page, pages.pages[first_page:])
    scale = key_dim**-0.5
    sequence = CachedSequence(tokens, paged(compressed), held, 256 * first_page)
    answer = attend_cached(
        q, indices, positions, [sequence], window=window, scale=scale, sink=sink, value_dim=value_dim,
        implementation="chunked", workspace_bytes=16 << 20, want_lse=True,
    )  # fmt: skip
    # the same problem as one tensor: compressed rows first, the tokens behind them
    both = KvRows(
        kv_format,
        torch.cat([compressed.data, recent.data]),
        None if compressed.scales is None else torch.cat([compressed.scales, recent.scales]),
    )
    tokens_seen = positions[:, None] - window + 1 + torch.arange(window)
    inside = torch.where((indices >= 0) & (indices < 600), indices, -1)
    flat = torch.cat([(tokens_seen + 600).to(torch.int32), inside], dim=1).contiguous()
    report = check_sparse_attention(answer.out, answer.lse, q, both, flat, scale=scale, sink=sink)
    assert report.wrong_rows == 0, report
    if not window:
        assert not answer.out[4].any()
        assert torch.isinf(answer.lse[4]).all()


def test_the_first_tokens_have_shorter_windows():
    recent = drawn(300, 64, KvFormat.BF16, 5)
    nothing = PagedKvRows(KvFormat.BF16, 64, 0, ())
    q = torch.randn((3, 2, 64), generator=torch.Generator().manual_seed(6)).to(torch.bfloat16)
    positions, none = torch.tensor([0, 1, 200]), torch.empty((3, 0), dtype=torch.int32)
    answer = attend_cached(
        q, none, positions, [CachedSequence(3, nothing, paged(recent))], window=128, scale=0.1, sink=None,
        value_dim=64, implementation="chunked", workspace_bytes=16 << 20,
    )  # fmt: skip
    assert torch.equal(answer.out[0], recent.data[0].expand(2, 64))
    tokens = positions[:, None] - 127 + torch.arange(128)
    report = check_sparse_attention(answer.out, None, q, recent, tokens.to(torch.int32), scale=0.1, sink=None)
    assert report.wrong_rows == 0


def test_neighbours_and_chunks_change_no_bit():
    compressed, recent = drawn(900, 64, KvFormat.BF16, 7), drawn(900, 64, KvFormat.BF16, 8)
    generator = torch.Generator().manual_seed(9)
    q = torch.randn((60, 4, 64), generator=generator).to(torch.bfloat16)
    indices = torch.randint(-1, 900, (60, 32), generator=generator, dtype=torch.int32)
    positions = torch.randint(0, 900, (60,), generator=generator)

    def attend(part: slice) -> torch.Tensor:
        sequence = CachedSequence(len(q[part]), paged(compressed), paged(recent))
        return attend_cached(
            q[part], indices[part], positions[part], [sequence], window=50, scale=0.125, sink=None, value_dim=64,
            implementation="chunked", workspace_bytes=16 << 20,
        ).out  # fmt: skip

    whole = attend(slice(0, 60))  # takes all compressed rows; parts pick theirs
    for step in (1, 7, 25):
        assert torch.equal(torch.cat([attend(slice(at, at + step)) for at in range(0, 60, step)]), whole)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs Triton's interpreter")
@pytest.mark.parametrize("width", [6, 200], ids=["picked", "all"])
def test_the_kernels_together(width):
    compressed, recent = drawn(300, 64, KvFormat.BF16, 10), drawn(600, 64, KvFormat.BF16, 11)
    generator = torch.Generator().manual_seed(12)
    q = torch.randn((2, 3, 64), generator=generator).to(torch.bfloat16)
    indices = torch.randint(-1, 310, (2, width), generator=generator, dtype=torch.int32)
    positions = torch.tensor([5, 560])
    answer = attend_cached(
        q, indices, positions, [CachedSequence(2, paged(compressed), paged(recent))], window=20, scale=0.125, sink=None,
        value_dim=64, implementation="triton", workspace_bytes=16 << 20, want_lse=True,
    )  # fmt: skip
    both = KvRows(KvFormat.BF16, torch.cat([compressed.data, recent.data]))
    tokens = positions[:, None] - 19 + torch.arange(20)
    named = torch.where(indices < 300, indices, -1)
    flat = torch.cat([torch.where(tokens >= 0, tokens + 300, -1).to(torch.int32), named], dim=1).contiguous()
    report = check_sparse_attention(answer.out, answer.lse, q, both, flat, scale=0.125, sink=None)
    assert report.wrong_rows == 0, report
