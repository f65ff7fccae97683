"""The tiles of a search: the best index keys of some query rows, window by window of the layer's keys."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from functools import partial

from streamindex_service.core.estimates import TopkWork, WorkspaceTerms
from streamindex_service.core.layers import Snapshot
from streamindex_service.core.turns import Grant, Need, OpenSearch, SearchTurn
from streamindex_service.core.windows import MERGE_BYTES_PER_ENTRY, windows_of
from streamindex_service.errors import ServiceError
from streamindex_service.frontend import requests
from streamindex_service.frontend.device import View
from streamindex_service.frontend.query_block import BlockLayout
from streamindex_service.frontend.requests import SearchParameters
from streamindex_service.frontend.service import Service
from streamindex_service.frontend.tiles import Submitted, TileDue, TilePart, TilePiece, TileSpec, search_tile
from streamindex_service.ipc.v1 import worker_pb2

_TERMS = [field.name for field in fields(WorkspaceTerms)]


class IndexTiles:
    """What a search has the device do, and what that takes.

    `layout_of` tells how rows lie in a block, where scores are kept and where not; `search` is the call's place among
    the others, once it is open.
    """

    def __init__(
        self,
        service: Service,
        snapshot: Snapshot,
        parameters: SearchParameters,
        layout_of: Callable[[bool], BlockLayout],
        search: Callable[[], OpenSearch],
    ) -> None:
        self._service = service
        self._snapshot = snapshot
        self._search = search
        self._view: View | None = None
        self._viewed = 0  # the window that it shows
        spec = snapshot.spec
        self.spec = TileSpec(spec.heads, spec.ratio, parameters.top_k, parameters.order)
        self.work = TopkWork(
            spec.key_format,
            spec.heads,
            spec.head_dim,
            snapshot.length_keys,
            parameters.top_k,
            parameters.want_scores,
            workspace_terms(service.require_worker_info().workspace),
        )
        beside, block_bytes = requests.search_floor_bytes(service.settings), service.blocks.block_bytes
        # a merge takes no more than a block, or what a single row needs
        merge_bytes = max(block_bytes, self._merge_bytes(1))
        self.windows = windows_of(snapshot, service.hbm.limit_bytes, beside, merge_bytes)
        self.in_parts = len(self.windows) > 1
        self._most_rows = merge_bytes // self._merge_bytes(1)  # of a tile that is merged
        # parts are merged by their scores, whether the caller wants them or not
        self._keeps_scores = parameters.want_scores or self.in_parts
        self.layout = layout_of(self._keeps_scores)
        self.least = Need(
            self.windows[0].pages,
            beside + merge_bytes * self.in_parts,
            0,
            self.work.flop(1, self.windows[0].keys),
        )

    name = "search"

    @property
    def service(self) -> Service:
        """Where it runs."""
        return self._service

    def seconds(self, rows: int) -> float:
        """Device seconds of so many rows that see all keys, about."""
        return self._service.governor.speed.seconds(self.work.flop(rows))

    def tile_rows(self, keys: int) -> int:
        """Query rows of the next tile, where they see up to so many keys: at least 1, at most a block.

        They are what the device computes in about `Governor.tile_s`, by the speed it has shown.
        """
        flop = self.work.flop(1, min(keys, self.windows[0].keys))
        most = min(self.layout.rows, self._most_rows) if self.in_parts else self.layout.rows
        governor = self._service.governor
        return governor.speed.rows(flop, governor.tile_s(self._search().band), most)

    def keys_seen(self, last_position: int) -> int:
        """Keys that a query at this position sees."""
        return min((last_position + 1) // self.spec.ratio, self._snapshot.length_keys)

    def steps(self, keys: int) -> int:
        """Windows of the layer that hold the first so many keys; at least 1."""
        return max(1, sum(window.first_key < keys for window in self.windows))

    def request(
        self,
        piece: TilePiece,
        granted: Callable[[Grant], None],
        refused: Callable[[ServiceError], None],
        *,
        alone: bool = False,
        smallest: bool = False,
    ) -> SearchTurn:
        """Ask for a turn for a tile and one window of the keys that it sees. See `TileOperation`."""
        need = self._need(piece, smallest)
        return self._service.governor.request(self._search(), need, granted, refused, alone=alone)

    def grow(self, turn: SearchTurn, piece: TilePiece) -> None:
        """A tile that still waits has come to have so many rows, and to see so many keys."""
        self._service.governor.grow(turn, self._need(piece, smallest=False))

    def submit(self, piece: TilePiece, grant: Grant, due: TileDue, request_key: str) -> Submitted:
        """Give the device a tile whose turn was granted. See `TileOperation`."""
        view = self._view_of(piece.step)
        message = partial(
            search_tile,
            view=view,
            spec=self.spec,
            block=piece.block,
            place=self.layout.place(piece.first, piece.rows, self._keeps_scores),
            workspace_bytes=grant.workspace_bytes - self._staging_bytes(piece.rows),
            part=TilePart(self.windows[piece.step].first_key, piece.step == self.steps(piece.keys) - 1),
            due=due,
        )
        return Submitted(*self._service.device.submit((view,), piece.block, request_key, message), (view,))

    def drop_views(self) -> None:
        """No tile will come any more."""
        if self._view is not None:
            self._service.device.drop_view(self._view)

    def _view_of(self, number: int) -> View:
        """A window as the worker knows it. For the moment in which a turn is granted; raises WorkerLostError."""
        window, device = self.windows[number], self._service.device
        if self._view is not None and self._viewed != number:
            device.drop_view(self._view)
            self._view = None
        self._view = device.view_of(self._view, self._snapshot, window.pages, window.keys)
        self._viewed = number
        return self._view

    def _merge_bytes(self, rows: int) -> int:
        return rows * self.work.top_k * MERGE_BYTES_PER_ENTRY

    def _staging_bytes(self, rows: int) -> int:
        return self.work.staging_bytes(rows) + (self._merge_bytes(rows) if self.in_parts else 0)

    def _need(self, piece: TilePiece, smallest: bool) -> Need:
        memory, staging, window = (
            self._service.settings.memory,
            self._staging_bytes(piece.rows),
            self.windows[piece.step],
        )
        floor = int(memory.workspace_floor_bytes)
        seen = min(window.keys, max(0, piece.keys - window.first_key))
        most = self.work.workspace_bytes(piece.rows, seen)
        want = floor if smallest else min(int(memory.workspace_bytes), max(floor, most))
        flop = self.work.flop(piece.rows, seen)
        return Need(window.pages, floor + staging, want + staging, flop, staging, most + staging)


def workspace_terms(message: worker_pb2.WorkspaceTerms) -> WorkspaceTerms:
    """What a worker said of its implementation."""
    return WorkspaceTerms(**{name: getattr(message, name) for name in _TERMS})
