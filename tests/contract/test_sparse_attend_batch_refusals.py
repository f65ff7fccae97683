"""What SparseAttendBatch refuses: an item by itself, with its own field to blame, or the whole call."""

from __future__ import annotations

from typing import Any

import grpc
import numpy as np
import pytest
from streamindex.v1 import attention_pb2, key_cache_pb2

from tests.contract.test_sparse_attend_refusals import DIM, HEADS, KIND, KV, ROWS, append, bf16
from tests.support.calls import TIMEOUT_S, refused
from tests.support.services import is_idle, wait_for
from tests.support.tensors import BF16, FP16, Draw

INVALID = grpc.StatusCode.INVALID_ARGUMENT


@pytest.fixture
def cache_id(calls):
    """300 index keys and KV rows, and 250 window rows, all ones."""
    with calls.cache(KIND, Draw(1).keys(KIND, ROWS), kv=KV) as made:
        for kind, count in ((key_cache_pb2.ROW_KIND_KV, ROWS), (key_cache_pb2.ROW_KIND_WINDOW, 250)):
            assert append(calls, made.id, kind, bf16(count, DIM), count).receive_until("committed").layer_keys == count
        yield made.id


def item(cache_id: str, rows: int = 2, **fields: Any) -> attention_pb2.SparseAttendBatchItem:
    wanted = {
        "key_cache_id": cache_id, "query_format": BF16, "row_count": rows, "q": bf16(rows, HEADS, DIM),
        "index_q": bf16(rows, 2, 16), "index_w": np.ones((rows, 2), "<f4").tobytes(), "positions": [100] * rows,
        **fields,
    }  # fmt: skip
    return attention_pb2.SparseAttendBatchItem(**wanted)


def given(cache_id: str, rows: int = 2, **fields: Any) -> attention_pb2.SparseAttendBatchItem:
    return item(cache_id, rows, **{"index_q": b"", "index_w": b"", "indices": bytes(12 * rows), **fields})


def request(items, **fields: Any) -> attention_pb2.SparseAttendBatchRequest:
    wanted = {"top_k": 3, "scale": 1.0, "window": 4, **fields}
    if "given_indices" in wanted:
        del wanted["top_k"]
    return attention_pb2.SparseAttendBatchRequest(items=items, **wanted)


def attend(calls, items, **fields: Any):
    results = calls.attention.SparseAttendBatch(request(items, **fields), timeout=TIMEOUT_S).results
    assert len(results) == len(items)
    return results


def test_a_call_in_plain_protobuf_is_answered(calls, cache_id):
    (result,) = attend(calls, [item(cache_id)], want_lse=True, want_indices=True)
    assert result.out == bf16(2, HEADS, DIM)  # all rows are ones: so is their mean
    assert (len(result.lse), len(result.indices)) == (4 * 2 * HEADS, 4 * 2 * 3)
    (result,) = attend(calls, [given(cache_id)], given_indices=3)
    assert (result.out, result.lse, result.indices) == (bf16(2, HEADS, DIM), b"", b"")


def test_items_fail_by_themselves(calls, cache_id):
    nan, inf = np.full((2, HEADS, DIM), 0x7FC0, "<u2").tobytes(), np.full((2, 2), np.inf, "<f4").tobytes()
    keys = Draw(2).keys(KIND, 20)
    with calls.cache(KIND) as bare, calls.cache(KIND, keys, kv=KV) as without, calls.cache(KIND, kv=KV) as empty:
        wrong = [
            (item("kc_nowhere"), "CACHE_NOT_FOUND", "key_cache_id"),
            (item(cache_id, layer=1), "INVALID_ARGUMENT", "layer"),
            (item(cache_id, convention="x"), "CONVENTION_MISMATCH", "convention"),
            (item(cache_id, query_format=FP16), "CONVENTION_MISMATCH", "query_format"),
            (item(cache_id, query_format=0), "INVALID_ARGUMENT", "query_format"),
            (item(cache_id, q=b"\0"), "INVALID_ARGUMENT", "q"),
            (item(cache_id, index_q=b""), "INVALID_ARGUMENT", "index_q"),
            (item(cache_id, index_w=bytes(15)), "INVALID_ARGUMENT", "index_w"),
            (item(cache_id, indices=bytes(24)), "INVALID_ARGUMENT", "indices"),
            (item(cache_id, positions=[1]), "INVALID_ARGUMENT", "positions"),
            (item(cache_id, positions=[1, 2**64 - 1]), "INVALID_ARGUMENT", "positions"),
            (item(cache_id, row_count=3), "INVALID_ARGUMENT", "positions"),
            (item(cache_id, positions=[249, 250]), "NO_KV_ROWS", "positions"),
            (item(cache_id, q=nan), "NON_FINITE", "q"),
            (item(cache_id, index_q=np.full((2, 2, 16), 0x7F80, "<u2").tobytes()), "NON_FINITE", "index_q"),
            (item(cache_id, index_w=inf), "NON_FINITE", "index_w"),
            (item(bare.id), "NO_KV_ROWS", "key_cache_id"),
            (item(without.id), "NO_KV_ROWS", "layer"),
            (item(empty.id), "NO_KV_ROWS", "positions"),
        ]
        good = item(cache_id)
        items = [each for one, _, _ in wrong for each in (one, good)]
        results = attend(calls, items)
        for (one, reason, field), result in zip(wrong, results[::2], strict=True):
            assert (result.error.reason, result.error.field) == (reason, field), one
            assert result.error.code
            assert not result.error.HasField("retry_after_ms")
            assert not result.out
        for result in results[1::2]:
            assert not result.HasField("error")
            assert result.out == bf16(2, HEADS, DIM)
    wait_for(lambda: is_idle(calls.load()))


