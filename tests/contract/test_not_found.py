"""An id that is unknown, expired, deleted, guessed or somebody else's: one answer for all, to the byte."""

from __future__ import annotations

import pytest
from streamindex.v1 import key_cache_pb2

from tests.support.calls import Calls, key_chunk, query_chunks, refused, resume_message, search_header, start_message
from tests.support.services import wait_for
from tests.support.tensors import Draw, Kind

KIND = Kind(heads=2, head_dim=32)


@pytest.fixture
def mine(inside):
    with Calls(inside.target, "mine") as calls:
        yield calls


@pytest.fixture
def theirs(inside):
    with Calls(inside.target, "theirs") as calls:
        yield calls


def stream_refusal(call, message):
    with call:
        call.send(message)
        return call.refusal()


def every_refusal(calls: Calls, cache_id: str):
    """How every call that names a cache refuses this one."""
    named = {"key_cache_id": cache_id}
    stub, of = calls.key_caches, calls.metadata
    yield refused(stub.GetKeyCache, key_cache_pb2.GetKeyCacheRequest(**named), metadata=of)
    yield refused(stub.DeleteKeyCache, key_cache_pb2.DeleteKeyCacheRequest(**named), metadata=of)
    yield refused(stub.TruncateKeys, key_cache_pb2.TruncateKeysRequest(**named), metadata=of)
    yield refused(stub.ForkKeyCache, key_cache_pb2.ForkKeyCacheRequest(**named), metadata=of)
    yield stream_refusal(calls.append_call(), start_message(cache_id, 5))
    yield stream_refusal(calls.search_call(), search_header(KIND, cache_id, 5))


def test_one_answer_for_all(mine, theirs):
    foreign = theirs.create(KIND)
    deleted = mine.create(KIND)
    mine.delete(deleted.id)
    expired = mine.create(KIND, idle_ttl_s=1)
    # a list is no use of a cache: the only look that lets it expire
    wait_for(lambda: expired.id not in {cache.id for cache in mine.list().key_caches})
    ids = [foreign.id, deleted.id, expired.id, foreign.id[:-1] + "A", "kc_" + "A" * 24, "", "x" * 1000, "ü\0"]
    seen = {}
    for cache_id in ids:
        for call, refusal in enumerate(every_refusal(mine, cache_id)):
            in_band = None if refusal.in_band is None else refusal.in_band.SerializeToString()
            answer = (refusal.code, refusal.details, refusal.trailers, in_band)
            assert seen.setdefault(call, answer) == answer, cache_id
    assert {answer[:3] for answer in seen.values()} == {seen[0][:3]}
    assert seen[0][0].name == "NOT_FOUND"
    assert theirs.get(foreign.id).id == foreign.id
    theirs.delete(foreign.id)


def test_uploads_are_their_owners(mine, theirs):
    cache = theirs.create(KIND)
    keys = Draw(1).keys(KIND, 10)
    call, accepted = theirs.start_upload(cache.id, 10)
    with call:
        call.send(key_chunk(KIND, keys, 0))
        call.receive("acknowledged")
        answers = set()
        for upload_id in (accepted.upload_id, "up_" + "A" * 24, ""):
            request = key_cache_pb2.QueryUploadRequest(upload_id=upload_id)
            query = refused(mine.key_caches.QueryUpload, request, metadata=mine.metadata)
            resume = stream_refusal(mine.append_call(), resume_message(upload_id))
            answers |= {(refusal.code, refusal.details, refusal.trailers) for refusal in (query, resume)}
        assert len(answers) == 1
        assert theirs.query_upload(accepted.upload_id).row_offset == 10
    theirs.delete(cache.id)


def test_lists_show_the_callers_caches_alone(mine, theirs):
    cache = theirs.create(KIND)
    assert cache.id in {found.id for found in theirs.list().key_caches}
    assert cache.id not in {found.id for found in mine.list().key_caches}
    theirs.delete(cache.id)


def test_a_cache_in_use_does_not_expire(mine):
    """Its time to live starts when the last call on it is over."""
    cache = mine.create(KIND, idle_ttl_s=1)
    mine.upload(KIND, cache.id, Draw(2).keys(KIND, 300))
    queries = Draw(3).queries(KIND, 20)
    other = mine.create(KIND, idle_ttl_s=1)
    with mine.start_search(KIND, cache.id, 5) as call:
        wait_for(lambda: other.id not in {found.id for found in mine.list().key_caches})
        call.send(*query_chunks(KIND, queries, 10))
        call.half_close()
        assert call.rest()[-1].done.row_count == 20
    assert mine.get(cache.id).layer_keys[0] == 300
    mine.delete(cache.id)


def test_an_expired_cache_gives_its_memory_back(inside, mine):
    before = mine.ledger("host").reserved_bytes
    cache = mine.create(KIND, idle_ttl_s=1)
    call, _ = mine.start_upload(cache.id, 20_001)
    with call:
        call.send(key_chunk(KIND, Draw(4).keys(KIND, 20_000), 0))  # more than the extents in use have room for
        call.receive("acknowledged")
        assert mine.ledger("host").reserved_bytes > before
        call.half_close()
        call.rest()
    wait_for(lambda: cache.id not in {found.id for found in mine.list().key_caches})
    # and so do its uploads, though their own time to live is longer
    wait_for(lambda: mine.ledger("host").reserved_bytes <= before, wait_s=3)  # less when another test's goes too
