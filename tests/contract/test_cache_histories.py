"""Histories of appends, rewrites, truncations and forks, against plain arrays; every answer bit for bit."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
from streamindex.checksum import crc32c
from streamindex.v1 import key_cache_pb2

from tests.support.calls import answers, finish_message, key_chunk, key_chunks, query_chunks
from tests.support.services import wait_for
from tests.support.tensors import BF16, FP8, FP16, FP32, Draw, Kind, ModelCache, expected

KIND = Kind(heads=2, head_dim=32)
SCALED = Kind(heads=2, head_dim=32, key_format=FP8)
BOTH = pytest.mark.parametrize("kind", [KIND, SCALED], ids=["bf16", "fp8"])


class Twin:
    """A cache of the service and its model."""

    def __init__(self, calls, kind, draw, cache_id=None, model=None):
        self.calls, self.kind, self.draw = calls, kind, draw
        self.id = cache_id or calls.create(kind).id
        self.model = model or ModelCache(kind)

    def write(self, layer, first_row, count, chunk_rows=300):
        rows = self.draw.keys(self.kind, count)
        self.model.write(layer, first_row, rows)
        held = self.calls.upload(self.kind, self.id, rows, first_row, layer, chunk_rows)
        assert held == len(self.model.layers[layer])

    def truncate(self, keys, layer=None):
        self.model.truncate(keys, layer)
        assert list(self.calls.truncate(self.id, keys, layer).layer_keys) == [len(rows) for rows in self.model.layers]

    def fork(self, keys=None):
        twin = self.calls.fork(self.id, keys)
        model = self.model.fork(keys)
        assert list(twin.layer_keys) == [len(rows) for rows in model.layers]
        return Twin(self.calls, self.kind, self.draw, twin.id, model)

    def check(self, layer=None):
        """Rank all keys of a layer: every key's place and score is seen."""
        for index in range(self.kind.layers) if layer is None else [layer]:
            keys = self.model.layers[index]
            queries = self.draw.queries(self.kind, 3, start_position=self.kind.ratio * (len(keys) + 1))
            top_k = max(1, min(4096, len(keys)))
            indices, scores = self.calls.search(self.kind, self.id, queries, top_k, layer=index, want_scores=True)
            wanted_indices, wanted_scores = expected(self.kind, keys, queries, top_k)
            assert np.array_equal(indices, wanted_indices)
            assert np.array_equal(scores, wanted_scores)


@pytest.fixture
def twins(calls):
    """Makes twins and deletes what is left of them."""
    made = []

    def make(kind, seed=0, twin=None):
        made.append(twin or Twin(calls, kind, Draw(seed)))
        return made[-1]

    yield make
    for twin in made:
        with contextlib.suppress(Exception):
            calls.delete(twin.id)


@BOTH
@pytest.mark.parametrize("sizes", [(1, 254, 1, 1, 255, 257), (256, 256, 1), (255, 2, 511), (700, 1, 67)], ids=str)
def test_appends_across_page_edges(twins, kind, sizes):
    twin = twins(kind, seed=sum(sizes))
    for count in sizes:
        twin.write(0, len(twin.model.layers[0]), count, chunk_rows=97)
        twin.check()


@BOTH
@pytest.mark.parametrize(
    ("first_row", "count"),
    [(0, 1), (0, 256), (0, 700), (3, 5), (250, 12), (255, 1), (256, 256), (300, 400), (511, 2), (699, 1), (690, 400)],
)
def test_a_draft_is_rejected_and_written_again(twins, kind, first_row, count):
    twin = twins(kind, seed=first_row)
    twin.write(0, 0, 700)
    twin.check()
    twin.write(0, first_row, count, chunk_rows=33)
    twin.check()


@BOTH
@pytest.mark.parametrize("keep", [0, 1, 255, 256, 257, 511, 699, 700, 10**12, 2**64 - 1])
def test_truncate_then_append(twins, kind, keep):
    twin = twins(kind, seed=1)
    twin.write(0, 0, 700)
    twin.check()
    twin.truncate(keep)
    twin.check()
    twin.write(0, len(twin.model.layers[0]), 130)
    twin.check()


