"""What one item of the Hopper kernels is, a block of heads of one token and a part of its index row; and where the rows
lie that its entries name."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.extra.cuda import gdc_wait

from streamindex_service.ops import paged_kv_rows

_PLACE_BITS = gl.constexpr(paged_kv_rows.PLACE_BITS)
_PLACE_ROW = gl.constexpr((1 << paged_kv_rows.PLACE_BITS) - 1)  # the bits of the row


@gluon.jit
def wait_for_inputs():
    """Of a kernel whose programs may start once those of the kernel before it in its stream have ended (programmatic
    dependent launch): wait until what that one wrote is there. Before this nothing may be read or written."""
    gdc_wait()


@gluon.jit
def first_element(index, ROW: gl.constexpr, UNIT: gl.constexpr, PLACED: gl.constexpr):
    """How many elements lie before the row of an entry: rows have ROW of them. PLACED: entries are places, in units of
    16 bytes, which have UNIT elements (see PlacedKvRows)."""
    if PLACED:
        return (index >> _PLACE_BITS) * UNIT + (index & _PLACE_ROW) * ROW
    return index.to(gl.int64) * ROW


@gluon.jit
def span(
    ends, item, splits, width, HEADS: gl.constexpr, HEADS_EACH: gl.constexpr, BLOCK: gl.constexpr,
    HAS_ENDS: gl.constexpr,
):  # fmt: skip
    """(token, first head, part, first entry, end entry) of an item. Head blocks of one part follow each other: they
    read the same rows."""
    HEAD_BLOCKS: gl.constexpr = (HEADS + HEADS_EACH - 1) // HEADS_EACH
    token = (item // HEAD_BLOCKS // splits).to(gl.int64)
    part = item // HEAD_BLOCKS % splits
    end = gl.load(ends + token) if HAS_ENDS else width
    blocks = (end + BLOCK - 1) // BLOCK
    begin = blocks * part // splits * BLOCK
    end = gl.minimum(blocks * (part + 1) // splits * BLOCK, end)
    return token, item % HEAD_BLOCKS * HEADS_EACH, part, begin, end
