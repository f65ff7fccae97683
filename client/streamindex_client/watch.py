"""WatchLoad: one question, and answers until the caller has seen enough."""

from __future__ import annotations

from typing import TYPE_CHECKING

from google.protobuf.message import DecodeError
from streamindex.v1 import server_pb2

from streamindex_client import contract
from streamindex_client.effects import Close, Emit, Open, Operation, Pause, Read, Sleep
from streamindex_client.errors import InputError, ProtocolError, StreamIndexError
from streamindex_client.model import Load

if TYPE_CHECKING:
    from typing import Any

    from streamindex_client.effects import Step
    from streamindex_client.retry import Environment

__all__ = ["watch_load"]


class _Question:
    """The sending half of a stream that has one message."""

    def __init__(self, message: bytes) -> None:
        self._left = [message]

    @property
    def wants_input(self) -> bool:
        return False

    def next_step(self) -> Step:
        return self._left.pop if self._left else Pause.HALF_CLOSE

    def feed(self, block: Any) -> None:
        raise AssertionError("a question needs no input")

    def end_input(self) -> None:
        raise AssertionError("a question needs no input")


def watch_load(env: Environment, interval_s: float, timeout_s: float | None) -> Operation[None]:
    """Emits a Load every `interval_s` seconds; a broken stream is followed by another one. Raises InputError."""
    if not 0.1 <= interval_s <= 60.0:
        raise InputError("interval_s", f"expected 0.1 to 60, got {interval_s}")
    request = server_pb2.WatchLoadRequest(interval_ms=round(1000 * interval_s)).SerializeToString()
    return _watch(env, request, timeout_s)


def _watch(env: Environment, request: bytes, timeout_s: float | None) -> Operation[None]:
    deadline = env.deadline(timeout_s)
    retrier = env.retrier(deadline)
    while True:
        try:
            yield Open(contract.WATCH_LOAD, _Question(request), deadline.remaining_s())
            while (message := (yield Read())) is not None:
                retrier.progress()
                yield Emit(_load(message))
        except StreamIndexError as error:
            yield Close()
            yield Sleep(retrier.delay_s(error))
        else:
            yield Close()
            return


def _load(message: bytes) -> Load:
    try:
        return Load.from_wire(server_pb2.WatchLoadResponse.FromString(message).load)
    except DecodeError:
        raise ProtocolError("a message is not of the expected type") from None
