"""Inputs that nobody sends on purpose, for every parser and every request message.

    python -m tests.security.fuzz [--count 1000000] [--seed 1]

runs so many against parsers and a server of this process, and ends with 1 at the first that crashes, hangs, or gets a
status that is not documented. Rounds of one seed are the same each time. `test_fuzz.py` runs a few hundred of each.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import grpc
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import DecodeError, Message
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from streamindex import framing, status
from streamindex.v1 import attention_pb2, key_cache_pb2, search_pb2, server_pb2

from streamindex_service import errors
from streamindex_service.frontend.metrics_server import parse_head
from streamindex_service.telemetry import trace
from tests.support.calls import Calls
from tests.support.inprocess import InProcessServer
from tests.support.services import ROOMY
from tests.support.tensors import Draw, Kind

ROUND = 2000  # examples of one seed
DEADLINE_S = 10.0
STREAM_MESSAGES = 3
MODULES = (attention_pb2, key_cache_pb2, search_pb2, server_pb2)
METHODS = {
    f"/{service.full_name}/{method.name}": method
    for module in MODULES
    for service in module.DESCRIPTOR.services_by_name.values()
    for method in service.methods
}
# Reasons that a malformed or absurd request may get. A status without a reason, INTERNAL, or WORKER_LOST is a defect.
ALLOWED = set(errors.reasons()) - {"INTERNAL", "WORKER_LOST", "POISON", "UNAUTHENTICATED", "PERMISSION_DENIED"}
KIND = Kind(heads=2, head_dim=32)
EDGES = [0, 1, 2, 31, 32, 255, 256, 4096, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63 - 1, 2**63, 2**64 - 1]
_INTEGERS = {
    FieldDescriptor.CPPTYPE_INT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.CPPTYPE_INT64: (-(2**63), 2**63 - 1),
    FieldDescriptor.CPPTYPE_UINT32: (0, 2**32 - 1),
    FieldDescriptor.CPPTYPE_UINT64: (0, 2**64 - 1),
}


class FoundError(AssertionError):
    """An input that breaks a promise."""


def messages(descriptor: Descriptor, known: list[str], depth: int = 3) -> st.SearchStrategy[bytes]:
    """Messages of a type, serialised: some fields set, with values at the edges. `known` are ids that exist."""
    cls: Any = descriptor._concrete_class
    if not descriptor.fields:
        return st.just(b"")
    fields = [field for field in descriptor.fields if not _is_map(field)]  # maps come in answers alone
    some = st.lists(st.sampled_from(fields), max_size=min(8, len(fields)), unique_by=_name)
    values = {field.name: _values(field, known, depth) for field in fields}

    @st.composite
    def build(draw: st.DrawFn) -> bytes:
        message = cls()
        for field in draw(some):
            _set(message, field, draw(values[field.name]))
        data: bytes = message.SerializeToString()
        return data

    return build()


def mangled(whole: st.SearchStrategy[bytes]) -> st.SearchStrategy[bytes]:
    """Those messages; cut short, with other bytes, doubled; and bytes that never were one."""

    @st.composite
    def mangle(draw: st.DrawFn) -> bytes:
        data = bytearray(draw(whole))
        for _ in range(draw(st.integers(0, 3))):
            at = draw(st.integers(0, len(data)))
            how = draw(st.sampled_from(("flip", "cut", "insert", "double")))
            if how == "flip" and at < len(data):
                data[at] ^= 1 << draw(st.integers(0, 7))
            elif how == "cut":
                del data[at:]
            elif how == "insert":
                data[at:at] = draw(st.binary(max_size=12))
            elif how == "double":
                data += data[:at]
        return bytes(data)

    return st.one_of(whole, mangle(), st.binary(max_size=64))


def _is_map(field: FieldDescriptor) -> bool:
    return field.message_type is not None and bool(field.message_type.GetOptions().map_entry)


def _name(field: FieldDescriptor) -> str:
    return field.name


def _values(field: FieldDescriptor, known: list[str], depth: int) -> st.SearchStrategy[Any]:
    one: st.SearchStrategy[Any]
    if field.cpp_type == FieldDescriptor.CPPTYPE_MESSAGE:
        one = messages(field.message_type, known, depth - 1) if depth else st.just(b"")
    elif field.cpp_type in _INTEGERS:
        least, most = _INTEGERS[field.cpp_type]
        one = st.one_of(st.sampled_from([edge for edge in EDGES if edge <= most]), st.integers(least, most))
    elif field.cpp_type == FieldDescriptor.CPPTYPE_ENUM:
        one = st.one_of(st.integers(0, 5), st.integers(-(2**31), 2**31 - 1))
    elif field.cpp_type == FieldDescriptor.CPPTYPE_BOOL:
        one = st.booleans()
    elif field.cpp_type in (FieldDescriptor.CPPTYPE_FLOAT, FieldDescriptor.CPPTYPE_DOUBLE):
        one = st.floats(width=32)
    elif field.type == FieldDescriptor.TYPE_BYTES:
        one = st.one_of(st.binary(max_size=40), st.sampled_from([64, 128, 256, 4096]).map(bytes))
    else:
        one = st.one_of(st.sampled_from(known), st.text(max_size=20)) if known else st.text(max_size=20)
    return st.lists(one, max_size=4) if field.is_repeated else one


def _set(message: Message, field: FieldDescriptor, value: Any) -> None:
    is_message = field.cpp_type == FieldDescriptor.CPPTYPE_MESSAGE
    if field.is_repeated and is_message:
        for each in value:
            getattr(message, field.name).add().ParseFromString(each)
    elif field.is_repeated:
        getattr(message, field.name).extend(value)
    elif is_message:
        getattr(message, field.name).ParseFromString(value)
        getattr(message, field.name).SetInParent()
    else:
        setattr(message, field.name, value)


# What must hold of one input.


def same_as_protobuf(parse: Callable[[bytes], Any], cls: Any, data: bytes) -> None:
    """The chunk parser reads what protobuf reads, and refuses what protobuf refuses."""
    try:
        expected = cls.FromString(data)
    except DecodeError:
        expected = None
    try:
        found = parse(data)
    except framing.FramingError:
        found = None
    if isinstance(found, framing.Chunk):
        chunk = None if expected is None or expected.WhichOneof("message") != "chunk" else expected.chunk
        if chunk is None:
            raise FoundError(f"a chunk that protobuf does not see: {data.hex()}")
        names = [field.name for field in chunk.DESCRIPTOR.fields if field.type == FieldDescriptor.TYPE_BYTES]
        read = (found.row_offset, found.row_count, *map(bytes, found.parts), found.crc32c)
        checksum = chunk.crc32c if chunk.HasField("crc32c") else None
        if read != (chunk.row_offset, chunk.row_count, *(getattr(chunk, name) for name in names), checksum):
            raise FoundError(f"a chunk read otherwise than by protobuf: {data.hex()}")
    elif found != expected:
        raise FoundError(f"read otherwise than by protobuf: {data.hex()}")


def small_parsers(data: bytes) -> None:
    """Headers, trailers and heads of requests: a value or the parser's own error, nothing else."""
    text = data.decode("latin-1")
    context = trace.of_call(text)
    if len(context.trace_id) != 32 or trace.read(context.traceparent) is None:
        raise FoundError(f"a trace context that cannot be passed on: {text!r}")
    status.from_trailer(data)
    with contextlib.suppress(ValueError):
        parse_head(data + b"\r\n\r\n")


