"""Implementations of an operation by name: what they have in common, and how one is found. Never silently replaced."""

import importlib.util
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import TypeVar

import torch

ANY_DEVICE = frozenset({"cpu", "cuda"})


class UnsupportedImplementationError(ValueError):
    """No implementation of that name, or not for that device and format; `valid_names` lists those that would do."""

    def __init__(self, name: str, reason: str, valid_names: tuple[str, ...]) -> None:
        super().__init__(f"implementation {name!r}: {reason}; valid names are {', '.join(valid_names) or 'none'}")
        self.name = name
        self.valid_names = valid_names


@dataclass(frozen=True, kw_only=True)
class Runnable:
    """Where one way to compute an operation runs.

    requires: a package that it imports. cpu_only_interpreted: on CPU tensors it runs under Triton's interpreter, which
    is for tests.
    """

    name: str
    devices: frozenset[str] = ANY_DEVICE
    requires: str | None = None
    cpu_only_interpreted: bool = False

    def runs_on(self, device: torch.device | str) -> bool:
        """Whether it runs here on that kind of device."""
        kind = torch.device(device).type
        if self.requires is not None and not _is_installed(self.requires):
            return False
        if kind == "cpu" and self.cpu_only_interpreted and os.environ.get("TRITON_INTERPRET") != "1":
            return False
        return kind in self.devices


@cache
def _is_installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


One = TypeVar("One", bound=Runnable)


def by_name(*implementations: One) -> Mapping[str, One]:
    """The table of an operation's implementations."""
    return MappingProxyType({each.name: each for each in implementations})


def find(table: Mapping[str, One], name: str, supports: Callable[[One], bool], why_not: str) -> One:
    """The implementation of that name. Raises UnsupportedImplementationError if there is none, or it does not support
    what is asked."""
    found = table.get(name)
    if found is None or not supports(found):
        valid = tuple(each.name for each in table.values() if supports(each))
        raise UnsupportedImplementationError(name, "unknown" if found is None else why_not, valid)
    return found
