"""All key caches: made, found, changed and dropped, and the host memory that their pages take.

A page is immutable once it is visible: a commit puts new pages in the place of old ones (copy on write), so whoever
holds a snapshot of a layer keeps reading what it started with, a fork shares pages by counting references, and a copy
of a page on the device stays valid for as long as the page exists.
"""

from __future__ import annotations

import contextlib
import secrets
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from streamindex_service.core.accounts import NO_QUOTA, Accounts, Quota
from streamindex_service.core.census import CachePages, Census
from streamindex_service.core.layers import KeyCache, Layer, Page, Snapshot
from streamindex_service.core.pages import PagePool, PageSlot
from streamindex_service.core.sizes import PAGE_KEYS, pages_of
from streamindex_service.core.specs import CacheSpec, RowKind
from streamindex_service.errors import (
    CacheNotFoundError,
    HostMemoryError,
    InvalidArgumentError,
    LayerChangedError,
    NoKvRowsError,
    TooManyError,
)

# What the host holds of a cache beside its pages, about, counted as long as the cache lives: its own record, that of a
# layer, and of a fork the entries of its page lists. Pages of its own are accounted for by what lies in them.
CACHE_RECORD_BYTES = 1024
LAYER_RECORD_BYTES = 256
FORKED_PAGE_BYTES = 64


@dataclass(frozen=True, slots=True)
class Watermarks:
    """Parts of the host budget: up to `high` uploads begin; up to `critical` they go on, and caches are made."""

    high: float = 1.0
    critical: float = 1.0


NO_WATERMARKS = Watermarks()


