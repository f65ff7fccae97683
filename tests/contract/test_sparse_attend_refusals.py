"""What SparseAttend, and uploads of KV rows, refuse: in-band and as the status, with the field to blame."""

from __future__ import annotations

from typing import Any

import grpc
import numpy as np
import pytest
from streamindex.checksum import crc32c
from streamindex.v1 import attention_pb2, key_cache_pb2, types_pb2

from tests.support.calls import StreamCall, refused
from tests.support.tensors import BF16, Draw, Kind

KIND = Kind(heads=2, head_dim=16, ratio=1)
HEADS, DIM, ROWS = 2, 32, 300
KV = key_cache_pb2.KvSpec(kv_format=types_pb2.KV_FORMAT_BF16, key_dim=DIM, value_dim=DIM, heads=HEADS)
INVALID, PRECONDITION = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.FAILED_PRECONDITION


def bf16(rows: int, *shape: int) -> bytes:
    return np.full((rows, *shape), 0x3F80, "<u2").tobytes()  # ones


def append(calls, cache_id: str, kind: int, data: bytes, row_count: int, scales: bytes = b"", layer: int = 0):
    """Write rows of a kind; the call, after everything was sent."""
    start = key_cache_pb2.AppendKeysHeader.Start(key_cache_id=cache_id, layer=layer, row_count=row_count, row_kind=kind)
    chunk = key_cache_pb2.KeyChunk(row_count=row_count, keys=data, scales=scales, crc32c=crc32c(scales, crc32c(data)))
    finish = key_cache_pb2.AppendKeysFinish(
        row_count=row_count, keys_crc32c=crc32c(data), scales_crc32c=crc32c(scales) if scales else None
    )
    call = calls.append_call()
    request = key_cache_pb2.AppendKeysRequest
    call.send(request(header=key_cache_pb2.AppendKeysHeader(start=start)), request(chunk=chunk), request(finish=finish))
    call.half_close()
    return call


@pytest.fixture
def cache_id(calls):
    """300 index keys, 280 KV rows and 250 window rows."""
    keys = Draw(1).keys(KIND, ROWS)
    with calls.cache(KIND, keys, kv=KV) as made:
        for kind, count in ((key_cache_pb2.ROW_KIND_KV, 280), (key_cache_pb2.ROW_KIND_WINDOW, 250)):
            assert append(calls, made.id, kind, bf16(count, DIM), count).receive_until("committed").layer_keys == count
        yield made.id


def header(cache_id: str, **fields: Any) -> attention_pb2.SparseAttendRequest:
    wanted = {"key_cache_id": cache_id, "given_indices": 3, "start_position": 0, "scale": 1.0, **fields}
    for name in [name for name, value in wanted.items() if value is None]:
        del wanted[name]
    return attention_pb2.SparseAttendRequest(header=attention_pb2.SparseAttendHeader(**wanted))


def chunk(rows: int = 4, **fields: Any) -> attention_pb2.SparseAttendRequest:
    wanted = {"row_count": rows, "q": bf16(rows, HEADS, DIM), "indices": bytes(12 * rows), **fields}
    return attention_pb2.SparseAttendRequest(chunk=attention_pb2.AttendChunk(**wanted))


def attend(calls, *messages) -> StreamCall:
    call = StreamCall(calls.attention.SparseAttend, metadata=calls.metadata)
    call.send(*messages)
    call.half_close()
    return call


def test_a_call_in_plain_protobuf_is_answered(calls, cache_id):
    with attend(calls, header(cache_id, window=2, want_lse=True), chunk(), chunk(row_offset=4)) as call:
        messages = call.rest()
    assert [message.WhichOneof("message") for message in messages][0 :: len(messages) - 1] == ["accepted", "done"]
    accepted = messages[0].accepted
    assert (accepted.layer_keys, accepted.kv_rows, accepted.window_rows) == (300, 280, 250)
    chunks = [message.chunk for message in messages[1:-1]]
    assert sum(each.row_count for each in chunks) == messages[-1].done.row_count == 8
    out = b"".join(each.out for each in chunks)
    assert out == bf16(8, HEADS, DIM)  # all rows are ones: so is their mean
    assert all(each.crc32c == crc32c(each.lse, crc32c(each.out)) for each in chunks)


