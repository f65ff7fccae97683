"""One attempt's stream on a blocking channel.

Threads. The caller's thread runs the operation and reads; a thread of the stream's own takes the sender's steps in
order and builds messages (the copy and the checksum), at most `MESSAGES_AHEAD` before gRPC's own thread for the stream
takes them: one message is built while another is sent. The sending half and the messages that are ready are touched
only under the run's `changed`; building, and fetching from the caller's iterator, happen outside it.

Exit. While the interpreter ends, it stops threads wherever they are, with the locks that they hold: whoever takes one
then, to cancel a call for instance, waits for ever. So streams that are still open are closed before that.
"""

from __future__ import annotations

import atexit
import sys
import threading
from collections import deque
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from streamindex_client.effects import Pause
from streamindex_client.options import MESSAGES_AHEAD

if TYPE_CHECKING:
    from collections.abc import Generator

    from streamindex_client.effects import Duplex, Open, Step
    from streamindex_client.sync_driver import Run, SyncDriver

__all__ = ["SyncStream"]

_EXIT_S = 5.0  # how long the exit waits for gRPC's word that a call is over


class SyncStream:
    """A stream and its sender. `close` must follow `start`, whatever happens."""

    def __init__(self, run: Run[Any], duplex: Duplex) -> None:
        self.duplex = duplex
        self.closed = False
        self.call: Any = None
        self.request_id = ""
        self._run = run
        self._changed = run.changed
        self._ready: deque[bytes] = deque()
        self._fetching = False  # the builder is in the caller's iterator, or about to be
        self._ended = False  # the builder is done
        self._builder = threading.Thread(target=self._build, name="streamindex-build", daemon=True)

    def start(self, driver: SyncDriver, effect: Open) -> None:
        """Open the stream and begin to send. Raises UnavailableError for a closed channel."""
        self.call, self.request_id = driver.open(effect.method, self._messages(), effect.timeout_s)
        if self._run.failed:  # an earlier attempt was still fetching
            self.cancel()
        with _opening:
            _streams.add(self)
        self._builder.start()

    def close(self) -> None:
        """Cancel the call and end the builder.

        A message that is being built is waited for, since it reads the caller's tensor. A builder in the caller's
        iterator cannot be stopped: it ends when that returns.
        """
        if sys.is_finalizing():
            return  # closed by `_close_all`; there are no threads any more, but perhaps their locks
        with self._changed:
            self.closed = True
            self._changed.notify_all()
        self.cancel()
        # Collected as garbage, an operation that was left is closed on any thread, the builder too.
        if self._builder.ident is None or self._builder is threading.current_thread():
            return
        with self._changed:
            self._changed.wait_for(lambda: self._ended or self._fetching)
            ended = self._ended
        if ended:
            self._builder.join()

    def cancel(self) -> None:
        """Cancel the call."""
        if self.call is not None:
            self.call.cancel()

    # On gRPC's thread.

    def _messages(self) -> Generator[bytes, None, None]:
        while (message := self._take()) is not None:
            yield message

    def _take(self) -> bytes | None:
        with self._changed:
            self._changed.wait_for(lambda: self._ready or self._ended or self.closed)
            if self.closed or not self._ready:
                return None
            message = self._ready.popleft()
            self._changed.notify_all()
        return message

    # On the builder.

    def _build(self) -> None:
        try:
            while (step := self._next_step()) is not Pause.HALF_CLOSE:
                if isinstance(step, Pause):
                    self._run.pull(self)
                else:
                    self._put(step())
        except BaseException as error:
            self._run.fail(error)
            self.cancel()
        finally:
            with self._changed:
                self._ended = True
                self._changed.notify_all()

    def _next_step(self) -> Step:
        """The next step, once there is room for a message and something to do; half-close when the stream is closed."""
        with self._changed:
            self._fetching = False
            while not self.closed:
                step = Pause.WAIT if len(self._ready) >= MESSAGES_AHEAD else self.duplex.next_step()
                if step is not Pause.WAIT:
                    self._fetching = step is Pause.NEED_INPUT
                    return step
                self._changed.wait()
        return Pause.HALF_CLOSE

    def _put(self, message: bytes) -> None:
        with self._changed:
            self._ready.append(message)
            self._changed.notify_all()


_streams: WeakSet[SyncStream] = WeakSet()
"""Those that were started and are not yet collected, closed or not."""

_opening = threading.Lock()


def _close_all() -> None:
    """Close the streams that are open, and see their calls end, while there are threads that can end them."""
    with _opening:
        streams = [stream for stream in _streams if not stream.closed]
    ends = []
    for stream in streams:
        stream.close()
        ended = threading.Event()
        if stream.call.add_callback(ended.set):
            ends.append(ended)
    for ended in ends:
        ended.wait(_EXIT_S)


atexit.register(_close_all)