def test_layers_are_apart(twins):
    kind = Kind(heads=2, head_dim=32, layers=3)
    twin = twins(kind)
    twin.write(0, 0, 300)
    twin.write(2, 0, 40)
    twin.check()
    twin.truncate(100, layer=0)
    twin.write(1, 0, 257)
    twin.check()
    twin.truncate(30)
    twin.check()


@BOTH
@pytest.mark.parametrize("keep", [None, 0, 255, 256, 300, 699, 5000])
def test_a_fork_and_its_source_change_apart(twins, calls, kind, keep):
    source = twins(kind, seed=2)
    source.write(0, 0, 700)
    source.check()
    before = calls.ledger("host").reserved_bytes
    fork = twins(kind, twin=source.fork(keep))
    assert 0 < calls.ledger("host").reserved_bytes - before < 2048  # the record; pages are shared, not copied
    fork.check()
    source.write(0, 250, 20)  # copy on write, on the one side
    fork.write(0, len(fork.model.layers[0]), 60)  # and on the other
    source.check()
    fork.check()
    again = twins(kind, twin=fork.fork())
    fork.truncate(10)
    again.check()
    calls.delete(source.id)
    fork.check()
    again.write(0, 0, 5)
    fork.check()
    again.check()


@BOTH
def test_a_search_keeps_the_rows_it_started_with(calls, kind):
    draw = Draw(3)
    keys, other = draw.keys(kind, 600), draw.keys(kind, 900)
    queries = draw.queries(kind, 40, start_position=1000)
    for change in ("rewrite", "truncate", "delete"):
        cache = calls.create(kind)
        calls.upload(kind, cache.id, keys)
        with calls.start_search(kind, cache.id, 600, start_position=1000) as call:
            chunks = query_chunks(kind, queries, 20)
            call.send(chunks[0])
            first = call.receive("chunk")
            if change == "rewrite":
                calls.upload(kind, cache.id, other)
            elif change == "truncate":
                calls.truncate(cache.id, 0)
            else:
                calls.delete(cache.id)
            # what is freed is written over by somebody else
            with calls.cache(kind, other):
                call.send(chunks[1])
                call.half_close()
                rest = call.rest()
            indices, _ = answers([first] + [message.chunk for message in rest[:-1]], 600)
        assert np.array_equal(indices, expected(kind, keys, queries, 600)[0]), change
        if change != "delete":
            calls.delete(cache.id)