@pytest.mark.parametrize(("fields", "code", "reason", "field"), [
    ({"given_indices": None}, INVALID, "INVALID_ARGUMENT", "header.top_k"),
    ({"given_indices": 16_385}, INVALID, "INVALID_ARGUMENT", "header.given_indices"),
    ({"given_indices": None, "top_k": 0}, INVALID, "INVALID_ARGUMENT", "header.top_k"),
    ({"given_indices": None, "all_visible": False}, INVALID, "INVALID_ARGUMENT", "header.all_visible"),
    ({"start_position": None}, INVALID, "INVALID_ARGUMENT", "header.start_position"),
    ({"scale": float("nan")}, INVALID, "INVALID_ARGUMENT", "header.scale"),
    ({"scale": float("inf")}, INVALID, "INVALID_ARGUMENT", "header.scale"),
    ({"sink": [1.0]}, INVALID, "INVALID_ARGUMENT", "header.sink"),
    ({"sink": [1.0, float("nan")]}, INVALID, "INVALID_ARGUMENT", "header.sink"),
    ({"window": 4097}, INVALID, "INVALID_ARGUMENT", "header.window"),
    ({"priority": 9}, INVALID, "INVALID_ARGUMENT", "header.priority"),
    ({"request_key": "x" * 65}, INVALID, "INVALID_ARGUMENT", "header.request_key"),
    ({"layer": 1}, INVALID, "INVALID_ARGUMENT", "layer"),
    ({"convention": "other"}, PRECONDITION, "CONVENTION_MISMATCH", "header.convention"),
    ({"given_indices": None, "top_k": 2, "query_format": 2}, PRECONDITION, "CONVENTION_MISMATCH",
     "header.query_format"),
    ({"given_indices": None, "top_k": 2, "query_format": BF16}, PRECONDITION, "NO_KV_ROWS", "header.layer"),
    ({"expected_layer_version": 1}, PRECONDITION, "LAYER_CHANGED", "header.expected_layer_version"),
])  # fmt: skip
def test_headers_that_are_refused(calls, cache_id, fields, code, reason, field):
    with attend(calls, header(cache_id, **fields)) as call:
        refusal = call.refusal()
    assert (refusal.code, refusal.error.reason, refusal.error.field) == (code, reason, field)


@pytest.mark.parametrize(("fields", "reason", "field"), [
    ({"q": bf16(4, HEADS, DIM)[:-2]}, "INVALID_ARGUMENT", "chunk.q"),
    ({"indices": bytes(44)}, "INVALID_ARGUMENT", "chunk.indices"),
    ({"index_q": bytes(8)}, "INVALID_ARGUMENT", "chunk.index_q"),
    ({"positions": bytes(32)}, "INVALID_ARGUMENT", "chunk.positions"),
    ({"row_offset": 1}, "INVALID_ARGUMENT", "chunk.row_offset"),
    ({"q": bf16(3, HEADS, DIM) + np.full((HEADS, DIM), 0x7FC0, "<u2").tobytes()}, "NON_FINITE", "q"),
    ({"crc32c": 7}, "CHECKSUM", "chunk.crc32c"),
])  # fmt: skip
def test_chunks_that_are_refused(calls, cache_id, fields, reason, field):
    with attend(calls, header(cache_id), chunk(**fields)) as call:
        refusal = call.refusal()
    assert (refusal.error.reason, refusal.error.field) == (reason, field)
    if reason == "NON_FINITE":
        assert dict(refusal.error.metadata) == {"tensor": "q", "row": "3"}


def test_queries_of_a_search_that_are_not_finite(calls, cache_id):
    calls.truncate(cache_id, 280)
    ordinary = {"index_q": bf16(4, 2, 16), "index_w": np.ones((4, 2), "<f4").tobytes(), "indices": b""}
    for name, bad in (("index_q", np.full((4, 2, 16), 0x7F80, "<u2")), ("index_w", np.full((4, 2), np.nan, "<f4"))):
        parts = ordinary | {name: bad.tobytes()}
        with attend(calls, header(cache_id, given_indices=None, top_k=2, query_format=BF16), chunk(**parts)) as call:
            refusal = call.refusal()
        assert (refusal.error.reason, refusal.error.field) == ("NON_FINITE", name)


def test_a_window_beyond_the_rows_held(calls, cache_id):
    with attend(calls, header(cache_id, start_position=247, window=5), chunk()) as call:
        refusal = call.refusal()
    assert (refusal.code, refusal.error.reason) == (PRECONDITION, "NO_KV_ROWS")
    assert dict(refusal.error.metadata) == {"row": "3", "needed_rows": "251", "window_rows": "250"}
    with attend(calls, header(cache_id, start_position=2**61), chunk()) as call:  # without a window nobody minds
        assert call.receive_until("done").row_count == 4


