"""AppendKeys and QueryUpload over a real socket: what is held, what is refused, and how one goes on."""

from __future__ import annotations

import grpc
import numpy as np
import pytest
from streamindex.checksum import crc32c
from streamindex.v1 import key_cache_pb2

from tests.support.calls import Calls, finish_message, key_chunk, key_chunks, refused, start_message
from tests.support.services import wait_for
from tests.support.tensors import BF16, FP8, FP16, FP32, Draw, Keys, Kind, expected

KIND = Kind(heads=2, head_dim=32)
SCALED = Kind(heads=2, head_dim=32, key_format=FP8)
ROWS = 700  # pages of 256: two and a part


def assert_holds(calls, kind, cache_id, keys, layer=0, seed=5):
    """The layer is these keys, bit for bit, as a search that ranks all of them sees it."""
    assert calls.get(cache_id).layer_keys[layer] == len(keys)
    queries = Draw(seed).queries(kind, 5, start_position=max(0, kind.ratio * len(keys) - 3))
    top_k = max(1, len(keys))
    indices, scores = calls.search(kind, cache_id, queries, top_k, layer=layer, want_scores=True)
    wanted_indices, wanted_scores = expected(kind, keys, queries, top_k)
    assert np.array_equal(indices, wanted_indices)
    assert np.array_equal(scores, wanted_scores)


@pytest.mark.parametrize("key_format", [BF16, FP16, FP32, FP8], ids=["bf16", "fp16", "fp32", "fp8"])
@pytest.mark.parametrize("chunk_rows", [1, 255, 256, 700])
def test_rows_in_chunks_of_any_size(calls, key_format, chunk_rows):
    kind = Kind(heads=2, head_dim=32, key_format=key_format)
    keys = Draw(1).keys(kind, ROWS)
    with calls.cache(kind) as cache:
        assert calls.upload(kind, cache.id, keys, chunk_rows=chunk_rows) == ROWS
        assert_holds(calls, kind, cache.id, keys)


def test_nothing_is_visible_before_the_commit(calls):
    keys = Draw(2).keys(KIND, ROWS)
    with calls.cache(KIND) as cache:
        call, accepted = calls.start_upload(cache.id, ROWS)
        with call:
            assert (accepted.row_offset, bool(accepted.upload_id)) == (0, True)
            call.send(*key_chunks(KIND, keys, 100))
            while call.receive("acknowledged").row_offset < ROWS:
                pass
            assert calls.get(cache.id).layer_keys[0] == 0
            assert not calls.query_upload(accepted.upload_id).committed
            call.send(finish_message(KIND, keys))
            assert call.receive("committed").layer_keys == ROWS
        assert_holds(calls, KIND, cache.id, keys)


@pytest.mark.parametrize("end", ["half-close", "cancel", "connection lost"])
def test_the_end_of_the_stream_never_commits_and_the_upload_goes_on(roomy_service, calls, end):
    keys = Draw(3).keys(KIND, ROWS)
    with calls.cache(KIND) as cache, Calls(roomy_service.address) as other:
        call, accepted = other.start_upload(cache.id, ROWS)
        call.send(*key_chunks(KIND, keys[:300], 100))
        while call.receive("acknowledged").row_offset < 300:
            pass
        if end == "half-close":
            call.half_close()
            assert all(message.WhichOneof("message") == "acknowledged" for message in call.rest())
            assert call.rpc.code() is grpc.StatusCode.OK
        elif end == "cancel":
            call.cancel()
        else:
            other.close()
        upload = calls.query_upload(accepted.upload_id)
        assert (upload.row_offset, upload.committed) == (300, False)
        assert calls.get(cache.id).layer_keys[0] == 0

        def resumed():
            resume = calls.append_call()
            resume.send(
                key_cache_pb2.AppendKeysRequest(
                    header=key_cache_pb2.AppendKeysHeader(resume_upload_id=accepted.upload_id)
                )
            )
            try:
                first = next(resume.rpc)
            except grpc.RpcError:
                return None
            return resume if first.accepted.row_offset == 300 else None

        found = []
        wait_for(lambda: found.append(resumed()) or found[-1])  # the old stream may hold it for a moment
        with found[-1] as resume:
            resume.send(*key_chunks(KIND, keys, 100, first=300), finish_message(KIND, keys))
            assert resume.receive_until("committed").layer_keys == ROWS
        assert_holds(calls, KIND, cache.id, keys)
        assert calls.query_upload(accepted.upload_id).committed


