"""Pages described by numbers: the same as tensors of them."""

import numpy as np
import pytest
import torch

from streamindex_service.ops.extent_pages import ExtentPages, addresses_of, to_device
from streamindex_service.ops.formats import KeyFormat
from streamindex_service.ops.kv_rows import KvFormat
from streamindex_service.ops.paged_keys import PAGE_KEYS, PagedKeys
from streamindex_service.ops.paged_kv_rows import JoinedKvRows, PagedKvRows
from streamindex_service.ops.topk import topk

HEAD_DIM = 16
PAGE_BYTES = PAGE_KEYS * (HEAD_DIM + 4)  # of e4m3 keys and their scales


def _extents(*pages: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(len(pages))
    return [torch.randint(0, 120, (n * PAGE_BYTES,), dtype=torch.uint8, generator=generator) for n in pages]


def _slots(*slots: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    which, numbers = np.array(slots, dtype=np.int64).reshape(-1, 2).T
    return which, numbers * PAGE_BYTES


def test_they_are_the_slices_that_the_numbers_say() -> None:
    extents = _extents(3, 2)
    which, starts = _slots((1, 1), (0, 2), (0, 0))
    pages = ExtentPages(extents, which, starts, (PAGE_KEYS, HEAD_DIM), torch.float8_e4m3fn)
    expected = [extents[w][s : s + PAGE_KEYS * HEAD_DIM] for w, s in zip(which, starts, strict=True)]
    assert len(pages) == 3
    for page, bytes_ in zip(pages, expected, strict=True):
        assert page.shape == (PAGE_KEYS, HEAD_DIM)
        assert page.dtype == torch.float8_e4m3fn
        assert page.data_ptr() == bytes_.data_ptr()
    assert [page.data_ptr() for page in pages[1:]] == [bytes_.data_ptr() for bytes_ in expected[1:]]
    assert addresses_of(pages).tolist() == addresses_of(expected).tolist() == [e.data_ptr() for e in expected]
    assert pages.device == extents[0].device


def test_a_search_of_them_is_that_of_the_tensors() -> None:
    extents = _extents(4, 2)
    which, starts = _slots((0, 3), (1, 0), (0, 1), (1, 1))
    keys = 3 * PAGE_KEYS + 17
    values = ExtentPages(extents, which, starts, (PAGE_KEYS, HEAD_DIM), torch.float8_e4m3fn)
    scales = ExtentPages(extents, which, starts + PAGE_KEYS * HEAD_DIM, (PAGE_KEYS,), torch.float32)
    for page in scales:
        page.copy_(torch.rand(PAGE_KEYS) + 0.5)
    by_number = PagedKeys(KeyFormat.FP8_E4M3, HEAD_DIM, keys, values, scales)
    by_tensor = PagedKeys(KeyFormat.FP8_E4M3, HEAD_DIM, keys, tuple(values), tuple(scales))
    assert by_number.key_table.offsets.tolist() == by_tensor.key_table.offsets.tolist()
    assert by_number.scale_table.offsets.tolist() == by_tensor.scale_table.offsets.tolist()
    q, w = torch.randn(5, 2, HEAD_DIM).to(torch.float8_e4m3fn), torch.randn(5, 2)
    found = [
        topk(q, w, k, keys - 1, ratio=1, top_k=40, implementation="chunked", want_scores=True)
        for k in (by_number, by_tensor)
    ]
    assert torch.equal(found[0].indices, found[1].indices)
    assert torch.equal(found[0].scores, found[1].scores)


def test_kv_rows_of_them() -> None:
    size = PAGE_KEYS * 2 * HEAD_DIM
    extent = torch.zeros(4 * size, dtype=torch.uint8)
    starts = np.array([3, 0, 1], dtype=np.int64) * size
    pages = ExtentPages([extent], np.zeros(3, dtype=np.int64), starts, (size,), torch.uint8)
    by_number = PagedKvRows(KvFormat.BF16, HEAD_DIM, 600, pages)
    by_tensor = PagedKvRows(KvFormat.BF16, HEAD_DIM, 600, tuple(pages))
    for rows in (by_number, by_tensor):
        joined = JoinedKvRows((rows,))
        assert joined.unit_table(extent.device).tolist() == [3 * size // 16, 0, size // 16]
        assert joined.placed(extent.device).anchor.data_ptr() == extent.data_ptr()
    with pytest.raises(ValueError, match="expected"):
        PagedKvRows(KvFormat.BF16, 2 * HEAD_DIM, 600, pages)


def test_rows_that_kernels_cannot_find_are_refused() -> None:
    extent = torch.zeros(2 * PAGE_KEYS * 2 * HEAD_DIM, dtype=torch.uint8)
    begin = 8 - extent.data_ptr() % 16  # eight bytes beside a multiple of 16
    page = extent[begin % 16 :][: PAGE_KEYS * 2 * HEAD_DIM]
    assert page.data_ptr() % 16 == 8
    with pytest.raises(ValueError, match="multiples of 16"):
        JoinedKvRows((PagedKvRows(KvFormat.BF16, HEAD_DIM, 1, (page,)),)).unit_table(extent.device)


def test_none_at_all() -> None:
    pages = ExtentPages([], *_slots(), (PAGE_KEYS, HEAD_DIM), torch.bfloat16)
    assert (len(pages), list(pages), pages.addresses().tolist()) == (0, [], [])
    assert PagedKeys(KeyFormat.BF16, HEAD_DIM, 0, pages).device == torch.device("cpu")


@pytest.mark.parametrize("start", [-1, 1, PAGE_BYTES + 1, 2 * PAGE_BYTES])
def test_what_is_not_in_its_extent_is_refused(start: int) -> None:
    which, starts = np.zeros(1, dtype=np.int64), np.array([start], dtype=np.int64)
    with pytest.raises(ValueError, match="within their extents"):
        ExtentPages(_extents(2), which, starts, (PAGE_KEYS, HEAD_DIM), torch.bfloat16)


def test_other_keys_than_the_format_has_are_refused() -> None:
    pages = ExtentPages(_extents(1), *_slots((0, 0)), (PAGE_KEYS, HEAD_DIM), torch.float8_e4m3fn)
    with pytest.raises(ValueError, match="expected"):
        PagedKeys(KeyFormat.BF16, HEAD_DIM, 10, pages)


def test_a_page_that_is_not_aligned_for_kernels_is_named() -> None:
    starts = np.array([0, 8], dtype=np.int64)
    pages = ExtentPages([torch.zeros(1 << 16, dtype=torch.uint8)], np.zeros(2, np.int64), starts, (256, 8), torch.half)
    with pytest.raises(ValueError, match=r"pages\[1\]"):
        PagedKeys(KeyFormat.FP16, 8, 512, pages).key_table  # noqa: B018


def test_a_table_on_the_cpu_is_the_numbers() -> None:
    assert to_device(np.arange(3, dtype=np.int64), torch.device("cpu")).tolist() == [0, 1, 2]
