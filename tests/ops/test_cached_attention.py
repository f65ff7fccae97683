"""Attention over a cache's pages: the same rows, wherever they lie, and the same bits, however the work is cut."""

from __future__ import annotations

import os

import pytest
import torch

from streamindex_service.ops.cached_attention import CachedSequence, attend_cached, gather_rows
from streamindex_service.ops.kv_rows import KvFormat, KvRows, pack_rows
from streamindex_service.ops.paged_kv_rows import PagedKvRows
from streamindex_service.ops.sparse_attention import check_sparse_attention
from tests.ops.attention_cases import paged
from tests.support.attention import joined

FORMATS = [(KvFormat.BF16, 64), (KvFormat.BF16, 576), (KvFormat.FP8_D512, 512), (KvFormat.FP8_D576, 576)]
BY_FORMAT = pytest.mark.parametrize(("kv_format", "key_dim"), FORMATS, ids=[f"{f.value}-D{d}" for f, d in FORMATS])


def drawn(rows: int, key_dim: int, kv_format: KvFormat, seed: int) -> KvRows:
    return pack_rows(torch.randn((rows, key_dim), generator=torch.Generator().manual_seed(seed)), kv_format)


@BY_FORMAT
def test_rows_are_copied_out_of_their_pages(kv_format, key_dim):
    rows = drawn(700, key_dim, kv_format, 1)
    wanted = torch.tensor([699, 0, 256, 255, -1, 511, 700, 2**40, 3, 3])
    source = paged(rows)
    data = torch.full((len(wanted), source.row_bytes), 7, dtype=torch.uint8)
    scales = torch.full((len(wanted), 8), 7, dtype=torch.uint8) if source.scale_bytes else None
    gather_rows(source, wanted, data, scales)
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
@BY_FORMAT
@pytest.mark.parametrize(("window", "width"), [(20, 6), (0, 70), (20, 0)], ids=["both", "indices", "window"])
def test_the_kernels_read_rows_in_their_pages(kv_format, key_dim, window, width):
    value_dim = 512 if key_dim >= 512 else key_dim
    compressed, recent = drawn(300, key_dim, kv_format, 10), drawn(600, key_dim, kv_format, 11)
    generator = torch.Generator().manual_seed(12)
    q = torch.randn((3, 3, key_dim), generator=generator).to(torch.bfloat16)
    indices = torch.randint(-1, 310, (3, width), generator=generator, dtype=torch.int32)
    positions = torch.tensor([5, 560, 599])
    pages = paged(recent, 3)
    held = PagedKvRows(kv_format, key_dim, 600, pages.pages)
    scale = key_dim**-0.5
    answer = attend_cached(
        q, indices, positions, [CachedSequence(3, paged(compressed), held)], window=window, scale=scale, sink=None,
        value_dim=value_dim, implementation="triton", workspace_bytes=16 << 20, want_lse=True,
    )  # fmt: skip
    tokens = positions[:, None] - window + 1 + torch.arange(window)
    named = torch.where(indices < 300, indices, -1)
    flat = torch.cat([torch.where(tokens >= 0, tokens + 300, -1).to(torch.int32), named], dim=1).contiguous()
    both = joined(compressed, recent)
    report = check_sparse_attention(answer.out, answer.lse, q, both, flat, scale=scale, sink=None)
    assert report.wrong_rows == 0, report


TRITON = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs Triton's interpreter")
IMPLEMENTATION = pytest.mark.parametrize("implementation", ["chunked", pytest.param("triton", marks=TRITON)])


@IMPLEMENTATION
def test_what_a_sequence_does_not_hold_is_nobodys(implementation):
    """Indices behind its rows, and windows before and behind what is held, name no row of the neighbour's."""
    rows = drawn(10, 64, KvFormat.BF16, 1)
    poison = KvRows(KvFormat.BF16, torch.full((512, 64), torch.nan, dtype=torch.bfloat16))
    nobody = CachedSequence(1, paged(poison), paged(poison))
    own = CachedSequence(3, paged(rows, 1), PagedKvRows(KvFormat.BF16, 64, 10, paged(rows, 1).pages), 256)
    q = torch.ones((5, 2, 64), dtype=torch.bfloat16)
    indices = torch.tensor([[0, 0, 0], [9, 10, 255], [256, 300, -7], [2**31 - 1, -(2**31), 3], [1, 1, 1]])
    positions = torch.tensor([3, 256, 270, 258, 5])
    answer = attend_cached(
        q, indices.to(torch.int32), positions, [nobody, own, nobody], window=4, scale=0.125, sink=None, value_dim=64,
        implementation=implementation, workspace_bytes=16 << 20, want_lse=True,
    )  # fmt: skip
    flat = torch.tensor([[0, -1, -1, -1, 9], [-1, -1, -1, -1, -1], [0, 1, 2, -1, 3]], dtype=torch.int32)
    report = check_sparse_attention(answer.out[1:4], answer.lse[1:4], q[1:4], rows, flat, scale=0.125, sink=None)
    assert report.wrong_rows == 0, report
    assert answer.out[0].isnan().all()
    assert answer.out[4].isnan().all()


@IMPLEMENTATION
@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"indices": torch.zeros((3, 8), dtype=torch.int32)[:, :4]}, "indices: not contiguous"),
        ({"indices": torch.zeros((3, 4), dtype=torch.int64)}, "indices: expected"),
        ({"indices": torch.zeros((4, 4), dtype=torch.int32)}, "indices: expected"),
        ({"positions": torch.zeros(6, dtype=torch.int64)[::2]}, "positions: not contiguous"),
        ({"positions": torch.zeros(3, dtype=torch.int32)}, "positions: expected"),
        ({"positions": torch.zeros(2, dtype=torch.int64)}, "positions: expected"),
        ({"window": -1}, "window: -1"),
        ({"parts": 0}, "parts: 0"),
        ({"sequences": []}, "sequences: there are none"),
    ],
)
def test_what_cannot_be_attended_is_refused(implementation, changes, told):
    pages = paged(drawn(10, 64, KvFormat.BF16, 1))
    given = {
        "q": torch.ones((3, 2, 64), dtype=torch.bfloat16),
        "indices": torch.zeros((3, 4), dtype=torch.int32),
        "positions": torch.zeros(3, dtype=torch.int64),
        "sequences": [CachedSequence(3, pages, pages)],
        "window": 2,
    }
    with pytest.raises(ValueError, match=told):
        attend_cached(
            **given | changes, scale=1.0, sink=None, value_dim=64, implementation=implementation,
            workspace_bytes=16 << 20,
        )  # fmt: skip


@IMPLEMENTATION
def test_nothing_is_held_at_all(implementation):
    nothing = PagedKvRows(KvFormat.FP8_D512, 512, 0, ())
    q = torch.ones((2, 3, 512), dtype=torch.bfloat16)
    answer = attend_cached(
        q, torch.zeros((2, 5), dtype=torch.int32), torch.tensor([0, 1]), [CachedSequence(2, nothing, nothing)],
        window=7, scale=1.0, sink=None, value_dim=512, implementation=implementation, workspace_bytes=16 << 20,
        want_lse=True,
    )  # fmt: skip
    assert not answer.out.any()
    assert torch.isposinf(answer.lse).all()
