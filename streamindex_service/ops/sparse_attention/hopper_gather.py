"""The partition of the Hopper kernel that brings rows in: copied as they are, or widened from 8 bits on the way.

Both fill one ring of stages, each a block of rows in bf16 [BLOCK, DIM] as the products read it, the rest of the keys
[BLOCK, TAIL], and a bias [BLOCK] that is 0 for a valid entry and −inf for another, whose row is zeros.

Packed rows are copied as they are into their own stage, to its upper part, and widened there in place. What is copied
takes half of what it becomes, so a piece of 64 elements, written to its place from below, has never reached the pieces
that were not read yet. Copies need no registers, so all of a block is under way at once, and two pieces at a time are
read before they are written: one piece would need twice the barriers, four more registers than there are. A thread
holds a quarter of each 64 elements of a row: the 16 bytes that it reads, and the two times 16 bytes that they become,
meet no bank of shared memory twice.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from streamindex_service.ops.gluon_names import load_async, view
from streamindex_service.ops.sparse_attention.hopper_items import first_element, span

ITEM_HEADS = 64  # M of wgmma
HEADS_AN_ITEM = gl.constexpr(ITEM_HEADS)
_WORDS = gl.constexpr(16)  # of four e4m3 values, or 32 of two bf16: 64 elements, a column of the swizzled stage
_TOGETHER = gl.constexpr(2)  # pieces of 64 elements that are widened between two barriers
# Four e4m3 values to bf16: their bits, moved to where bf16 has them, are the value times 2^-120. Exact, subnormals too.
_MOVE = """{
    .reg .b32 a, b, t, u;
    prmt.b32 a, $4, 0, 0x1404;
    prmt.b32 b, $4, 0, 0x3424;
    shr.u32 t, a, 4;
    shr.u32 u, b, 4;
    and.b32 t, t, 0x07f007f0;
    and.b32 u, u, 0x07f007f0;
    and.b32 a, a, 0x80008000;
    and.b32 b, b, 0x80008000;
    or.b32 a, a, t;
    or.b32 b, b, u;
    mov.b32 t, 0x7b807b80;
    mul.rn.bf16x2 a, a, t;
    mul.rn.bf16x2 b, b, t;
"""
_DONE = """
    mov.b32 {$0, $1}, a;
    mov.b32 {$2, $3}, b;
}"""
_TIMES_POWER = gl.constexpr(_MOVE + "mul.rn.bf16x2 a, a, $5; mul.rn.bf16x2 b, b, $5;" + _DONE)
# times a scale in two parts: rounded as their sum would be, but for the last bits of the second
_TIMES_SUM = gl.constexpr(
    _MOVE
    + """
    mul.rn.bf16x2 t, a, $6;
    mul.rn.bf16x2 u, b, $6;
    fma.rn.bf16x2 a, a, $5, t;
    fma.rn.bf16x2 b, b, $5, u;
