"""Tiles: what an operation has the device do with some rows of a block, and the messages that ask for it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from streamindex_service.core.turns import Grant, SearchTurn
from streamindex_service.errors import ServiceError
from streamindex_service.frontend.host_memory import Block
from streamindex_service.frontend.service import Service
from streamindex_service.frontend.views import View
from streamindex_service.ipc.link import Fields
from streamindex_service.ipc.v1 import worker_pb2 as pb

_SCORE_ORDER = 1  # streamindex.v1.ResultOrder: parts are merged in this order


@dataclass(frozen=True, slots=True)
class TilePiece:
    """Rows [first, first + rows) of a block, which see up to `keys` keys, in one of the steps that they take."""

    block: Block
    first: int
    rows: int
    keys: int
    step: int


@dataclass(frozen=True, slots=True)
class Submitted:
    """A tile that the device has been given, and the views that it reads."""

    tile_id: int
    future: asyncio.Future[pb.FromWorker]
    views: Sequence[View]


class TileOperation(Protocol):
    """What an open call computes, tile by tile."""

    @property
    def service(self) -> Service:
        """Where it runs."""

    @property
    def name(self) -> str:
        """What traces call it."""

    def steps(self, keys: int) -> int:
        """Turns on the device, one after another, that rows need which see so many keys."""

    def request(
        self,
        piece: TilePiece,
        granted: Callable[[Grant], None],
        refused: Callable[[ServiceError], None],
        *,
        alone: bool = False,
        smallest: bool = False,
    ) -> SearchTurn:
        """Ask for a turn on the device. `smallest`: with no more workspace than any tile can do with."""

    def grow(self, turn: SearchTurn, piece: TilePiece) -> None:
        """A tile that still waits has become this one."""

    def submit(self, piece: TilePiece, grant: Grant, due: TileDue, request_key: str) -> Submitted:
        """Give the device a tile whose turn was granted, at once. Raises WorkerLostError."""


@dataclass(frozen=True, slots=True)
class TileSpec:
    """What all tiles of a search have in common."""

    heads: int
    ratio: int
    top_k: int
    order: int


@dataclass(frozen=True, slots=True)
class TilePlace:
    """Where a tile's tensors lie in its block: byte offsets. `scores` is None when none are wanted."""

    rows: int
    q: int
    w: int
    positions: int
    indices: int
    scores: int | None


@dataclass(frozen=True, slots=True)
class TilePart:
    """Which of a layer's keys a tile is searched against. `is_last`: the answer is complete then."""

    first_key: int = 0
    is_last: bool = True


@dataclass(frozen=True, slots=True)
class TileDue:
    """Which of the tiles that the worker has goes first, how long it may take, and whose log lines it belongs to."""

    band: int = 0
    estimated_s: float = 0.0
    request_id: str = ""
    traceparent: str = ""


def span(block: Block, offset: int) -> Fields:
    """A byte offset of a block as the worker finds it, a `Span`."""
    return {"segment_id": block.shared.segment_id, "offset_bytes": block.offset_bytes + offset}


def search_tile(
    tile_id: int,
    sequences: Sequence[Fields],
    spec: TileSpec,
    block: Block,
    place: TilePlace,
    workspace_bytes: int,
    part: TilePart,
    due: TileDue,
) -> pb.ToWorker:
    """The message that asks for a tile of searches; `sequences` are `SearchSequence`s."""
    tile: Fields = {
        "tile_id": tile_id,
        "sequences": sequences,
        "rows": place.rows,
        "heads": spec.heads,
        "ratio": spec.ratio,
        "top_k": spec.top_k,
        "order": spec.order if part.is_last else _SCORE_ORDER,
        "workspace_bytes": workspace_bytes,
        "q": span(block, place.q),
        "w": span(block, place.w),
        "positions": span(block, place.positions),
        "indices": span(block, place.indices),
        "scores": None if place.scores is None else span(block, place.scores),
        "first_key": part.first_key,
        "merge": part.first_key > 0,
        "band": due.band,
        "estimated_us": int(1e6 * due.estimated_s),
        "request_id": due.request_id,
        "traceparent": due.traceparent,
    }
    return pb.ToWorker(search_tile=tile)
