"""A call of attention between its header and its end."""

from __future__ import annotations

from collections.abc import Callable

from streamindex_service.core.layers import KeyCache, Page
from streamindex_service.core.specs import RowKind
from streamindex_service.core.turns import Need
from streamindex_service.errors import CacheNotFoundError, InvalidArgumentError, NoKvRowsError
from streamindex_service.frontend.admission import OpenCall
from streamindex_service.frontend.attend_block import SEARCHED, attend_layout
from streamindex_service.frontend.attend_requests import AttendParameters
from streamindex_service.frontend.attend_tiles import AttendTiles
from streamindex_service.frontend.index_tiles import IndexTiles
from streamindex_service.frontend.query_block import BlockLayout
from streamindex_service.frontend.service import Service


async def admit_attention(
    service: Service,
    cache: KeyCache,
    layer: int,
    parameters: AttendParameters,
    deadline_s: Callable[[], float | None],
    version_is_right: Callable[[int], None] = lambda version: None,
    *,
    among_others: bool = False,
) -> AdmittedAttention:
    """Open a call on a cache that the caller has just found, once the layer's rows are in host memory.

    deadline_s: the caller's remaining time; `version_is_right` raises for a version of the layer. Both are asked when
    the rows are there. among_others: rows of other calls lie in the same blocks. Raises ServiceError.
    """
    found = [service.caches.layer(cache, layer, kind) for kind in RowKind]

    def spilled() -> list[Page]:
        if not any(rows.spilled_pages for rows in found):
            return []
        return [page for rows in found for page in rows.pages]  # all: those that are there must stay meanwhile

    async with service.room.with_pages(cache, spilled):
        if cache.deleted:  # while its rows were brought
            raise CacheNotFoundError
        version_is_right(sum(rows.version for rows in found))
        return AdmittedAttention(service, cache, layer, parameters, deadline_s(), among_others)


def _nothing(pages: int) -> tuple[int, int]:
    return 0, 0


class AdmittedAttention(OpenCall):
    """An open call of attention: `index` finds indices, where the caller does not give them, and `attend` the outputs.

    `layout` is that of the blocks through which rows pass, the same for all calls of a kind whose rows lie
    `among_others`; `version` that of the layer, all kinds of its rows together. Raises NoKvRowsError where index
    keys have no KV rows.
    """

    def __init__(
        self,
        service: Service,
        cache: KeyCache,
        layer: int,
        parameters: AttendParameters,
        deadline_s: float | None,
        among_others: bool = False,
    ) -> None:
        super().__init__(service, cache)
        # what no query of the call asks for is not held: windows may be a few of very many pages
        self.keys = self._hold(layer, RowKind.KEYS, _nothing if parameters.search is None else None)
        self.kv = self._hold(layer, RowKind.KV)
        self.window = self._hold(layer, RowKind.WINDOW, parameters.window_pages)
        self.version = self.keys.version + self.kv.version + self.window.version
        self.index: IndexTiles | None = None
        try:
            if parameters.search is not None:
                self._refuse_keys_without_rows()
                self.index = IndexTiles(
                    service,
                    self.keys,
                    parameters.search,
                    lambda scored: self._layout(parameters, scored or among_others).only(SEARCHED),
                    self._place,
                )
                self._operations.append(self.index)
                service.governor.refuse_what_never_fits(self.index.least)
            if parameters.all_visible:
                self._refuse_long_layers()
            in_parts = self.index is not None and self.index.in_parts
            self.layout = self._layout(parameters, in_parts or among_others)
            self.attend = AttendTiles(
                service,
                self.kv,
                self.window if parameters.window else None,
                parameters,
                self.layout,
                self._place,
                in_steps=among_others,
            )
            self._operations.append(self.attend)
            rows = max(1, parameters.row_count)
            run_s = self.attend.seconds(rows) + (self.index.seconds(rows) if self.index is not None else 0.0)
            self._open(self.keys, parameters.band, self.attend.least, run_s, deadline_s)
        except BaseException:
            self._let_go()
            raise

    @property
    def needs(self) -> list[Need]:
        """The least of each operation: of the search, if there is one, and of the attention."""
        return [*([] if self.index is None else [self.index.least]), self.attend.least]

    def tile_rows(self, keys: int) -> int:
        """Query rows of the next tile, where they see up to so many index keys."""
        rows = self.attend.tile_rows()
        return rows if self.index is None else min(rows, self.index.tile_rows(keys))

    def keys_seen(self, last_position: int) -> int:
        """Index keys that a query at this position sees, of those that are searched."""
        return 0 if self.index is None else self.index.keys_seen(last_position)

    def _layout(self, parameters: AttendParameters, keeps_scores: bool) -> BlockLayout:
        return attend_layout(self._cache.spec, parameters, keeps_scores, self.service.blocks.block_bytes)

    def _refuse_long_layers(self) -> None:
        limit = self.service.settings.limits.max_given_indices
        if self.kv.length_keys > limit:
            raise InvalidArgumentError(
                f"the layer has {self.kv.length_keys} KV rows, {limit} at most are attended whole",
                field="header.all_visible",
                metadata={"kv_rows": self.kv.length_keys, "limit": limit},
            )

    def _refuse_keys_without_rows(self) -> None:
        if self.kv.length_keys < self.keys.length_keys:
            raise NoKvRowsError(
                f"the layer has {self.keys.length_keys} index keys and {self.kv.length_keys} KV rows",
                field="header.layer",
                metadata={"needed_rows": self.keys.length_keys, "kv_rows": self.kv.length_keys},
            )
