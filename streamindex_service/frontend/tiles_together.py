"""Tiles over rows of several calls: one copy of queries to the device, and one run of the kernels there.

What bounds such a tile: its rows lie in one block, one after another; its parts are of one kind, as their callers see
to; the device holds the pages of all of them together, beside the workspace; they are as fast together as apart; and it
takes no longer than a tile of the call's band may.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from streamindex_service.core.attention_estimates import Padding
from streamindex_service.core.estimates import DeviceSpeed
from streamindex_service.core.turns import Grant, Need, OpenSearch, SearchTurn
from streamindex_service.errors import ServiceError
from streamindex_service.frontend.service import Service
from streamindex_service.frontend.tiles import Submitted, TileDue, TilePiece


class Joinable(Protocol):
    """An operation whose rows may be in a tile with rows of others of its kind."""

    name: str

    @property
    def service(self) -> Service:
        """Where it runs."""

    @property
    def speed(self) -> DeviceSpeed:
        """What its work takes."""

    @property
    def workspace_bytes(self) -> int:
        """The least workspace of a tile."""

    def bytes_of(self, piece: TilePiece) -> int:
        """Device memory of all that a tile reads and writes; without the workspace."""

    def padding_bytes(self, padding: Padding) -> int:
        """Device memory of what index rows are wider for than each by itself."""

    def flop_of(self, piece: TilePiece) -> int:
        """Operations of a tile."""

    @property
    def width(self) -> int:
        """Of an index row, as the device has it: all those of a tile are as wide as the widest."""

    def may_join(self, rows: int, keys: int, padding: Padding) -> bool:
        """Whether a tile of so many rows, of which one sees so many keys, is as fast as several of fewer, and no more
        than the device may have."""

    def need_together(self, parts: Sequence[Any], *, smallest: bool) -> Need:
        """What a tile takes whose rows, one after another in a block, are these `Part`s. `smallest`: with no more
        workspace than any tile can do with."""

    def submit_together(self, parts: Sequence[Any], grant: Grant, due: TileDue, request_key: str) -> Submitted:
        """Give the device such a tile, whose turn was granted. Raises WorkerLostError."""


Tiles = TypeVar("Tiles", bound=Joinable)
Part = tuple[Tiles, TilePiece]


class Together(Generic[Tiles]):
    """A `TileOperation` on rows of a block that follow each other, which are of its `parts`.

    first, rows: those of the block; keys: the most that any row sees. search: in whose place it waits, which stays open
    for as long as any of the parts' calls.
    """

    def __init__(self, parts: Sequence[Part[Tiles]], search: OpenSearch) -> None:
        self.parts = parts
        self.first = parts[0][1].first
        self.rows = sum([piece.rows for _, piece in parts])
        self.keys = max([piece.keys for _, piece in parts])
        self._search = search
        self._kind = parts[0][0]

    @property
    def name(self) -> str:
        """What traces call it."""
        return self._kind.name

    @property
    def service(self) -> Service:
        """Where it runs."""
        return self._kind.service

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
        """Ask for a turn. See `TileOperation`."""
        need = self._need(piece, smallest)
        return self.service.governor.request(self._search, need, granted, refused, alone=alone)

    def grow(self, turn: SearchTurn, piece: TilePiece) -> None:
        """See `TileOperation`."""
        self.service.governor.grow(turn, self._need(piece, smallest=False))

    def submit(self, piece: TilePiece, grant: Grant, due: TileDue, request_key: str) -> Submitted:
        """Give the device a tile whose turn was granted. See `TileOperation`."""
        return self._kind.submit_together(self._within(piece), grant, due, request_key)

    def _need(self, piece: TilePiece, smallest: bool) -> Need:
        return self._kind.need_together(self._within(piece), smallest=smallest)

    def _within(self, piece: TilePiece) -> Sequence[Part[Tiles]]:
        """The parts of a piece: for want of memory it may have come to be less than all."""
        if piece.rows == self.rows:
            return self.parts
        found = []
        for tiles, whole in self.parts:
            first = max(whole.first, piece.first)
            rows = min(whole.first + whole.rows, piece.first + piece.rows) - first
            if rows > 0:
                found.append((tiles, TilePiece(piece.block, first, rows, whole.keys, 0)))
        return found


@dataclass(slots=True)
class _Sums:
    """Of the parts of a tile: device memory of all that they read, write and copy, each by itself, rows, operations,
    the most keys that any of them sees, and how wide their index rows are."""

    size_bytes: int = 0
    rows: int = 0
    flop: int = 0
    keys: int = 0
    padding: Padding = Padding()  # noqa: RUF009, for it is frozen

    def plus(self, part: Part[Any]) -> _Sums:
        tiles, piece = part
        return _Sums(
            self.size_bytes + tiles.bytes_of(piece),
            self.rows + piece.rows,
            self.flop + tiles.flop_of(piece),
            max(self.keys, piece.keys),
            self.padding.plus(piece.rows, tiles.width),
        )


def joined(parts: Iterable[Part[Tiles]], search: OpenSearch) -> Iterator[Together[Tiles]]:
    """As few tiles as can be of parts that come in the order of their rows; see the module's text."""
    tile: list[Part[Tiles]] = []
    sums: _Sums | None = None  # of the tile's parts, once there are two: most calls have one
    for part in parts:
        if tile:
            sums = (sums or _Sums().plus(tile[0])).plus(part)
            if not (_follow(tile[-1], part) and _fit(part[0], sums, search)):
                yield Together(tile, search)
                tile, sums = [], None
        tile.append(part)
    if tile:
        yield Together(tile, search)


def _follow(before: Part[Any], after: Part[Any]) -> bool:
    """Whether no rows lie between them, that have failed; and they are not of one call, which was cut because they may
    not be together."""
    (tiles, piece), (others, added) = before, after
    return piece.first + piece.rows == added.first and tiles is not others


def _fit(tiles: Joinable, sums: _Sums, search: OpenSearch) -> bool:
    """Whether so much may be one tile. `tiles` is of any of its parts; each of them by itself may."""
    service = tiles.service
    # Pages lie in extents, of which the last may be filled in part only.
    needed = tiles.workspace_bytes + int(service.settings.memory.extent_bytes)
    needed += sums.size_bytes + tiles.padding_bytes(sums.padding)
    if needed > service.hbm.limit_bytes or not tiles.may_join(sums.rows, sums.keys, sums.padding):
        return False
    tile_s = service.governor.tile_s(search.band)
    return tiles.speed.rows(sums.flop // sums.rows, tile_s, sums.rows) == sums.rows
