"""How many kernels this process has compiled: a number that grows under load means that a length became a compile-time
constant."""

from __future__ import annotations

import sys
from collections.abc import Iterable

# Where the kernels of the calls are. What is not imported has compiled nothing.
_MODULES = ("topk.triton", "sparse_attention.triton", "index_rows.triton", "cached_attention.triton")


def variants(kernels: Iterable[object]) -> int:
    """Variants of these kernels, compiled or loaded from Triton's cache on disk; none under the interpreter."""
    return sum(len(cache[0]) for kernel in kernels for cache in list(getattr(kernel, "device_caches", {}).values()))


def count() -> int:
    """Variants of all kernels that serve calls. For any thread: a module may be on its way in."""
    counters = (getattr(sys.modules.get(f"{__package__}.{name}"), "compiled_variants", None) for name in _MODULES)
    return sum(counter() for counter in counters if counter is not None)
