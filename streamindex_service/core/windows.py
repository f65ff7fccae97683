"""Layers larger than the device: page by page through it, in windows.

A tile is searched against one window of pages after another, and the best so far of each row is merged with the best
of the next window. Partial answers merge exactly, and a score is the same sequence of operations wherever its key
lies: the answer is bitwise that of a device which holds the layer as a whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from streamindex_service.core.layers import Page, Snapshot
from streamindex_service.core.sizes import PAGE_KEYS

# A window takes so much of what is left beside the smallest workspace: the next can come while this one is searched,
# and other searches' pages need not all go for it.
_WINDOWS_ON_DEVICE = 2
# Device memory of a merge, for each entry of an answer row: both lists, as scores, indices, packed keys and places.
MERGE_BYTES_PER_ENTRY = 96


@dataclass(frozen=True, slots=True)
class Window:
    """Pages that are on the device together: keys [first_key, first_key + keys) of a layer."""

    number: int
    first_key: int
    keys: int
    pages: Sequence[Page]


def windows_of(snapshot: Snapshot, budget_bytes: int, beside_bytes: int, merge_bytes: int) -> tuple[Window, ...]:
    """A layer in one window where it fits the budget with `beside_bytes` of workspace beside it, else in several.

    merge_bytes: what a tile needs more when there are several. A window has at least a page, whether it fits or not:
    the governor refuses what never fits.
    """
    page_bytes, pages = snapshot.spec.page_bytes, snapshot.pages
    size = len(pages)
    if size * page_bytes + beside_bytes > budget_bytes:
        room = max(0, budget_bytes - beside_bytes - merge_bytes)
        size = max(1, room // _WINDOWS_ON_DEVICE // page_bytes)
    found = []
    for number, first in enumerate(range(0, max(1, len(pages)), max(1, size))):
        first_key = first * PAGE_KEYS
        keys = min(snapshot.length_keys - first_key, size * PAGE_KEYS)
        found.append(Window(number, first_key, keys, pages[first : first + size]))
    return tuple(found)
