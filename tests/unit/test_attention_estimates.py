"""Estimates of attention against the operation that they speak of."""

from __future__ import annotations

from dataclasses import asdict, replace

import pytest
import torch
from streamindex.v1 import types_pb2

from streamindex_service.core.attention_estimates import (
    MOST_PARTS,
    STEP_ROWS,
    WINDOW_GROUP,
    AttentionTerms,
    AttentionWork,
    Padding,
    parts_of,
    window_group,
)
from streamindex_service.core.sizes import KvFormat, RowForm
from streamindex_service.core.specs import KvSpec, RowKind
from streamindex_service.frontend import requests
from streamindex_service.frontend.attend_tiles import attention_terms
from streamindex_service.ipc.v1 import worker_pb2 as pb
from streamindex_service.ops import kv_rows
from streamindex_service.ops.cached_attention import ATTENTION_TERMS
from streamindex_service.ops.paged_kv_rows import row_sizes
from streamindex_service.ops.sparse_attention import LIMITS, plan_for

V4 = KvSpec(KvFormat.BF16, 512, 512, 64)
NAMES = {
    KvFormat.BF16: kv_rows.KvFormat.BF16,
    KvFormat.FP8_D512: kv_rows.KvFormat.FP8_D512,
    KvFormat.FP8_D576: kv_rows.KvFormat.FP8_D576,
}


def terms(name: str) -> AttentionTerms:
    """As they come from the worker."""
    return AttentionTerms(**asdict(ATTENTION_TERMS[name]))


def work(kv: KvSpec = V4, kv_rows: int = 65_536, width: int = 512, window: int = 128) -> AttentionWork:
    return AttentionWork(kv, kv_rows, width, window, False, terms("chunked"))


@pytest.mark.parametrize("heads", [1, 64, 128])
@pytest.mark.parametrize("width", [0, 1, 640, 2048, 4096 + 4096])
@pytest.mark.parametrize(("key_dim", "value_dim"), [(16, 16), (512, 512), (576, 512)])
def test_the_workspace_is_enough_for_the_operation_to_plan_with(heads, width, key_dim, value_dim):
    needed = terms("chunked").size_bytes(heads, key_dim, width)
    plan = plan_for(
        "chunked", "cpu", kv_rows.KvFormat.BF16, tokens=100, heads=heads, key_dim=key_dim, value_dim=value_dim,
        width=width, workspace_bytes=needed,
    )  # fmt: skip
    assert plan.token_chunk >= 1
    assert plan.workspace_bytes <= needed


@pytest.mark.parametrize("name", ATTENTION_TERMS)
def test_the_frontend_hears_what_the_worker_says(name):
    said = pb.AttentionTerms(**asdict(ATTENTION_TERMS[name]))
    assert attention_terms(pb.AttentionTerms.FromString(said.SerializeToString())) == terms(name)


@pytest.mark.parametrize("heads", [1, 16, 64, 128])
@pytest.mark.parametrize("rows", [1, 28, 300])
def test_the_workspace_of_the_kernels_holds_the_parts_of_index_rows(heads, rows):
    from streamindex_service.ops.sparse_attention.plan import AttentionKernel, Shape, plan_triton

    offered = terms("triton").size_bytes(heads, 576, 8320, MOST_PARTS)
    left = offered - terms("triton").fixed_bytes
    shape = Shape(rows, heads, 576, 512, 8320, "fp8_d576")
    plan = plan_triton(shape, left, 132, AttentionKernel.PORTABLE, MOST_PARTS)
    assert plan.workspace_bytes <= left
    used = terms("triton").used_bytes(heads, 576, 8320, rows, MOST_PARTS)
    assert plan.workspace_bytes <= used - terms("triton").fixed_bytes + 1024
    assert plan.token_chunk >= min(rows, 16)  # whatever the heads, so that what is launched is aligned


