"""The tiles of a search: the best index keys of some query rows, window by window of the layer's keys."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import lru_cache, partial

from streamindex_service.core.attention_estimates import Padding
from streamindex_service.core.estimates import DeviceSpeed, TopkWork, WorkspaceTerms
from streamindex_service.core.layers import Page, Snapshot
from streamindex_service.core.turns import Grant, Need, OpenSearch, SearchTurn
from streamindex_service.core.windows import MERGE_BYTES_PER_ENTRY, windows_of
from streamindex_service.errors import ServiceError
from streamindex_service.frontend import requests
from streamindex_service.frontend.query_block import BlockLayout
from streamindex_service.frontend.requests import SearchParameters
from streamindex_service.frontend.service import Service
from streamindex_service.frontend.tiles import Submitted, TileDue, TilePart, TilePiece, TileSpec, search_tile
from streamindex_service.frontend.views import View
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
        # of the smallest tile, and what the largest would take
        rows = min(parameters.row_count or self.layout.rows, self.layout.rows)
        self.least = Need(
            self.windows[0].pages,
            beside + merge_bytes * self.in_parts,
            self._want_bytes(rows, self.windows[0].keys) + self._staging_bytes(rows),
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
        part = TilePart(self.windows[piece.step].first_key, piece.step == self.steps(piece.keys) - 1)
        return self._submit([(self, piece)], part, grant, due, request_key)

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

    def _want_bytes(self, rows: int, keys: int) -> int:
        """Workspace that a tile can use, as much as any may have."""
        most_bytes = int(self._service.settings.memory.workspace_bytes)
        return min(most_bytes, max(self.workspace_bytes, self.work.workspace_bytes(rows, keys)))

    def _staging_bytes(self, rows: int) -> int:
        return self.work.staging_bytes(rows) + (self._merge_bytes(rows) if self.in_parts else 0)

    def _need(self, piece: TilePiece, smallest: bool) -> Need:
        return self._need_of([(self, piece)], piece.step, smallest=smallest)

    # Of tiles whose rows are of several calls; see `tiles_together`.

    @property
    def speed(self) -> DeviceSpeed:
        """What work like this takes."""
        return self._service.governor.speed

    @property
    def workspace_bytes(self) -> int:
        """The least that a tile takes beside rows and keys."""
        return int(self._service.settings.memory.workspace_floor_bytes)

    def bytes_of(self, piece: TilePiece) -> int:
        """Device memory of all that a tile reads and writes; without the workspace."""
        pages_bytes = len(self.windows[0].pages) * self._snapshot.spec.page_bytes
        return pages_bytes + self.work.staging_bytes(piece.rows)

    def flop_of(self, piece: TilePiece) -> int:
        """Operations of a tile."""
        return self.work.flop(piece.rows, piece.keys)

    width = 0

    def padding_bytes(self, padding: Padding) -> int:
        """None: see `width`."""
        return 0

    def may_join(self, rows: int, keys: int, padding: Padding) -> bool:
        """Whether a tile of so many rows, of which one sees so many keys, is as fast as several of fewer."""
        return self.work.workspace_bytes(rows, keys) <= int(self._service.settings.memory.workspace_bytes)

    @staticmethod
    def need_together(parts: Sequence[tuple[IndexTiles, TilePiece]], *, smallest: bool) -> Need:
        """What a tile takes whose rows, one after another in a block, are these pieces of calls of one kind."""
        return parts[0][0]._need_of(parts, 0, smallest=smallest)

    @staticmethod
    def submit_together(
        parts: Sequence[tuple[IndexTiles, TilePiece]], grant: Grant, due: TileDue, request_key: str
    ) -> Submitted:
        """Give the device such a tile, whose turn was granted. Raises WorkerLostError."""
        return parts[0][0]._submit(parts, TilePart(), grant, due, request_key)

    def _need_of(self, parts: Sequence[tuple[IndexTiles, TilePiece]], step: int, *, smallest: bool) -> Need:
        window, floor = self.windows[step], self.workspace_bytes
        pages: Sequence[Page] = window.pages
        layers: Sequence[Sequence[Page]] = ()
        if len(parts) > 1:  # each once, for forks share them
            layers = [each.windows[0].pages for each, _ in parts]
            pages = tuple(dict.fromkeys(page for layer in layers for page in layer))
        rows = sum(piece.rows for _, piece in parts)
        staging = self._staging_bytes(rows)
        seen = [
            min(each.windows[step].keys, max(0, piece.keys - each.windows[step].first_key)) for each, piece in parts
        ]
        most = self.work.workspace_bytes(rows, max(seen))
        want = floor if smallest else self._want_bytes(rows, max(seen))
        flop = sum(each.work.flop(piece.rows, keys) for (each, piece), keys in zip(parts, seen, strict=True))
        return Need(pages, floor + staging, want + staging, flop, staging, most + staging, layers=layers)

    def _submit(
        self,
        parts: Sequence[tuple[IndexTiles, TilePiece]],
        part: TilePart,
        grant: Grant,
        due: TileDue,
        request_key: str,
    ) -> Submitted:
        (_, first), rows = parts[0], sum(piece.rows for _, piece in parts)
        views = [each._view_of(piece.step) for each, piece in parts]
        message = partial(
            search_tile,
            sequences=[
                {"view_id": view.view_id, "rows": piece.rows} for view, (_, piece) in zip(views, parts, strict=True)
            ],
            spec=self.spec,
            block=first.block,
            place=self.layout.place(first.first, rows, self._keeps_scores),
            workspace_bytes=grant.workspace_bytes - self._staging_bytes(rows),
            part=part,
            due=due,
        )
        return Submitted(*self._service.device.submit(views, first.block, request_key, message), views)


def workspace_terms(message: worker_pb2.WorkspaceTerms) -> WorkspaceTerms:
    """What a worker said of its implementation."""
    return _read_terms(message.SerializeToString())


@lru_cache(4)  # every item of a step asks for them
def _read_terms(data: bytes) -> WorkspaceTerms:
    message = worker_pb2.WorkspaceTerms.FromString(data)
    return WorkspaceTerms(**{name: getattr(message, name) for name in _TERMS})
