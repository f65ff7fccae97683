"""The client's half of SparseAttendBatch, without a network."""

from __future__ import annotations

import numpy as np
import pytest
from streamindex.v1 import attention_pb2, types_pb2
from streamindex_client.attend_batch import AttendBatchItem, build_attend_batch
from streamindex_client.errors import InputError, NotFoundError, ProtocolError
from streamindex_client.formats import KeyFormat
from streamindex_client.handles import CacheHandle
from streamindex_client.model import KeyCacheInfo, KeyCacheSpec, KvSpec

HEADS, DIM, VALUE_DIM, TOP_K = 2, 32, 16, 5
SPEC = KeyCacheSpec(3, 16, 4, KeyFormat.BF16, 2, "plain", kv=KvSpec("bf16", DIM, VALUE_DIM, HEADS))
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
