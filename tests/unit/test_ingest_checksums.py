"""Chunks that were written together are judged each by its own checksum."""

from __future__ import annotations

import numpy as np
import pytest
from streamindex.checksum import combine, crc32c
from streamindex.framing import Chunk

from streamindex_service.errors import ChecksumError
from streamindex_service.frontend.tensors import verify_written

SIZES = (1000, 64, 70_000, 2, 512)


def written(cuts: tuple[int, ...] = ()) -> tuple[list[np.ndarray], list[bytes]]:
    """Chunks of SIZES, and where they lie: memory that is cut at some places."""
    memory = np.random.default_rng(3).integers(0, 256, sum(SIZES), np.uint8)
    ends = np.cumsum(SIZES)[:-1]
    return np.split(memory, cuts), [part.tobytes() for part in np.split(memory, ends)]


def chunk(row: int, data: bytes, crc: int) -> Chunk:
    return Chunk(row, len(data) // 2, (memoryview(data), memoryview(b"")), crc)


@pytest.mark.parametrize("cuts", [(), (1000,), (500, 1064), (10, 20, 30, 71_066), (1000, 1064, 71_064, 71_066)])
def test_chunks_and_stretches_end_where_they_like(cuts):
    stretches, parts = written(cuts)
    sums = [crc32c(part) for part in parts]
    assert verify_written(stretches, [chunk(0, *each) for each in zip(parts, sums, strict=True)]) == sums
    for bad in range(len(parts)):
        wrong = [crc ^ (number == bad) for number, crc in enumerate(sums)]
        with pytest.raises(ChecksumError):
            verify_written(stretches, [chunk(0, *each) for each in zip(parts, wrong, strict=True)])


def test_false_checksums_that_make_up_for_each_other_are_refused():
    stretches, parts = written()
    sums = [crc32c(part) for part in parts]
    one, other = parts[0], parts[1]
    wrong = sums[0] ^ 0x1234
    made_up = sums[1] ^ combine(sums[0], 0, len(other)) ^ combine(wrong, 0, len(other))
    assert combine(wrong, made_up, len(other)) == combine(sums[0], sums[1], len(other)) == crc32c(one + other)
    false = [wrong, made_up, *sums[2:]]
    with pytest.raises(ChecksumError):
        verify_written(stretches, [chunk(0, *each) for each in zip(parts, false, strict=True)])
