"""Files for keys that leave host memory: nameless, so that nothing is left when the process ends, however it does.

One file an extent. Its length is taken from the disk before the first byte is written, so that a full disk is met where
nothing is lost yet; what was written is on the disk before its copy in memory may go. For one thread at a time, but for
the bookkeeping of extents, which is the event loop's.
"""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
from collections.abc import Callable, Sequence

from streamindex.checksum import crc32c

from streamindex_service.core.pages import PageSlot

_NO_TMPFILE = (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL, errno.ENOENT)  # of file systems that have none


class SpillFiles:
    """Pages in nameless files of a directory. `close_later(close)` runs the closing of a file on some thread."""

    def __init__(self, directory: str, close_later: Callable[[Callable[[], None]], object]) -> None:
        self._directory = directory
        self._close_later = close_later
        self._bytes: dict[int, int] = {}  # by extent
        self._files: dict[int, int] = {}

    def check(self) -> None:
        """That files can be made there. Raises OSError."""
        os.close(self._open())

    def make_extent(self, extent_id: int, extent_bytes: int) -> None:
        """Note an extent; its file is made with its first page."""
        self._bytes[extent_id] = extent_bytes

    def drop_extent(self, extent_id: int) -> None:
        """Let go of an extent, and with it of the disk."""
        del self._bytes[extent_id]
        fd = self._files.pop(extent_id, None)
        if fd is not None:
            self._close_later(lambda: os.close(fd))

    def close(self) -> None:
        """Let go of everything, at once."""
        while self._files:
            os.close(self._files.popitem()[1])

    def write(self, pages: Sequence[tuple[PageSlot, memoryview]]) -> list[int]:
        """Write pages; they are on the disk when this returns. Gives the CRC-32C of each. Raises OSError."""
        touched = set()
        checksums = []
        for slot, data in pages:
            fd = self._file(slot.extent_id)
            _write_all(fd, data, slot.offset_bytes)
            checksums.append(crc32c(data))
            touched.add(fd)
        for fd in touched:
            # A disk that cannot take them says so now or never; until then memory has them.
            os.fdatasync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)  # they left memory to make room in it
        return checksums

    def read(self, slot: PageSlot, size_bytes: int, checksum: int) -> bytearray:
        """A page as it was written. Raises OSError, for bytes that are not those too."""
        data = bytearray(size_bytes)
        _read_all(self._file(slot.extent_id), memoryview(data), slot.offset_bytes)
        if crc32c(data) != checksum:
            raise OSError(errno.EIO, "the bytes are not those that were written")
        return data

    def _file(self, extent_id: int) -> int:
        fd = self._files.get(extent_id)
        if fd is None:
            fd = self._open()
            try:
                os.posix_fallocate(fd, 0, self._bytes[extent_id])
            except BaseException:
                os.close(fd)
                raise
            self._files[extent_id] = fd
        return fd

    def _open(self) -> int:
        try:
            return os.open(self._directory, os.O_TMPFILE | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600)
        except OSError as error:
            if error.errno not in _NO_TMPFILE:
                raise
        fd, path = tempfile.mkstemp(prefix="streamindex-", dir=self._directory)  # 0600
        try:
            os.unlink(path)
        except BaseException:
            os.close(fd)
            with contextlib.suppress(OSError):
                os.unlink(path)
            raise
        return fd


def _write_all(fd: int, data: memoryview, offset: int) -> None:
    while data:
        written = os.pwrite(fd, data, offset)
        if written == 0:
            raise OSError(errno.EIO, "nothing was written")
        data, offset = data[written:], offset + written


def _read_all(fd: int, data: memoryview, offset: int) -> None:
    while data:
        count = os.preadv(fd, [data], offset)
        if count == 0:
            raise OSError(errno.EIO, "the file ends before its page")
        data, offset = data[count:], offset + count
