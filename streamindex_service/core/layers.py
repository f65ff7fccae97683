"""What a key cache consists of: layers, their rows of each kind, and the pages in which these lie."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from streamindex_service.core.accounts import Account
from streamindex_service.core.census import CachePages
from streamindex_service.core.pages import PageSlot
from streamindex_service.core.specs import CacheSpec, RowKind


@dataclass(slots=True, eq=False)
class Layer:
    """Rows of one kind in one layer: a length and their pages. `version` changes with everything that changes what a
    search would see.

    `resident_pages` is how many of its pages are on the device, `spilled_pages` how many are on disk and not in host
    memory. `cache_id` names the cache that it belongs to, `of_cache` counts the pages of all its layers.
    `snapshot_pages` are the pages as all snapshots share them, so that what is known of them need not be found out
    anew for each search: None until the next snapshot.
    """

    cache_id: str
    page_bytes: int
    of_cache: CachePages

    length_keys: int = 0
    pages: list[Page] = field(default_factory=list)
    version: int = 1
    resident_pages: int = 0
    spilled_pages: int = 0
    snapshot_pages: tuple[Page, ...] | None = None


@dataclass(slots=True, eq=False)
class Page:
    """256 rows of one kind in host memory, or spilled to disk, and where they lie on the device, if they do.

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
    spared: int = 0  # sequences that have it and are not evicted for others
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

    def move(self, slot: PageSlot) -> PageSlot:
        """It has another place on the device from now on; gives the one that it had, to be freed."""
        assert self.device is not None, "a page moves that has no place"
        freed, self.device = self.device, slot
        return freed

    def show_in(self, layer: Layer) -> None:
        """One more layer has it."""
        if self.layer is None:
            self.layer = layer
        else:
            self.forks = self.forks or {}
            self.forks[layer] = None
        self._count_in(layer, 1)

    def hide_from(self, layer: Layer) -> None:
        """A layer has it no more."""
        if self.layer is layer:
            self.layer = None
        else:
            assert self.forks is not None, "a page is not in this layer"
            del self.forks[layer]
        self._count_in(layer, -1)

    def layers(self) -> Sequence[Layer]:
        """The layers that show it."""
        if self.forks:
            return [*((self.layer,) if self.layer is not None else ()), *self.forks]
        return (self.layer,) if self.layer is not None else ()

    def _count_in(self, layer: Layer, pages: int) -> None:
        resident = pages if self.device is not None else 0
        spilled = pages if self.spilled is not None else 0
        layer.resident_pages += resident
        layer.spilled_pages += spilled
        layer.of_cache.add(pages, resident, spilled)

    def _count_spilled(self, pages: int) -> None:
        for layer in self.layers():
            layer.spilled_pages += pages
            layer.of_cache.add(0, 0, pages)


def place_all(pages: Sequence[Page], slots: Sequence[PageSlot]) -> None:
    """They are on the device now, each in its place. Layers come by thousands of pages: each is counted once."""
    moved: dict[Layer, int] = {}
    for page, slot in zip(pages, slots, strict=True):
        assert page.device is None, "a page has two places"
        page.device = slot
        for layer in page.layers():
            moved[layer] = moved.get(layer, 0) + 1
    for layer, count in moved.items():
        layer.resident_pages += count
        layer.of_cache.placed(count)


def displace_all(pages: Iterable[Page]) -> list[PageSlot]:
    """They are not any more; the places that they had, to be freed."""
    moved: dict[Layer, int] = {}
    freed: list[PageSlot] = []
    for page in pages:
        assert page.device is not None, "a page leaves that has no place"
        freed.append(page.device)
        page.device = None
        for layer in page.layers():
            moved[layer] = moved.get(layer, 0) + 1
    for layer, count in moved.items():
        layer.resident_pages -= count
        layer.of_cache.displaced(count)
    return freed


@dataclass(slots=True, eq=False)
class Snapshot:
    """Rows of one kind of a layer as they were at one moment; holds references on pages until it is released.

    held: which of its pages, all or those that will be asked for, which follow each other from number `first_held` on.
    The others may be gone, and their memory somebody else's, any time: `held_pages` gives none of them.
    """

    spec: CacheSpec
    length_keys: int
    pages: tuple[Page, ...]
    version: int
    kind: RowKind = RowKind.KEYS
    held: tuple[Page, ...] = ()
    first_held: int = 0

    def held_pages(self, first: int, stop: int) -> tuple[Page, ...]:
        """Pages [first, stop). Asking for one that is not held is a defect, and raises AssertionError."""
        start = first - self.first_held
        if first < stop and not 0 <= start <= start + stop - first <= len(self.held):
            raise AssertionError(
                f"pages {first} to {stop} are asked for, {len(self.held)} are held from {self.first_held}"
            )
        return self.held[start : start + stop - first] if first < stop else ()


@dataclass(slots=True, eq=False)
class KeyCache:
    """A cache and its layers: `layers` has the index keys of each, `kv_layers` and `window_layers` the rows of these
    kinds, where the cache has them."""

    cache_id: str
    owner: str
    spec: CacheSpec
    layers: list[Layer]
    kv_layers: list[Layer]
    window_layers: list[Layer]
    created: int  # order of creation
    used_at: float
    record_bytes: int  # of the host, beside the pages
    busy: int = 0  # calls that name it now: it does not expire under them
    deleted: bool = False

    @property
    def all_layers(self) -> Iterator[Layer]:
        """Of all kinds, those of one layer together."""
        for layer, keys in enumerate(self.layers):
            yield keys
            if self.kv_layers:
                yield self.kv_layers[layer]
                yield self.window_layers[layer]

    def of_kind(self, kind: RowKind) -> list[Layer]:
        """Rows of one kind, layer by layer; none where the cache does not have them."""
        return {RowKind.KEYS: self.layers, RowKind.KV: self.kv_layers, RowKind.WINDOW: self.window_layers}[kind]

    @property
    def host_bytes(self) -> int:
        """Bytes of its pages in host memory, shared ones counted in full."""
        return sum((len(layer.pages) - layer.spilled_pages) * layer.page_bytes for layer in self.all_layers)

    @property
    def spilled_bytes(self) -> int:
        """Bytes of its pages that are on disk, shared ones counted in full."""
        return sum(layer.spilled_pages * layer.page_bytes for layer in self.all_layers)

    @property
    def resident_bytes(self) -> int:
        """Bytes of its pages that are on the device."""
        return sum(layer.resident_pages * layer.page_bytes for layer in self.all_layers)