def test_finish_after_a_lost_answer_is_answered_again(calls):
    keys = Draw(4).keys(KIND, 300)
    with calls.cache(KIND) as cache:
        call, accepted = calls.start_upload(cache.id, 300)
        with call:
            call.send(*key_chunks(KIND, keys, 100), finish_message(KIND, keys))
            call.receive_until("committed")
            call.rest()
        calls.upload(KIND, cache.id, keys, first_row=300)
        for _ in range(2):
            again, state = calls.resume_upload(accepted.upload_id)
            with again:
                assert state.row_offset == 300
                again.send(finish_message(KIND, keys))
                assert again.receive("committed").layer_keys == 300
        assert_holds(calls, KIND, cache.id, keys + keys)


def test_a_chunk_to_a_committed_upload_is_refused(calls):
    keys = Draw(4).keys(KIND, 300)
    with calls.cache(KIND) as cache:
        call, accepted = calls.start_upload(cache.id, 300)
        with call:
            call.send(*key_chunks(KIND, keys, 100), finish_message(KIND, keys))
            call.receive_until("committed")
            call.rest()
        again, _ = calls.resume_upload(accepted.upload_id)
        with again:
            again.send(key_chunk(KIND, keys[:100], 0))
            refusal = again.refusal()
        assert refusal.code is grpc.StatusCode.INVALID_ARGUMENT, refusal
        assert_holds(calls, KIND, cache.id, keys)


@pytest.mark.parametrize("kind", [KIND, SCALED], ids=["bf16", "fp8"])
def test_a_duplicate_chunk_changes_nothing(calls, kind):
    keys = Draw(5).keys(kind, ROWS)
    with calls.cache(kind) as cache:
        call, _ = calls.start_upload(cache.id, ROWS)
        with call:
            for chunk in key_chunks(kind, keys, 150):
                call.send(chunk, chunk)
            call.send(key_chunk(kind, keys[200:500], 200))  # other bounds, same bytes
            call.send(finish_message(kind, keys))
            assert call.receive_until("committed").layer_keys == ROWS
        assert_holds(calls, kind, cache.id, keys)


def other_keys(rows: Keys) -> Keys:
    values = rows.values.copy()
    values[-1, -1] = -values[-1, -1] or 1
    return Keys(values, rows.scales)


def other_scales(rows: Keys) -> Keys:
    scales = rows.scales.copy()
    scales[-1] *= 2
    return Keys(rows.values, scales)


@pytest.mark.parametrize(
    ("kind", "change"), [(KIND, other_keys), (SCALED, other_keys), (SCALED, other_scales)], ids=["bf16", "fp8", "scale"]
)
def test_the_same_offset_with_other_bytes_conflicts(calls, kind, change):
    keys = Draw(6).keys(kind, ROWS)
    with calls.cache(kind) as cache:
        call, accepted = calls.start_upload(cache.id, ROWS)
        with call:
            call.send(key_chunk(kind, keys[:300], 0), key_chunk(kind, change(keys[100:280]), 100))
            refusal = call.refusal()
        assert (refusal.code, refusal.error.reason) == (grpc.StatusCode.ABORTED, "UPLOAD_CONFLICT")
        assert calls.query_upload(accepted.upload_id).row_offset == 300
        finish_by_resuming(calls, kind, cache.id, accepted.upload_id, keys, 300)


def finish_by_resuming(calls, kind, cache_id, upload_id, keys, held):
    call, accepted = calls.resume_upload(upload_id)
    with call:
        assert accepted.row_offset == held
        call.send(*key_chunks(kind, keys, 123, first=held), finish_message(kind, keys))
        call.receive_until("committed")
    assert_holds(calls, kind, cache_id, keys)


@pytest.mark.parametrize("row_offset", [301, 400, 2**40, 0xFFFFFFFFFFFFFF00])
def test_a_gap_is_refused_with_the_offset_to_go_on_at(calls, row_offset):
    keys = Draw(7).keys(KIND, ROWS)
    with calls.cache(KIND) as cache:
        call, accepted = calls.start_upload(cache.id, ROWS)
        with call:
            call.send(*key_chunks(KIND, keys[:300], 50), key_chunk(KIND, keys[301:310], row_offset))
            refusal = call.refusal()
        if row_offset < ROWS:
            assert (refusal.code, refusal.error.reason) == (grpc.StatusCode.OUT_OF_RANGE, "OFFSET_GAP")
            assert refusal.error.metadata["expected_row_offset"] == "300"
        else:  # beyond what was announced
            assert (refusal.code, refusal.error.field) == (grpc.StatusCode.INVALID_ARGUMENT, "chunk.row_count")
        finish_by_resuming(calls, KIND, cache.id, accepted.upload_id, keys, 300)


