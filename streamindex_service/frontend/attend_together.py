"""Tiles of attention over rows of several sequences: one copy and one run of the kernels on the device.

What bounds such a tile: its rows lie in one block, one after another; the KV rows are of one format, dimensions and
number of heads, and the call has one scale, sink, window and number of indices; the device holds the KV pages of all
its sequences together, beside the workspace and the copies; and it takes no longer than a tile of the call's band may.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from streamindex_service.core.turns import Grant, Need, OpenSearch, SearchTurn
from streamindex_service.errors import ServiceError
from streamindex_service.frontend.attend_tiles import AttendTiles, need_together, submit_together
from streamindex_service.frontend.service import Service
from streamindex_service.frontend.tiles import Submitted, TileDue, TilePiece

Part = tuple[AttendTiles, TilePiece]


class AttendTogether:
    """A `TileOperation` on rows of a block that follow each other. `search`: in whose place it waits, which stays open
    for as long as any of the parts' calls."""

    def __init__(self, parts: Sequence[Part], search: OpenSearch) -> None:
        self._parts = parts
        self._search = search

    name = "attend"

    @property
    def service(self) -> Service:
        """Where it runs."""
        return self._parts[0][0].service

    @property
    def first(self) -> int:
        """First row of the block."""
        return self._parts[0][1].first

    @property
    def rows(self) -> int:
        """Rows of all parts."""
        return sum(piece.rows for _, piece in self._parts)

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
        return self.service.governor.request(self._search, self._need(piece), granted, refused, alone=alone)

    def grow(self, turn: SearchTurn, piece: TilePiece) -> None:
        """See `TileOperation`."""
        self.service.governor.grow(turn, self._need(piece))

    def submit(self, piece: TilePiece, grant: Grant, due: TileDue, request_key: str) -> Submitted:
        """Give the device a tile whose turn was granted. See `TileOperation`."""
        return submit_together(self._within(piece), due, request_key)

    def _need(self, piece: TilePiece) -> Need:
        return need_together(self._within(piece))

    def _within(self, piece: TilePiece) -> list[Part]:
        """The parts of a piece: for want of memory it may have come to be less than all."""
        found = []
        for tiles, whole in self._parts:
            first = max(whole.first, piece.first)
            rows = min(whole.first + whole.rows, piece.first + piece.rows) - first
            if rows > 0:
                found.append((tiles, TilePiece(piece.block, first, rows, 0, 0)))
        return found


@dataclass(slots=True)
class _Sums:
    """Of the parts of a tile: device memory of all that they read, write and copy, rows, and operations."""

    size_bytes: int = 0
    rows: int = 0
    flop: int = 0

    def plus(self, part: Part) -> _Sums:
        tiles, piece = part
        flop = self.flop + tiles.work.flop(piece.rows)
        return _Sums(self.size_bytes + tiles.bytes_of(piece), self.rows + piece.rows, flop)


def joined(parts: Iterable[Part], search: OpenSearch) -> Iterator[AttendTogether]:
    """As few tiles as can be of parts that come in the order of their rows; see the module's text."""
    tile: list[Part] = []
    sums = _Sums()
    for part in parts:
        together = sums.plus(part)
        if tile and not (_follow(tile[-1], part) and _fit(part[0], together, search)):
            yield AttendTogether(tile, search)
            tile, together = [], _Sums().plus(part)
        tile.append(part)
        sums = together
    if tile:
        yield AttendTogether(tile, search)


def _follow(before: Part, after: Part) -> bool:
    """Whether no rows lie between them, that have failed; and they are not of one call, which was cut because they may
    not be together."""
    (tiles, piece), (others, added) = before, after
    return piece.first + piece.rows == added.first and tiles is not others


def _fit(tiles: AttendTiles, sums: _Sums, search: OpenSearch) -> bool:
    """Whether so much may be one tile. `tiles` is of any of its parts; each of them by itself may."""
    service = tiles.service
    # Pages lie in extents, of which the last may be filled in part only.
    needed = tiles.workspace_bytes + int(service.settings.memory.extent_bytes)
    if needed + sums.size_bytes > service.hbm.limit_bytes:
        return False
    tile_s = service.governor.tile_s(search.band)
    return service.attention_speed.rows(sums.flop // sums.rows, tile_s, sums.rows) == sums.rows
