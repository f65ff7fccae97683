"""What the governor admits: open searches, their turns on the device, what a turn takes and what it was given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from streamindex_service.core.band_queue import Band, Turn
from streamindex_service.core.estimates import DeviceSpeed
from streamindex_service.core.layers import Page, Snapshot
from streamindex_service.core.working_set import Needed
from streamindex_service.errors import ServiceError


@dataclass(frozen=True, slots=True)
class Need:
    """What a turn takes: pages of the layer, device memory beside them, operations, and rows waiting in memory.

    floor_bytes: device memory without which it cannot run; want_bytes: what it could use, and may have. estimate_bytes:
    what it would use if it had all that it can use. speed: what its operation has shown; None: what searches have.
    layers: the pages apart, where they are of several layers.
    """

    pages: Sequence[Page]
    floor_bytes: int
    want_bytes: int
    flop: int
    size_bytes: int = 0
    estimate_bytes: int = 0
    speed: DeviceSpeed | None = None
    layers: Sequence[Sequence[Page]] = ()


@dataclass(slots=True, eq=False)
class OpenSearch:
    """A search between its header and its end. `turns` wait, `grants` are with the device; `rows_wait`: its rows do, so
    that it has no turn for them yet, and is queued all the same."""

    caller: str
    band: Band
    snapshot: Snapshot
    turns: int = 0
    grants: int = 0
    rows_wait: bool = False
    used: dict[int, Sequence[Page]] = field(default_factory=dict)  # what its turns had pinned, by identity
    page_sets: dict[DeviceSpeed | None, Needed] = field(default_factory=dict)  # that each operation came for last


@dataclass(slots=True, eq=False)
class Grant:
    """A turn that may run: its pages are pinned, its workspace is reserved."""

    turn: SearchTurn
    workspace_bytes: int
    waited_s: float
    epoch: int  # of the device memory that the pages are on


@dataclass(slots=True, eq=False)
class SearchTurn(Turn):
    """A turn, what it needs, and who is told: `granted` when it may run, `refused` when it never will."""

    open_search: OpenSearch = field(kw_only=True)
    need: Need = field(kw_only=True)
    granted: Callable[[Grant], None] = field(kw_only=True)
    refused: Callable[[ServiceError], None] = field(kw_only=True)
    page_set: Needed | None = field(kw_only=True)  # None: it needs no pages
    workspaces_bytes: int = field(kw_only=True)  # beside which its pages take part
    waiting: bool = True
