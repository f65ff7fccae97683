"""Ctrl-C while gRPC's blocking client is at work."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Any


@contextmanager
def interrupt_closes(close: Callable[[], None]) -> Iterator[None]:
    """Within, SIGINT calls `close` on another thread, and KeyboardInterrupt is raised at the end.

    Python raises KeyboardInterrupt between any two instructions of the main thread, those on the way in and out of a
    `with lock` too, and then nobody ever releases that lock. gRPC's thread waits for it, closing the channel waits for
    that thread, and whoever was interrupted never comes to stop what it has started. So the main thread is not
    interrupted: `close` is to make it fail, or return. A second SIGINT is as it was before.

    On other threads than the main one, which no signal interrupts, this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    wanted: SimpleQueue[bool] = SimpleQueue()  # its put may interrupt itself
    interrupted = threading.Event()

    def wait() -> None:
        if wanted.get():
            interrupted.set()
            close()

    def handle(_number: int, _frame: Any) -> None:
        signal.signal(signal.SIGINT, before)
        wanted.put(True)

    waiter = threading.Thread(target=wait, name="interrupt", daemon=True)
    waiter.start()
    before = signal.signal(signal.SIGINT, handle)
    try:
        yield
    except Exception as error:
        if interrupted.is_set():
            raise KeyboardInterrupt from error
        raise
    finally:
        signal.signal(signal.SIGINT, before)
        wanted.put(False)
        waiter.join()
    if interrupted.is_set():
        raise KeyboardInterrupt
