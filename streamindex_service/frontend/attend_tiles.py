"""The tiles of attention: some query rows over their windows and over the KV rows that their indices name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial

import numpy as np

from streamindex_service.core.attention_estimates import AttentionTerms, AttentionWork, window_group
from streamindex_service.core.layers import Page, Snapshot
from streamindex_service.core.sizes import PAGE_KEYS
from streamindex_service.core.turns import Grant, Need, OpenSearch, SearchTurn
from streamindex_service.errors import ExceedsBudgetError, ServiceError
from streamindex_service.frontend.attend_block import INDICES, LSE, OUT, POSITIONS, Q, positions_of
from streamindex_service.frontend.attend_requests import AttendParameters
from streamindex_service.frontend.device import View
from streamindex_service.frontend.host_memory import Block
from streamindex_service.frontend.query_block import BlockLayout
from streamindex_service.frontend.service import Service
from streamindex_service.frontend.tiles import Submitted, TileDue, TilePiece, span
from streamindex_service.ipc.v1 import worker_pb2 as pb

_TERMS = [field.name for field in fields(AttentionTerms)]
_PLACES_KEPT = 3  # sets of pages of a call: of the tiles that it has on their way, and the one before them


@dataclass(frozen=True, slots=True, eq=False)
class _Place:
    """Window pages [first_page, first_page + len(window)) of the layer, and all pages of a tile that needs these."""

    first_page: int
    window: tuple[Page, ...]
    pages: Sequence[Page]


class AttendTiles:
    """What attention has the device do, and what that takes.

    `window` is the snapshot of the window rows, None where the call has no window; `search` is the call's place among
    the others, once it is open. Raises ExceedsBudgetError when not even one row can ever be computed.
    """

    def __init__(
        self,
        service: Service,
        kv: Snapshot,
        window: Snapshot | None,
        parameters: AttendParameters,
        layout: BlockLayout,
        search: Callable[[], OpenSearch],
    ) -> None:
        self._service = service
        self._kv = kv
        self._window = window
        self._parameters = parameters
        self._layout = layout
        self._search = search
        self._kv_view: View | None = None
        self._window_view: View | None = None
        self._viewed: _Place | None = None  # what the window view shows
        self._places: dict[tuple[int, int], _Place] = {}  # by page numbers, oldest first
        self.work = AttentionWork(
            parameters.kv,
            kv.length_keys,
            parameters.width,
            parameters.window,
            parameters.want_lse,
            attention_terms(service.require_worker_info().attention.terms),
        )
        floor = int(service.settings.memory.workspace_floor_bytes)
        self._workspace_bytes = max(floor, self.work.workspace_bytes())
        kv_bytes = len(kv.pages) * parameters.kv.form.page_bytes
        room = service.hbm.limit_bytes - kv_bytes - self._workspace_bytes
        self._most_rows = self.work.rows_within(room, layout.rows)
        if not self._most_rows:
            raise ExceedsBudgetError(
                "the KV rows of the layer and the smallest workspace do not fit the device memory budget",
                metadata={
                    "needed_bytes": kv_bytes + self._workspace_bytes + self.work.beside_bytes(1),
                    "budget_bytes": service.hbm.limit_bytes,
                },
            )
        self.least = self._need(kv.pages, self._workspace_bytes + self.work.beside_bytes(1), 1)

    name = "attend"

    @property
    def service(self) -> Service:
        """Where it runs."""
        return self._service

    def seconds(self, rows: int) -> float:
        """Device seconds of so many rows, about; 0 before anything was measured: a guess is to refuse nobody."""
        speed = self._service.attention_speed
        return speed.seconds(self.work.flop(rows)) if speed.measured else 0.0

    def tile_rows(self) -> int:
        """Query rows of the next tile: at least 1, at most what a block and the device's memory hold."""
        governor = self._service.governor
        seconds = governor.tile_s(self._search().band)
        return self._service.attention_speed.rows(self.work.flop(1), seconds, self._most_rows)

    def rows_together(self, block: Block, first: int, rows: int) -> int:
        """Of rows that follow each other, how many the device may compute together: windows far apart are not."""
        if self._window is None:
            return rows
        positions = positions_of(self._layout, block, first, rows)
        spread = np.maximum.accumulate(positions) - np.minimum.accumulate(positions)
        apart = spread >= self._most_rows
        return int(np.argmax(apart)) if apart.any() else rows

    def steps(self, keys: int) -> int:
        """See `TileOperation`."""
        return 1

    def request(
        self,
        piece: TilePiece,
        granted: Callable[[Grant], None],
        refused: Callable[[ServiceError], None],
        *,
        alone: bool = False,
        smallest: bool = False,
    ) -> SearchTurn:
        """Ask for a turn. See `TileOperation`; there is but one size of workspace."""
        return self._service.governor.request(self._search(), self._need_of(piece), granted, refused, alone=alone)

    def grow(self, turn: SearchTurn, piece: TilePiece) -> None:
        """A tile that still waits has become this one."""
        self._service.governor.grow(turn, self._need_of(piece))

    def submit(self, piece: TilePiece, grant: Grant, due: TileDue, request_key: str) -> Submitted:
        """Give the device a tile whose turn was granted. See `TileOperation`."""
        device = self._service.device
        self._kv_view = device.view_of(self._kv_view, self._kv, self._kv.pages, self._kv.length_keys)
        views = [self._kv_view]
        place = self._place_of(piece)
        if self._window is not None:
            self._window_view = self._view_of(self._window, place)
            views.append(self._window_view)
        message = partial(self._message, piece=piece, due=due, views=views, place=place)
        return Submitted(*device.submit(views, piece.block, request_key, message), views)

    def drop_views(self) -> None:
        """No tile will come any more."""
        for view in (self._kv_view, self._window_view):
            if view is not None:
                self._service.device.drop_view(view)

    def _message(
        self, tile_id: int, piece: TilePiece, due: TileDue, views: Sequence[View], place: _Place
    ) -> pb.ToWorker:
        parameters, layout, block = self._parameters, self._layout, piece.block
        at = {tensor: span(block, layout.at(tensor, piece.first)) for tensor in (Q, POSITIONS, INDICES, OUT, LSE)}
        message = pb.AttendTile(
            tile_id=tile_id,
            view_id=views[0].view_id,
            window_view_id=views[1].view_id if len(views) > 1 else None,
            first_window_row=place.first_page * PAGE_KEYS,
            window=parameters.window,
            rows=piece.rows,
            heads=parameters.kv.heads,
            width=parameters.width,
            value_dim=parameters.kv.value_dim,
            scale=parameters.scale,
            sink=parameters.sink,
            workspace_bytes=self._workspace_bytes,
            q=at[Q],
            positions=at[POSITIONS],
            indices=at[INDICES],
            out=at[OUT],
            lse=at[LSE] if parameters.want_lse else None,
            band=due.band,
            estimated_us=int(1e6 * due.estimated_s),
            request_id=due.request_id,
            traceparent=due.traceparent,
        )
        return pb.ToWorker(attend_tile=message)

    def _view_of(self, window: Snapshot, place: _Place) -> View:
        """Window pages as the worker knows them. For the moment in which a turn is granted; raises WorkerLostError."""
        device = self._service.device
        if self._window_view is not None and self._viewed is not place:
            device.drop_view(self._window_view)
            self._window_view = None
        rows = min(window.length_keys - place.first_page * PAGE_KEYS, len(place.window) * PAGE_KEYS)
        self._viewed = place
        return device.view_of(self._window_view, window, place.window, max(0, rows))

    def _need_of(self, piece: TilePiece) -> Need:
        first, stop = self._tokens_of(piece)
        floor = self._workspace_bytes + self.work.staging_bytes(piece.rows)
        floor += self.work.copy_bytes(piece.rows, stop - first)
        return self._need(self._place_of(piece).pages, floor, piece.rows)

    def _need(self, pages: Sequence[Page], floor_bytes: int, rows: int) -> Need:
        return Need(
            pages,
            floor_bytes,
            floor_bytes,
            self.work.flop(rows),
            self.work.staging_bytes(rows),
            floor_bytes,
            self._service.attention_speed,
        )

    def _tokens_of(self, piece: TilePiece) -> tuple[int, int]:
        """Tokens that are in the windows of a tile's rows."""
        if self._window is None:
            return 0, 0
        positions = positions_of(self._layout, piece.block, piece.first, piece.rows)
        return max(0, int(positions.min()) - self._parameters.window + 1), int(positions.max()) + 1

    def _place_of(self, piece: TilePiece) -> _Place:
        """The pages that a tile reads: the same object for as long as they are the same, for so they stay pinned."""
        pages = self._window.pages if self._window is not None else ()
        first, stop = window_group(*self._tokens_of(piece), len(pages))
        place = self._places.get((first, stop))
        if place is None:
            window = pages[first:stop]
            place = _Place(first, window, (*self._kv.pages, *window) if window else self._kv.pages)
            self._places[first, stop] = place
            if len(self._places) > _PLACES_KEPT:
                oldest = self._places.pop(next(iter(self._places)))
                self._service.governor.let_go(self._search(), oldest.pages)
        return place


def attention_terms(message: pb.AttentionTerms) -> AttentionTerms:
    """What a worker said of its implementation."""
    return AttentionTerms(**{name: getattr(message, name) for name in _TERMS})
