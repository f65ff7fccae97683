from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from streamindex import checksum

IMPLEMENTATIONS = [checksum.crc32c, checksum.crc32c_numpy]
LENGTHS = [0, 1, 3, 4, 127, 128, 255, 256, 257, 2048, 4095, 4096, 4097, 65536, 65539, (1 << 20) + 12345]


@pytest.mark.parametrize("crc32c", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("data", "expected"),
    [  # RFC 3720, appendix B.4, and the check value of the catalogue of CRCs
        (b"", 0),
        (b"123456789", 0xE3069283),
        (b"\0" * 32, 0x8A9136AA),
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
        (bytes(reversed(range(32))), 0x113FDB5C),
    ],
)
def test_known_vectors(crc32c, data, expected):
    assert crc32c(data) == expected


@pytest.mark.parametrize("length", LENGTHS)
def test_numpy_agrees_with_the_package_at_every_level_of_folding(length):
    pytest.importorskip("crc32c")
    data = np.random.default_rng(length).integers(0, 256, length, np.uint8)
    assert checksum.crc32c_numpy(data, 77) == checksum.crc32c(data, 77)


@settings(deadline=None)
@given(st.binary(max_size=5000), st.binary(max_size=5000), st.integers(0, 2**32 - 1))
def test_pieces_and_wholes(a, b, value):
    for crc32c in IMPLEMENTATIONS:
        assert crc32c(b, crc32c(a, value)) == crc32c(a + b, value)
    whole = checksum.combine(checksum.crc32c(a), checksum.crc32c(b), len(b))
    assert whole == checksum.crc32c(a + b)


def test_combine_over_a_length_that_nobody_could_hash():
    one = checksum.combine(0x12345678, 0, 1 << 40)
    two = checksum.combine(checksum.combine(0x12345678, 0, 1 << 39), 0, 1 << 39)
    assert one == two
    assert checksum.combine(5, 7, 0) == 5 ^ 7
    with pytest.raises(ValueError, match="bytes_b"):
        checksum.combine(0, 0, -1)


@pytest.mark.parametrize("crc32c", IMPLEMENTATIONS)
def test_any_contiguous_buffer(crc32c):
    array = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    expected = checksum.crc32c(array.tobytes())
    assert crc32c(memoryview(array.tobytes())) == expected
    assert checksum.crc32c(array) == expected
    assert checksum.crc32c(np.empty((0, 4))) == 0
    assert checksum.crc32c(bytearray(b"123456789")) == 0xE3069283
    with pytest.raises(ValueError, match="contiguous"):
        checksum.crc32c(array[:, ::2])


def test_unaligned_views():
    data = bytes(range(256)) * 300
    assert checksum.crc32c_numpy(memoryview(data)[3:70003]) == checksum.crc32c(data[3:70003])