@pytest.mark.parametrize("kv_format", KvFormat)
def test_frontend_and_operation_agree_on_rows(kv_format):
    key_dim = kv_format.key_dim or 512
    form = RowForm.of_kv(kv_format, key_dim)
    assert (form.row_bytes, form.scale_bytes) == row_sizes(NAMES[kv_format], key_dim)
    rows = kv_rows.pack_rows(torch.zeros((3, key_dim)), NAMES[kv_format])
    assert rows.row_bytes == form.row_bytes + form.scale_bytes
    packed = NAMES[kv_format].packed
    assert kv_format.key_dim == (None if packed is None else packed.key_dim)
    assert types_pb2.KvFormat.Name(kv_format) == f"KV_FORMAT_{kv_format.name}"


def test_frontend_and_operation_agree_on_limits():
    assert LIMITS.max_heads == requests.MAX_ATTENTION_HEADS
    assert (LIMITS.min_value_dim, LIMITS.max_value_dim) == (requests.MIN_VALUE_DIM, requests.MAX_VALUE_DIM)
    assert LIMITS.tail_dims == requests.KEY_TAILS
    assert [kind.name for kind in RowKind] == ["KEYS", "KV", "WINDOW"]


def test_a_tile_copies_each_row_once_and_no_more_than_are_named():
    rows = 128 << 10  # a query row and its answer
    few, many = work().tile_bytes(2, 130), work().tile_bytes(200, 328)
    assert 2 * rows + (2 * 512 + 130) * 1024 < few < 2 * rows + (2 * 512 + 130) * 1200
    assert 200 * rows + (65_536 + 328) * 1024 < many < 200 * rows + (65_536 + 328) * 1200
    assert work(kv_rows=100).tile_bytes(200, 0) < work().tile_bytes(200, 0)


def test_a_tile_that_copies_takes_the_most_that_is_there_at_a_time():
    """Wide index rows: while they are made, or while few rows are attended."""
    copying = replace(terms("triton"), reads_pages=False, copied_row_bytes=8, index_entry_bytes=4)
    small = KvSpec(KvFormat.BF16, 80, 64, 1)
    lists = AttentionWork(small, 1000, 4096, 0, False, copying)
    entries = 1000 * 4096
    assert 29 * entries < lists.tile_bytes(1000, 0) < 30 * entries  # 25 an entry, and 4 of the indices themselves
    wide = AttentionWork(KvSpec(KvFormat.BF16, 512, 512, 128), 1000, 512, 0, True, copying)
    answers = 1000 * 128 * (2 * 1024 + 4) + 1_024_000
    assert answers < wide.tile_bytes(1000, 0) < 1.05 * answers


def test_a_tile_whose_rows_are_read_in_their_pages_takes_none_of_them():
    in_pages = AttentionWork(V4, 65_536, 512, 128, False, terms("triton"))
    of_a_row = 64 * 2 * 1024 + 512 * 4 + 640 * 8 + 80  # query, answer, indices, places, where its rows are
    table = 8 * (65_536 + 1024) // 256
    assert in_pages.tile_bytes(200, 1024) == 200 * of_a_row + table + 512
    assert in_pages.tile_bytes(200, 1024) < work().tile_bytes(200, 1024) / 3


BLOCK_BYTES = 4 << 20


@pytest.mark.parametrize(
    ("kv_format", "heads", "entries", "in_steps", "parts"),
    [
        (KvFormat.BF16, 64, 640, False, 4),  # 32 rows are a block: as many items of 64 heads
        (KvFormat.FP8_D512, 128, 1152, False, 4),  # 16 rows, two items each
        (KvFormat.FP8_D576, 128, 2048, True, 4),
        (KvFormat.BF16, 64, 300, False, 2),  # too few entries for more
        (KvFormat.BF16, 64, 100, True, 1),
        (KvFormat.FP8_D576, 16, 2048, True, 4),  # a step of 32 rows
        (KvFormat.FP8_D576, 16, 2048, False, 1),  # a block has 118
        (KvFormat.FP8_D512, 16, 640, True, 1),
        (KvFormat.FP8_D512, 8, 1152, True, 2),
        (KvFormat.FP8_D512, 16, None, True, 4),  # all visible: whatever there is
        (KvFormat.FP8_D512, 16, None, False, 1),
        (KvFormat.FP8_D512, 64, None, False, 4),
    ],
)
def test_a_tile_is_shared_out_by_what_a_block_holds(kv_format, heads, entries, in_steps, parts):
    kv = KvSpec(kv_format, kv_format.key_dim or 512, 512, heads)
    rows = BLOCK_BYTES // (2 * heads * (kv.key_dim + 512))
    assert parts_of(kv, entries, min(rows, STEP_ROWS) if in_steps else rows) == parts
    assert parts_of(kv, entries, 1000 * rows) == 1  # where a tile has rows enough