def test_all_visible_rows_must_be_held(calls, cache_id):
    """280 KV rows of ratio 1, where there are 300 keys."""
    whole = {"given_indices": None, "all_visible": True}
    with attend(calls, header(cache_id, start_position=277, **whole), chunk(indices=b"")) as call:
        refusal = call.refusal()
    assert (refusal.code, refusal.error.reason) == (PRECONDITION, "NO_KV_ROWS")
    assert refusal.error.field == "header.start_position"
    assert dict(refusal.error.metadata) == {"row": "3", "needed_rows": "281", "kv_rows": "280"}
    with attend(calls, header(cache_id, start_position=276, **whole), chunk(indices=b"")) as call:
        assert b"".join(each.chunk.out for each in call.rest()[1:-1]) == bf16(4, HEADS, DIM)
    with attend(calls, header(cache_id, **whole), chunk()) as call:
        assert call.refusal().error.field == "chunk.indices"


def test_a_layer_is_attended_whole_up_to_a_limit(calls):
    with calls.cache(KIND, kv=KV) as made:
        for first, count in ((0, 16_384), (16_384, 1)):
            start = key_cache_pb2.AppendKeysHeader.Start(
                key_cache_id=made.id, first_row=first, row_count=count, row_kind=key_cache_pb2.ROW_KIND_KV
            )
            data = bf16(count, DIM)
            with calls.append_call() as call:
                each = 4096
                call.send(key_cache_pb2.AppendKeysRequest(header=key_cache_pb2.AppendKeysHeader(start=start)))
                for at in range(0, count, each):
                    rows = min(each, count - at)
                    part = data[64 * at : 64 * (at + rows)]
                    sent = key_cache_pb2.KeyChunk(row_offset=at, row_count=rows, keys=part, crc32c=crc32c(part))
                    call.send(key_cache_pb2.AppendKeysRequest(chunk=sent))
                finish = key_cache_pb2.AppendKeysFinish(row_count=count, keys_crc32c=crc32c(data))
                call.send(key_cache_pb2.AppendKeysRequest(finish=finish))
                call.half_close()
                call.receive_until("committed")
            whole = header(made.id, given_indices=None, all_visible=True, start_position=16_000)
            with attend(calls, whole, chunk(indices=b"")) as call:
                if not first:
                    assert call.receive_until("done").row_count == 4
                    continue
                refusal = call.refusal()
            assert (refusal.code, refusal.error.field) == (INVALID, "header.all_visible")
            assert dict(refusal.error.metadata) == {"kv_rows": "16385", "limit": "16384"}


def test_announced_rows_must_come(calls, cache_id):
    with attend(calls, header(cache_id, row_count=5), chunk()) as call:
        assert call.refusal().error.field == "header.row_count"


def test_rows_beyond_those_announced_are_not_computed(calls, cache_id):
    """The call holds what those it announced can ask for; the rest may be somebody else's by now."""
    call = StreamCall(calls.attention.SparseAttend, metadata=calls.metadata)
    with call:  # it stays open: what ends it is the chunk
        call.send(header(cache_id, row_count=5, window=2), chunk(), chunk(row_offset=4))
        refusal = call.refusal()
    assert (refusal.code, refusal.error.reason, refusal.error.field) == (
        INVALID,
        "INVALID_ARGUMENT",
        "header.row_count",
    )
    assert dict(refusal.error.metadata) == {"announced_rows": "5", "received_rows": "8"}


def test_a_cache_of_index_keys_alone(calls):
    with calls.cache(KIND) as made:
        with attend(calls, header(made.id)) as call:
            refusal = call.refusal()
        assert (refusal.code, refusal.error.reason) == (PRECONDITION, "NO_KV_ROWS")
        for kind in (key_cache_pb2.ROW_KIND_KV, key_cache_pb2.ROW_KIND_WINDOW):
            with append(calls, made.id, kind, bf16(1, DIM), 1) as call:
                assert call.refusal().error.reason == "NO_KV_ROWS"
        assert not calls.get(made.id).layer_kv_rows


def test_unknown_caches_are_not_found(calls, cache_id):
    texts = set()
    for wrong in ("", "kc_guess", cache_id + "x"):
        with attend(calls, header(wrong)) as call:
            refusal = call.refusal()
        assert refusal.code == grpc.StatusCode.NOT_FOUND
        texts.add(refusal.details)
    assert len(texts) == 1


