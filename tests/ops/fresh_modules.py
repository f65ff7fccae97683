"""Modules imported a second time, beside what a test put in place of others."""

import importlib
import sys
from types import ModuleType

import pytest


def import_afresh(monkeypatch: pytest.MonkeyPatch, *names: str) -> list[ModuleType]:
    """These modules, imported as if for the first time; when the test ends, all is as it was."""
    for name in names:
        package, _, attribute = name.rpartition(".")
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
        del sys.modules[name]
        monkeypatch.setattr(importlib.import_module(package), attribute, None, raising=False)
        delattr(importlib.import_module(package), attribute)
    return [importlib.import_module(name) for name in names]
