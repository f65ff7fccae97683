"""Rows that come with the items of a SparseAttendBatch: written first, then everything attends."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest
import streamindex_client
import torch
from streamindex.v1 import attention_pb2, key_cache_pb2
from streamindex_client import AttendBatchItem, AttendBatchResult

from streamindex_service.ops.kv_rows import KvFormat, KvRows
from tests.support.attend_batch import ASKED, SCALE, WINDOW
from tests.support.attention import Queries, Rows, Shape, wrong_rows
from tests.support.calls import TIMEOUT_S
from tests.support.decoding import Decoding
from tests.support.services import is_idle, wait_for

SHAPE = Shape()
SHAPES = [SHAPE, Shape(KvFormat.FP8_D512, 512, 512, heads=2), Shape(KvFormat.FP8_D576, 576, 512, heads=2, ratio=1)]
Append = attention_pb2.SparseAttendBatchItem.Append
KEYS, KV, WINDOW_ROWS = (key_cache_pb2.RowKind.Value(f"ROW_KIND_{name}") for name in ("KEYS", "KV", "WINDOW"))


@pytest.fixture(scope="module")
def client(roomy_service):
    with streamindex_client.connect(roomy_service.address) as made:
        yield made


def ask(client: streamindex_client.Client, items: list[AttendBatchItem]) -> list[AttendBatchResult]:
    return client.sparse_attend_batch(items, **ASKED, want_indices=True)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.kv_format.value)
def test_decoding_step_by_step(client, shape):
    """Two sequences, a few tokens a step, over the edges of pages; then a draft is rejected and written over."""
    made = [Decoding(client, shape, 560, held, seed) for held, seed in ((250, 1), (3, 2))]
    for counts in ((1, 1), (4, 1), (1, 8), (3, 252), (1, 1), (260, 2)):
        steps = [each.step(count) for each, count in zip(made, counts, strict=True)]
        results = ask(client, [item for item, _ in steps])
        for each, (_, queries), result in zip(made, steps, results, strict=True):
            each.check(client, result, queries)
            assert each.cache.length(0) == result.layer_keys
            assert each.cache.kv_length(0) == result.layer_kv_rows
            assert each.cache.window_length(0) == result.layer_window_rows
    for each in made:  # the last two tokens were a draft; others come in their place
        drawn = Rows.drawn(shape, 560, each.seed + 50)
        before, keys = each.held - 2, (each.held - 2) // shape.ratio
        others = Rows(
            torch.cat([each.rows.keys[:keys], drawn.keys[keys:]]),
            *(
                KvRows(
                    shape.kv_format,
                    torch.cat([old.data[:count], new.data[count:]]),
                    None if old.scales is None else torch.cat([old.scales[:count], new.scales[count:]]),
                )
                for old, new, count in (
                    (each.rows.kv, drawn.kv, keys), (each.rows.window, drawn.window, before),
                )
            ),
        )  # fmt: skip
        each.rows, each.held = others, before
        item, queries = each.step(2, first_key=keys, first_kv_row=keys, first_window_row=before)
        for _ in range(2):  # safe to repeat
            each.check(client, ask(client, [item])[0], queries)
        each.cache.delete()


def test_all_appends_come_before_any_item_attends(client):
    decoding = Decoding(client, SHAPE, 300, 260, 5)
    step, queries = decoding.step(40)
    appended = dict.fromkeys(("keys", "kv_rows", "kv_scales", "window_rows", "window_scales"))
    looks = AttendBatchItem(
        decoding.cache, 0, **{name: getattr(step, name) for name in ("q", "index_q", "index_w", "start_position")}
    )
    adds = AttendBatchItem(decoding.cache, 0, **{name: getattr(step, name) for name in appended})
    results = ask(client, [looks, adds])
    decoding.check(client, results[0], queries)
    assert results[1].error is None
    assert (results[1].out, results[1].lse, results[1].indices) == (None, None, None)
    assert (results[1].layer_keys, results[1].layer_kv_rows, results[1].layer_window_rows) == (75, 75, 300)
    assert (decoding.cache.length(0), decoding.cache.kv_length(0), decoding.cache.window_length(0)) == (75, 75, 300)
    decoding.cache.delete()


def test_a_layer_of_another_number_and_one_that_was_empty(client):
    cache = SHAPE.create(client, layers=3)
    rows = Rows.drawn(SHAPE, 90, 7)
    queries = Queries.drawn(SHAPE, torch.arange(80, 90), 7)
    item = AttendBatchItem(
        cache, 2, q=queries.q, index_q=queries.index_q, index_w=queries.index_w, start_position=80, keys=rows.keys,
        kv_rows=rows.kv.data, window_rows=rows.window.data,
    )  # fmt: skip
    (result,) = ask(client, [item])
    assert result.error is None, result.error
    assert not wrong_rows(SHAPE, rows, queries, result.indices, WINDOW, result.out, result.lse, scale=SCALE)
    assert cache.refresh().layer_window_rows == (0, 0, 90)
    cache.delete()


def test_with_asyncio(roomy_service, client):
    decoding = Decoding(client, SHAPE, 100, 97, 8)

    async def step():
        async with streamindex_client.connect_async(roomy_service.address) as made:
            cache = await made.open_key_cache(decoding.cache.id)
            item, queries = decoding.step(3)
            fields = {name: getattr(item, name) for name in item.__slots__ if name != "cache"}
            (result,) = await made.sparse_attend_batch([AttendBatchItem(cache, **fields)], **ASKED, want_indices=True)
            assert cache.window_length(0) == 100
            return result, queries

    decoding.check(client, *asyncio.run(step()))
    decoding.cache.delete()


def wire(cache: Any, appends: list[Append], **others: Any) -> attention_pb2.SparseAttendBatchItem:
    """An item that only appends."""
    return attention_pb2.SparseAttendBatchItem(
        key_cache_id=cache.id, query_format=cache.info.spec.key_format.wire, appends=appends, **others
    )


def rows_of(kind: int, first: int, count: int, **others: Any) -> Append:
    row_bytes = 64 if kind == KEYS else 128
    return Append(
        **{"row_kind": kind, "first_row": first, "row_count": count, "rows": bytes(row_bytes * count), **others}
    )


def test_what_is_wrong_with_an_append_is_told_of_its_item_alone(client, calls):
    """Nothing of an item is written where any of its rows, or the sizes of its queries, are not right."""
    apart, good = (Decoding(client, SHAPE, 200, 190, seed) for seed in (10, 11))
    nan = b"\xc0\x7f" + bytes(126)
    right = rows_of(WINDOW_ROWS, 190, 1)
    invalid = "INVALID_ARGUMENT"
    wrong = [
        ([right, rows_of(KV, 47, 1, row_kind=4)], invalid, "appends[1].row_kind"),
        ([right, rows_of(KV, 47, 1), rows_of(KV, 47, 1)], invalid, "appends[2].row_kind"),
        ([rows_of(KEYS, 47, 1), rows_of(KEYS, 47, 1, row_kind=0)], invalid, "appends[1].row_kind"),
        ([right, rows_of(KV, 47, 1, rows=bytes(127))], invalid, "appends[1].rows"),
        ([right, rows_of(KV, 47, 2, row_count=2**32 - 1)], invalid, "appends[1].row_count"),
        ([right, rows_of(KV, 47, 1, scales=bytes(8))], invalid, "appends[1].scales"),
        ([right, rows_of(KV, 47, 1, rows=nan)], "NON_FINITE", "appends[1].rows"),
        ([rows_of(WINDOW_ROWS, 190, 1, rows=nan)], "NON_FINITE", "appends[0].rows"),
        ([right, rows_of(KEYS, 47, 1, rows=nan[:64])], "NON_FINITE", "appends[1].rows"),
        ([right, rows_of(KV, 48, 1)], "OFFSET_GAP", "appends[1].first_row"),
        ([right, rows_of(KV, 2**64 - 1, 1)], invalid, "appends[1].row_count"),
        ([right, rows_of(KEYS, 47, 0)], invalid, "appends[1].row_count"),
    ]
    queried, _ = good.step(3)
    asked = streamindex_client.attend_batch.build_attend_batch(
        [queried], **ASKED, sink=None, want_indices=True, priority=None
    ).message
    misplaced = attention_pb2.SparseAttendBatchItem()
    misplaced.CopyFrom(asked.items[0])
    misplaced.key_cache_id = apart.cache.id
    misplaced.q = misplaced.q[:-2]
    del asked.items[1:]
    asked.items.extend([misplaced, *(wire(apart.cache, appends) for appends, _, _ in wrong)])
    results = calls.attention.SparseAttendBatch(asked, timeout=TIMEOUT_S).results
    assert not results[0].HasField("error"), results[0].error
    assert (results[0].layer_keys, results[0].kv_rows, results[0].window_rows) == (48, 48, 193)
    assert (results[1].error.reason, results[1].error.field) == (invalid, "q")
    for (appends, reason, field), result in zip(wrong, results[2:], strict=True):
        assert (result.error.reason, result.error.field) == (reason, field), appends
        assert result.error.message
        assert not result.out
    held = apart.cache.refresh()
    assert (held.layer_keys, held.layer_kv_rows, held.layer_window_rows) == ((47,), (47,), (190,))
    for each in (apart, good):
        each.cache.delete()
    wait_for(lambda: is_idle(calls.load()))
    assert calls.load().open_uploads == 0


def test_scales_that_are_none(client, calls):
    """Of packed KV rows and of fp8 keys."""
    shape = SHAPES[1]
    cache = shape.create(client, key_format="fp8_e4m3")
    rows = bytes(576)
    wrong = [
        Append(row_kind=KV, row_count=1, rows=rows, scales=b"\x7f\xff" + bytes(6)),
        Append(row_kind=WINDOW_ROWS, row_count=1, rows=rows, scales=b"\xff" + bytes(7)),
        Append(row_kind=KEYS, row_count=1, rows=bytes(32), scales=b"\x00\x00\xc0\x7f"),
    ]
    request = attention_pb2.SparseAttendBatchRequest(top_k=4, scale=1.0)
    for append in wrong:
        request.items.add().CopyFrom(wire(cache, [append]))
    for result in calls.attention.SparseAttendBatch(request, timeout=TIMEOUT_S).results:
        assert (result.error.reason, result.error.field) == ("NON_FINITE", "appends[0].scales")
        assert (result.layer_keys, result.kv_rows, result.window_rows) == (0, 0, 0)
    cache.delete()


def test_what_was_written_before_an_item_failed_is_told(client, calls):
    """Queries are looked at when it is their turn, and their rows are there then."""
    decoding = Decoding(client, SHAPE, 200, 190, 12)
    item, _ = decoding.step(3)
    item.q[1, 2, 3] = torch.nan
    (result,) = ask(client, [item])
    assert (result.error.reason, result.error.field) == ("NON_FINITE", "q")
    assert (result.layer_keys, result.layer_kv_rows, result.layer_window_rows) == (48, 48, 193)
    assert decoding.cache.window_length(0) == 190
    held = decoding.cache.refresh()
    assert (held.layer_keys, held.layer_kv_rows, held.layer_window_rows) == ((48,), (48,), (193,))
    decoding.cache.delete()


def test_keys_without_kv_rows_may_be_appended_and_not_searched(client):
    """By an item that only appends; and its bytes are counted."""
    decoding = Decoding(client, SHAPE, 200, 190, 13)
    rows = decoding.rows.keys[47:49]
    (result,) = ask(client, [AttendBatchItem(decoding.cache, 0, keys=rows)])
    assert result.error is None, result.error
    assert (result.layer_keys, result.layer_kv_rows) == (49, 47)
    item, _ = decoding.step(1)
    (result,) = ask(client, [replace(item, first_key=47, keys=rows[:1])])
    assert result.error.reason == "NO_KV_ROWS"
    decoding.cache.delete()


def test_items_of_one_call_append_behind_each_other(client):
    decoding = Decoding(client, SHAPE, 200, 190, 14)
    window = decoding.rows.window.data
    items = [
        AttendBatchItem(decoding.cache, 0, window_rows=window[first : first + 2], first_window_row=given)
        for first, given in ((190, None), (192, None), (191, 191), (194, None))
    ]
    results = ask(client, items)
    assert [(result.error, result.layer_window_rows) for result in results] == [(None, 196)] * 4
    queries = decoding.queries(193, 196)
    item = AttendBatchItem(
        decoding.cache, 0, q=queries.q, index_q=queries.index_q, index_w=queries.index_w, start_position=193
    )
    (result,) = ask(client, [item])
    rows = Rows(decoding.rows.keys[:47], *(decoding.of(188).kv, decoding.of(196).window))
    assert not wrong_rows(SHAPE, rows, queries, result.indices, WINDOW, result.out, result.lse, scale=SCALE)
    decoding.cache.delete()


def test_a_cache_that_holds_index_keys_alone_takes_none(client, calls):
    cache = client.create_key_cache(heads=3, head_dim=32, ratio=4, layers=1, key_format="bf16")
    request = attention_pb2.SparseAttendBatchRequest(top_k=4, scale=1.0)
    request.items.add().CopyFrom(wire(cache, [rows_of(KEYS, 0, 1)]))
    result = calls.attention.SparseAttendBatch(request, timeout=TIMEOUT_S).results[0]
    assert (result.error.reason, result.error.field) == ("NO_KV_ROWS", "key_cache_id")
    assert cache.refresh().layer_keys == (0,)
    cache.delete()
