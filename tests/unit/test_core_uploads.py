from __future__ import annotations

import pytest

from streamindex_service.core.caches import edges
from streamindex_service.errors import (
    CacheNotFoundError,
    HostMemoryError,
    InvalidArgumentError,
    LayerChangedError,
    OffsetGapError,
    TooManyError,
    UploadBusyError,
    UploadNotFoundError,
)
from tests.support.core_world import OWNER, World, spec

MOST = 1 << 20


@pytest.fixture
def world():
    return World()


@pytest.fixture
def cache(world):
    return world.store.create(OWNER, spec(layers=1))


def attached(world, cache, first_row, rows):
    upload = world.uploads.start(cache, 0, first_row, rows, MOST)
    world.uploads.attach(upload)
    return upload


@pytest.mark.parametrize(
    ("offset", "rows", "taken", "repeat"),
    [(0, 10, 0, False), (5, 5, 5, False), (0, 5, 5, True), (2, 3, 5, True), (99, 1, 99, False), (0, 100, 100, True)],
)
def test_a_chunk_goes_on_or_repeats(world, cache, offset, rows, taken, repeat):
    assert attached(world, cache, 0, 100).is_repeat(offset, rows, taken) is repeat


@pytest.mark.parametrize(("offset", "rows", "taken"), [(6, 1, 5), (3, 3, 5), (0, 6, 5), (99, 1, 0)])
def test_a_chunk_that_leaves_a_gap_or_straddles(world, cache, offset, rows, taken):
    with pytest.raises(OffsetGapError) as caught:
        attached(world, cache, 0, 100).is_repeat(offset, rows, taken)
    assert caught.value.metadata == {"expected_row_offset": str(taken)}


@pytest.mark.parametrize(("offset", "rows"), [(0, 0), (0, 101), (100, 1), (2**64 - 1, 2**32 - 1)])
def test_rows_that_were_not_announced(world, cache, offset, rows):
    with pytest.raises(InvalidArgumentError):
        attached(world, cache, 0, 100).is_repeat(offset, rows, 0)


@pytest.mark.parametrize(("first", "rows"), [(0, 0), (0, MOST + 1), (0, 2**64), (2**64, 1)])
def test_declared_rows_that_cannot_be(world, cache, first, rows):
    with pytest.raises(InvalidArgumentError):
        world.uploads.start(cache, 0, first, rows, MOST)
    assert world.uploads.open_uploads == 0


def test_memory_grows_with_what_arrives(world, cache):
    world.write(cache, 0, 0, 100)
    before = world.host.reserved_bytes
    upload = attached(world, cache, 100, MOST - 100)
    assert world.host.reserved_bytes == before
    for rows in (1, 155, 1, 1000):
        world.hold(upload, rows)
        assert len(upload.staged) == (100 + upload.rows_held + 255) // 256


def test_host_memory_that_is_used_up_names_the_figures(world, cache):
    upload = attached(world, cache, 0, MOST)
    with pytest.raises(HostMemoryError) as caught:
        world.hold(upload, MOST)
    assert caught.value.metadata["budget_bytes"] == str(world.host.limit_bytes)
    assert world.host.reserved_bytes <= world.host.limit_bytes
    world.uploads.detach(upload)
    world.uploads.drop(upload)
    assert world.host.reserved_bytes == cache.record_bytes


def test_one_writer_at_a_time(world, cache):
    upload = attached(world, cache, 0, 10)
    with pytest.raises(UploadBusyError):
        world.uploads.attach(upload)
    world.uploads.detach(upload)
    world.uploads.attach(upload)


def test_the_time_to_live_runs_only_while_nobody_writes(world, cache):
    upload = attached(world, cache, 0, 300)
    world.hold(upload, 200)
    world.clock.advance(1000)
    assert world.uploads.expire() == 0
    world.uploads.detach(upload)
    world.clock.advance(29.9)
    assert world.uploads.get(OWNER, upload.upload_id) is upload
    world.clock.advance(0.2)
    with pytest.raises(UploadNotFoundError):
        world.uploads.get(OWNER, upload.upload_id)
    assert world.uploads.expire() == 1
    assert world.host.reserved_bytes == cache.record_bytes


