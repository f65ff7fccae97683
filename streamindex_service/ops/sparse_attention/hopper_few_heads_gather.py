"""The partition of the kernel for few heads that brings rows in: it copies them into a ring of stages, as they are,
and takes the scales of a block apart before it hands the block over.

A scale is 2^e times a share, 2^e being the power of two of the largest scale of the row. Shares of a row in f16 are as
good as its scales if these lie within 2^12 of each other, and e within what the softmax's sums bear.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from streamindex_service.ops.gluon_names import load_async, view
from streamindex_service.ops.sparse_attention.hopper_items import first_element, span

ITEM_HEADS = 16  # M of mma.sync
HEADS_AN_ITEM = gl.constexpr(ITEM_HEADS)
ENTRIES = gl.constexpr(512)  # of an index row, brought in together
COPY_WARPS = gl.constexpr(4)
COPY_THREADS = gl.constexpr(32 * COPY_WARPS)
WORDS = gl.constexpr(128)  # of four e4m3 of a row
ROTARY_WORDS = gl.constexpr(32)  # of two bf16
SHARE_HEAD = gl.constexpr(2.0**-1)  # what shares in f16 are multiplied by: the range of f16 lies below
BEYOND = gl.constexpr(256)  # added to the exponent of a row whose shares f16 does not hold
# Exponents as float32 has them, 127 for 1. A weight is found with 2^e and divided by it for the denominator: were rows
# further apart than these, one that counts in the denominator would be 0 before that.
_LEAST, _LARGEST = gl.constexpr(87), gl.constexpr(187)
# How many powers of two scales of a row may lie apart: a weight times a share of 2^-12 has all its bits down to 2^-16
# of the largest such, and is 0 below 2^-27.
_FARTHEST = gl.constexpr(12)
# Of a row whose scales lie further apart, the largest is left so far above 1: smaller ones need the room below.
_LEFT_ABOVE = gl.constexpr(60)


@gluon.constexpr_function
def word_layout(block):
    """Where word w of row k lies. 16 bytes stay together, and neither way of reading meets a bank twice: keys, eight
    words of four rows at a time, and values, four pairs of words (_by_warp) of four rows, every other one."""
    words = [[0, 1 << bit] for bit in range(7)]
    rows = [[1, 8], [2, 16], [4, 4]] + [[1 << bit, 0] for bit in range(3, block.bit_length() - 1)]
    return gl.SharedLinearLayout(words + rows)


@gluon.constexpr_function
def _copy_layouts():
    """How the threads share out copies of values, of rotary elements, of scales [groups, rows] and of entries."""
    return (
        gl.BlockedLayout([1, 4], [1, 32], [COPY_WARPS, 1], [1, 0]),
        gl.BlockedLayout([1, 4], [4, 8], [COPY_WARPS, 1], [1, 0]),
        gl.BlockedLayout([1, 1], [1, 32], [COPY_WARPS, 1], [1, 0]),
    )


@gluon.jit
def power(exponent):
    """2^(exponent − 127), of exponents from 1 to 254."""
    return (exponent << 23).to(gl.float32, bitcast=True)


@gluon.jit
def exponent_of(x):
    """The exponent of float32 numbers as they have it, 0 to 255."""
    return (x.to(gl.int32, bitcast=True) >> 23) & 0xFF


@gluon.jit
def _load_entries(entries, start, end, rows, BLOCK: gl.constexpr, BLOCKS: gl.constexpr):
    """Entries of BLOCKS blocks, −1 where not valid and behind the end: [BLOCKS, BLOCK]."""
    layout: gl.constexpr = _copy_layouts()[2]
    block = gl.expand_dims(gl.arange(0, BLOCKS, layout=gl.SliceLayout(1, layout)), 1)
    place = start + block * BLOCK + gl.expand_dims(gl.arange(0, BLOCK, layout=gl.SliceLayout(0, layout)), 0)
    found = gl.load(entries + place, mask=place < end, other=-1)
    return gl.where((found >= 0) & (found < rows), found, -1)


@gluon.jit
def _start_copies(
    data, scales, entry_smem, value_smem, rotary_smem, scale_smem,
    ROW: gl.constexpr, NARROW: gl.constexpr, ROTARY: gl.constexpr, PLACED: gl.constexpr,
):  # fmt: skip
    """Have the rows of a block of entries copied as they are, 16 bytes at a time, zeros where an entry is −1. Returns
    their biases [BLOCK]: 0, or −inf. What is masked is not read, so the address of −1 may be any."""
    layouts: gl.constexpr = _copy_layouts()
    found = entry_smem.load(gl.SliceLayout(1, layouts[0]))
    row = data + gl.expand_dims(first_element(found, ROW // 4, 4, PLACED), 1)
    word = gl.expand_dims(gl.arange(0, WORDS, layout=gl.SliceLayout(0, layouts[0])), 0)
    load_async(value_smem, row + word, mask=gl.expand_dims(found >= 0, 1) & (word < NARROW // 4))
    found = entry_smem.load(gl.SliceLayout(1, layouts[1]))
    row = data + gl.expand_dims(first_element(found, ROW // 4, 4, PLACED), 1)
    word = gl.expand_dims(gl.arange(0, ROTARY_WORDS, layout=gl.SliceLayout(0, layouts[1])), 0)
    load_async(rotary_smem, row + (ROTARY // 4 + word), mask=gl.expand_dims(found >= 0, 1) & (word >= 0))
    found = entry_smem.load(gl.SliceLayout(0, layouts[2]))
    valid = found >= 0
    if NARROW == 448:  # eight exponent bytes beside the row
        load_async(scale_smem, scales + first_element(found, 1, 2, PLACED), mask=valid)
    else:  # four float32 behind its values
        group = gl.expand_dims(gl.arange(0, 4, layout=gl.SliceLayout(1, layouts[2])), 1)
        place = data + (gl.expand_dims(first_element(found, ROW // 4, 4, PLACED) + NARROW // 4, 0) + group)
        load_async(scale_smem, place, mask=gl.expand_dims(valid, 0) & (group >= 0))
    return gl.where(valid, 0.0, float("-inf"))


@gluon.jit
def _share_scales(
    scale_smem, exponent_smem, share_smem, narrow_smem,
    GROUPS: gl.constexpr, NARROW: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """Take the scales of a block apart: exponents of 2^e [BLOCK] int32 as float32 has them, shares [GROUPS, BLOCK]
    float32, and the same in f16, times SHARE_HEAD. BEYOND is added where a row's shares in f16 will not do."""
    # a row's scales in one thread: nothing is traded
    layout: gl.constexpr = gl.BlockedLayout([GROUPS, 1], [1, 32], [1, COPY_WARPS], [0, 1])
    if NARROW == 448:  # an exponent byte is the exponent field of a float32; the eighth is padding
        group = gl.expand_dims(gl.arange(0, GROUPS, layout=gl.SliceLayout(1, layout)), 1)
        eight = gl.expand_dims(scale_smem.load(gl.SliceLayout(0, layout)), 0)
        byte = ((eight >> (8 * group).to(gl.int64)) & 0xFF).to(gl.int32)
        scale = power(gl.where(group < NARROW // GROUP, byte, 0))
    else:
        bits = scale_smem.load(layout)
        scale = bits.to(gl.float32, bitcast=True)
    size = gl.abs(scale)
    most = gl.max(size, axis=0)
    least = gl.min(gl.where(size == 0.0, float("inf"), size), axis=0)  # a scale of zero goes with any other
    exponent = exponent_of(most)
    held = (exponent - exponent_of(least) <= _FARTHEST) & (exponent >= _LEAST) & (exponent <= _LARGEST)
    beyond = (most > 0.0) & (held == 0)
    within = gl.minimum(gl.maximum(exponent, _LEAST), _LARGEST)
    exponent = gl.where(beyond, gl.maximum(exponent - _LEFT_ABOVE, 127), within)
    share = scale * gl.expand_dims(power(254 - exponent), 0)
    exponent_smem.store(gl.where(beyond, exponent + BEYOND, exponent))
    share_smem.store(share)
    narrow_smem.store((share * SHARE_HEAD).to(gl.float16))


@gluon.jit
def _hand_over(
    number, scale_smem, exponent_smem, share_smem, narrow_smem, landed, full,
    STAGES: gl.constexpr, GROUPS: gl.constexpr, NARROW: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """Wait for the rows of block `number`, take their scales apart, and let the other partitions have it."""
    slot = number % STAGES
    hopper.mbarrier.wait(landed.index(slot), (number // STAGES) & 1)
    _share_scales(
        scale_smem.index(slot), exponent_smem.index(slot), share_smem.index(slot), narrow_smem.index(slot),
        GROUPS, NARROW, GROUP,
    )  # fmt: skip
    hopper.mbarrier.arrive(full.index(slot), count=1)


@gluon.jit
def copy_rows(
    data, scales, indices, ends, items, splits, rows, width,
    entry_smem, value_smem, rotary_smem, scale_smem, bias_smem, exponent_smem, share_smem, narrow_smem,
    landed, full, empty,
    HEADS: gl.constexpr, BLOCK: gl.constexpr, STAGES: gl.constexpr, HAS_ENDS: gl.constexpr,
    ROW: gl.constexpr, NARROW: gl.constexpr, GROUP: gl.constexpr, ROTARY: gl.constexpr, GROUPS: gl.constexpr,
    PLACED: gl.constexpr,
):  # fmt: skip
    """The partition that keeps the ring full. Entries come in many blocks at a time, the next of them meanwhile.

    A block is handed over once the copies of the one after it have started, also if that is of another item.
    """
    BLOCKS: gl.constexpr = ENTRIES // BLOCK
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    together = view(entry_smem, gl.int64 if PLACED else gl.int32, [BLOCKS, BLOCK], flat)
    done = items * 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        token, _, _, begin, end = span(ends, item, splits, width, HEADS, HEADS_AN_ITEM, BLOCK, HAS_ENDS)
        entries = indices + token * width
        following = _load_entries(entries, begin, end, rows, BLOCK, BLOCKS)
        block = items * 0
        for start in range(begin, end, BLOCK):
            if block == 0:
                together.store(following)
                following = _load_entries(entries, start + ENTRIES, end, rows, BLOCK, BLOCKS)
            slot = done % STAGES
            hopper.mbarrier.wait(empty.index(slot), ((done // STAGES) & 1) ^ 1)
            bias = _start_copies(
                data, scales, entry_smem.index(block), value_smem.index(slot), rotary_smem.index(slot),
                scale_smem.index(slot), ROW, NARROW, ROTARY, PLACED,
            )  # fmt: skip
            async_copy.mbarrier_arrive(landed.index(slot), increment_count=False)
            bias_smem.index(slot).store(bias)
            if done > 0:
                _hand_over(
                    done - 1, scale_smem, exponent_smem, share_smem, narrow_smem, landed, full,
                    STAGES, GROUPS, NARROW, GROUP,
                )  # fmt: skip
            block = (block + 1) % BLOCKS
            done += 1
    for number in range(gl.maximum(done - 1, 0), done):  # the last, if there was any
        _hand_over(
            number, scale_smem, exponent_smem, share_smem, narrow_smem, landed, full, STAGES, GROUPS, NARROW, GROUP
        )


@gluon.constexpr_function
def _everywhere(block, warps):
    """[BLOCK], all of it in every warp."""
    registers = [[32 << bit] for bit in range((block // 32).bit_length() - 1)]
    return gl.DistributedLinearLayout(
        registers, [[1 << bit] for bit in range(5)], [[0]] * (warps.bit_length() - 1), [], [block]
    )


@gluon.jit
def any_beyond(exponent_smem, BLOCK: gl.constexpr, WARPS: gl.constexpr):
    """Whether an exponent [BLOCK] is BEYOND for any row of the block. Each warp finds it for itself: no barrier."""
    return gl.max(exponent_smem.load(_everywhere(BLOCK, WARPS)), axis=0) >= BEYOND
