"""The fuzzer's short form, and that it sees what it looks for."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from streamindex import framing
from streamindex.v1 import search_pb2

from tests.security import fuzz
from tests.support.inprocess import InProcessServer
from tests.support.services import ROOMY


@pytest.fixture(scope="module")
def target() -> Iterator[fuzz.Target]:
    with InProcessServer(ROOMY) as server:
        found = fuzz.Target(server)
        yield found
        found.close()


def test_parsers():
    for number, examples in fuzz.rounds(1500, 7):
        fuzz.run_round(fuzz.fuzz_parsers, fuzz.parser_inputs(), number, examples)


def test_every_call(target):
    for number, examples in fuzz.rounds(800, 7):
        fuzz.run_round(lambda each: target.send(*each), fuzz.call_inputs(target.known), number, examples)
    assert target.codes["OK"] > 20
    assert target.codes.keys() >= {"INVALID_ARGUMENT", "MALFORMED_MESSAGE", "CACHE_NOT_FOUND"}


def test_every_parser_of_chunks_is_driven():
    assert {parse.__name__ for parse, _ in fuzz.PARSERS} == {name for name in framing.__all__ if "parse" in name}


def test_a_parser_that_reads_otherwise_is_found():
    def careless(data: bytes) -> object:
        found = framing.parse_search_request(data)
        if isinstance(found, framing.Chunk) and found.row_count > 255:
            return framing.Chunk(found.row_offset, found.row_count & 255, found.parts, found.crc32c)
        return found

    with pytest.raises(fuzz.FoundError):
        fuzz.run_round(
            lambda data: fuzz.same_as_protobuf(careless, search_pb2.SearchRequest, data),
            fuzz.mangled(fuzz.messages(search_pb2.SearchRequest.DESCRIPTOR, [])),
            3,
            2000,
        )


def test_an_undocumented_status_is_found(target, monkeypatch):
    monkeypatch.setattr(fuzz, "ALLOWED", fuzz.ALLOWED - {"CACHE_NOT_FOUND"})
    with pytest.raises(fuzz.FoundError, match="CACHE_NOT_FOUND"):
        target.send("/streamindex.v1.KeyCacheService/GetKeyCache", [b""])