"""
    + _DONE
)
_FOUR_BF16 = gl.constexpr((gl.bfloat16, gl.bfloat16, gl.bfloat16, gl.bfloat16))


@gluon.jit
def copy_rows(
    data, indices, ends, items, splits, rows, width, key_smem, tail_smem, bias_smem, full, empty,
    HEADS: gl.constexpr, DIM: gl.constexpr, TAIL: gl.constexpr, BLOCK: gl.constexpr, STAGES: gl.constexpr,
    HAS_ENDS: gl.constexpr, PLACED: gl.constexpr,
):  # fmt: skip
    """Keep the ring full with bf16 rows of DIM + TAIL elements."""
    wide: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    lane = gl.arange(0, BLOCK, layout=gl.SliceLayout(1, wide))
    dim = gl.arange(0, DIM, layout=gl.SliceLayout(0, wide))
    done = items * 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        token, _, _, begin, end = span(ends, item, splits, width, HEADS, HEADS_AN_ITEM, BLOCK, HAS_ENDS)
        entries = indices + token * width
        following = gl.load(entries + begin + lane, mask=begin + lane < end, other=-1)
        for start in range(begin, end, BLOCK):
            slot = done % STAGES
            index = following
            following = gl.load(entries + start + BLOCK + lane, mask=start + BLOCK + lane < end, other=-1)
            valid = (index >= 0) & (index < rows)
            row = data + gl.expand_dims(first_element(gl.where(valid, index, 0), DIM + TAIL, 8, PLACED), 1)
            mask = gl.expand_dims(valid, 1)
            hopper.mbarrier.wait(empty.index(slot), ((done // STAGES) & 1) ^ 1)
            load_async(key_smem.index(slot), row + gl.expand_dims(dim, 0), mask=mask & (gl.expand_dims(dim, 0) >= 0))
            if TAIL > 0:
                tail = gl.expand_dims(gl.arange(0, TAIL, layout=gl.SliceLayout(0, wide)), 0)
                load_async(tail_smem.index(slot), row + DIM + tail, mask=mask & (tail >= 0))
            async_copy.mbarrier_arrive(full.index(slot), increment_count=False)
            bias_smem.index(slot).store(gl.where(valid, 0.0, float("-inf")))
            hopper.mbarrier.arrive(full.index(slot), count=1)
            done += 1


@gluon.jit
def _load_scales(data, scales, index, valid, NARROW: gl.constexpr, ROW: gl.constexpr, PLACED: gl.constexpr):
    """The scales of a block of rows: 8 exponent bytes as one number, or four float32 numbers as they are in memory."""
    if NARROW == 448:
        found = (gl.load(scales + first_element(index, 1, 2, PLACED), mask=valid, other=0),)
    else:
        place = data + first_element(index, ROW // 4, 4, PLACED) + NARROW // 4
        found = (
            gl.load(place, mask=valid, other=0),
            gl.load(place + 1, mask=valid, other=0),
            gl.load(place + 2, mask=valid, other=0),
            gl.load(place + 3, mask=valid, other=0),
        )
    return found


@gluon.jit
def _packed_pieces(keys, BLOCK: gl.constexpr, DIM: gl.constexpr):
    """A stage as pieces of packed words, one behind the other: [DIM / 32, BLOCK, 16] int32, 4 KiB each for 64 rows."""
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    return view(keys, gl.int32, [DIM // 32, BLOCK, _WORDS], flat)


@gluon.jit
def _start_copies(
    data, index, valid, keys, tail, NARROW: gl.constexpr, BLOCK: gl.constexpr, DIM: gl.constexpr, ROW: gl.constexpr,
    ROTARY: gl.constexpr, PLACED: gl.constexpr, layout: gl.constexpr,
):  # fmt: skip
    """Have a block of rows copied: piece i of the packed values to where column (PIECES + i) / 2 of the stage will be,
    rotary values to their place. Zeros where not valid. As words: bytes would be copied one by one."""
    PIECES: gl.constexpr = NARROW // 64
    # the layout of the stage, in words of two elements
    as_words: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=32, rank=2)
    row = data + gl.expand_dims(first_element(index, ROW // 4, 4, PLACED), 1)
    column = gl.expand_dims(gl.arange(0, _WORDS, layout=gl.SliceLayout(0, layout)), 0)
    mask = gl.expand_dims(valid, 1)
    pieces = _packed_pieces(keys, BLOCK, DIM)
    for piece in gl.static_range(PIECES):
        load_async(pieces.index(PIECES + piece), row + (piece * _WORDS + column), mask=mask & (column >= 0))
    if NARROW < DIM:
        rotary = view(keys, gl.int32, [BLOCK, DIM // 2], as_words).slice(NARROW // 2, 2 * _WORDS, dim=1)
    else:
        rotary = view(tail, gl.int32, [BLOCK, 2 * _WORDS], as_words)
    column = gl.expand_dims(gl.arange(0, 2 * _WORDS, layout=gl.SliceLayout(0, layout)), 0)
    load_async(rotary, row + (ROTARY // 4 + column), mask=mask & (column >= 0))
    async_copy.commit_group()


@gluon.jit
def _twice(x):
    """A bf16 of 16 bits in both halves of a word."""
    return x | (x << 16)


@gluon.jit
def _widen(words, scales, piece: gl.constexpr, BLOCK: gl.constexpr, NARROW: gl.constexpr, GROUP: gl.constexpr):
    """64 elements of a block of rows in bf16: [BLOCK, 64]."""
    if NARROW == 448:
        # an exponent byte is the exponent field of a bf16
        scale = _twice((((scales[0] >> (8 * piece)) & 0xFF) << 7).to(gl.int32))
        a, b, c, d = gl.inline_asm_elementwise(
            _TIMES_POWER, "=h,=h,=h,=h,r,r", [words, gl.expand_dims(scale, 1)], dtype=_FOUR_BF16, is_pure=True, pack=1
        )
    else:
        scale = scales[piece * 64 // GROUP].to(gl.float32, bitcast=True)
        high = scale.to(gl.bfloat16)
        low = (scale - high.to(gl.float32)).to(gl.bfloat16)
        high_bits = gl.expand_dims(_twice(high.to(gl.uint16, bitcast=True).to(gl.int32)), 1)
        low_bits = gl.expand_dims(_twice(low.to(gl.uint16, bitcast=True).to(gl.int32)), 1)
        a, b, c, d = gl.inline_asm_elementwise(
            _TIMES_SUM, "=h,=h,=h,=h,r,r,r", [words, high_bits, low_bits], dtype=_FOUR_BF16, is_pure=True, pack=1
        )
    return gl.reshape(gl.join(gl.join(a, c), gl.join(b, d)), (BLOCK, 64))


@gluon.jit
def _widen_in_place(
    keys, scales, BLOCK: gl.constexpr, DIM: gl.constexpr, NARROW: gl.constexpr, GROUP: gl.constexpr,
    layout: gl.constexpr,
):  # fmt: skip
    """Turn what _start_copies brought into rows as the products read them."""
    PIECES: gl.constexpr = NARROW // 64
    pieces = _packed_pieces(keys, BLOCK, DIM)
    for first in gl.static_range(0, PIECES, _TOGETHER):
        words = ()
        for piece in gl.static_range(first, min(first + _TOGETHER, PIECES)):
            words += (pieces.index(PIECES + piece).load(layout),)
        for piece in gl.static_range(first, min(first + _TOGETHER, PIECES)):
            wide = _widen(words[piece - first], scales, piece, BLOCK, NARROW, GROUP)
            keys.slice(piece * 64, 64, dim=1).store(wide)


@gluon.jit
def unpack_rows(
    data, scales, indices, ends, items, splits, rows, width, key_smem, tail_smem, bias_smem, full, empty,
    HEADS: gl.constexpr, DIM: gl.constexpr, BLOCK: gl.constexpr, STAGES: gl.constexpr, HAS_ENDS: gl.constexpr,
    ROW: gl.constexpr, NARROW: gl.constexpr, GROUP: gl.constexpr, ROTARY: gl.constexpr, PLACED: gl.constexpr,
):  # fmt: skip
    """Keep the ring full with packed rows, widened. data: rows of ROW / 4 int32; scales: of an int64, if beside."""
    layout: gl.constexpr = gl.BlockedLayout([1, 4], [8, 4], [4, 1], [1, 0])
    lane = gl.arange(0, BLOCK, layout=gl.SliceLayout(1, layout))
    done = items * 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        token, _, _, begin, end = span(ends, item, splits, width, HEADS, HEADS_AN_ITEM, BLOCK, HAS_ENDS)
        entries = indices + token * width
        following = gl.load(entries + begin + lane, mask=begin + lane < end, other=-1)
        for start in range(begin, end, BLOCK):
            slot = done % STAGES
            valid = (following >= 0) & (following < rows)
            index = gl.where(valid, following, 0)
            scale = _load_scales(data, scales, index, valid, NARROW, ROW, PLACED)
            following = gl.load(entries + start + BLOCK + lane, mask=start + BLOCK + lane < end, other=-1)
            hopper.mbarrier.wait(empty.index(slot), ((done // STAGES) & 1) ^ 1)
            keys = key_smem.index(slot)
            _start_copies(
                data, index, valid, keys, tail_smem.index(slot), NARROW, BLOCK, DIM, ROW, ROTARY, PLACED, layout
            )
            bias_smem.index(slot).store(gl.where(valid, 0.0, float("-inf")))
            async_copy.wait_group(0)
            _widen_in_place(keys, scale, BLOCK, DIM, NARROW, GROUP, layout)
            hopper.fence_async_shared()
            hopper.mbarrier.arrive(full.index(slot), count=1)
            done += 1