def test_a_row_that_no_block_holds(calls):
    wide = key_cache_pb2.KvSpec(kv_format=types_pb2.KV_FORMAT_BF16, key_dim=576, value_dim=512, heads=128)
    # 272 KiB a row and its answer; blocks have 256 KiB here
    with calls.cache(KIND, kv=wide) as made, attend(calls, header(made.id)) as call:
        refusal = call.refusal()
    assert refusal.error.reason == "INVALID_ARGUMENT"
    assert int(refusal.error.metadata["needed_bytes"]) > int(refusal.error.metadata["limit_bytes"]) == 256 * 1024


@pytest.mark.parametrize(("field", "value"), [
    ("kv_format", 0), ("kv_format", 9), ("heads", 0), ("heads", 129), ("value_dim", 8), ("value_dim", 48),
    ("value_dim", 1024), ("key_dim", 40), ("key_dim", 0), ("key_dim", 2**31),
])  # fmt: skip
def test_kv_specs_that_are_refused(calls, field, value):
    spec = key_cache_pb2.KvSpec()
    spec.CopyFrom(KV)
    setattr(spec, field, value)
    refusal = refused(calls.create, KIND, kv=spec)
    assert (refusal.error.reason, refusal.error.field) == ("INVALID_ARGUMENT", f"spec.kv.{field}")


def test_dimensions_of_packed_rows_are_the_format_s(calls):
    spec = key_cache_pb2.KvSpec(kv_format=types_pb2.KV_FORMAT_FP8_D512, key_dim=576, value_dim=512, heads=1)
    assert refused(calls.create, KIND, kv=spec).error.field == "spec.kv.key_dim"
    spec = key_cache_pb2.KvSpec(kv_format=types_pb2.KV_FORMAT_FP8_D576, key_dim=576, value_dim=256, heads=1)
    assert refused(calls.create, KIND, kv=spec).error.field == "spec.kv.value_dim"


@pytest.mark.parametrize(("kv_format", "dim", "row", "at", "value", "tensor"), [
    (types_pb2.KV_FORMAT_BF16, 512, 1024, 3, 0x7F, "kv_rows"),  # the high byte of an Inf
    (types_pb2.KV_FORMAT_FP8_D512, 512, 576, 100, 0x7F, "kv_rows"),  # an e4m3 NaN
    (types_pb2.KV_FORMAT_FP8_D512, 512, 576, 449, 0xFF, "kv_rows"),  # a bf16 rotary value
    (types_pb2.KV_FORMAT_FP8_D576, 576, 656, 100, 0xFF, "kv_rows"),
    (types_pb2.KV_FORMAT_FP8_D576, 576, 656, 515, 0x7F, "kv_rows"),  # a float32 scale
    (types_pb2.KV_FORMAT_FP8_D576, 576, 656, 655, 0x7F, "kv_rows"),
])  # fmt: skip
def test_rows_that_are_not_finite(calls, kv_format, dim, row, at, value, tensor):
    spec = key_cache_pb2.KvSpec(kv_format=kv_format, key_dim=dim, value_dim=512, heads=1)
    data = np.zeros((5, row), np.uint8)
    data[3, at] = value
    data[3, at - 1] = 0x80 if kv_format == types_pb2.KV_FORMAT_BF16 or at > 448 else 0
    scales = bytes(40) if kv_format == types_pb2.KV_FORMAT_FP8_D512 else b""
    with calls.cache(KIND, kv=spec) as made:
        with append(calls, made.id, key_cache_pb2.ROW_KIND_KV, data.tobytes(), 5, scales) as call:
            refusal = call.refusal()
        assert refusal.error.reason == "NON_FINITE"
        assert dict(refusal.error.metadata) == {"tensor": tensor, "row": "3"}
        assert list(calls.get(made.id).layer_kv_rows) == [0]


def test_scales_beside_rows_that_are_nan(calls):
    spec = key_cache_pb2.KvSpec(kv_format=types_pb2.KV_FORMAT_FP8_D512, key_dim=512, value_dim=512, heads=1)
    scales = np.zeros((5, 8), np.uint8)
    scales[2, 7] = 0xFF  # padding may be anything
    with calls.cache(KIND, kv=spec) as made:
        kind, data = key_cache_pb2.ROW_KIND_WINDOW, bytes(5 * 576)
        assert append(calls, made.id, kind, data, 5, scales.tobytes()).receive_until("committed").layer_keys == 5
        scales[4, 6] = 0xFF
        with append(calls, made.id, kind, data, 5, scales.tobytes()) as call:
            refusal = call.refusal()
        assert dict(refusal.error.metadata) == {"tensor": "scales", "row": "4"}


def test_row_kinds_that_do_not_exist(calls, cache_id):
    with append(calls, cache_id, 4, bf16(1, DIM), 1) as call:
        assert call.refusal().error.field == "header.start.row_kind"
