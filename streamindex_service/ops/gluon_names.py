"""What the Gluon kernels use under names that differ between the Tritons allowed, and what of Gluon a Triton lacks.

Gluon is an experimental part of Triton. A name that goes is gone, or stays as a stub that takes any arguments and
raises when a kernel is compiled with it: too late for another kernel to be chosen. So both count as missing.

`barrier` is for the threads of a partition, `load_tile` for a block of a tensor descriptor, brought by the copy engine
to shared memory, `load_async` for elements that threads have copied there (cp.async); None where this Triton has none.
"""

import inspect

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.ampere import async_copy


def find(owner: object, *names: str) -> object | None:
    """The first of these that `owner` has, or None."""
    for name in names:
        found = getattr(owner, name, None)
        if found is not None and not _is_stub(found):
            return found
    return None


def missing(*needed: tuple[object, tuple[str, ...]]) -> list[str]:
    """Those of the names that their owner, a module or a class, does not have."""
    return [name for owner, names in needed for name in names if find(owner, name) is None]


def _is_stub(found: object) -> bool:
    if not inspect.isfunction(found):
        return False
    parameters = inspect.signature(found).parameters.values()
    variable = {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}
    # what Triton's interpreter puts in place of a function takes anything too, and has a parameter of its own
    named = {parameter.name for parameter in parameters if parameter.kind not in variable}
    return variable <= {parameter.kind for parameter in parameters} and named <= {"_semantic"}


# the first is Triton 3.9's name, the other 3.6's
barrier = find(gl, "barrier", "thread_barrier")
load_tile = find(getattr(hopper, "tma", None), "async_load", "async_copy_global_to_shared")
load_async = find(async_copy, "async_load", "async_copy_global_to_shared")
_REINTERPRET = gl.constexpr(find(gl.shared_memory_descriptor, "reinterpret") is not None)


@gluon.jit
def _view(smem, kind: gl.constexpr, shape: gl.constexpr, layout: gl.constexpr):
    """The same shared memory as elements of another type."""
    return smem.reinterpret(kind, shape, layout) if _REINTERPRET else smem._reinterpret(kind, shape, layout)


view = _view if find(gl.shared_memory_descriptor, "reinterpret", "_reinterpret") else None
