"""The client's half of SparseAttendBatch, without a network."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from streamindex.v1 import attention_pb2, key_cache_pb2, types_pb2
from streamindex_client.attend_batch import AttendBatchItem, build_attend_batch
from streamindex_client.errors import InputError, NotFoundError, ProtocolError
from streamindex_client.formats import KeyFormat
from streamindex_client.handles import CacheHandle
from streamindex_client.model import KeyCacheInfo, KeyCacheSpec, KvSpec

HEADS, DIM, VALUE_DIM, TOP_K = 2, 32, 16, 5
SPEC = KeyCacheSpec(3, 16, 4, KeyFormat.BF16, 2, "plain", kv=KvSpec("bf16", DIM, VALUE_DIM, HEADS))
KEY = np.ones((1, 16), np.uint16)
CACHE = CacheHandle(KeyCacheInfo("cache", SPEC, (0, 0), 0, 0))


def item(rows: int, **others) -> AttendBatchItem:
    fields = {
        "q": np.full((rows, HEADS, DIM), rows, np.uint16), "index_q": np.ones((rows, 3, 16), np.uint16),
        "index_w": np.ones((rows, 3), np.float32), "start_position": 7,
    }  # fmt: skip
    return AttendBatchItem(CACHE, 1, **fields | others)


def build(*items: AttendBatchItem, **others):
    asked = {"top_k": TOP_K, "window": 4, "scale": 0.5, "sink": None, "want_lse": True, "want_indices": True}
    return build_attend_batch(items, **asked | {"priority": None} | others)


def result(rows: int, **others) -> attention_pb2.SparseAttendBatchResult:
    fields = {
        "out": np.full((rows, HEADS, VALUE_DIM), rows, "<u2").tobytes(),
        "lse": np.full((rows, HEADS), rows, "<f4").tobytes(),
        "indices": np.full((rows, TOP_K), rows, "<i4").tobytes(),
    }
    return attention_pb2.SparseAttendBatchResult(**fields | others)


def answer(*results: attention_pb2.SparseAttendBatchResult) -> attention_pb2.SparseAttendBatchResponse:
    return attention_pb2.SparseAttendBatchResponse(results=results)


def test_what_is_sent():
    made = build(item(2), item(1, start_position=None, positions=[9]), priority="batch", sink=np.array([1.0, -np.inf]))
    message = made.message
    assert (message.top_k, message.window, message.scale, list(message.sink)) == (TOP_K, 4, 0.5, [1.0, -np.inf])
    assert (message.want_lse, message.want_indices, message.priority) == (True, True, types_pb2.PRIORITY_BATCH)
    first, other = message.items
    assert (first.key_cache_id, first.layer, first.convention, first.row_count) == ("cache", 1, "plain", 2)
    assert (list(first.positions), list(other.positions)) == ([7, 8], [9])
    assert (first.q, first.indices) == (np.full((2, HEADS, DIM), 2, "<u2").tobytes(), b"")
    assert (len(first.index_q), len(first.index_w)) == (2 * 3 * 16 * 2, 2 * 3 * 4)


def test_indices_that_are_given():
    some = {"index_q": None, "index_w": None}
    made = build(item(2, indices=np.arange(6).reshape(2, 3), **some), top_k=None)
    assert made.message.given_indices == 3
    assert np.frombuffer(made.message.items[0].indices, "<i4").tolist() == list(range(6))
    (read,) = made.results(answer(result(2, indices=b"")))
    assert read.indices is None  # they are not sent back, asked for or not
    assert build(top_k=None).message.WhichOneof("selection") == "given_indices"


def test_all_visible_rows_are_attended_without_indices():
    some = {"index_q": None, "index_w": None}
    made = build(item(2, **some), top_k=None, all_visible=True)
    assert (made.message.WhichOneof("selection"), made.message.all_visible) == ("all_visible", True)
    assert not made.message.items[0].indices
    (read,) = made.results(answer(result(2, indices=b"")))
    assert read.indices is None
    with pytest.raises(InputError, match="all_visible"):
        build(item(2), all_visible=True)
    with pytest.raises(InputError, match="indices"):
        build(item(2, indices=np.zeros((2, 3)), **some), top_k=None, all_visible=True)
    with pytest.raises(InputError, match="index_q"):
        build(item(2), top_k=None, all_visible=True)


def test_what_is_read():
    made = build(item(2), item(1))
    error = types_pb2.Error(code=5, reason="CACHE_NOT_FOUND", message="no such cache")
    good, bad = made.results(answer(result(2), attention_pb2.SparseAttendBatchResult(error=error)))
    assert good.out.tolist() == np.full((2, HEADS, VALUE_DIM), 2).tolist()
    assert good.out.dtype == np.uint16
    assert good.lse.tolist() == [[2.0] * HEADS] * 2
    assert good.indices.tolist() == [[2] * TOP_K] * 2
    assert isinstance(bad.error, NotFoundError)
    assert (bad.out, bad.lse, bad.indices) == (None, None, None)
    (bare,) = build(item(1), want_lse=False, want_indices=False).results(answer(result(1, lse=b"", indices=b"")))
    assert (bare.lse, bare.indices) == (None, None)


@pytest.mark.parametrize("wrong", [{"out": b""}, {"lse": bytes(7)}, {"indices": b""}])
def test_answers_of_another_length(wrong):
    with pytest.raises(ProtocolError, match="item 1 has"):
        build(item(2), item(1)).results(answer(result(2), result(1, **wrong)))


def test_answers_of_another_number():
    with pytest.raises(ProtocolError, match="1 results came for 2 items"):
        build(item(2), item(1)).results(answer(result(2)))


def test_errors_name_the_item():
    good = item(1)
    bad = AttendBatchItem(CACHE, 2, good.q, good.index_q, good.index_w, start_position=0)
    with pytest.raises(InputError, match=r"items\[1\]\.layer"):
        build(good, bad)
    bare = CacheHandle(KeyCacheInfo("bare", KeyCacheSpec(3, 16, 4, KeyFormat.BF16, 2, "plain"), (0, 0), 0, 0))
    with pytest.raises(InputError, match=r"items\[0\]\.q"):
        build(AttendBatchItem(bare, 0, item(1).q))


def cache(form: str = "bf16", key_format: KeyFormat = KeyFormat.BF16) -> CacheHandle:
    """Of two layers, of which the second has rows."""
    width = {"fp8_d512": 512, "fp8_d576": 576}.get(form, DIM)
    spec = KeyCacheSpec(
        3, 16, 4, key_format, 2, "plain", kv=KvSpec(form, width, 512 if width > DIM else VALUE_DIM, HEADS)
    )
    info = KeyCacheInfo("cache", spec, (0, 7), 0, 0, layer_kv_rows=(0, 5), layer_window_rows=(0, 30))
    return CacheHandle(info)


def test_rows_that_are_appended_are_sent_with_where_they_go():
    keys, rows = np.full((2, 16), 3, np.uint16), np.full((4, DIM), 9, np.uint16)
    made = build(AttendBatchItem(cache(), 1, keys=keys, kv_rows=rows[:3], window_rows=rows, first_window_row=28))
    (sent,) = made.message.items
    assert (sent.row_count, sent.q, list(sent.positions)) == (0, b"", [])
    kinds = [key_cache_pb2.ROW_KIND_KEYS, key_cache_pb2.ROW_KIND_KV, key_cache_pb2.ROW_KIND_WINDOW]
    assert [each.row_kind for each in sent.appends] == kinds
    assert [(each.first_row, each.row_count) for each in sent.appends] == [(7, 2), (5, 3), (28, 4)]
    assert [each.rows for each in sent.appends] == [keys.tobytes(), rows[:3].tobytes(), rows.tobytes()]
    assert not any(each.scales for each in sent.appends)
    queried = build(replace(item(2, window_rows=rows), cache=cache())).message.items[0]
    assert (queried.row_count, len(queried.positions), len(queried.appends)) == (2, 2, 1)
    scaled = AttendBatchItem(
        cache("fp8_d512", KeyFormat.FP8_E4M3), 1, keys=np.ones((2, 16), np.uint8), key_scales=np.ones(2, np.float32),
        kv_rows=np.ones((1, 576), np.uint8), kv_scales=np.full((1, 8), 127, np.uint8),
    )  # fmt: skip
    (sent,) = build(scaled).message.items
    assert [(len(each.rows), len(each.scales)) for each in sent.appends] == [(32, 8), (576, 8)]


@pytest.mark.parametrize(
    ("fields", "field", "expectation"),
    [
        ({}, "q", "give q, or rows to append"),
        ({"keys": np.ones((1, 15), np.uint16)}, "keys", r"expected \[keys, head_dim\]"),
        (
            {"keys": np.ones((1, 16), np.uint16), "key_scales": np.ones(1, np.float32)},
            "key_scales",
            "not used with bf16",
        ),
        ({"kv_rows": np.ones((1, DIM), np.float32)}, "kv_rows", "float32"),
        ({"kv_rows": np.ones((1, DIM), np.uint16), "kv_scales": np.ones((1, 8), np.uint8)}, "kv_scales", "not used"),
        ({"window_rows": np.ones((1, DIM), np.uint16), "first_window_row": -1}, "first_window_row", "-1"),
        ({"window_scales": np.ones((1, 8), np.uint8)}, "window_scales", "not used without window_rows"),
        ({"first_key": 4}, "first_key", "not used without keys"),
        ({"keys": KEY, "positions": [3]}, "positions", "not used without q"),
        ({"keys": KEY, "index_q": 0}, "index_q", "not used without q"),
    ],
)
def test_appends_that_are_wrong(fields, field, expectation):
    with pytest.raises(InputError, match=expectation) as caught:
        build(item(1), AttendBatchItem(cache(), 1, **fields))
    assert caught.value.field == f"items[1].{field}"


def test_the_lengths_after_appends_are_noted_but_for_items_that_failed():
    rows = np.ones((1, DIM), np.uint16)
    failing, appending, looking = cache(), cache(), cache()
    made = build(
        AttendBatchItem(failing, 1, window_rows=rows),
        AttendBatchItem(appending, 1, window_rows=rows),
        AttendBatchItem(
            looking, 1, **{name: getattr(item(2), name) for name in ("q", "index_q", "index_w")}, start_position=3
        ),
    )
    lengths = {"layer_keys": 7, "kv_rows": 6, "window_rows": 31}
    error = types_pb2.Error(code=5, reason="CACHE_NOT_FOUND", message="gone")
    came = answer(
        attention_pb2.SparseAttendBatchResult(error=error, **lengths),
        attention_pb2.SparseAttendBatchResult(**lengths),
        result(2, **lengths),
    )
    failed, appended, looked = made.results(came)
    for each in (failed, appended, looked):
        assert (each.layer_keys, each.layer_kv_rows, each.layer_window_rows) == (7, 6, 31)
    assert isinstance(failed.error, NotFoundError)
    assert (appended.error, appended.out, appended.lse, appended.indices) == (None, None, None, None)
    assert looked.out.shape == (2, HEADS, VALUE_DIM)
    assert [each.window_length(1) for each in (failing, appending, looking)] == [30, 31, 30]
    assert appending.kv_length(1) == 5  # it appended none of these: another did, and is told so
    with pytest.raises(ProtocolError, match="item 1 only appends"):
        made.results(answer(came.results[0], result(1), came.results[2]))


def test_the_width_of_given_indices_is_that_of_items_with_queries():
    rows = np.ones((1, DIM), np.uint16)
    some = {"index_q": None, "index_w": None}
    made = build(
        AttendBatchItem(cache(), 1, window_rows=rows), item(1, indices=np.array([[1, 2, 3]]), **some), top_k=None
    )
    assert made.message.given_indices == 3
    assert build(AttendBatchItem(cache(), 1, window_rows=rows), top_k=None).message.given_indices == 0