def test_given_indices_fail_by_item_too(calls, cache_id):
    wrong = [
        (given(cache_id, indices=bytes(20)), "INVALID_ARGUMENT", "indices"),
        (item(cache_id), "INVALID_ARGUMENT", "index_q"),
        (given(cache_id, convention="x"), "CONVENTION_MISMATCH", "convention"),
        (given(cache_id, row_count=0), "INVALID_ARGUMENT", "positions"),
    ]
    results = attend(calls, [*(one for one, _, _ in wrong), given(cache_id, query_format=FP16)], given_indices=3)
    for (_, reason, field), result in zip(wrong, results, strict=False):
        assert (result.error.reason, result.error.field) == (reason, field)
    assert results[-1].out == bf16(2, HEADS, DIM)  # nobody looks at the format of queries that do not come


def test_a_sink_is_for_caches_of_so_many_heads(calls, cache_id):
    wide = key_cache_pb2.KvSpec()
    wide.CopyFrom(KV)
    wide.heads = HEADS + 1
    with calls.cache(KIND, kv=wide) as other:
        one, two = attend(calls, [item(other.id, 0), item(cache_id)], sink=[1.0, 2.0])
    assert (one.error.reason, one.error.field) == ("INVALID_ARGUMENT", "sink")
    assert len(two.out) == 2 * 2 * HEADS * DIM


def test_a_row_that_no_block_holds(calls, cache_id):
    wide = key_cache_pb2.KvSpec()
    wide.CopyFrom(KV)
    wide.key_dim, wide.value_dim, wide.heads = 576, 512, 128
    with calls.cache(KIND, kv=wide) as made:
        one, two = attend(calls, [item(made.id), item(cache_id)])
    assert (one.error.reason, one.error.field) == ("INVALID_ARGUMENT", "key_cache_id")
    assert int(one.error.metadata["needed_bytes"]) > int(one.error.metadata["limit_bytes"]) == 256 * 1024
    assert two.out == bf16(2, HEADS, DIM)


@pytest.mark.parametrize(
    ("fields", "items", "field"),
    [
        ({"top_k": 0}, 0, "top_k"),
        ({"top_k": 4097}, 0, "top_k"),
        ({"top_k": None}, 0, "top_k"),
        ({"given_indices": 16_385}, 0, "given_indices"),
        ({"window": 4097}, 0, "window"),
        ({"scale": float("nan")}, 0, "scale"),
        ({"scale": float("-inf")}, 0, "scale"),
        ({"sink": [0.0, float("nan")]}, 0, "sink"),
        ({"priority": 9}, 0, "priority"),
        ({}, 1025, "items"),
    ],
)
def test_what_concerns_the_whole_call(calls, fields, items, field):
    wrong = request([attention_pb2.SparseAttendBatchItem()] * items, **fields)
    refusal = refused(calls.attention.SparseAttendBatch, wrong, timeout=TIMEOUT_S)
    assert (refusal.code, refusal.error.field) == (INVALID, field)


@pytest.mark.parametrize("rows", [(4097,), (2048, 2049), (2**32 - 1, 2**32 - 1)])
def test_rows_of_all_items_together(calls, rows):
    wrong = request([attention_pb2.SparseAttendBatchItem(row_count=count) for count in rows])
    refusal = refused(calls.attention.SparseAttendBatch, wrong, timeout=TIMEOUT_S)
    assert (refusal.code, refusal.error.field) == (INVALID, "items.row_count")
    assert refusal.error.metadata["limit"] == "4096"


def test_answers_longer_than_a_message_are_refused_before_the_work(calls):
    """4,096 rows of 4,096 indices and 512 outputs are 68 MiB, of 4.5 MiB of queries; a message has 64."""
    thin = key_cache_pb2.KvSpec()
    thin.CopyFrom(KV)
    thin.key_dim, thin.value_dim, thin.heads = 16, 16, 32
    rows = 4096
    with calls.cache(KIND, kv=thin) as made:
        fields = {"q": bf16(rows, 32, 16), "index_q": bf16(rows, 2, 16), "index_w": bytes(8 * rows)}
        wrong = request([item(made.id, rows, **fields)], top_k=4096, want_indices=True, window=0)
        refusal = refused(calls.attention.SparseAttendBatch, wrong, timeout=TIMEOUT_S)
    assert refusal.code is INVALID
    assert refusal.error.metadata["needed_bytes"] == str(rows * (4096 * 4 + 32 * 16 * 2))


def test_a_message_longer_than_the_limit(calls):
    wrong = request([attention_pb2.SparseAttendBatchItem(q=bytes(65 << 20))])
    with pytest.raises(grpc.RpcError) as caught:
        calls.attention.SparseAttendBatch(wrong, timeout=TIMEOUT_S)
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