def test_a_first_row_beyond_the_layer_is_a_gap(calls):
    with calls.cache(KIND, Draw(8).keys(KIND, 10)) as cache:
        call = calls.append_call()
        with call:
            call.send(start_message(cache.id, 5, first_row=11))
            refusal = call.refusal()
    assert (refusal.code, refusal.error.reason) == (grpc.StatusCode.OUT_OF_RANGE, "OFFSET_GAP")
    assert refusal.error.metadata["expected_row_offset"] == "10"


@pytest.mark.parametrize("kind", [KIND, SCALED], ids=["bf16", "fp8"])
@pytest.mark.parametrize("repeat", [False, True], ids=["new rows", "rows held"])
def test_a_bad_checksum_takes_nothing(calls, kind, repeat):
    keys = Draw(9).keys(kind, ROWS)
    at = 100 if repeat else 300
    chunk = key_chunk(kind, keys[at : at + 150], at)
    chunk.chunk.crc32c ^= 1
    with calls.cache(kind) as cache:
        call, accepted = calls.start_upload(cache.id, ROWS)
        with call:
            call.send(key_chunk(kind, keys[:300], 0), chunk, key_chunk(kind, keys[300:], 300))
            refusal = call.refusal()
        assert (refusal.code, refusal.error.reason) == (grpc.StatusCode.DATA_LOSS, "CHECKSUM")
        finish_by_resuming(calls, kind, cache.id, accepted.upload_id, keys, 300)


@pytest.mark.parametrize(
    ("kind", "field"),
    [(KIND, "keys_crc32c"), (SCALED, "keys_crc32c"), (SCALED, "scales_crc32c")],
    ids=["bf16", "fp8 keys", "fp8 scales"],
)
def test_a_wrong_digest_commits_nothing(calls, kind, field):
    keys = Draw(10).keys(kind, ROWS)
    finish = finish_message(kind, keys)
    setattr(finish.finish, field, getattr(finish.finish, field) ^ 0x8000)
    with calls.cache(kind) as cache:
        host = calls.ledger("host").reserved_bytes
        call, accepted = calls.start_upload(cache.id, ROWS)
        with call:
            call.send(*key_chunks(kind, keys, 200), finish)
            refusal = call.refusal()
        assert (refusal.code, refusal.error.reason) == (grpc.StatusCode.DATA_LOSS, "DIGEST")
        assert refusal.error.field == f"finish.{field}"
        assert calls.get(cache.id).layer_keys[0] == 0
        request = key_cache_pb2.QueryUploadRequest(upload_id=accepted.upload_id)
        assert refused(calls.key_caches.QueryUpload, request).error.reason == "UPLOAD_NOT_FOUND"
        assert calls.ledger("host").reserved_bytes == host
        calls.upload(kind, cache.id, keys)
        assert_holds(calls, kind, cache.id, keys)


@pytest.mark.parametrize("field", ["keys_crc32c", "scales_crc32c"])
def test_the_digest_is_required(calls, field):
    keys = Draw(11).keys(SCALED, 20)
    with calls.cache(SCALED) as cache:
        call, accepted = calls.start_upload(cache.id, 20)
        with call:
            call.send(key_chunk(SCALED, keys, 0), finish_message(SCALED, keys, **{field: None}))
            refusal = call.refusal()
        assert (refusal.code, refusal.error.field) == (grpc.StatusCode.INVALID_ARGUMENT, f"finish.{field}")
        finish_by_resuming(calls, SCALED, cache.id, accepted.upload_id, keys, 20)


def test_a_chunk_without_a_checksum_is_refused(calls):
    keys = Draw(12).keys(KIND, 20)
    with calls.cache(KIND) as cache:
        call, _ = calls.start_upload(cache.id, 20)
        with call:
            call.send(key_chunk(KIND, keys, 0, crc32c=None))
            refusal = call.refusal()
    assert (refusal.code, refusal.error.field) == (grpc.StatusCode.INVALID_ARGUMENT, "chunk.crc32c")


