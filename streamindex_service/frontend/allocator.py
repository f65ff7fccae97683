"""How the C library's allocator treats the buffers of messages."""

from __future__ import annotations

import ctypes

# mallopt parameters of glibc; see mallopt(3)
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3
_KEPT_BYTES = 128 << 20
_STEP_BYTES = 16 << 20
_LARGEST_BUFFER_BYTES = 16 << 20


def keep_message_buffers() -> bool:
    """Let freed message buffers be used again instead of going back to the system; False where glibc is not in use.

    A stream of 1 MiB messages frees each buffer soon after the next was allocated, and glibc's defaults give the memory
    back and fault it in again each time: about 200 page faults a message, half of what receiving it costs. At most
    128 MiB of freed memory are kept.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    wanted = {
        _M_MMAP_THRESHOLD: _LARGEST_BUFFER_BYTES,
        _M_TRIM_THRESHOLD: _KEPT_BYTES,
        _M_TOP_PAD: _STEP_BYTES,
    }
    return all(mallopt(parameter, value) == 1 for parameter, value in wanted.items())