class CacheStore:
    """All caches.

    `host` is where pages come from; `drop_device` is told when a page with a copy on the device is gone, `make_room`
    when host memory was reserved for something else than pages. `reclaim` is asked for what has expired before anybody
    is refused for want of memory, and tells whether there was any; the uploads set it. `drop_spilled` is told of the
    place on disk of a page that is gone.

    `by_use` are the caches that may have pages in host memory, least recently used first. `census` tells how many are
    on the device and on disk.
    """

    def __init__(
        self,
        host: PagePool,
        drop_device: Callable[[Page], None],
        clock: Callable[[], float],
        max_caches: int,
        quota: Quota = NO_QUOTA,
        make_room: Callable[[], None] = lambda: None,
        new_id: Callable[[], str] = lambda: "kc_" + secrets.token_urlsafe(18),
        watermarks: Watermarks = NO_WATERMARKS,
    ) -> None:
        self.host = host
        self.watermarks = watermarks
        self.reclaim: Callable[[], bool] = lambda: False
        self.drop_spilled: Callable[[PageSlot], None] = lambda slot: None
        self.by_use: OrderedDict[KeyCache, None] = OrderedDict()
        self.accounts = Accounts(quota)
        self.census = Census()
        self._drop_device = drop_device
        self._clock = clock
        self._max_caches = max_caches
        self._make_room = make_room
        self._new_id = new_id
        self._caches: dict[str, KeyCache] = {}
        self._owned: dict[str, dict[str, KeyCache]] = {}  # by owner, oldest first
        self._created = 0

    def __len__(self) -> int:
        return len(self._caches)

    def create(self, owner: str, spec: CacheSpec, shared_pages: int = 0) -> KeyCache:
        """Make an empty cache, to share so many pages. Raises TooManyError, HostMemoryError, with the figures."""
        if self._too_many(owner):
            self.reclaim()
        if len(self._caches) >= self._max_caches:
            raise TooManyError(
                f"the server holds {self._max_caches} key caches, as many as it may",
                metadata={"key_caches": len(self._caches), "limit": self._max_caches},
            )
        record_bytes = (
            CACHE_RECORD_BYTES + len(spec.kinds) * spec.layers * LAYER_RECORD_BYTES + shared_pages * FORKED_PAGE_BYTES
        )
        self.require_room(spec.page_bytes, record_bytes, self.watermarks.critical)
        account = self.accounts.of(owner)
        account.open_cache()
        if not self.host.ledger.try_reserve(record_bytes):
            account.close_cache()
            self.accounts.forget_if_empty(account)
            raise self.memory_used_up(spec.page_bytes, record_bytes, self.watermarks.critical)
        self._make_room()
        self._created += 1
        now = self._clock()
        cache_id = self._new_id()
        pages = CachePages(self.census)
        layers, kv_layers, window_layers = (
            [Layer(cache_id, spec.form(kind).page_bytes, pages) for _ in range(spec.layers) if kind in spec.kinds]
            for kind in RowKind
        )
        cache = KeyCache(cache_id, owner, spec, layers, kv_layers, window_layers, self._created, now, record_bytes)
        self._caches[cache_id] = cache
        self.by_use[cache] = None
        self._owned.setdefault(owner, {})[cache.cache_id] = cache
        return cache

    def get(self, owner: str, cache_id: str) -> KeyCache:
        """Find a cache of this caller and count it as used. Raises CacheNotFoundError."""
        cache = self._caches.get(cache_id)
        if cache is None or cache.owner != owner or self._expired(cache):
            raise CacheNotFoundError
        self.touch(cache)
        return cache

    def touch(self, cache: KeyCache) -> None:
        """It was used just now."""
        cache.used_at = self._clock()
        if not cache.deleted:
            self.by_use[cache] = None
            self.by_use.move_to_end(cache)

    def came_back(self, page: Page) -> None:
        """A page is in host memory again: caches that show it have something there, however long ago they were used."""
        for layer in page.layers():
            cache = self._caches[layer.cache_id]
            if cache not in self.by_use:
                self.by_use[cache] = None
                self.by_use.move_to_end(cache, last=False)

    def owned_by(self, owner: str, after: int, limit: int) -> list[KeyCache]:
        """The caller's caches made after number `after`, oldest first, at most `limit`."""
        owned = self._owned.get(owner, {}).values()
        found = (cache for cache in owned if cache.created > after and not self._expired(cache))
        return [cache for cache, _ in zip(found, range(limit), strict=False)]

    def delete(self, cache: KeyCache) -> None:
        """Drop a cache."""
        del self._caches[cache.cache_id]
        self.by_use.pop(cache, None)
        owned = self._owned[cache.owner]
        del owned[cache.cache_id]
        if not owned:
            del self._owned[cache.owner]
        cache.deleted = True
        for layer in cache.all_layers:
            self._let_go(layer, 0, len(layer.pages))
            layer.length_keys = 0
        self.host.ledger.release(cache.record_bytes)
        account = self.accounts.of(cache.owner)
        account.close_cache()
        self.accounts.forget_if_empty(account)

    def expired(self) -> list[KeyCache]:
        """Every cache that was idle for its time to live."""
        return [cache for cache in self._caches.values() if self._expired(cache)]

    def truncate(self, cache: KeyCache, keys: int, layer_index: int | None, window_rows: int | None = None) -> None:
        """Shorten one layer, or all: index keys and KV rows to `keys`, window rows to `window_rows`, by default to all
        that may go with so many keys. Raises InvalidArgumentError for a layer that does not exist."""
        if layer_index is not None:
            self.layer(cache, layer_index)
        for kind in cache.spec.kinds:
            layers = cache.of_kind(kind)
            length = self._length_of(cache, kind, keys, window_rows)
            for layer in layers if layer_index is None else [layers[layer_index]]:
                if length < layer.length_keys:
                    self._let_go(layer, pages_of(length), len(layer.pages))
                    layer.length_keys = length
                    layer.version += 1

    def fork(self, cache: KeyCache, keys: int | None, window_rows: int | None = None) -> KeyCache:
        """Make a cache that shares this one's pages, up to the lengths that `truncate` would leave; None is all.

        Raises TooManyError, HostMemoryError.
        """
        most = {
            kind: self._length_of(cache, kind, keys, window_rows)
            for kind in cache.spec.kinds
            if keys is not None or (kind is RowKind.WINDOW and window_rows is not None)
        }
        lengths = {
            kind: [min(layer.length_keys, most.get(kind, layer.length_keys)) for layer in cache.of_kind(kind)]
            for kind in cache.spec.kinds
        }
        with self.kept(cache):
            twin = self.create(cache.owner, cache.spec, sum(pages_of(n) for each in lengths.values() for n in each))
        for kind in cache.spec.kinds:
            for source, target, length in zip(cache.of_kind(kind), twin.of_kind(kind), lengths[kind], strict=True):
                target.length_keys = length
                target.pages = source.pages[: pages_of(length)]
                for page in target.pages:
                    page.references += 1
                    page.show_in(target)
        return twin

    def layer(self, cache: KeyCache, index: int, kind: RowKind = RowKind.KEYS) -> Layer:
        """Rows of one kind, of a layer by number. Raises InvalidArgumentError; NoKvRowsError when the cache has none
        of that kind."""
        if not 0 <= index < len(cache.layers):
            raise InvalidArgumentError(f"layer must be below {len(cache.layers)}", field="layer")
        if kind not in cache.spec.kinds:
            raise NoKvRowsError("the cache holds index keys alone")
        return cache.of_kind(kind)[index]

    def snapshot(
        self,
        cache: KeyCache,
        layer_index: int,
        kind: RowKind = RowKind.KEYS,
        held: Callable[[int], tuple[int, int]] | None = None,
    ) -> Snapshot:
        """Hold rows as they are now; `release_snapshot` lets them go. held: of so many pages [first, stop) that will be
        asked for, by default all. Raises InvalidArgumentError, NoKvRowsError."""
        layer = self.layer(cache, layer_index, kind)
        assert not layer.spilled_pages, "a search begins on rows that are not in host memory"
        if layer.snapshot_pages is None:
            layer.snapshot_pages = tuple(layer.pages)
        pages = kept = layer.snapshot_pages
        first = 0
        if held is not None:
            first, stop = held(len(pages))
            kept = pages[first:stop]
        self.hold(kept)
        return Snapshot(cache.spec, layer.length_keys, pages, layer.version, kind, kept, first)

    def release_snapshot(self, snapshot: Snapshot) -> None:
        """Let go of a snapshot."""
        self.release(snapshot.held)

    def hold(self, pages: Sequence[Page]) -> None:
        """Pages do not go, and are not spilled, until they are released."""
        for page in pages:
            page.references += 1

    def commit(self, cache: KeyCache, layer: Layer, first_row: int, rows: int, staged: list[PageSlot]) -> None:
        """Make staged pages visible as rows [first_row, first_row + rows).

        `staged` are the pages from page first_row // 256 on. The caller has already filled the rows that the first and
        the last of them share with the pages they replace (see `edges`). Raises CacheNotFoundError when the cache was
        deleted since, LayerChangedError when the layer was truncated below first_row.
        """
        if cache.deleted:
            raise CacheNotFoundError
        if first_row > layer.length_keys:
            raise LayerChangedError(
                "the layer was truncated below the upload's first row", metadata={"layer_keys": layer.length_keys}
            )
        first_page = first_row // PAGE_KEYS
        account = self.accounts.of(cache.owner)
        pages = [Page(slot, layer.page_bytes, account, layer) for slot in staged]
        layer.of_cache.add(len(pages), 0, 0)
        self._let_go(layer, first_page, first_page + len(pages))
        layer.pages[first_page:first_page] = pages
        layer.snapshot_pages = None
        layer.length_keys = max(layer.length_keys, first_row + rows)
        layer.version += 1
        self.by_use[cache] = None
        assert len(layer.pages) == pages_of(layer.length_keys)

    @contextlib.contextmanager
    def kept(self, cache: KeyCache) -> Iterator[None]:
        """A cache that does not go, whatever is reclaimed within; after that it has been used just now."""
        cache.busy += 1
        try:
            yield
        finally:
            cache.busy -= 1
            self.touch(cache)

    def pages_below(self, watermark: float, page_bytes: int) -> int:
        """Pages of this size that may be taken until so much of the host budget is used."""
        left_bytes = int(watermark * self.host.ledger.limit_bytes) - self.host.used_bytes(page_bytes)
        return max(0, left_bytes // page_bytes)

    def require_room(self, page_bytes: int, needed_bytes: int, watermark: float) -> None:
        """That so many bytes more are below a watermark, for a cache whose pages have this size.

        Raises HostMemoryError with the figures, when nothing has expired that could go.
        """
        limit_bytes = int(watermark * self.host.ledger.limit_bytes)
        while self.host.used_bytes(page_bytes) + needed_bytes > limit_bytes:
            if not self.reclaim():
                raise self.memory_used_up(page_bytes, needed_bytes, watermark)

    def memory_used_up(self, page_bytes: int, needed_bytes: int, watermark: float) -> HostMemoryError:
        """The refusal, with the figures."""
        ledger = self.host.ledger
        return HostMemoryError(
            "the host memory budget is used up",
            metadata={
                "needed_bytes": needed_bytes,
                "reserved_bytes": self.host.used_bytes(page_bytes),
                "watermark_bytes": int(watermark * ledger.limit_bytes),
                "budget_bytes": ledger.limit_bytes,
            },
        )

    @staticmethod
    def _length_of(cache: KeyCache, kind: RowKind, keys: int | None, window_rows: int | None) -> int:
        """The length of rows of one kind that goes with so many keys, of which window rows may be told apart."""
        if kind is RowKind.WINDOW and window_rows is not None:
            return window_rows
        assert keys is not None
        return cache.spec.window_rows_of(keys) if kind is RowKind.WINDOW else keys

    def _too_many(self, owner: str) -> bool:
        """Whether a cache more would be refused for the number of those that are there."""
        quota = self.accounts.quota.caches
        of_one = len(self._owned.get(owner, ()))
        return len(self._caches) >= self._max_caches or (quota is not None and of_one >= quota)

    def _expired(self, cache: KeyCache) -> bool:
        return cache.busy == 0 and self._clock() - cache.used_at >= cache.spec.idle_ttl_s

    def _let_go(self, layer: Layer, start: int, stop: int) -> None:
        """Take pages [start, stop) out of a layer."""
        pages = layer.pages[start:stop]
        del layer.pages[start:stop]
        layer.snapshot_pages = None
        for page in pages:
            page.hide_from(layer)
        self.release(pages)

    def release(self, pages: Sequence[Page]) -> None:
        """Let go of pages; those that nobody else has are freed."""
        for page in pages:  # a decode step has thousands
            left = page.references = page.references - 1
            if left <= 0:
                self._free(page)

    def _free(self, page: Page) -> None:
        """Nobody has it any more."""
        assert page.references == 0, "a page was released twice"
        assert page.pins == 0, "a page in use was released"
        if page.device is not None:
            self._drop_device(page)
        if page.spilled is not None:
            self.drop_spilled(page.spilled)
        else:
            self.host.free(page.in_host)
        page.account.take(-page.page_bytes)
        self.accounts.forget_if_empty(page.account)


def edges(layer: Layer, first_row: int, rows: int) -> list[tuple[int, int, int]]:
    """Rows that staged pages share with the pages they replace: (page index, first row, row count) within the page.

    Before a commit of [first_row, first_row + rows), these rows are copied from the layer's pages to the staged ones.
    """
    found = []
    end = first_row + rows
    head = first_row % PAGE_KEYS
    if head:
        found.append((first_row // PAGE_KEYS, 0, head))
    tail_page = (end - 1) // PAGE_KEYS
    kept = min(layer.length_keys, (tail_page + 1) * PAGE_KEYS) - end
    if kept > 0:
        found.append((tail_page, end - tail_page * PAGE_KEYS, kept))
    return found


def blank_rows(layer: Layer, first_row: int, rows: int) -> int:
    """Rows at the end of the last staged page that a commit of [first_row, first_row + rows) gives no content."""
    end = max(first_row + rows, layer.length_keys)
    page_end = pages_of(first_row + rows) * PAGE_KEYS
    return max(0, page_end - end)
