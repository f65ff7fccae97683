"""How the work of the Hopper score kernel is shared out: parts, groups of queries, steps.

A step is one product of a few queries with one block of keys. Everything here is asked alike by the warp that feeds and
by those that consume, which thereby agree on the order of steps without a word.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from streamindex_service.ops.topk.parts import FIELDS

_FIELDS = gl.constexpr(FIELDS)


@gluon.jit
def part_at(parts, part, keys, key_offsets, scales, scale_offsets):
    """A part's own tables, rows, length and position: see `parts.FIELDS`."""
    at = parts + part * _FIELDS
    ALIGNED: gl.constexpr = 128 // keys.dtype.element_ty.primitive_bitwidth
    own_keys = keys + gl.multiple_of(gl.load(at), ALIGNED)
    own_offsets = key_offsets + gl.load(at + 1)
    own_scales = scales + gl.multiple_of(gl.load(at + 2), 4)
    own_scale_offsets = scale_offsets + gl.load(at + 3)
    start, rows = gl.load(at + 4).to(gl.int32), gl.load(at + 5).to(gl.int32)
    length, first_position = gl.load(at + 6).to(gl.int32), gl.load(at + 7).to(gl.int32)
    return own_keys, own_offsets, own_scales, own_scale_offsets, start, rows, length, first_position


@gluon.jit
def group_work(
    group_start, query_group, rows, row_start, tile_start, tile_keys, length, first_position, ratio,
    QUERIES: gl.constexpr, BLOCK_KEYS: gl.constexpr, EXPLICIT: gl.constexpr,
):  # fmt: skip
    """What a group of queries has to do: steps of a key block that all see; such blocks; all blocks; steps of all."""
    size = gl.minimum(query_group, rows - group_start)
    steps = (size + QUERIES - 1) // QUERIES
    if EXPLICIT:
        blocks = (gl.minimum(tile_keys, length - tile_start) + BLOCK_KEYS - 1) // BLOCK_KEYS
        return steps, blocks, blocks, steps * blocks
    position = first_position.to(gl.int64) + row_start + group_start
    seen_by_first = gl.minimum((position + 1) // ratio, length).to(gl.int32) - tile_start
    seen_by_last = gl.minimum((position + size) // ratio, length).to(gl.int32) - tile_start
    whole = (gl.minimum(gl.maximum(seen_by_first, 0), tile_keys) + BLOCK_KEYS - 1) // BLOCK_KEYS
    blocks = (gl.minimum(gl.maximum(seen_by_last, 0), tile_keys) + BLOCK_KEYS - 1) // BLOCK_KEYS
    total = whole * steps
    for block in range(whole, blocks):
        total += steps - _first_step(block, tile_start, position, ratio, QUERIES, BLOCK_KEYS)
    return steps, whole, blocks, total


@gluon.jit
def _first_step(block, tile_start, position, ratio, QUERIES: gl.constexpr, BLOCK_KEYS: gl.constexpr):
    """The first step of the group whose queries see any key of the block. position: of the group's first query."""
    # the first position that sees a key is ratio * (key + 1) - 1
    nearest = (tile_start + block * BLOCK_KEYS + 1).to(gl.int64) * ratio - 1 - position
    return (gl.maximum(nearest, 0) // QUERIES).to(gl.int32)


@gluon.jit
def segment(
    place, end, steps, whole, group_start, row_start, tile_start, first_position, ratio,
    QUERIES: gl.constexpr, BLOCK_KEYS: gl.constexpr,
):  # fmt: skip
    """Where step `place` of a group's work lies, and how many follow with the same keys before `end`: (key block,
    step within the group, steps)."""
    block = place // gl.maximum(steps, 1)
    step = place % gl.maximum(steps, 1)
    if block >= whole:
        position = first_position.to(gl.int64) + row_start + group_start
        block = whole
        left = place - whole * steps
        first = _first_step(block, tile_start, position, ratio, QUERIES, BLOCK_KEYS)
        while left >= steps - first:
            left -= steps - first
            block += 1
            first = _first_step(block, tile_start, position, ratio, QUERIES, BLOCK_KEYS)
        step = first + left
    return block, step, gl.minimum(steps - step, end - place)


@gluon.jit
def trim(
    positions, row, count, rows, key_start, length, ratio,
    QUERIES: gl.constexpr, MOST_QUERIES: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """First and end step of `count` from query `row` on that see key `key_start`, for explicit positions."""
    lane = gl.arange(0, MOST_QUERIES, layout=gl.BlockedLayout([MOST_QUERIES // 32 // WARPS], [32], [WARPS], [0]))
    position = gl.load(positions + gl.minimum(row + lane, rows - 1))
    inside = (lane < count * QUERIES) & (row + lane < rows)
    sees = inside & (gl.minimum((position + 1) // ratio, length) > key_start)
    first = gl.min(gl.where(sees, lane, MOST_QUERIES), axis=0) // QUERIES
    last = (gl.max(gl.where(sees, lane + 1, 0), axis=0) + QUERIES - 1) // QUERIES
    return gl.minimum(first, last), last


@gluon.jit
def share(total, turned):
    """This block's part of `total` steps: first and end. Parts differ by one step at most.

    turned: where the blocks begin that have one step more, counted back; it is given for the next work, so that those
    come next that had none.
    """
    blocks = gl.num_programs(0)
    block = (gl.program_id(0) + turned) % blocks
    least, more = total // blocks, total % blocks
    begin = block * least + gl.minimum(block, more)
    return begin, begin + least + (block < more).to(gl.int32), (turned + blocks - more) % blocks
