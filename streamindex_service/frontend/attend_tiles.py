"""The tiles of attention: some query rows over their windows and over the KV rows that their indices name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache, partial

import numpy as np

from streamindex_service.core.attention_estimates import (
    STEP_ROWS,
    AttentionTerms,
    AttentionWork,
    Padding,
    parts_of,
    window_group,
)
from streamindex_service.core.estimates import DeviceSpeed
from streamindex_service.core.layers import Page, Snapshot
from streamindex_service.core.sizes import BF16_BYTES, PAGE_KEYS
from streamindex_service.core.turns import Grant, Need, OpenSearch, SearchTurn
from streamindex_service.errors import ExceedsBudgetError, ServiceError
from streamindex_service.frontend.attend_block import INDICES, LSE, OUT, Q
from streamindex_service.frontend.attend_requests import AttendParameters
from streamindex_service.frontend.host_memory import Block
from streamindex_service.frontend.query_block import POSITIONS, BlockLayout, positions_of
from streamindex_service.frontend.service import Service
from streamindex_service.frontend.tiles import Submitted, TileDue, TilePiece, span
from streamindex_service.frontend.views import View
from streamindex_service.ipc.link import Fields
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
    the others, once it is open; `in_steps`: rows come a few of each call. Raises ExceedsBudgetError when not even one
    row can ever be computed.
    """

    def __init__(
        self,
        service: Service,
        kv: Snapshot,
        window: Snapshot | None,
        parameters: AttendParameters,
        layout: BlockLayout,
        search: Callable[[], OpenSearch],
        *,
        in_steps: bool,
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
        self._looked_at: tuple[TilePiece, tuple[int, int]] | None = None  # see _tokens_of
        terms = attention_terms(service.require_worker_info().attention.terms)
        self.work = AttentionWork(
            parameters.kv,
            kv.length_keys,
            self._most_seen(kv.length_keys) if parameters.all_visible else parameters.width,
            parameters.window,
            parameters.want_lse,
            terms,
            named=not parameters.all_visible,
            parts=_parts(parameters, service.blocks.block_bytes, in_steps=in_steps) if terms.splits else 1,
        )
        floor = int(service.settings.memory.workspace_floor_bytes)
        self.workspace_bytes = max(floor, self.work.workspace_bytes())
        kv_bytes = len(kv.pages) * parameters.kv.form.page_bytes
        room = service.hbm.limit_bytes - kv_bytes - self.workspace_bytes
        self._most_rows = self.work.rows_within(room, min(layout.rows, self._most_listed()))
        if not self._most_rows:
            raise ExceedsBudgetError(
                "the KV rows of the layer and the smallest workspace do not fit the device memory budget",
                metadata={
                    "needed_bytes": kv_bytes + self.workspace_bytes + self.work.beside_bytes(1),
                    "budget_bytes": service.hbm.limit_bytes,
                },
            )
        least_bytes = self.workspace_bytes + self.work.beside_bytes(1)
        self.least = Need(kv.pages, least_bytes, least_bytes, self.work.flop(1), speed=service.attention_speed)

    def _most_seen(self, kv_rows: int) -> int:
        """KV rows that a query may see, where it attends all of those."""
        last = self._parameters.last_position
        return kv_rows if last is None else min(kv_rows, (last + 1) // self._kv.spec.ratio)

    def _most_listed(self) -> int:
        """Query rows whose index rows, as the device has them, take no more than a workspace; at least 1."""
        most_bytes = int(self._service.settings.memory.workspace_bytes)
        return max(1, most_bytes // max(1, self._list_bytes(1, self.work.width)))

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
        need = self.need_together([(self, piece)], smallest=smallest)
        return self._service.governor.request(self._search(), need, granted, refused, alone=alone)

    def grow(self, turn: SearchTurn, piece: TilePiece) -> None:
        """A tile that still waits has become this one."""
        self._service.governor.grow(turn, self.need_together([(self, piece)], smallest=False))

    def submit(self, piece: TilePiece, grant: Grant, due: TileDue, request_key: str) -> Submitted:
        """Give the device a tile whose turn was granted. See `TileOperation`."""
        return self.submit_together([(self, piece)], grant, due, request_key)

    def sequence(self, piece: TilePiece) -> tuple[Fields, list[View]]:
        """What rows of a tile attend, as the worker knows it, an `AttendSequence`. For the moment in which a turn is
        granted; raises WorkerLostError."""
        device, place = self._service.device, self._place_of(piece)
        self._kv_view = device.view_of(self._kv_view, self._kv, self._kv.pages, self._kv.length_keys)
        sequence = {"view_id": self._kv_view.view_id, "rows": piece.rows}
        if self._window is None:
            return sequence, [self._kv_view]
        self._window_view = self._view_of(self._window, place)
        sequence["window_view_id"] = self._window_view.view_id
        sequence["first_window_row"] = place.first_page * PAGE_KEYS
        return sequence, [self._kv_view, self._window_view]

    def drop_views(self) -> None:
        """No tile will come any more."""
        self._looked_at = None
        for view in (self._kv_view, self._window_view):
            if view is not None:
                self._service.device.drop_view(view)

    def message(self, piece: TilePiece, due: TileDue, sequences: Sequence[Fields], tile_id: int) -> pb.ToWorker:
        """The message that asks for a tile: rows of the block, whatever they attend. sequences: `AttendSequence`s."""
        parameters, layout, block = self._parameters, self._layout, piece.block
        at = {tensor: span(block, layout.at(tensor, piece.first)) for tensor in (Q, POSITIONS, INDICES, OUT, LSE)}
        tile: Fields = {
            "tile_id": tile_id,
            "sequences": sequences,
            "window": parameters.window,
            "rows": piece.rows,
            "heads": parameters.kv.heads,
            "width": parameters.width,
            "value_dim": parameters.kv.value_dim,
            "scale": parameters.scale,
            "sink": parameters.sink,
            "workspace_bytes": self.workspace_bytes,
            "q": at[Q],
            "positions": at[POSITIONS],
            "indices": None if parameters.all_visible else at[INDICES],
            "visible_ratio": self._kv.spec.ratio if parameters.all_visible else 0,
            "parts": self.work.parts,
            "out": at[OUT],
            "lse": at[LSE] if parameters.want_lse else None,
            "band": due.band,
            "estimated_us": int(1e6 * due.estimated_s),
            "request_id": due.request_id,
            "traceparent": due.traceparent,
        }
        return pb.ToWorker(attend_tile=tile)

    def _view_of(self, window: Snapshot, place: _Place) -> View:
        """Window pages as the worker knows them. For the moment in which a turn is granted; raises WorkerLostError."""
        device = self._service.device
        if self._window_view is not None and self._viewed is not place:
            device.drop_view(self._window_view)
            self._window_view = None
        rows = min(window.length_keys - place.first_page * PAGE_KEYS, len(place.window) * PAGE_KEYS)
        self._viewed = place
        return device.view_of(self._window_view, window, place.window, max(0, rows))

    def pages_of(self, piece: TilePiece) -> Sequence[Page]:
        """All pages that a tile reads: the same object for as long as they are the same."""
        return self._place_of(piece).pages

    def bytes_of(self, piece: TilePiece) -> int:
        """Device memory of all that a tile reads and writes; without the workspace."""
        pages_bytes = len(self.pages_of(piece)) * self._parameters.kv.form.page_bytes
        return pages_bytes + self.tile_bytes(piece)

    def tile_bytes(self, piece: TilePiece) -> int:
        """The same without the pages that it reads."""
        first, stop = self._tokens_of(piece)
        return self.work.tile_bytes(piece.rows, stop - first)

    # Of tiles whose rows are of several calls; see `tiles_together`.

    @property
    def speed(self) -> DeviceSpeed:
        """What attention takes."""
        return self._service.attention_speed

    def flop_of(self, piece: TilePiece) -> int:
        """Operations of a tile."""
        if not self._parameters.all_visible:
            return self.work.flop(piece.rows)
        positions = positions_of(self._layout, piece.block, piece.first, piece.rows)
        return self.work.flop_of_entries(
            int(np.minimum((positions + 1) // self._kv.spec.ratio, self.work.width).sum()), piece.rows
        )

    @property
    def width(self) -> int:
        """See `Joinable`."""
        return self.work.width

    def padding_bytes(self, padding: Padding) -> int:
        """See `Joinable`."""
        return padding.entries * self.work.terms.index_entry_bytes

    def may_join(self, rows: int, keys: int, padding: Padding) -> bool:
        """Whether a tile of so many rows is as fast as several: each row is worked on by itself. Where rows are copied,
        the workspace depends on the width."""
        if not self.work.terms.reads_pages and padding.entries:
            return False
        return self._list_bytes(rows, padding.widest) <= int(self._service.settings.memory.workspace_bytes)

    def _list_bytes(self, rows: int, width: int) -> int:
        """Device memory of index rows, as the kernels read them."""
        return rows * (width + self.work.window) * self.work.terms.index_entry_bytes

    @staticmethod
    def need_together(parts: Sequence[tuple[AttendTiles, TilePiece]], *, smallest: bool) -> Need:
        """What a tile takes whose rows, one after another in a block, are these pieces of calls of one kind. There is
        but one size of workspace."""
        tiles = parts[0][0]
        rows = sum(piece.rows for _, piece in parts)
        pages = tiles.pages_of(parts[0][1])
        layers: Sequence[Sequence[Page]] = ()
        if len(parts) > 1:  # each once, for forks share them
            layers = [each.pages_of(piece) for each, piece in parts]
            pages = tuple(dict.fromkeys(page for layer in layers for page in layer))
        padding = Padding.of((piece.rows, each.width) for each, piece in parts)
        beside_bytes = sum(each.tile_bytes(piece) for each, piece in parts)
        beside_bytes += tiles.padding_bytes(padding)
        floor_bytes = tiles.workspace_bytes + beside_bytes
        used_bytes = tiles.work.used_bytes(rows, tiles.workspace_bytes) + beside_bytes
        flop = sum(each.flop_of(piece) for each, piece in parts)
        size_bytes = tiles.work.staging_bytes(rows)
        return Need(pages, floor_bytes, floor_bytes, flop, size_bytes, used_bytes, tiles.speed, layers)

    @staticmethod
    def submit_together(
        parts: Sequence[tuple[AttendTiles, TilePiece]], grant: Grant, due: TileDue, request_key: str
    ) -> Submitted:
        """Give the device such a tile, whose turn was granted. Raises WorkerLostError."""
        tiles, first = parts[0]
        sequences, views = [], []
        for each, piece in parts:
            sequence, read = each.sequence(piece)
            sequences.append(sequence)
            views += read
        whole = TilePiece(first.block, first.first, sum(piece.rows for _, piece in parts), 0, 0)
        message = partial(tiles.message, whole, due, sequences)
        return Submitted(*tiles.service.device.submit(views, first.block, request_key, message), views)

    def _tokens_of(self, piece: TilePiece) -> tuple[int, int]:
        """Tokens that are in the windows of a tile's rows."""
        if self._window is None:
            return 0, 0
        if self._looked_at is None or self._looked_at[0] is not piece:
            positions = positions_of(self._layout, piece.block, piece.first, piece.rows)
            tokens = max(0, int(positions.min()) - self._parameters.window + 1), int(positions.max()) + 1
            self._looked_at = piece, tokens
        return self._looked_at[1]

    def _place_of(self, piece: TilePiece) -> _Place:
        """The pages that a tile reads: the same object for as long as they are the same, for so they stay pinned."""
        pages = self._window.pages if self._window is not None else ()
        first, stop = window_group(*self._tokens_of(piece), len(pages))
        place = self._places.get((first, stop))
        if place is None:
            window = () if self._window is None else self._window.held_pages(first, stop)
            place = _Place(first, window, (*self._kv.pages, *window) if window else self._kv.pages)
            self._places[first, stop] = place
            if len(self._places) > _PLACES_KEPT:
                oldest = self._places.pop(next(iter(self._places)))
                self._service.governor.let_go(self._search(), oldest.pages)
        return place


def _parts(parameters: AttendParameters, block_bytes: int, *, in_steps: bool) -> int:
    """How many parts index rows are split into, by what a block holds of queries and outputs."""
    kv = parameters.kv
    rows = block_bytes // (kv.heads * (kv.key_dim + kv.value_dim) * BF16_BYTES)
    entries = None if parameters.all_visible else parameters.width + parameters.window
    return parts_of(kv, entries, min(rows, STEP_ROWS) if in_steps else rows)


def attention_terms(message: pb.AttentionTerms) -> AttentionTerms:
    """What a worker said of its implementation."""
    return _read_terms(message.SerializeToString())


@lru_cache(4)  # every item of a step asks for them
def _read_terms(data: bytes) -> AttentionTerms:
    message = pb.AttentionTerms.FromString(data)
    return AttentionTerms(**{name: getattr(message, name) for name in _TERMS})
