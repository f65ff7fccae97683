"""Which tiles a worker's device was given and is not done with, in memory that the frontend shares.

The worker keeps it up to date with a few stores a tile and no message, and it is there after any death: a worker that
is killed, faults or hangs has no last word.
"""

from __future__ import annotations

import itertools

from streamindex_service.ipc.segments import Segment

SLOTS = 64  # more tiles than a device is ever given at a time
_SLOT_WORDS = 2  # when it was given, counting from 1, or 0 for a free slot; and the tile
_WORD_BYTES = 8
TABLE_BYTES = SLOTS * _SLOT_WORDS * _WORD_BYTES


class RunningTiles:
    """The worker adds and removes, one call at a time; the frontend reads."""

    def __init__(self, segment: Segment) -> None:
        self._segment = segment
        self._words = memoryview(segment.map).cast("Q")
        self._slots: dict[int, int] = {}  # tile -> where it is listed
        self._free = list(range(SLOTS))
        self._given = itertools.count(1)

    @classmethod
    def create(cls) -> RunningTiles:
        """Make an empty one. Raises OSError."""
        return cls(Segment.create(TABLE_BYTES))

    @classmethod
    def receive(cls, fd: int) -> RunningTiles:
        """Map the one that the frontend made. Raises ValueError if it is none."""
        return cls(Segment.receive(fd, TABLE_BYTES, writable=True))

    @property
    def fd(self) -> int:
        """The descriptor that the worker is sent."""
        return self._segment.fd

    def add(self, tile_id: int) -> None:
        """The device is about to be given a tile. One that is tried again stays as old as it is."""
        if tile_id in self._slots or not self._free:
            return
        slot = self._slots[tile_id] = self._free.pop()
        self._words[_SLOT_WORDS * slot + 1] = tile_id
        self._words[_SLOT_WORDS * slot] = next(self._given)  # last: a worker that dies in between has not listed it

    def remove(self, tile_id: int) -> None:
        """The device is done with it. What is not listed is ignored."""
        slot = self._slots.pop(tile_id, None)
        if slot is not None:
            self._words[_SLOT_WORDS * slot] = 0
            self._free.append(slot)

    def oldest_first(self) -> list[int]:
        """The tiles, in the order in which the device was given them."""
        words = self._words.tolist()
        return [tile for given, tile in sorted(zip(words[::2], words[1::2], strict=True)) if given]

    def close(self) -> None:
        """Let go of the memory."""
        self._words.release()
        self._segment.close()
