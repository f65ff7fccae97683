"""Key caches: what callers hold, as pages of host memory.

A page is immutable once it is visible: a commit puts new pages in the place of old ones (copy on write), so whoever
holds a snapshot of a layer keeps reading what it started with, a fork shares pages by counting references, and a copy
of a page on the device stays valid for as long as the page exists.
"""

from __future__ import annotations

import contextlib
import secrets
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from streamindex_service.core.accounts import NO_QUOTA, Account, Accounts, Quota
from streamindex_service.core.pages import PagePool, PageSlot
from streamindex_service.core.sizes import PAGE_KEYS, KeyFormat, page_bytes, pages_of
from streamindex_service.errors import (
    CacheNotFoundError,
    HostMemoryError,
    InvalidArgumentError,
    LayerChangedError,
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


@dataclass(frozen=True, slots=True)
class CacheSpec:
    """What a cache is; fixed for its life."""

    heads: int
    head_dim: int
    ratio: int
    key_format: KeyFormat
    layers: int
    convention: str
    expected_keys: int
    idle_ttl_s: float
    priority: int

    @property
    def page_bytes(self) -> int:
        """Bytes of one page of this cache's keys."""
        return page_bytes(self.key_format, self.head_dim)


@dataclass(slots=True, eq=False)
class Layer:
    """One layer: a length and its pages. `version` changes with everything that changes what a search would see.

    `resident_pages` is how many of its pages are on the device, `spilled_pages` how many are on disk and not in host
    memory. `cache_id` names the cache that it belongs to. `snapshot_pages` are the pages as all snapshots share them,
    so that what is known of them need not be found out anew for each search: None until the next snapshot.
    """

    cache_id: str = ""

    length_keys: int = 0
    pages: list[Page] = field(default_factory=list)
    version: int = 1
    resident_pages: int = 0
    spilled_pages: int = 0
    snapshot_pages: tuple[Page, ...] | None = None


@dataclass(slots=True, eq=False)
class Page:
    """256 keys in host memory, or spilled to disk, and where they lie on the device, if they do.

    `layer` and `forks` are the layers that show it; searches that only hold it are counted in `references`, copies from
    host memory to the device that have not ended in `copies`. Exactly one of `host` and `spilled` is a place;
    `crc32c` is of the bytes on disk.
    """

    host: PageSlot | None
    page_bytes: int
    account: Account
    layer: Layer | None
    references: int = 1
    device: PageSlot | None = None
    pins: int = 0  # searches that use the device copy now
    forks: dict[Layer, None] | None = None
    spilled: PageSlot | None = None
    crc32c: int = 0
    copies: int = 0

    @property
    def in_host(self) -> PageSlot:
        """Its place in host memory, where whoever uses it has seen to it that it has one."""
        assert self.host is not None, "a page in use is on disk"
        return self.host

    @property
    def idle(self) -> bool:
        """Whether layers show it and nobody uses it."""
        return self.references == self.shown > 0 and not self.pins and not self.copies

    @property
    def shown(self) -> int:
        """Layers that show it."""
        return (self.layer is not None) + len(self.forks or ())

    def spill(self, slot: PageSlot, checksum: int) -> PageSlot:
        """It is on disk from now on; gives its place in host memory, to be freed."""
        freed, self.host = self.in_host, None
        self.spilled, self.crc32c = slot, checksum
        self._count_spilled(1)
        return freed

    def restore(self, slot: PageSlot) -> PageSlot:
        """It is in host memory again; gives its place on disk, to be freed."""
        assert self.spilled is not None, "a page is brought back that was never spilled"
        freed, self.spilled = self.spilled, None
        self.host = slot
        self._count_spilled(-1)
        return freed

    def place(self, slot: PageSlot) -> None:
        """It is on the device now."""
        assert self.device is None, "a page has two places"
        self.device = slot
        self._count(1)

    def displace(self) -> None:
        """It is not any more."""
        self.device = None
        self._count(-1)

    def show_in(self, layer: Layer) -> None:
        """One more layer has it."""
        if self.layer is None:
            self.layer = layer
        else:
            self.forks = self.forks or {}
            self.forks[layer] = None
        layer.resident_pages += self.device is not None
        layer.spilled_pages += self.spilled is not None

    def hide_from(self, layer: Layer) -> None:
        """A layer has it no more."""
        if self.layer is layer:
            self.layer = None
        else:
            assert self.forks is not None, "a page is not in this layer"
            del self.forks[layer]
        layer.resident_pages -= self.device is not None
        layer.spilled_pages -= self.spilled is not None

    def layers(self) -> Iterator[Layer]:
        """The layers that show it."""
        if self.layer is not None:
            yield self.layer
        yield from self.forks or ()

    def _count(self, pages: int) -> None:
        for layer in self.layers():
            layer.resident_pages += pages

    def _count_spilled(self, pages: int) -> None:
        for layer in self.layers():
            layer.spilled_pages += pages


@dataclass(slots=True, eq=False)
class Snapshot:
    """A layer as it was at one moment; holds references on its pages until it is released."""

    spec: CacheSpec
    length_keys: int
    pages: tuple[Page, ...]
    version: int


@dataclass(slots=True, eq=False)
class KeyCache:
    """A cache and its layers."""

    cache_id: str
    owner: str
    spec: CacheSpec
    layers: list[Layer]
    created: int  # order of creation
    used_at: float
    record_bytes: int  # of the host, beside the pages
    busy: int = 0  # calls that name it now: it does not expire under them
    deleted: bool = False

    @property
    def host_bytes(self) -> int:
        """Bytes of its pages in host memory, shared ones counted in full."""
        return sum(len(layer.pages) - layer.spilled_pages for layer in self.layers) * self.spec.page_bytes

    @property
    def spilled_bytes(self) -> int:
        """Bytes of its pages that are on disk, shared ones counted in full."""
        return sum(layer.spilled_pages for layer in self.layers) * self.spec.page_bytes

    @property
    def resident_bytes(self) -> int:
        """Bytes of its pages that are on the device."""
        return sum(layer.resident_pages for layer in self.layers) * self.spec.page_bytes


class CacheStore:
    """All caches.

    `host` is where pages come from; `drop_device` is told when a page with a copy on the device is gone, `make_room`
    when host memory was reserved for something else than pages. `reclaim` is asked for what has expired before anybody
    is refused for want of memory, and tells whether there was any; the uploads set it. `drop_spilled` is told of the
    place on disk of a page that is gone.

    `by_use` are the caches that may have pages in host memory, least recently used first.
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
        if len(self._caches) >= self._max_caches:
            raise TooManyError(
                f"the server holds {self._max_caches} key caches, as many as it may",
                metadata={"key_caches": len(self._caches), "limit": self._max_caches},
            )
        record_bytes = CACHE_RECORD_BYTES + spec.layers * LAYER_RECORD_BYTES + shared_pages * FORKED_PAGE_BYTES
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
        layers = [Layer(cache_id) for _ in range(spec.layers)]
        cache = KeyCache(cache_id, owner, spec, layers, self._created, now, record_bytes)
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
        for layer in cache.layers:
            self._let_go(layer, 0, len(layer.pages))
            layer.length_keys = 0
        self.host.ledger.release(cache.record_bytes)
        account = self.accounts.of(cache.owner)
        account.close_cache()
        self.accounts.forget_if_empty(account)

    def expired(self) -> list[KeyCache]:
        """Every cache that was idle for its time to live."""
        return [cache for cache in self._caches.values() if self._expired(cache)]

    def truncate(self, cache: KeyCache, keys: int, layer_index: int | None) -> None:
        """Shorten one layer, or all. Raises InvalidArgumentError for a layer that does not exist."""
        layers = cache.layers if layer_index is None else [self.layer(cache, layer_index)]
        for layer in layers:
            if keys < layer.length_keys:
                self._let_go(layer, pages_of(keys), len(layer.pages))
                layer.length_keys = keys
                layer.version += 1

    def fork(self, cache: KeyCache, keys: int | None) -> KeyCache:
        """Make a cache that shares this one's pages. Raises TooManyError, HostMemoryError."""
        lengths = [layer.length_keys if keys is None else min(keys, layer.length_keys) for layer in cache.layers]
        with self.kept(cache):
            twin = self.create(cache.owner, cache.spec, sum(map(pages_of, lengths)))
        for source, target, length in zip(cache.layers, twin.layers, lengths, strict=True):
            target.length_keys = length
            target.pages = source.pages[: pages_of(length)]
            for page in target.pages:
                page.references += 1
                page.show_in(target)
        return twin

    def layer(self, cache: KeyCache, index: int) -> Layer:
        """A layer by number. Raises InvalidArgumentError."""
        if not 0 <= index < len(cache.layers):
            raise InvalidArgumentError(f"layer must be below {len(cache.layers)}", field="layer")
        return cache.layers[index]

    def snapshot(self, cache: KeyCache, layer_index: int) -> Snapshot:
        """Hold a layer as it is now; `release_snapshot` lets it go. Raises InvalidArgumentError."""
        layer = self.layer(cache, layer_index)
        assert not layer.spilled_pages, "a search begins on keys that are not in host memory"
        if layer.snapshot_pages is None:
            layer.snapshot_pages = tuple(layer.pages)
        self.hold(layer.snapshot_pages)
        return Snapshot(cache.spec, layer.length_keys, layer.snapshot_pages, layer.version)

    def release_snapshot(self, snapshot: Snapshot) -> None:
        """Let go of a snapshot."""
        self.release(snapshot.pages)

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
        pages = [Page(slot, cache.spec.page_bytes, account, layer) for slot in staged]
        self._let_go(layer, first_page, first_page + len(pages))
        layer.pages[first_page:first_page] = pages
        layer.snapshot_pages = None
        layer.length_keys = max(layer.length_keys, first_row + rows)
        layer.version += 1
        self.by_use[cache] = None
        assert len(layer.pages) == pages_of(layer.length_keys)

    @contextlib.contextmanager
    def kept(self, cache: KeyCache) -> Iterator[None]:
        """A cache that does not go, whatever is reclaimed within."""
        cache.busy += 1
        try:
            yield
        finally:
            cache.busy -= 1

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
        for page in pages:
            page.references -= 1
            assert page.references >= 0, "a page was released twice"
            if page.references == 0:
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