class Target:
    """A server of this process with a cache in it, and calls of any bytes."""

    def __init__(self, server: InProcessServer) -> None:
        self._server = server
        self.codes: Counter[str] = Counter()
        with Calls(server.target) as calls:
            cache = calls.create(KIND)
            calls.upload(KIND, cache.id, Draw(1).keys(KIND, 300))
            call, accepted = calls.start_upload(cache.id, 10, first_row=300)
            call.half_close()
            call.rest()
        self.known = [cache.id, accepted.upload_id]
        self._channel = grpc.insecure_channel(server.target)
        self._calls: dict[str, Any] = {}
        for path, method in METHODS.items():
            kind = f"{'stream' if method.client_streaming else 'unary'}_"
            kind += "stream" if method.server_streaming else "unary"
            self._calls[path] = getattr(self._channel, kind)(path)

    def close(self) -> None:
        self._channel.close()

    def send(self, path: str, data: list[bytes]) -> None:
        """One call. Raises FoundError for a status that is not documented, and for none."""
        method, call = METHODS[path], self._calls[path]
        started = time.monotonic()
        try:
            argument = iter(data) if method.client_streaming else data[0]
            answer = call(argument, timeout=DEADLINE_S)
            if path.endswith("/WatchLoad"):
                next(answer)
                answer.cancel()
            elif method.server_streaming:
                for _ in answer:
                    pass
            self.codes["OK"] += 1
        except grpc.RpcError as error:
            details = dict(error.trailing_metadata() or ()).get(status.TRAILER)
            told = None if details is None else status.from_trailer(details)
            if told is None or told.reason not in ALLOWED:
                sent = [each.hex() for each in data]
                reason = told.reason if told else error.details()
                raise FoundError(f"{path}: {error.code().name}/{reason} after {sent}") from error
            self.codes[told.reason] += 1
        if time.monotonic() - started > DEADLINE_S:
            raise FoundError(f"{path}: no answer in time after {[each.hex() for each in data]}")


