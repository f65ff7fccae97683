"""An event loop whose clock does not wait: when nothing is ready it is at once the time of the next timer."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

_ROUNDING_S = 1e-6  # a timer is due at its time, not just before it


class VirtualLoop(asyncio.SelectorEventLoop):
    """For what waits for nothing but timers and other tasks. Times are exact, whatever the machine is busy with."""

    def __init__(self) -> None:
        self._now_s = 0.0
        super().__init__()
        select = self._selector.select

        def jump(timeout: float | None = None) -> Any:
            ready = select(0)
            if not ready and timeout:
                self._now_s += timeout + _ROUNDING_S
            assert ready or timeout is not None, "nothing will ever happen any more"
            return ready

        self._selector.select = jump

    def time(self) -> float:
        """Seconds since it began."""
        return self._now_s


def run_virtually(work: Coroutine[Any, Any, None]) -> None:
    """Run it on such a loop."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        runner.run(work)
