"""How many kernels this process has compiled: one that grows under load means that a length became a compile-time
constant."""

from __future__ import annotations

import threading
from typing import Any

_count = 0
_lock = threading.Lock()  # kernels are compiled by whichever thread launches them first


def watch() -> None:
    """Count from now on. Nothing is counted where there is no Triton, or one that does not tell."""
    try:
        from triton import knobs
    except ImportError:
        return
    knobs.runtime.jit_post_compile_hook = _compiled


def count() -> int:
    """Kernels compiled, or loaded from Triton's cache on disk, since `watch`."""
    return _count


def _compiled(**_: Any) -> None:
    global _count
    with _lock:
        _count += 1