@pytest.mark.parametrize(
    ("announced", "sent", "finished"), [(20, 20, 19), (20, 20, 21), (20, 19, 20), (20, 19, 19), (20, 0, 20)]
)
def test_row_counts_that_disagree_commit_nothing(calls, announced, sent, finished):
    keys = Draw(13).keys(KIND, 21)
    with calls.cache(KIND) as cache:
        call, accepted = calls.start_upload(cache.id, announced)
        with call:
            call.send(*key_chunks(KIND, keys[:sent], 7), finish_message(KIND, keys[:sent], row_count=finished))
            refusal = call.refusal()
        assert (refusal.code, refusal.error.field) == (grpc.StatusCode.INVALID_ARGUMENT, "finish.row_count")
        assert calls.get(cache.id).layer_keys[0] == 0
        finish_by_resuming(calls, KIND, cache.id, accepted.upload_id, keys[:announced], sent)


def test_one_stream_at_a_time_writes_an_upload(calls):
    keys = Draw(14).keys(KIND, 300)
    with calls.cache(KIND) as cache:
        call, accepted = calls.start_upload(cache.id, 300)
        with call:
            call.send(key_chunk(KIND, keys[:100], 0))
            call.receive("acknowledged")
            with calls.append_call() as second:
                second.send(
                    key_cache_pb2.AppendKeysRequest(
                        header=key_cache_pb2.AppendKeysHeader(resume_upload_id=accepted.upload_id)
                    )
                )
                refusal = second.refusal()
            assert (refusal.code, refusal.error.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "UPLOAD_BUSY")
            call.send(*key_chunks(KIND, keys, 100, first=100), finish_message(KIND, keys))
            call.receive_until("committed")
        assert_holds(calls, KIND, cache.id, keys)


def poisoned(kind: Kind, rows: Keys, row: int, value: bytes, tensor: str):
    """A chunk with one element replaced, and the checksum of what it then is."""
    keys, scales = bytearray(rows.key_bytes(kind)), bytearray(rows.scale_bytes(kind))
    if tensor == "keys":
        at = row * kind.row_bytes + 5 * len(value)
        keys[at : at + len(value)] = value
    else:
        scales[4 * row : 4 * row + 4] = value
    return {"keys": bytes(keys), "scales": bytes(scales)}


NON_FINITE = [
    (BF16, "keys", np.uint16(0x7F80).tobytes()),
    (BF16, "keys", np.uint16(0xFFC1).tobytes()),
    (FP16, "keys", np.float16(-np.inf).tobytes()),
    (FP16, "keys", np.float16(np.nan).tobytes()),
    (FP32, "keys", np.float32(np.inf).tobytes()),
    (FP32, "keys", np.float32(np.nan).tobytes()),
    (FP8, "keys", b"\x7f"),
    (FP8, "keys", b"\xff"),
    (FP8, "scales", np.float32(np.nan).tobytes()),
    (FP8, "scales", np.float32(-np.inf).tobytes()),
]


@pytest.mark.parametrize(("key_format", "tensor", "value"), NON_FINITE)
@pytest.mark.parametrize("row", [0, 256, 399])
def test_nan_and_inf_are_refused_by_name_and_row_and_rows_before_stay(calls, key_format, tensor, value, row):
    kind = Kind(heads=2, head_dim=32, key_format=key_format)
    keys = Draw(15).keys(kind, ROWS)
    bad = key_chunk(kind, keys[300:], 300, **poisoned(kind, keys[300:], row, value, tensor))
    with calls.cache(kind) as cache:
        call, accepted = calls.start_upload(cache.id, ROWS)
        with call:
            call.send(key_chunk(kind, keys[:300], 0), bad)
            refusal = call.refusal()
        assert (refusal.code, refusal.error.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "NON_FINITE")
        assert dict(refusal.error.metadata) == {"tensor": tensor, "row": str(300 + row)}
        finish_by_resuming(calls, kind, cache.id, accepted.upload_id, keys, 300)


def test_the_largest_finite_numbers_are_taken(calls):
    for key_format, value in [
        (BF16, np.uint16(0x7F7F).tobytes()),
        (FP16, np.float16(65504).tobytes()),
        (FP32, np.float32(3e38).tobytes()),
        (FP8, b"\x7e"),
    ]:
        kind = Kind(heads=1, head_dim=16, key_format=key_format)
        keys = value * (4 * 16)
        scales = np.ones(4, "<f4").tobytes() if kind.has_scales else b""
        with calls.cache(kind) as cache:
            call, _ = calls.start_upload(cache.id, 4)
            with call:
                chunk = key_cache_pb2.KeyChunk(
                    row_count=4, keys=keys, scales=scales, crc32c=crc32c(scales, crc32c(keys))
                )
                call.send(key_cache_pb2.AppendKeysRequest(chunk=chunk))
                finish = key_cache_pb2.AppendKeysFinish(
                    row_count=4, keys_crc32c=crc32c(keys), scales_crc32c=crc32c(scales)
                )
                call.send(key_cache_pb2.AppendKeysRequest(finish=finish))
                assert call.receive_until("committed").layer_keys == 4


