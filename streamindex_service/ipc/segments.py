"""Memory segments: the tensor bytes that frontend and worker share.

A segment is an anonymous memfd, sealed against a change of its length, so that neither side can make the other fault.
Only its descriptor is ever passed on, over the socket pair; it has no name that anybody could guess.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os


class Segment:
    """A piece of shared memory of a fixed length.

    `map` is writable for the side that made it and for a side that was told so. Close it when nobody reads it any more.
    """

    def __init__(self, fd: int, size_bytes: int, *, writable: bool) -> None:
        self.fd = fd
        self.size_bytes = size_bytes
        protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        self.map = mmap.mmap(fd, size_bytes, mmap.MAP_SHARED, protection)

    @classmethod
    def create(cls, size_bytes: int) -> Segment:
        """Make a segment of zeros. Memory is taken as it is touched. Raises OSError."""
        fd = os.memfd_create("streamindex", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, size_bytes)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
            return cls(fd, size_bytes, writable=True)
        except BaseException:
            os.close(fd)
            raise

    @classmethod
    def receive(cls, fd: int, size_bytes: int, *, writable: bool) -> Segment:
        """Map a segment that another process made. Raises ValueError if it is not what was announced."""
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
        wanted = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
        if seals & wanted != wanted or os.fstat(fd).st_size != size_bytes:
            raise ValueError("the segment is not sealed, or not as long as announced")
        return cls(fd, size_bytes, writable=writable)

    def view(self, offset_bytes: int, size_bytes: int) -> memoryview:
        """A part of the segment. Raises ValueError beyond its end."""
        if offset_bytes < 0 or size_bytes < 0 or offset_bytes + size_bytes > self.size_bytes:
            raise ValueError(f"[{offset_bytes}, +{size_bytes}) is outside a segment of {self.size_bytes} bytes")
        return memoryview(self.map)[offset_bytes : offset_bytes + size_bytes]

    def close(self) -> None:
        """Close the descriptor; the memory goes once the last view of it is gone."""
        os.close(self.fd)
        with contextlib.suppress(BufferError):  # a view is still alive; the map goes when it is collected
            self.map.close()
