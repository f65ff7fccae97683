"""Futures whose outcome nobody may be left to look at."""

from __future__ import annotations

import asyncio
from typing import Any


def seen(future: asyncio.Future[Any]) -> None:
    """A callback: an exception of it is not told of as one that was never retrieved."""
    if not future.cancelled():
        future.exception()