def parser_inputs() -> st.SearchStrategy[bytes]:
    return st.one_of(*(mangled(messages(cls.DESCRIPTOR, [])) for _, cls in PARSERS))


def call_inputs(known: list[str]) -> st.SearchStrategy[tuple[str, list[bytes]]]:
    of_method = []
    for path, method in METHODS.items():
        most = STREAM_MESSAGES if method.client_streaming else 1
        one = mangled(messages(method.input_type, known))
        of_method.append(st.tuples(st.just(path), st.lists(one, min_size=1, max_size=most)))
    return st.one_of(*of_method)


PARSERS: tuple[tuple[Callable[[bytes], Any], Any], ...] = (
    (framing.parse_append_keys_request, key_cache_pb2.AppendKeysRequest),
    (framing.parse_search_request, search_pb2.SearchRequest),
    (framing.parse_search_response, search_pb2.SearchResponse),
    (framing.parse_attend_request, attention_pb2.SparseAttendRequest),
    (framing.parse_attend_response, attention_pb2.SparseAttendResponse),
)


def fuzz_parsers(data: bytes) -> None:
    for parse, cls in PARSERS:
        same_as_protobuf(parse, cls, data)
    small_parsers(data)


def rounds(count: int, first_seed: int) -> Iterator[tuple[int, int]]:
    """(seed, examples): hypothesis remembers what it has tried, so that many small rounds are faster than one."""
    numbers = random.Random(first_seed)
    while count > 0:
        yield numbers.getrandbits(32), min(ROUND, count)
        count -= ROUND


def run_round(check: Callable[[Any], None], inputs: st.SearchStrategy[Any], number: int, examples: int) -> None:
    """Raises what `check` raises, for the smallest input that does."""
    silent = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example]
    limits = settings(
        max_examples=examples,
        deadline=None,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=silent,
    )
    seed(number)(limits(given(inputs)(check)))()


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--count", type=int, default=1_000_000, help="inputs, parsers and calls half each")
    arguments.add_argument("--seed", type=int, default=1)
    chosen = arguments.parse_args()
    half, started = chosen.count // 2, time.monotonic()
    run_all(fuzz_parsers, parser_inputs(), half, chosen.seed, "parsers")
    with InProcessServer(ROOMY) as server:
        target = Target(server)
        run_all(lambda each: target.send(*each), call_inputs(target.known), chosen.count - half, chosen.seed, "calls")
        target.close()
    seconds = time.monotonic() - started
    print(
        f"{chosen.count} inputs in {seconds:.0f} s: no crash, no hang, no status that is not documented; calls ended as"
    )
    print(dict(target.codes))


def run_all(
    check: Callable[[Any], None], inputs: st.SearchStrategy[Any], count: int, first_seed: int, what: str
) -> None:
    """All rounds, with a line for each tenth of them."""
    done, told = 0, 0
    for number, examples in rounds(count, first_seed):
        run_round(check, inputs, number, examples)
        done += examples
        if done - told >= count // 10:
            told = done
            print(f"{what}: {done} of {count}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
