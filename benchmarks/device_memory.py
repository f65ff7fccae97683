"""The memory of a device, seen from outside."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import TracebackType
from typing import Self


def nvml_used_bytes(uuid: str) -> Callable[[], int]:
    """What reads the memory in use, by all processes, of the GPU with this UUID. Raises pynvml.NVMLError."""
    import pynvml

    pynvml.nvmlInit()
    name = uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}"
    handle = pynvml.nvmlDeviceGetHandleByUUID(name)
    return lambda: int(pynvml.nvmlDeviceGetMemoryInfo(handle).used)


class Sampler:
    """Reads again and again, on a thread, for the length of a `with`; keeps the most."""

    def __init__(self, read: Callable[[], int], period_s: float) -> None:
        self.most = 0
        self.samples = 0
        self._read = read
        self._period_s = period_s
        self._over = threading.Event()
        self._failed: list[BaseException] = []
        self._thread = threading.Thread(target=self._run, name="memory sampler")

    def _run(self) -> None:
        try:
            while True:
                self.most = max(self.most, self._read())
                self.samples += 1
                if self._over.wait(self._period_s):
                    return
        except BaseException as error:
            self._failed.append(error)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()
        if self._failed and error is None:
            raise self._failed[0]
