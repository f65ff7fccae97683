"""Where an upload's rows lie in host memory: written to staged pages, read there, and made visible."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from streamindex.framing import Chunk

from streamindex_service.core.caches import blank_rows, edges
from streamindex_service.core.layers import Page
from streamindex_service.core.sizes import PAGE_KEYS
from streamindex_service.core.uploads import Upload
from streamindex_service.frontend.service import Service
from streamindex_service.frontend.tensors import Bytes

RowBytes = tuple[int, int]
"""Bytes of a row: of its key, of its scale."""


def page_ranges(upload: Upload, row_offset: int, row_count: int) -> Iterator[tuple[int, int, int, int]]:
    """Where rows of an upload lie, page by page: (staged page, row within it, row of the chunk, rows)."""
    done = 0
    while done < row_count:
        page, row = upload.place(row_offset + done)
        count = min(row_count - done, PAGE_KEYS - row)
        yield page, row, done, count
        done += count


def write_rows(service: Service, upload: Upload, chunks: Sequence[Chunk], row_bytes: RowBytes) -> list[Bytes]:
    """Write chunks that follow each other to the upload's staged pages, with as few system calls as may be.

    Gives what was written as it lies there, in order: stretches of whole keys where the format has no scales. Raises
    HostMemoryError.
    """
    pieces = [piece for chunk in chunks for piece in _pieces(upload, chunk, row_bytes)]
    return service.host_extents.write(pieces)


def _pieces(upload: Upload, chunk: Chunk, row_bytes: RowBytes) -> Iterator[tuple[int, int, memoryview]]:
    """A chunk's bytes and where they go: (extent, byte within it, bytes)."""
    keys, scales = chunk.parts
    key_bytes, scale_bytes = row_bytes
    page_bytes = upload.layer.page_bytes
    run = None  # pages without scales that lie one after the other take one piece
    for page, row, first, count in page_ranges(upload, chunk.row_offset, chunk.row_count):
        extent, offset = upload.staged[page]
        if run is not None and (extent, offset) == run[:2] and not row:
            run = (extent, offset + page_bytes, *run[2:4], first + count)
            continue
        if run is not None:
            yield _piece(run, keys, key_bytes)
        run = (extent, offset + page_bytes, offset + row * key_bytes, first, first + count)
        if scale_bytes:
            yield _piece(run, keys, key_bytes)
            run = None
            part = scales[first * scale_bytes : (first + count) * scale_bytes]
            yield extent, offset + PAGE_KEYS * key_bytes + row * scale_bytes, part
    if run is not None:
        yield _piece(run, keys, key_bytes)


def _piece(run: tuple[int, int, int, int, int], keys: memoryview, key_bytes: int) -> tuple[int, int, memoryview]:
    extent, _, offset, first, stop = run
    return extent, offset, keys[first * key_bytes : stop * key_bytes]


def page_rows(service: Service, slot: Any, row_bytes: RowBytes, row: int, count: int) -> tuple[Bytes, Bytes]:
    """Rows [row, row + count) of a page in host memory: their keys and their scales, as bytes."""
    key_bytes, scale_bytes = row_bytes
    keys = service.host_extents.bytes_at(slot, row * key_bytes, count * key_bytes)
    scales = service.host_extents.bytes_at(slot, PAGE_KEYS * key_bytes + row * scale_bytes, count * scale_bytes)
    return keys, scales


async def commit_upload(service: Service, upload: Upload, row_bytes: RowBytes) -> None:
    """Make a complete upload visible.

    Raises CacheNotFoundError, LayerChangedError; what HostRoom.with_pages raises.
    """
    async with service.room.with_pages(upload.cache, lambda: _replaced(upload)):
        _commit(service, upload, row_bytes)


def _replaced(upload: Upload) -> list[Page]:
    """Pages of which a commit takes over rows."""
    layer = upload.layer
    if upload.first_row > layer.length_keys:
        return []
    return [layer.pages[page] for page, _, _ in edges(layer, upload.first_row, upload.row_count)]


def _commit(service: Service, upload: Upload, row_bytes: RowBytes) -> None:
    layer = upload.layer
    if upload.first_row <= layer.length_keys:  # else the commit refuses; so it does when the cache is gone
        first_page = upload.first_row // PAGE_KEYS
        for page, row, count in edges(layer, upload.first_row, upload.row_count):
            old = page_rows(service, layer.pages[page].in_host, row_bytes, row, count)
            new = page_rows(service, upload.staged[page - first_page], row_bytes, row, count)
            for source, target in zip(old, new, strict=True):
                target[:] = source
        # The memory may have been another caller's; a visible page holds nothing but its own cache's rows.
        blank = blank_rows(layer, upload.first_row, upload.row_count)
        for target in page_rows(service, upload.staged[-1], row_bytes, PAGE_KEYS - blank, blank):
            target[:] = 0
    service.uploads.commit(upload)
