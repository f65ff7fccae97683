"""The parsers under a fuzzer that sees which of their branches an input reaches, and keeps those that reach new ones.

    python -m tests.security.guided [--count 1000000] [--seed 1]

needs atheris (the extra `fuzz`). It ends with 0 after so many inputs, and with another status at the first that breaks
a promise of `fuzz.fuzz_parsers`, which it tells.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import atheris

# What reads a peer's bytes before protobuf or instead of it. Only what is imported for the first time here is watched.
WATCHED = [
    "streamindex.framing",
    "streamindex.status",
    "streamindex_service.frontend.metrics_server",
    "streamindex_service.telemetry.trace",
]

with atheris.instrument_imports(include=WATCHED):
    from streamindex import framing
    from streamindex.v1 import key_cache_pb2, types_pb2

    from streamindex_service.telemetry import trace
    from tests.security import fuzz

MOST_BYTES = 4096  # of an input


def seeds() -> Iterator[bytes]:
    """Inputs to begin with: one of each kind, as a client writes it."""
    some = bytes(range(64))
    yield key_cache_pb2.AppendKeysRequest().SerializeToString()
    yield framing.encode_key_chunk(1, 2, some, some[:8], 3)
    yield framing.encode_query_chunk(1 << 40, 2, some, some[:8], some[:16], None)
    yield framing.encode_index_chunk(0, 2, some, b"", 7)
    yield framing.encode_attend_chunk(5, 1, (some, some[:4], b"", some[:8], some[:8]), 9)
    yield framing.encode_output_chunk(5, 1, some, some[:4], None)
    for _, cls in fuzz.PARSERS:
        for field in cls.DESCRIPTOR.fields:
            message = cls()
            getattr(message, field.name).SetInParent()
            yield message.SerializeToString()
    yield types_pb2.Error(reason="HOST_MEMORY", field="keys").SerializeToString()
    yield trace.of_call(None).traceparent.encode()
    yield b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nAccept: */*"


def check(data: bytes) -> None:
    """Raises FoundError."""
    try:
        fuzz.fuzz_parsers(data)
    except fuzz.FoundError:
        raise
    except Exception as error:
        raise fuzz.FoundError(f"{error!r} after {data.hex()}") from error


def _run(count: int, number: int, corpus: str) -> None:
    options = [f"-runs={count}", f"-seed={number}", f"-max_len={MOST_BYTES}", "-timeout=10", "-print_final_stats=1"]
    atheris.Setup([sys.argv[0], *options, corpus], check)
    atheris.Fuzz()


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--count", type=int, default=1_000_000, help="inputs")
    arguments.add_argument("--seed", type=int, default=1)
    chosen = arguments.parse_args()
    with tempfile.TemporaryDirectory(prefix="streamindex-") as corpus:
        for number, data in enumerate(seeds()):
            (Path(corpus) / str(number)).write_bytes(data)
        # A process of its own: the fuzzer ends the one that it runs in, whatever is left to be done there.
        fuzzer = multiprocessing.get_context("fork").Process(target=_run, args=(chosen.count, chosen.seed, corpus))
        fuzzer.start()
        fuzzer.join()
    return fuzzer.exitcode or 0


if __name__ == "__main__":
    sys.exit(main())