@pytest.mark.parametrize("way", ["delete", "delete while detached"])
def test_a_cache_deleted_during_an_upload(calls, way):
    keys = Draw(16).keys(KIND, ROWS)
    host = calls.ledger("host").reserved_bytes
    cache = calls.create(KIND)
    call, accepted = calls.start_upload(cache.id, ROWS)
    with call:
        call.send(key_chunk(KIND, keys[:300], 0))
        call.receive("acknowledged")
        if way == "delete":
            calls.delete(cache.id)
            call.send(*key_chunks(KIND, keys, 100, first=300), finish_message(KIND, keys))
            refusal = call.refusal()
            assert (refusal.code, refusal.error.reason) == (grpc.StatusCode.NOT_FOUND, "CACHE_NOT_FOUND")
        else:
            call.half_close()
            call.rest()
            calls.delete(cache.id)
    request = key_cache_pb2.QueryUploadRequest(upload_id=accepted.upload_id)
    wait_for(lambda: calls.ledger("host").reserved_bytes == host)
    assert refused(calls.key_caches.QueryUpload, request).error.reason == "UPLOAD_NOT_FOUND"


def test_a_layer_truncated_below_an_upload_refuses_its_commit(calls):
    keys = Draw(17).keys(KIND, 300)
    with calls.cache(KIND, keys) as cache:
        call, _ = calls.start_upload(cache.id, 300, first_row=300)
        with call:
            call.send(*key_chunks(KIND, keys, 100))
            while call.receive("acknowledged").row_offset < 300:
                pass
            calls.truncate(cache.id, 299)
            call.send(finish_message(KIND, keys))
            refusal = call.refusal()
        assert (refusal.code, refusal.error.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "LAYER_CHANGED")
        assert_holds(calls, KIND, cache.id, keys[:299])


def test_two_uploads_of_one_layer_both_count(calls):
    keys, tail = Draw(18).keys(KIND, 300), Draw(19).keys(KIND, 200)
    with calls.cache(KIND, keys) as cache:
        first, _ = calls.start_upload(cache.id, 200, first_row=150)
        second, _ = calls.start_upload(cache.id, 300, first_row=300)
        with first, second:
            first.send(*key_chunks(KIND, tail, 70))
            second.send(*key_chunks(KIND, keys, 70))
            second.send(finish_message(KIND, keys))
            assert second.receive_until("committed").layer_keys == 600
            first.send(finish_message(KIND, tail))
            assert first.receive_until("committed").layer_keys == 600
        assert_holds(calls, KIND, cache.id, keys[:150] + tail + keys[50:])


def test_an_upload_that_nobody_writes_is_forgotten(tight):
    keys = Draw(20).keys(KIND, 300)
    with tight.cache(KIND) as cache:
        host = tight.ledger("host").reserved_bytes
        call, accepted = tight.start_upload(cache.id, ROWS)
        with call:
            call.send(key_chunk(KIND, keys, 0))
            call.receive("acknowledged")
            assert tight.ledger("host").reserved_bytes > host
            call.half_close()
            call.rest()
        assert tight.query_upload(accepted.upload_id).row_offset == 300
        wait_for(lambda: tight.load().open_uploads == 0)
        request = key_cache_pb2.QueryUploadRequest(upload_id=accepted.upload_id)
        assert refused(tight.key_caches.QueryUpload, request).error.reason == "UPLOAD_NOT_FOUND"
        assert tight.ledger("host").reserved_bytes == host
        resume = tight.append_call()
        with resume:
            resume.send(
                key_cache_pb2.AppendKeysRequest(
                    header=key_cache_pb2.AppendKeysHeader(resume_upload_id=accepted.upload_id)
                )
            )
            assert resume.refusal().error.reason == "UPLOAD_NOT_FOUND"


def test_refusals_come_in_band_whatever_is_being_acknowledged(calls):
    """The acknowledger and the refusal write to one stream."""
    keys = Draw(21).keys(KIND, 200)
    with calls.cache(KIND) as cache:
        for _ in range(60):
            call, _ = calls.start_upload(cache.id, 200)
            with call:
                bad = key_chunk(KIND, keys[199:], 199)
                bad.chunk.crc32c ^= 1
                call.send(*key_chunks(KIND, keys[:199], 3), bad)
                assert call.refusal().error.reason == "CHECKSUM"
