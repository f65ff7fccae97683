"""Uploads: rows on their way into a layer.

An upload holds rows in staged pages until its finish; nothing is visible before. It survives a disconnect for its time
to live and goes on at the row it had reached. One stream at a time may write it.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass, field

from streamindex_service.core.caches import CacheStore
from streamindex_service.core.layers import KeyCache, Layer
from streamindex_service.core.pages import PageSlot
from streamindex_service.core.sizes import PAGE_KEYS
from streamindex_service.core.specs import RowKind
from streamindex_service.errors import (
    CacheNotFoundError,
    InvalidArgumentError,
    OffsetGapError,
    TooManyError,
    UploadBusyError,
    UploadNotFoundError,
)

_RECLAIM_S = 1.0  # between two looks for what has expired, when memory is short


@dataclass(slots=True, eq=False)
class Upload:
    """Rows [first_row, first_row + row_count) of one kind of a layer, of which `rows_held` have arrived.

    `keys_crc32c` and `scales_crc32c` are running checksums of the rows held.
    """

    upload_id: str
    owner: str
    cache: KeyCache
    layer: Layer
    first_row: int
    row_count: int
    touched_at: float
    kind: RowKind = RowKind.KEYS
    rows_held: int = 0
    keys_crc32c: int = 0
    scales_crc32c: int = 0
    staged: list[PageSlot] = field(default_factory=list)
    attached: bool = False
    committed: bool = False
    layer_keys: int = 0  # after the commit

    def place(self, row: int) -> tuple[int, int]:
        """Where row `row` of the upload lies: (index in `staged`, row within that page)."""
        absolute = self.first_row + row
        return absolute // PAGE_KEYS - self.first_row // PAGE_KEYS, absolute % PAGE_KEYS

    def is_repeat(self, row_offset: int, rows: int, rows_taken: int) -> bool:
        """True: these rows are among the first `rows_taken`, compare them. False: they go on where those end.

        Raises OffsetGapError when they do neither, InvalidArgumentError when they pass the announced row count.
        """
        if rows < 1 or row_offset + rows > self.row_count:
            raise InvalidArgumentError(
                f"rows {row_offset}..{row_offset + rows} are not among the upload's {self.row_count}",
                field="chunk.row_count",
            )
        if row_offset + rows <= rows_taken:
            return True
        if row_offset != rows_taken:
            raise OffsetGapError(
                f"the chunk starts at row {row_offset}, the upload goes on at row {rows_taken}",
                field="chunk.row_offset",
                metadata={"expected_row_offset": rows_taken},
            )
        return False


class UploadTable:
    """All uploads, open and lately committed."""

    def __init__(
        self,
        store: CacheStore,
        clock: Callable[[], float],
        ttl_s: float,
        max_uploads: int,
        new_id: Callable[[], str] = lambda: "up_" + secrets.token_urlsafe(18),
    ) -> None:
        self._store = store
        self._clock = clock
        self._ttl_s = ttl_s
        self._max_uploads = max_uploads
        self._new_id = new_id
        self._reclaimed_at = -_RECLAIM_S
        store.reclaim = self.reclaim
        self._uploads: dict[str, Upload] = {}
        self._committed: dict[str, Upload] = {}  # those of them that are committed, oldest first

    @property
    def open_uploads(self) -> int:
        """Uploads that hold rows or may."""
        return len(self._uploads) - len(self._committed)

    @staticmethod
    def check_start(cache: KeyCache, layer: Layer, first_row: int, row_count: int, max_layer_keys: int) -> None:
        """Whether rows may be written to a layer as it is now.

        Raises CacheNotFoundError for a cache that was deleted since it was found, InvalidArgumentError, OffsetGapError.
        """
        if cache.deleted:  # or its layers would look as if they had been truncated
            raise CacheNotFoundError
        if row_count < 1:
            raise InvalidArgumentError("row_count must be at least 1", field="header.start.row_count")
        if first_row + row_count > max_layer_keys:
            raise InvalidArgumentError(
                f"a layer may have {max_layer_keys} rows of a kind",
                field="header.start.row_count",
                metadata={"limit": max_layer_keys},
            )
        if first_row > layer.length_keys:
            raise OffsetGapError(
                f"the layer has {layer.length_keys} such rows; rows are written at or before its end",
                field="header.start.first_row",
                metadata={"expected_row_offset": layer.length_keys},
            )

    def start(
        self,
        cache: KeyCache,
        layer_index: int,
        first_row: int,
        row_count: int,
        max_layer_keys: int,
        kind: RowKind = RowKind.KEYS,
    ) -> Upload:
        """Open an upload of rows of one kind.

        Raises CacheNotFoundError, InvalidArgumentError, NoKvRowsError, OffsetGapError, TooManyError, HostMemoryError.
        """
        layer = self._store.layer(cache, layer_index, kind)
        self.check_start(cache, layer, first_row, row_count, max_layer_keys)
        if self.open_uploads >= self._max_uploads:
            self.expire()
        if self.open_uploads >= self._max_uploads:
            raise TooManyError(
                f"{self._max_uploads} uploads are open, as many as may be", metadata={"limit": self._max_uploads}
            )
        with self._store.kept(cache):
            self._store.require_room(layer.page_bytes, layer.page_bytes, self._store.watermarks.high)
        self._store.accounts.of(cache.owner).open_upload()
        upload = Upload(self._new_id(), cache.owner, cache, layer, first_row, row_count, self._clock(), kind)
        self._uploads[upload.upload_id] = upload
        return upload

    def get(self, owner: str, upload_id: str) -> Upload:
        """Find an upload of this caller. Raises UploadNotFoundError."""
        upload = self._uploads.get(upload_id)
        if upload is None or upload.owner != owner or self._expired(upload):
            raise UploadNotFoundError
        return upload

    def attach(self, upload: Upload) -> None:
        """Make one stream the upload's writer. Raises UploadBusyError."""
        if upload.attached:
            raise UploadBusyError("another stream is writing this upload", field="header.resume_upload_id")
        upload.attached = True
        upload.cache.busy += 1

    def detach(self, upload: Upload) -> None:
        """The stream is gone; from now on the time to live runs."""
        upload.attached = False
        upload.cache.busy -= 1
        upload.touched_at = self._clock()
        self._store.touch(upload.cache)
        if upload.cache.deleted and upload.upload_id in self._uploads:
            self.drop(upload)

    def hold(self, upload: Upload, rows: int) -> None:
        """Take the pages that the upload's first `rows` rows need.

        Memory grows with the rows that arrive, never with the rows announced. Raises HostMemoryError with the figures.
        """
        critical = self._store.watermarks.critical
        last_page, _ = upload.place(rows - 1)
        page_bytes = upload.layer.page_bytes
        while (missing := last_page + 1 - len(upload.staged)) > 0:
            account = self._store.accounts.of(upload.owner)
            most = min(account.room(page_bytes, missing), self._store.pages_below(critical, page_bytes))
            slots = self._store.host.try_allocate_some(page_bytes, most) if most else []
            if not slots:
                if self.reclaim():
                    continue
                raise self._store.memory_used_up(page_bytes, page_bytes, critical)
            upload.staged += slots
            account.take(len(slots) * page_bytes)

    def reclaim(self, at_once: bool = False) -> bool:
        """Drop caches and uploads past their time to live, before anybody is refused for want of memory.

        False when there are none, and when it was tried a moment ago, unless it is to be done at once: it looks at all
        of them.
        """
        now = self._clock()
        if now - self._reclaimed_at < _RECLAIM_S and not at_once:
            return False
        self._reclaimed_at = now
        dropped = self.expire()
        for cache in self._store.expired():
            self._store.delete(cache)
            self.drop_cache(cache)
            dropped += 1
        return dropped > 0

    def commit(self, upload: Upload) -> None:
        """Make a complete upload visible. Raises CacheNotFoundError, LayerChangedError."""
        assert upload.rows_held == upload.row_count
        self._store.commit(upload.cache, upload.layer, upload.first_row, upload.row_count, upload.staged)
        upload.staged = []
        upload.committed = True
        self._store.accounts.of(upload.owner).close_upload()
        upload.layer_keys = upload.layer.length_keys
        upload.touched_at = self._clock()
        # Remembered, so that a finish whose answer was lost can be repeated; as many as may be open, and no more.
        self._committed[upload.upload_id] = upload
        if len(self._committed) > self._max_uploads:
            self.drop(next(iter(self._committed.values())))

    def drop(self, upload: Upload) -> None:
        """Forget an upload and give its pages back."""
        del self._uploads[upload.upload_id]
        self._committed.pop(upload.upload_id, None)
        for slot in upload.staged:
            self._store.host.free(slot)
        account = self._store.accounts.of(upload.owner)
        account.take(-len(upload.staged) * upload.layer.page_bytes)
        if not upload.committed:
            account.close_upload()
        self._store.accounts.forget_if_empty(account)
        upload.staged = []

    def close(self, upload: Upload) -> None:
        """A short upload is over, committed or not: nothing of it is remembered."""
        self.detach(upload)
        if upload.upload_id in self._uploads:
            self.drop(upload)

    def drop_cache(self, cache: KeyCache) -> None:
        """Forget the uploads of a cache that is gone, those that a stream still writes apart."""
        for upload in [u for u in self._uploads.values() if u.cache is cache and not u.attached]:
            self.drop(upload)

    def expire(self) -> int:
        """Forget every upload that nobody wrote for its time to live; return how many."""
        expired = [upload for upload in self._uploads.values() if self._expired(upload)]
        for upload in expired:
            self.drop(upload)
        return len(expired)

    def _expired(self, upload: Upload) -> bool:
        return not upload.attached and self._clock() - upload.touched_at >= self._ttl_s