@pytest.mark.parametrize("key_format", [BF16, FP16, FP32, FP8], ids=["bf16", "fp16", "fp32", "fp8"])
def test_what_lay_in_a_page_before_is_never_seen(calls, key_format):
    """Freed pages hold other bytes, which read as NaN or as huge numbers in another format."""
    kind = Kind(heads=2, head_dim=32, key_format=key_format)
    same_page_bytes = {BF16: FP16, FP16: BF16, FP32: BF16, FP8: FP8}[key_format]
    former = Kind(heads=2, head_dim=64 if key_format == FP32 else 32, key_format=same_page_bytes)
    draw = Draw(4)
    rows = draw.keys(former, 256)
    filler = {BF16: b"\x7f\x7f", FP16: b"\xff\x7b", FP8: b"\x7e"}[former.key_format]
    keys = filler * (former.row_bytes * 256 // len(filler))
    scales = np.full(256, 3e38 if former.has_scales else 0, "<f4").tobytes() if former.has_scales else b""
    with calls.cache(former) as cache:
        call, _ = calls.start_upload(cache.id, 256)
        with call:
            call.send(key_chunk(former, rows, 0, keys=keys, scales=scales))
            finish = key_cache_pb2.AppendKeysFinish(
                row_count=256, keys_crc32c=crc32c(keys), scales_crc32c=crc32c(scales)
            )
            call.send(key_cache_pb2.AppendKeysRequest(finish=finish))
            call.receive_until("committed")
        calls.search(former, cache.id, draw.queries(former, 1, start_position=300), 10)
    keys = draw.keys(kind, 100)
    with calls.cache(kind, keys) as cache:
        queries = draw.queries(kind, 4, start_position=1000)
        indices, scores = calls.search(kind, cache.id, queries, 100, want_scores=True)
    wanted_indices, wanted_scores = expected(kind, keys, queries, 100)
    assert np.array_equal(indices, wanted_indices)
    assert np.array_equal(scores, wanted_scores)


@pytest.mark.parametrize("seed", range(6))
def test_random_histories(twins, calls, seed):
    """Appends, rewrites, truncations, forks, deletions and searches in any order, on two formats."""
    random = np.random.default_rng(seed)
    kind = Kind(heads=2, head_dim=16, layers=2, key_format=[BF16, FP8, FP16][seed % 3], ratio=[1, 4][seed % 2])
    alive = [twins(kind, seed=seed)]
    for _ in range(40):
        twin = alive[random.integers(len(alive))]
        layer = int(random.integers(2))
        held = len(twin.model.layers[layer])
        step = random.choice(["append", "append", "rewrite", "truncate", "fork", "delete", "search", "search"])
        if step == "append" and held < 1500:
            twin.write(layer, held, int(random.integers(1, 400)), chunk_rows=int(random.integers(1, 300)))
        elif step == "rewrite":
            twin.write(layer, int(random.integers(held + 1)), int(random.integers(1, 300)))
        elif step == "truncate":
            twin.truncate(int(random.integers(held + 10)), layer if random.integers(2) else None)
        elif step == "fork" and len(alive) < 4:
            alive.append(twins(kind, twin=twin.fork(int(random.integers(held + 2)) if random.integers(2) else None)))
        elif step == "delete" and len(alive) > 1:
            alive.remove(twin)
            calls.delete(twin.id)
        else:
            twin.check(layer)
    for twin in alive:
        twin.check()


def test_everything_is_given_back(calls):
    draw = Draw(6)
    wait_for(lambda: calls.load().running_searches == 0)
    before = calls.load()
    cache = calls.create(KIND)
    calls.upload(KIND, cache.id, draw.keys(KIND, 3000))
    fork = calls.fork(cache.id, 1000)
    calls.upload(KIND, fork.id, draw.keys(KIND, 3000), first_row=999)
    call, _ = calls.start_upload(cache.id, 3000, first_row=3000)
    with call:
        call.send(key_chunk(KIND, draw.keys(KIND, 700), 0))
        call.receive("acknowledged")
    for name in (cache.id, fork.id):
        calls.search(KIND, name, draw.queries(KIND, 3, start_position=10_000), 5)
    # SearchDone is sent after everything but the pages was given back
    during = calls.load()
    assert during.running_searches == 0
    hbm = next(ledger for ledger in during.ledgers if ledger.name == "hbm")
    assert hbm.reserved_bytes % (1 << 20) == 0  # whole extents of pages, no workspace
    for name in (cache.id, fork.id):
        calls.delete(name)
    wait_for(
        lambda: (
            [ledger.reserved_bytes for ledger in calls.load().ledgers]
            == [ledger.reserved_bytes for ledger in before.ledgers]
        )
    )
    assert calls.load().key_caches == before.key_caches
    assert calls.load().open_uploads == before.open_uploads


def test_an_append_that_overlaps_the_end_and_is_resumed(twins, calls):
    """The rows before the upload's first row are taken over at the commit, not when the upload starts."""
    twin = twins(KIND, seed=7)
    twin.write(0, 0, 300)
    rows = twin.draw.keys(KIND, 500)
    call, accepted = calls.start_upload(twin.id, 500, first_row=290)
    with call:
        call.send(key_chunk(KIND, rows[:100], 0))
        call.receive("acknowledged")
        call.half_close()
        call.rest()
    twin.write(0, 200, 95)
    call, state = calls.resume_upload(accepted.upload_id)
    with call:
        assert state.row_offset == 100
        call.send(*key_chunks(KIND, rows, 100, first=100), finish_message(KIND, rows))
        call.receive_until("committed")
    twin.model.write(0, 290, rows)
    twin.check()