def test_index_rows_of_a_tile_are_as_wide_as_the_widest():
    padding = Padding.of([(3, 100), (1, 900), (2, 0)])
    assert (padding.rows, padding.widest, padding.entries) == (6, 900, 6 * 900 - 300 - 900)
    assert Padding.of([(5, 70)]).entries == Padding().entries == 0


def test_all_visible_rows_have_no_indices():
    named = AttentionWork(V4, 8192, 8192, 128, False, terms("triton"))
    whole = replace(named, named=False)
    assert named.staging_bytes(20) - whole.staging_bytes(20) == named.tile_bytes(20, 0) - whole.tile_bytes(20, 0)
    assert named.tile_bytes(20, 0) - whole.tile_bytes(20, 0) == 20 * 8192 * 4
    assert named.flop(20) == whole.flop(20)
    # they are made where rows are copied
    copied = replace(named, terms=terms("chunked"))
    assert copied.tile_bytes(20, 0) == replace(copied, named=False).tile_bytes(20, 0)


def test_rows_use_of_a_workspace_what_they_can():
    kernel = AttentionWork(V4, 65_536, 512, 128, False, terms("triton"), parts=4)
    unsplit = replace(kernel, parts=1)
    assert unsplit.used_bytes(1, 32 << 20) == unsplit.used_bytes(1000, 32 << 20) < kernel.used_bytes(1, 32 << 20)
    assert kernel.used_bytes(1, 32 << 20) < kernel.used_bytes(3, 32 << 20) < kernel.workspace_bytes()
    assert kernel.used_bytes(1000, 32 << 20) == kernel.workspace_bytes() == 32 << 20
    assert work().used_bytes(1, 64 << 20) < work().used_bytes(3, 64 << 20) < work().used_bytes(1000, 64 << 20)
    assert work().used_bytes(1000, 64 << 20) == 64 << 20


def test_bytes_grow_with_rows_and_the_most_rows_are_those_that_fit():
    measured = work()
    sizes = [measured.beside_bytes(rows) for rows in range(1, 300)]
    assert sizes == sorted(sizes)
    for budget in (sizes[0] - 1, sizes[0], sizes[40], sizes[40] + 1, sizes[-1] + 1):
        most = measured.rows_within(budget, 299)
        assert most == sum(size <= budget for size in sizes)


def test_operations_follow_what_is_attended():
    assert work().flop(3) == 3 * 2 * 640 * 64 * 1024
    assert work(kv_rows=10).flop(1) == 2 * 138 * 64 * 1024
    assert work(width=0, window=0).flop(5) == 1


@pytest.mark.parametrize(("first", "stop", "pages", "wanted"), [
    (0, 1, 100, (0, 4)),
    (1023, 1025, 100, (0, 8)),
    (1024, 2048, 100, (4, 8)),
    (5000, 5001, 20, (16, 20)),
    (5000, 5001, 18, (16, 18)),
    (0, 0, 0, (0, 0)),
])  # fmt: skip
def test_window_pages_come_in_groups(first, stop, pages, wanted):
    assert WINDOW_GROUP == 4
    assert window_group(first, stop, pages) == wanted


@pytest.mark.parametrize("rows", [1, 28, 1000, 1024])
def test_the_window_pages_of_a_tile_are_no_more_than_foreseen(rows):
    measured = work()
    for position in range(0, 5000, 37):
        first, stop = window_group(max(0, position - 127), position + rows, 10_000)
        assert (stop - first) * V4.form.page_bytes <= measured.window_bytes(rows)
