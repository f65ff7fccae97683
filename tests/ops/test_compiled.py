"""Counting compiled kernels, over all that serve calls."""

import sys
from importlib import import_module
from types import ModuleType, SimpleNamespace

import pytest

from streamindex_service.ops import compiled


def _kernel(*variants_by_device: int) -> SimpleNamespace:
    """As Triton keeps them: for each device the variants, then more."""
    return SimpleNamespace(
        device_caches={d: ({str(i): None for i in range(n)}, {}) for d, n in enumerate(variants_by_device)}
    )


def test_variants_of_all_devices_count() -> None:
    assert compiled.variants([_kernel(2, 1), _kernel(4), None, object()]) == 7


def test_what_is_not_imported_or_on_its_way_in_has_compiled_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in compiled._MODULES:
        monkeypatch.delitem(sys.modules, f"streamindex_service.ops.{name}", raising=False)
    assert compiled.count() == 0
    for number, name in enumerate(compiled._MODULES):
        module = ModuleType(name)
        if number:  # the first has begun to be imported
            module.compiled_variants = lambda number=number: 10**number  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, f"streamindex_service.ops.{name}", module)
    assert compiled.count() == 1110


def test_every_module_that_is_counted_has_a_count() -> None:
    for name in compiled._MODULES:
        assert import_module(f"streamindex_service.ops.{name}").compiled_variants() == 0  # interpreted
