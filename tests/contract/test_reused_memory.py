"""Host memory that is used again: it is, and what it held before is never part of a visible page."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import numpy as np
import pytest
import streamindex_client
from streamindex_client import Client, KeyCache

from streamindex_service.core.caches import CACHE_RECORD_BYTES, LAYER_RECORD_BYTES
from tests.support.inprocess import InProcessServer
from tests.support.services import MIB, ROOMY, wait_for

HEAD_DIM = 128
PAGE_KEYS = 256
SECRET = 0x5A
OWN = 0x11
DIRTY_KEYS = MIB // (2 * HEAD_DIM)  # an extent


@pytest.fixture(scope="module")
def server():
    with InProcessServer(ROOMY) as running:
        yield running


@pytest.fixture
def client(server):
    with streamindex_client.connect(server.target) as connected:
        yield connected


def new_cache(client: Client, key_format: str = "bf16") -> KeyCache:
    return client.create_key_cache(heads=1, head_dim=HEAD_DIM, ratio=1, key_format=key_format, layers=1)


def keys(rows: int, octet: int, dtype: type = np.uint16) -> np.ndarray:
    return np.full(rows * HEAD_DIM * np.dtype(dtype).itemsize, octet, np.uint8).view(dtype).reshape(rows, HEAD_DIM)


def leave_secrets(client: Client, rows: int = 2 * DIRTY_KEYS) -> None:
    """Another caller's keys come and go."""
    cache = new_cache(client)
    cache.append(layer=0, keys=keys(rows, SECRET), first_row=0)
    cache.delete()


def visible_pages(server: InProcessServer, cache: KeyCache) -> list[bytes]:
    """Every byte of the cache's pages, which is what a worker may be given."""

    def read() -> list[bytes]:
        service = server.server.service
        held = service.caches._caches[cache.id]
        pages = held.layers[0].pages
        return [service.host_extents.bytes_at(page.in_host, 0, page.page_bytes).tobytes() for page in pages]

    return server.run(read)


def spare_bytes(client: Client) -> int:
    return client.load().ledgers["host"].spare_bytes


def test_freed_memory_is_spare_and_used_again(client):
    leave_secrets(client)
    host = client.load().ledgers["host"]
    assert (host.reserved_bytes, host.spare_bytes) == (0, 2 * MIB)
    cache = new_cache(client)
    cache.append(layer=0, keys=keys(DIRTY_KEYS, OWN), first_row=0)
    host = client.load().ledgers["host"]
    assert (host.reserved_bytes, host.spare_bytes) == (MIB + CACHE_RECORD_BYTES + LAYER_RECORD_BYTES, MIB)
    cache.delete()
    assert spare_bytes(client) == 2 * MIB


@pytest.mark.parametrize("rows", [1, 10, PAGE_KEYS - 1, PAGE_KEYS, PAGE_KEYS + 1, 3 * PAGE_KEYS + 7])
def test_the_tail_of_a_page_is_not_what_was_there_before(server, client, rows):
    leave_secrets(client)
    assert spare_bytes(client) >= 2 * MIB
    cache = new_cache(client)
    cache.append(layer=0, keys=keys(rows, OWN), first_row=0)
    content = b"".join(visible_pages(server, cache))
    written = rows * 2 * HEAD_DIM
    assert content[:written] == bytes([OWN]) * written
    assert not any(content[written:])
    cache.delete()


def test_scales_are_not_what_was_there_before(server, client):
    leave_secrets(client)
    page = 256 * (HEAD_DIM + 4)
    assert MIB // page * page != MIB  # so these extents have another length, and must be dirtied by their like
    for octet, rows in ((SECRET, 2000), (OWN, 300)):
        cache = new_cache(client, "fp8_e4m3")
        scales = np.full(rows, octet, np.float32)
        cache.append(layer=0, keys=keys(rows, octet, np.uint8), scales=scales, first_row=0)
        if octet == SECRET:
            cache.delete()
    last = visible_pages(server, cache)[-1]
    assert not any(last[44 * HEAD_DIM : PAGE_KEYS * HEAD_DIM])
    assert not any(last[PAGE_KEYS * HEAD_DIM + 44 * 4 :])
    cache.delete()


def test_appends_forks_and_truncations_stay_clean(server, client):
    leave_secrets(client)
    cache = new_cache(client)
    for first_row, rows in ((0, 100), (100, 1), (50, 20), (101, 500), (601, 3)):
        cache.append(layer=0, keys=keys(rows, OWN), first_row=first_row)
        leave_secrets(client)
    fork = cache.fork(keys=300)
    fork.append(layer=0, keys=keys(5, OWN), first_row=290)
    cache.truncate(10)
    cache.append(layer=0, keys=keys(1, OWN), first_row=10)
    for each in (cache, fork):
        assert set(b"".join(visible_pages(server, each))) <= {0, OWN}
        each.delete()


def test_an_upload_that_is_given_up_shows_nothing_and_gives_its_memory_back(server, client):
    class Torn(np.ndarray):
        def __getitem__(self, index):
            if isinstance(index, slice) and (index.stop or 0) > DIRTY_KEYS:
                raise LookupError
            return super().__getitem__(index)

    cache = new_cache(client)
    with pytest.raises(LookupError):
        cache.append(layer=0, keys=keys(3 * DIRTY_KEYS, SECRET).view(Torn), first_row=0)
    assert visible_pages(server, cache) == []
    cache.delete()
    wait_for(lambda: nothing_is_held(client))


def nothing_is_held(client: Client) -> bool:
    load = client.load()
    return load.open_uploads == 0 and load.ledgers["host"].reserved_bytes == 0


def segments() -> list[int]:
    """The memory segment of each descriptor of one that this process has: two of each, one of them the mapping's."""
    found = []
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            if "memfd:streamindex" in os.readlink(entry):
                found.append(entry.stat().st_ino)
    return found


def test_an_idle_service_has_its_descriptors_back():
    memory = {**ROOMY["memory"], "extent_bytes": 65_536, "spare_segments": 5, "spare_s": 4.0}
    settings = {**ROOMY, "memory": memory, "server": {**ROOMY.get("server", {}), "sweep_s": 0.1}}
    others = set(segments())  # of services of other tests, which may go meanwhile

    def descriptors() -> int:
        """Its own, without those of the table that it shares with its worker."""
        return sum(each not in others for each in segments()) - 2

    with InProcessServer(settings) as running, streamindex_client.connect(running.target) as client:
        wait_for(lambda: descriptors() == 0)
        leave_secrets(client)
        wait_for(lambda: descriptors() == 2 * 5)
        wait_for(lambda: spare_bytes(client) == 0)
        wait_for(lambda: descriptors() == 0)
        cache = new_cache(client)
        cache.append(layer=0, keys=keys(DIRTY_KEYS, OWN), first_row=0)
        assert descriptors() == 2 * 16
        cache.delete()
