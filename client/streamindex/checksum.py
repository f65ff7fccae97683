"""CRC-32C (Castagnoli), the checksum of every chunk and the digest of every upload.

`crc32c` runs at memory speed with the `crc32c` package (hardware instructions, without the interpreter lock) and
falls back to numpy. `combine` joins the checksums of two pieces into that of the whole, so that the digest of an
upload costs no second pass over its bytes.

The numpy method. Without the conditioning at both ends a CRC register is linear over GF(2): with Z(n) the operator
that advances it over n zero bytes, the register of A‖B, both n bytes long, is that of Z(n)(A) ⊕ B, where Z(n) acts on
every 32-bit word of A by itself. So a buffer cut in rows of `lanes` words folds to one row, `row = Z(row) ⊕ next`,
in whole-row numpy operations; Z is two lookups a word, in tables of 2^16 entries. Rows of 8192 words fold to one, then
rows of 512 and 32; what is left, under 128 bytes, goes byte by byte. It is the folding of Gopal et al., "Fast CRC
Computation for Generic Polynomials Using PCLMULQDQ" (Intel, 2009), with tables in the place of the multiplication.

The operator for `combine` is x^(8n) modulo the polynomial, as in zlib's crc32_combine.
"""

from __future__ import annotations

from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy.typing as npt

try:
    from crc32c import crc32c as _native_crc32c
except ImportError:
    _native_crc32c = None  # type: ignore[assignment]

__all__ = ["combine", "crc32c", "crc32c_numpy"]

_POLYNOMIAL = 0x82F63B78  # reflected: bit 31 is the coefficient of x^0
_ONES = 0xFFFFFFFF
_LANES = (8192, 512, 32)
_OPERATORS_KEPT = 64  # an upload needs two: its chunk length and its last chunk's


def crc32c_numpy(data: Any, value: int = 0) -> int:
    """`crc32c` computed by numpy alone; the same result for every input."""
    octets = np.frombuffer(data, np.uint8) if memoryview(data).nbytes else np.empty(0, np.uint8)
    return _register(octets, value ^ _ONES) ^ _ONES


def crc32c(data: Any, value: int = 0) -> int:
    """CRC-32C of a contiguous buffer: bytes, memoryview, numpy array of any shape.

    `value` is the checksum of the bytes before, so `crc32c(b, crc32c(a)) == crc32c(a + b)`. Raises TypeError for what
    is no buffer, ValueError or BufferError for one that is not contiguous.
    """
    view = memoryview(data)
    if not view.c_contiguous:
        raise ValueError("the buffer is not contiguous")
    if view.ndim != 1 or view.format != "B":
        view = view.cast("B") if view.nbytes else memoryview(b"")
    return _compute(view, value)


_compute: Callable[[Any, int], int] = crc32c_numpy if _native_crc32c is None else _native_crc32c


def combine(crc_a: int, crc_b: int, bytes_b: int) -> int:
    """The checksum of A‖B from those of A and of B, and the length of B in bytes. Raises ValueError if negative."""
    if bytes_b < 0:
        raise ValueError(f"bytes_b is {bytes_b}, expected at least 0")
    t0, t1, t2, t3 = _combine_tables(bytes_b)
    return t0[crc_a & 0xFF] ^ t1[crc_a >> 8 & 0xFF] ^ t2[crc_a >> 16 & 0xFF] ^ t3[crc_a >> 24] ^ crc_b


def _multiply(a: int, b: int) -> int:
    """Product of two polynomials of degree < 32, modulo the CRC polynomial."""
    product = 0
    while a:
        if a & 0x80000000:
            product ^= b
        a = a << 1 & _ONES
        b = b >> 1 ^ (_POLYNOMIAL if b & 1 else 0)
    return product


@cache
def _power_of_two(exponent: int) -> int:
    """x^(8 · 2^exponent): the operator of 2^exponent zero bytes."""
    if exponent:
        half = _power_of_two(exponent - 1)
        return _multiply(half, half)
    return 0x80000000 >> 8


def _zeros(count: int) -> int:
    """x^(8 · count): the operator that advances a register over `count` zero bytes."""
    operator = 0x80000000
    for exponent in range(count.bit_length()):
        if count >> exponent & 1:
            operator = _multiply(_power_of_two(exponent), operator)
    return operator


def _tables(operator: int, bits: int) -> list[npt.NDArray[np.uint32]]:
    """The operator as lookup tables, one for each `bits`-wide slice of a register, lowest first."""
    tables = []
    for low in range(0, 32, bits):
        table = np.zeros(1 << bits, np.uint32)
        for bit in range(bits):
            table[1 << bit : 2 << bit] = table[: 1 << bit] ^ np.uint32(_multiply(operator, 1 << low + bit))
        tables.append(table)
    return tables


@lru_cache(_OPERATORS_KEPT)
def _combine_tables(count: int) -> tuple[list[int], ...]:
    return tuple(table.tolist() for table in _tables(_zeros(count), 8))


@cache
def _fold_tables(lanes: int) -> list[npt.NDArray[np.uint32]]:
    tables: list[npt.NDArray[np.uint32]] = _tables(_zeros(4 * lanes), 16)
    return tables


@cache
def _byte_table() -> list[int]:
    table: list[int] = _tables(_zeros(1), 8)[0].tolist()
    return table


def _register(octets: npt.NDArray[np.uint8], register: int) -> int:
    for lanes in _LANES:
        body = len(octets) // (4 * lanes) * (4 * lanes)
        if body > 4 * lanes:
            row = _fold(octets[:body].view("<u4").reshape(-1, lanes), register)
            octets, register = octets[body:], _register(row.view(np.uint8), 0)
    table = _byte_table()
    for octet in octets.tobytes():
        register = register >> 8 ^ table[(register ^ octet) & 0xFF]
    return register


def _fold(rows: npt.NDArray[np.uint32], register: int) -> npt.NDArray[np.uint32]:
    low, high = _fold_tables(rows.shape[1])
    row: npt.NDArray[np.uint32] = rows[0].astype("<u4")
    row[0] ^= register
    halves = row.view("<u2")
    scratch = np.empty_like(row)
    folded = np.empty_like(row)
    for following in rows[1:]:
        np.take(low, halves[0::2], out=folded, mode="wrap")
        np.take(high, halves[1::2], out=scratch, mode="wrap")
        np.bitwise_xor(folded, scratch, out=row)
        np.bitwise_xor(row, following, out=row)
    return row