def test_an_upload_is_its_owners(world, cache):
    upload = attached(world, cache, 0, 10)
    for owner, name in (("other", upload.upload_id), (OWNER, "up_x"), (OWNER, "")):
        with pytest.raises(UploadNotFoundError):
            world.uploads.get(owner, name)


def test_so_many_uploads_and_no_more(world, cache):
    uploads = [attached(world, cache, 0, 10) for _ in range(8)]
    with pytest.raises(TooManyError):
        world.uploads.start(cache, 0, 0, 10, MOST)
    world.hold(uploads[0], 10)
    world.uploads.commit(uploads[0])
    assert world.uploads.open_uploads == 7
    attached(world, cache, 10, 10)


def test_uploads_that_have_expired_are_in_nobodys_way(world, cache):
    """Nobody is told of too many because the sweep has not come yet."""
    for _ in range(8):
        world.uploads.start(cache, 0, 0, 10, MOST)
    with pytest.raises(TooManyError):
        world.uploads.start(cache, 0, 0, 10, MOST)
    world.clock.advance(30.0)
    world.uploads.start(cache, 0, 0, 10, MOST)
    assert world.uploads.open_uploads == 1


def test_a_deleted_cache_takes_its_uploads_along(world, cache):
    idle, busy = attached(world, cache, 0, 300), attached(world, cache, 0, 300)
    for upload in (idle, busy):
        world.hold(upload, 300)
    world.uploads.detach(idle)
    world.delete(cache)
    assert world.host.reserved_bytes > 0  # a stream still writes the one
    with pytest.raises(CacheNotFoundError):
        world.uploads.commit(busy)
    world.uploads.detach(busy)
    assert (world.host.reserved_bytes, world.uploads.open_uploads) == (0, 0)


def test_a_layer_cut_below_the_first_row_refuses_the_commit(world, cache):
    world.write(cache, 0, 0, 300)
    upload = attached(world, cache, 300, 10)
    world.hold(upload, 10)
    world.store.truncate(cache, 299, 0)
    with pytest.raises(LayerChangedError):
        world.uploads.commit(upload)
    assert cache.layers[0].length_keys == 299


@pytest.mark.parametrize(
    ("length", "first", "rows", "wanted"),
    [
        (0, 0, 1, []),
        (300, 300, 1, [(1, 0, 44)]),
        (256, 256, 300, []),
        (700, 0, 256, []),
        (700, 10, 5, [(0, 0, 10), (0, 15, 241)]),
        (700, 250, 10, [(0, 0, 250), (1, 4, 252)]),
        (700, 600, 100, [(2, 0, 88)]),
        (700, 0, 699, [(2, 187, 1)]),
    ],
)
def test_rows_that_new_pages_share_with_old_ones(world, cache, length, first, rows, wanted):
    if length:
        world.write(cache, 0, 0, length)
    assert edges(cache.layers[0], first, rows) == wanted


def test_committed_uploads_are_remembered_up_to_a_bound(world, cache):
    done = []
    for number in range(20):
        upload = attached(world, cache, number, 1)
        world.hold(upload, 1)
        world.uploads.commit(upload)
        world.uploads.detach(upload)
        done.append(upload)
        assert world.uploads.open_uploads == 0
    assert len(world.uploads._uploads) == 8  # as many as may be open
    for upload in done[-8:]:
        assert world.uploads.get(OWNER, upload.upload_id).committed
    with pytest.raises(UploadNotFoundError):
        world.uploads.get(OWNER, done[-9].upload_id)
    assert cache.layers[0].length_keys == 20


def test_a_committed_upload_that_a_stream_still_holds_may_be_forgotten(world, cache):
    first = attached(world, cache, 0, 1)
    world.hold(first, 1)
    world.uploads.commit(first)
    for number in range(8):
        world.write(cache, 0, number, 1)
    kept = []
    for number in range(8):
        kept.append(attached(world, cache, number, 1))
        world.hold(kept[-1], 1)
        world.uploads.commit(kept[-1])
    world.uploads.detach(first)
    world.delete(cache)
    for upload in kept:
        world.uploads.detach(upload)
    assert (world.uploads.open_uploads, world.host.reserved_bytes) == (0, 0)
    assert not world.uploads._uploads
