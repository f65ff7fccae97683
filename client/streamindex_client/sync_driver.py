"""Runs operations on a blocking gRPC channel.

The caller's thread runs the operation and reads its stream; `sync_stream` sends, on threads of its own. Both sides of
a session are touched only under the run's `changed`.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import grpc

from streamindex_client.contract import REQUEST_ID, Method
from streamindex_client.effects import Call, Close, Emit, Notify, Open, Read, Sleep
from streamindex_client.errors import UnavailableError, from_rpc
from streamindex_client.propagation import trace_headers
from streamindex_client.sync_stream import SyncStream

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator

    from streamindex_client.effects import Effect, Operation

__all__ = ["Run", "SyncDriver"]

_Result = TypeVar("_Result")
Metadata = tuple[tuple[str, str], ...]


class SyncDriver:
    """A channel and the metadata of every call on it."""

    def __init__(self, channel: grpc.Channel, metadata: Metadata, new_id: Callable[[], str]) -> None:
        self._channel = channel
        self._metadata = metadata
        self._new_id = new_id
        self._calls: dict[str, Any] = {}

    def run(self, operation: Operation[_Result]) -> _Result:
        """The result of an operation that emits nothing."""
        events = self.events(operation)
        while True:
            try:
                next(events)
            except StopIteration as stop:
                result: _Result = stop.value
                return result

    def events(self, operation: Operation[_Result], blocks: Any = None) -> Generator[Any, None, _Result]:
        """What the operation emits, as the caller asks for it; `blocks` feeds its stream."""
        return Run(self, operation, blocks).events()

    def close(self) -> None:
        """Close the channel; calls that run fail."""
        self._channel.close()

    def call(self, effect: Call) -> Any:
        """Make a unary call."""
        request_id = self._new_id()
        path = effect.method.path
        if path not in self._calls:
            self._calls[path] = self._channel.unary_unary(
                path,
                request_serializer=lambda message: message.SerializeToString(),
                response_deserializer=effect.method.response.FromString,
            )
        try:
            return self._calls[path](effect.request, timeout=effect.timeout_s, metadata=self._tag(request_id))
        except grpc.RpcError as error:
            raise from_rpc(error, request_id) from None
        except ValueError as error:  # gRPC's word for a channel that the caller has closed
            raise UnavailableError(str(error), reason="CLOSED") from None

    def open(self, method: Method, requests: Iterator[bytes], timeout_s: float | None) -> tuple[Any, str]:
        """Start a stream of bytes; its call and its id."""
        request_id = self._new_id()
        if method.path not in self._calls:
            self._calls[method.path] = self._channel.stream_stream(method.path)
        try:
            return self._calls[method.path](requests, timeout=timeout_s, metadata=self._tag(request_id)), request_id
        except ValueError as error:
            raise UnavailableError(str(error), reason="CLOSED") from None

    def _tag(self, request_id: str) -> Metadata:
        return (*self._metadata, *trace_headers(self._metadata), (REQUEST_ID, request_id))


class Run(Generic[_Result]):
    """One operation on its way."""

    def __init__(self, driver: SyncDriver, operation: Operation[_Result], blocks: Any) -> None:
        self._driver = driver
        self._operation = operation
        self._blocks = None if blocks is None else iter(blocks)
        self.changed = threading.Condition()
        self._pulling = threading.Lock()
        self._stream: SyncStream | None = None
        self._source_failure: BaseException | None = None

    @property
    def failed(self) -> bool:
        """Whether the caller's iterator or tensor has raised."""
        return self._source_failure is not None

    def events(self) -> Generator[Any, None, _Result]:
        """Run the operation, giving what it emits."""
        result: Any = None
        failure: Exception | None = None
        try:
            while True:
                try:
                    with self.changed:
                        effect = self._resume(result, failure)
                        self.changed.notify_all()
                except StopIteration as stop:
                    final: _Result = stop.value
                    return final
                result = failure = None
                if isinstance(effect, Emit):
                    yield effect.value
                    continue
                try:
                    result = self._perform(effect)
                except Exception as error:
                    if error is self._source_failure:
                        raise
                    failure = error
        finally:
            self._operation.close()
            self._close()

    def _resume(self, result: Any, failure: Exception | None) -> Effect:
        return self._operation.send(result) if failure is None else self._operation.throw(failure)

    def _perform(self, effect: Effect) -> Any:
        match effect:
            case Read():
                return self._read()
            case Call():
                return self._driver.call(effect)
            case Sleep():
                time.sleep(effect.seconds)
            case Notify():
                effect.callback(effect.done, effect.total)
            case Open():
                self._close()
                self._stream = SyncStream(self, effect.duplex)
                self._stream.start(self._driver, effect)
            case Close():
                self._close()
        return None

    def _read(self) -> bytes | None:
        stream = self._stream
        assert stream is not None, "a stream is read while it is open"
        try:
            message: bytes | None = next(stream.call, None)
        except grpc.RpcError as error:
            if self._source_failure is not None:
                raise self._source_failure from None
            raise from_rpc(error, stream.request_id) from None
        return message

    def _close(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def pull(self, stream: SyncStream) -> None:
        """Fetch one block of the caller's iterator.

        A thread of an earlier attempt may still be fetching: then its block is what this attempt wanted.
        """
        with self._pulling:
            if self._source_failure is not None:
                raise self._source_failure
            with self.changed:
                if stream.closed or not stream.duplex.wants_input:
                    return
            block = next(self._blocks, _END) if self._blocks is not None else _END
            with self.changed:
                if block is _END:
                    stream.duplex.end_input()
                else:
                    stream.duplex.feed(block)
                self.changed.notify_all()

    def fail(self, error: BaseException) -> None:
        """The caller's iterator or tensor has raised: end the operation with that."""
        self._source_failure = error
        stream = self._stream  # a later attempt's, when the thread of an earlier one was still fetching
        if stream is not None:
            stream.cancel()


_END: Any = object()
