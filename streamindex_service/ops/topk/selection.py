"""Kernels that select the best of a chunk's scores exactly; `triton.py` launches them and says what they do together.

Entries stand in index order at every step, so a tie is decided by position alone and no result depends on the order in
which threads or blocks ran.
"""

import triton
import triton.language as tl

_FILTER_SCALARS = [
    "row_start", "tile_start", "tile_keys", "length", "first_position", "ratio", "score_stride", "top_k", "capacity",
]  # fmt: skip
# scores, thresholds, marks, survivors are the workspace's own and always aligned
_LIST_POINTERS = ["positions", "old_scores", "old_indices", "new_scores", "new_indices"]


@triton.jit
def visible_keys(positions, first_position, row, row_start, ratio, length, EXPLICIT: tl.constexpr):
    """Keys that chunk rows `row` see: min((position + 1) // ratio, length), int32. EXPLICIT positions are the chunk's
    own."""
    position = tl.load(positions + row) if EXPLICIT else first_position.to(tl.int64) + row_start + row
    return tl.minimum((position + 1) // ratio, length).to(tl.int32)


@triton.jit
def _ordered_bits(score):
    """uint32 bits whose unsigned order is the float order; 0 is below every number."""
    bits = score.to(tl.uint32, bitcast=True)
    return tl.where((bits >> 31) != 0, ~bits, bits | 0x80000000)


@triton.jit
def _bisect(bits, inside, needed, most):
    """A threshold that at least `needed` of the bits that are `inside` reach: one that no more than `most` reach, or,
    if there is none, the largest of all. The others' bits must be 0."""
    highest = tl.max(bits, axis=0)
    differ = tl.min(tl.where(inside, bits, highest), axis=0) ^ highest
    differ |= differ >> 1
    differ |= differ >> 2
    differ |= differ >> 4
    differ |= differ >> 8
    differ |= differ >> 16
    reached = highest & ~differ  # what all have in common
    step = differ ^ (differ >> 1)
    while step != 0:
        trial = reached | step
        count = tl.sum((bits >= trial).to(tl.int32), axis=0)
        reached = tl.where(count >= needed, trial, reached)
        step = tl.where((count >= needed) & (count <= most), 0, step >> 1).to(tl.uint32)
    return reached


@triton.jit
def _sampled_threshold(scores, sample, every, needed, LANES: tl.constexpr, LINE: tl.constexpr):
    """Bits that `needed` of the sample reach, or an eighth more: one line of LINE scores in `every`."""
    lane = tl.arange(0, LANES)
    inside = lane < sample
    value = tl.load(scores + lane // LINE * (LINE * every) + lane % LINE, mask=inside, other=0.0)
    bits = tl.where(inside, _ordered_bits(value), 0).to(tl.uint32)
    return _bisect(bits, inside, needed, needed + needed // 8)


@triton.jit(do_not_specialize=_FILTER_SCALARS, do_not_specialize_on_alignment=["positions"])
def threshold_kernel(
    scores, thresholds, positions,
    row_start, tile_start, tile_keys, length, first_position, ratio, score_stride, top_k, capacity,
    LANES: tl.constexpr, EVERY: tl.constexpr, LINE: tl.constexpr, EXPLICIT: tl.constexpr,
):  # fmt: skip
    """Per row, bits that somewhat more than top_k scores of the tile should reach, from a sample; 0 where the row is
    short. Grid: (rows of the chunk,)."""
    row = tl.program_id(0)
    visible = visible_keys(positions, first_position, row, row_start, ratio, length, EXPLICIT)
    tile_count = tl.maximum(tl.minimum(visible - tile_start, tile_keys), 0)
    scores += row.to(tl.int64) * (score_stride // 256) * 256
    every = tl.maximum(tl.cdiv(tile_count, LANES), EVERY)
    sample = tile_count // (LINE * every) * LINE
    # of the best top_k, the sample holds about `mean`; four deviations more make fewer than top_k survivors rare
    mean = top_k.to(tl.float32) * sample.to(tl.float32) / tl.maximum(tile_count, 1).to(tl.float32)
    needed = (mean + 4.0 * tl.sqrt(mean) + 4.0).to(tl.int32)
    threshold = tl.full((), 0, tl.uint32)
    if (tile_count >= 4 * top_k) & (needed < sample):
        if sample <= LANES // 4:
            threshold = _sampled_threshold(scores, sample, every, needed, LANES // 4, LINE)
        elif sample <= LANES // 2:
            threshold = _sampled_threshold(scores, sample, every, needed, LANES // 2, LINE)
        else:
            threshold = _sampled_threshold(scores, sample, every, needed, LANES, LINE)
    tl.store(thresholds + row, threshold.to(tl.int32, bitcast=True))


@triton.jit(do_not_specialize=_FILTER_SCALARS, do_not_specialize_on_alignment=["positions"])
def mark_kernel(
    scores, thresholds, marks, positions,
    row_start, tile_start, tile_keys, length, first_position, ratio, score_stride, top_k, capacity,
    BLOCK: tl.constexpr, EXPLICIT: tl.constexpr,
):  # fmt: skip
    """One bit per score of the tile: whether it reaches its row's threshold. Grid: (blocks of the tile, rows).

    marks: [rows, score_stride / 32] int32, bit b of word i being key tile_start + 32 i + b. The only pass over the
    scores, so it does nothing else. Rows are read in whole blocks, past their end too: the buffer has a block more.
    """
    row, start = tl.program_id(1), tl.program_id(0) * BLOCK
    visible = visible_keys(positions, first_position, row, row_start, ratio, length, EXPLICIT)
    count = tl.maximum(tl.minimum(visible - tile_start, tile_keys), 0) - start
    threshold = tl.load(thresholds + row).to(tl.uint32, bitcast=True)
    if (count > 0) & (threshold != 0):
        # whole lines: what the compiler must know to load 16 bytes at a time
        begin = row.to(tl.int64) * (score_stride // 256) * 256 + start
        word, bit = tl.arange(0, BLOCK // 32), tl.arange(0, 32)
        place = word[:, None] * 32 + bit[None, :]
        value = tl.load(scores + begin + place)
        take = (_ordered_bits(value) >= threshold) & (place < count)
        packed = tl.sum(tl.where(take, (1 << bit)[None, :], 0), axis=1)
        tl.store(marks + begin // 32 + word, packed, mask=word * 32 < count)


@triton.jit
def _population(word):
    """Set bits of each uint32, int32."""
    word = word - ((word >> 1) & 0x55555555)
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F
    word = word + (word >> 8)
    return ((word + (word >> 16)) & 63).to(tl.int32)


@triton.jit(do_not_specialize=_FILTER_SCALARS, do_not_specialize_on_alignment=_LIST_POINTERS)
def finish_kernel(
    scores, thresholds, marks, old_scores, old_indices, survivor_scores, survivor_indices, survivor_counts,
    new_scores, new_indices, positions,
    row_start, tile_start, tile_keys, length, first_position, ratio, score_stride, top_k, capacity,
    LANES: tl.constexpr, MOST_LANES: tl.constexpr, WORDS: tl.constexpr, BLOCK: tl.constexpr, EXPLICIT: tl.constexpr,
):  # fmt: skip
    """Collect what of one row can still be among the best, in index order: candidates so far that reach the threshold,
    then the marked keys of the tile; and select the best top_k of them. Grid: (rows of the chunk,).

    A right count makes the survivors a superset of the answer. If they are fewer than top_k, or more than `capacity`,
    the sample misled: the count is stored as −1. These rows, and those of more than MOST_LANES survivors, are left to
    `rest_kernel`.
    """
    row = tl.program_id(0)
    visible = visible_keys(positions, first_position, row, row_start, ratio, length, EXPLICIT)
    old_count = tl.minimum(tl.minimum(visible, tile_start), top_k)
    tile_count = tl.maximum(tl.minimum(visible - tile_start, tile_keys), 0)
    threshold = tl.load(thresholds + row).to(tl.uint32, bitcast=True)
    result = tl.full((), -1, tl.int32)
    if threshold != 0:
        scores += row.to(tl.int64) * score_stride
        marks += row.to(tl.int64) * (score_stride // 32)
        old_scores += row.to(tl.int64) * top_k
        old_indices += row.to(tl.int64) * top_k
        new_scores += row.to(tl.int64) * top_k
        new_indices += row.to(tl.int64) * top_k
        survivor_scores += row.to(tl.int64) * capacity
        survivor_indices += row.to(tl.int64) * capacity
        kept = tl.full((), 0, tl.int32)
        kept = _survive(
            old_scores, old_indices, old_count, threshold, kept, capacity, survivor_scores, survivor_indices, BLOCK
        )
        old_kept = kept
        kept = _unmark(marks, tl.cdiv(tile_count, 32), tile_start, kept, capacity, survivor_indices, WORDS)
        if (kept >= top_k) & (kept <= capacity):
            result = kept
            tl.debug_barrier()  # other threads wrote the indices
            if kept <= LANES:
                _select_survivors(
                    scores, tile_start, survivor_scores, survivor_indices, old_kept, kept, top_k, new_scores,
                    new_indices, LANES,
                )  # fmt: skip
            elif kept <= MOST_LANES:
                _select_survivors(
                    scores, tile_start, survivor_scores, survivor_indices, old_kept, kept, top_k, new_scores,
                    new_indices, MOST_LANES,
                )  # fmt: skip
            else:
                lane = tl.arange(0, BLOCK)
                for start in range(old_kept, kept, BLOCK):
                    place = start + lane
                    index = tl.load(survivor_indices + place, mask=place < kept, other=tile_start)
                    value = tl.load(scores + index - tile_start, mask=place < kept, other=0.0)
                    tl.store(survivor_scores + place, value, mask=place < kept)
    tl.store(survivor_counts + row, result)


@triton.jit
def _unmark(marks, words, tile_start, kept, capacity, to_indices, WORDS: tl.constexpr):
    """Append the keys whose bits are set, in order; what does not fit is counted, not stored. Returns the count."""
    lane = tl.arange(0, WORDS)
    for start in range(0, words, WORDS):
        word = tl.load(marks + start + lane, mask=start + lane < words, other=0).to(tl.uint32, bitcast=True)
        marked = _population(word)
        place = kept + tl.cumsum(marked, axis=0) - marked
        rounds = tl.where(kept <= capacity, tl.max(marked, axis=0), 0)
        for _ in range(rounds):  # the lowest bit of each word, and off with it
            lowest = (word & (~word + 1)).to(tl.float32).to(tl.uint32, bitcast=True)
            index = tile_start + (start + lane) * 32 + (lowest >> 23).to(tl.int32) - 127
            tl.store(to_indices + place, index, mask=(word != 0) & (place < capacity))
            word = word & (word - (word != 0).to(tl.uint32))
            place += 1
        kept += tl.sum(marked, axis=0)
    return kept


@triton.jit
def _select_survivors(
    scores, tile_start, survivor_scores, survivor_indices, old_kept, kept, top_k, new_scores, new_indices,
    LANES: tl.constexpr,
):  # fmt: skip
    """The best top_k of `kept` survivors, of which the first `old_kept` have their scores listed; kept ≥ top_k."""
    lane = tl.arange(0, LANES)
    inside, old = lane < kept, lane < old_kept
    index = tl.load(survivor_indices + lane, mask=inside, other=tile_start)
    value = tl.load(scores + tl.where(old, 0, index - tile_start), mask=inside & (lane >= old_kept), other=0.0)
    value = tl.where(old, tl.load(survivor_scores + lane, mask=old, other=0.0), value)
    _keep_held(value, index, inside, top_k, new_scores, new_indices)


@triton.jit
def _survive(
    values, ids, count, threshold, kept, capacity, to_scores, to_indices, BLOCK: tl.constexpr
):  # fmt: skip
    """Append, in order, the entries whose bits are not below `threshold`; what does not fit is counted, not stored."""
    lane = tl.arange(0, BLOCK)
    for start in range(0, count, BLOCK):
        inside = start + lane < count
        value = tl.load(values + start + lane, mask=inside, other=0.0)
        take = (inside & (_ordered_bits(value) >= threshold)).to(tl.int32)
        place = kept + tl.cumsum(take, axis=0) - 1
        index = tl.load(ids + start + lane, mask=inside, other=0)
        fits = (take != 0) & (place < capacity)
        tl.store(to_scores + place, value, mask=fits)
        tl.store(to_indices + place, index, mask=fits)
        kept += tl.sum(take, axis=0)
    return kept


@triton.jit
def _add_digits(histogram, values, count, prefix, SHIFT: tl.constexpr, BLOCK: tl.constexpr):
    """Add to `histogram` [256] the digits at SHIFT of those of `count` floats whose higher digits are `prefix`."""
    lane = tl.arange(0, BLOCK)
    for start in range(0, count, BLOCK):
        inside = start + lane < count
        bits = _ordered_bits(tl.load(values + start + lane, mask=inside, other=0.0))
        if SHIFT < 24:
            inside = inside & ((bits >> (SHIFT + 8)) == prefix)
        digit = ((bits >> SHIFT) & 255).to(tl.int32)
        # digits that do not count go to bin 0, and are taken off again
        counted = tl.histogram(tl.where(inside, digit, 0), 256)
        outside = BLOCK - tl.sum(inside.to(tl.int32), axis=0)
        histogram += counted - tl.where(tl.arange(0, 256) == 0, outside, 0)
    return histogram


@triton.jit
def _next_digit(histogram, needed, prefix):
    """The prefix one digit longer that holds the `needed`-th largest, and which of the entries with it that is."""
    # at_least[b]: entries with digit b or more; the one sought has the largest digit with at_least ≥ needed
    at_least = tl.sum(histogram, axis=0) - tl.cumsum(histogram, axis=0) + histogram
    digit = tl.sum((at_least >= needed).to(tl.int32), axis=0) - 1
    needed -= tl.sum(tl.where(tl.arange(0, 256) > digit, histogram, 0), axis=0)
    return needed, (prefix << 8) | digit.to(tl.uint32)


@triton.jit
def _keep(
    values,
    ids,
    first_id,
    count,
    kth,
    ties_left,
    kept,
    new_scores,
    new_indices,
    HAS_IDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Append, in order, the entries above `kth` and the first `ties_left` equal to it. Returns the counts that remain
    and are kept."""
    lane = tl.arange(0, BLOCK)
    for start in range(0, count, BLOCK):
        inside = start + lane < count
        value = tl.load(values + start + lane, mask=inside, other=0.0)
        bits = _ordered_bits(value)
        tie = (inside & (bits == kth)).to(tl.int32)
        tie_rank = tl.cumsum(tie, axis=0)  # 1 for the first
        take = (inside & (bits > kth)).to(tl.int32) | (tie & (tie_rank <= ties_left).to(tl.int32))
        place = kept + tl.cumsum(take, axis=0) - 1
        index = tl.load(ids + start + lane, mask=inside, other=0) if HAS_IDS else first_id + start + lane
        tl.store(new_scores + place, value, mask=take != 0)
        tl.store(new_indices + place, index, mask=take != 0)
        ties_left -= tl.minimum(tl.sum(tie, axis=0), ties_left)
        kept += tl.sum(take, axis=0)
    return ties_left, kept


@triton.jit
def _select_held(
    old_scores, old_indices, old_count, scores, tile_start, tile_count, top_k, new_scores, new_indices,
    LANES: tl.constexpr,
):  # fmt: skip
    """The best top_k of at most LANES entries, all held in registers, in index order."""
    lane = tl.arange(0, LANES)
    total = old_count + tile_count
    take = tl.minimum(total, top_k)
    old, inside = lane < old_count, lane < total
    value = tl.load(old_scores + lane, mask=old, other=0.0)
    index = tl.load(old_indices + lane, mask=old, other=0)
    value = tl.where(old, value, tl.load(scores + lane - old_count, mask=inside & (lane >= old_count), other=0.0))
    index = tl.where(old, index, tile_start + lane - old_count)
    _keep_held(value, index, inside, take, new_scores, new_indices)


@triton.jit
def _keep_held(value, index, inside, take, new_scores, new_indices):
    """Write the best `take` of the entries that are `inside`, in order; there are at least so many."""
    bits = tl.where(inside, _ordered_bits(value), 0).to(tl.uint32)
    kth = _bisect(bits, inside, take, take)
    above = (inside & (bits > kth)).to(tl.int32)
    tie = (inside & (bits == kth)).to(tl.int32)
    ties_taken = take - tl.sum(above, axis=0)
    ranks = tl.cumsum(above + (tie << 16), axis=0)  # both counts are below 2^15
    tie_rank = ranks >> 16  # 1 for the first
    place = (ranks & 0xFFFF) + tl.minimum(tie_rank, ties_taken) - 1
    kept = (above != 0) | ((tie != 0) & (tie_rank <= ties_taken))
    tl.store(new_scores + place, value, mask=kept)
    tl.store(new_indices + place, index, mask=kept)


@triton.jit
def _select_read(
    old_scores, old_indices, old_count, scores, tile_start, tile_count, top_k, new_scores, new_indices,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The best top_k of any number of entries: read once per digit of the k-th largest score, and
    once more."""
    kth = tl.full((), 0, tl.uint32)  # bits of the k-th best score; 0 is below every score
    needed = tl.full((), 0, tl.int32)  # how many equal to it belong to the result
    if old_count + tile_count > top_k:
        needed += top_k
        for step in tl.static_range(4):
            histogram = tl.zeros((256,), tl.int32)
            histogram = _add_digits(histogram, old_scores, old_count, kth, 24 - 8 * step, BLOCK)
            histogram = _add_digits(histogram, scores, tile_count, kth, 24 - 8 * step, BLOCK)
            needed, kth = _next_digit(histogram, needed, kth)
    kept = tl.full((), 0, tl.int32)
    needed, kept = _keep(old_scores, old_indices, 0, old_count, kth, needed, kept, new_scores, new_indices, True, BLOCK)
    _keep(scores, old_indices, tile_start, tile_count, kth, needed, kept, new_scores, new_indices, False, BLOCK)


@triton.jit(do_not_specialize=["rows", *_FILTER_SCALARS], do_not_specialize_on_alignment=_LIST_POINTERS)
def rest_kernel(
    scores, old_scores, old_indices, survivor_scores, survivor_indices, survivor_counts, new_scores, new_indices,
    positions,
    rows, row_start, tile_start, tile_keys, length, first_position, ratio, score_stride, top_k, capacity,
    MOST_LANES: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, EXPLICIT: tl.constexpr,
):  # fmt: skip
    """The rows that `finish_kernel` left: selected from their survivors where these were too many for the registers,
    from all scores where the sample misled. Grid: (rows of the chunk / ROWS,), since there are seldom any."""
    first = tl.program_id(0) * ROWS
    member = first + tl.arange(0, ROWS)
    counts = tl.load(survivor_counts + member, mask=member < rows, other=0)
    left = tl.sum(((counts < 0) | (counts > MOST_LANES)).to(tl.int32), axis=0)
    row = first
    while left > 0:
        survivors = tl.load(survivor_counts + row)
        if (survivors < 0) | (survivors > MOST_LANES):
            left -= 1
            place = row.to(tl.int64)
            if survivors < 0:
                visible = visible_keys(positions, first_position, row, row_start, ratio, length, EXPLICIT)
                old_count = tl.minimum(tl.minimum(visible, tile_start), top_k)
                tile_count = tl.maximum(tl.minimum(visible - tile_start, tile_keys), 0)
                _select_read(
                    old_scores + place * top_k, old_indices + place * top_k, old_count, scores + place * score_stride,
                    tile_start, tile_count, top_k, new_scores + place * top_k, new_indices + place * top_k, BLOCK,
                )  # fmt: skip
                _pad(old_count + tile_count, top_k, new_scores + place * top_k, new_indices + place * top_k, BLOCK)
            else:  # they stand for candidates and tile alike
                _select_read(
                    survivor_scores + place * capacity, survivor_indices + place * capacity, survivors, scores,
                    tile_start, survivors * 0, top_k, new_scores + place * top_k, new_indices + place * top_k, BLOCK,
                )  # fmt: skip
        row += 1


@triton.jit
def _pad(count, top_k, new_scores, new_indices, BLOCK: tl.constexpr):
    """Fill what `count` entries leave of a row's top_k."""
    lane = tl.arange(0, BLOCK)
    for start in range(tl.minimum(count, top_k), top_k, BLOCK):
        unused = start + lane < top_k
        tl.store(new_scores + start + lane, float("-inf"), mask=unused)
        tl.store(new_indices + start + lane, -1, mask=unused)


@triton.jit(do_not_specialize=_FILTER_SCALARS, do_not_specialize_on_alignment=_LIST_POINTERS)
def select_kernel(
    scores, old_scores, old_indices, new_scores, new_indices, positions,
    row_start, tile_start, tile_keys, length, first_position, ratio, score_stride, top_k, capacity,
    LANES: tl.constexpr, BLOCK: tl.constexpr, MANY: tl.constexpr, EXPLICIT: tl.constexpr,
):  # fmt: skip
    """The best top_k of (candidates so far, this tile's scores) of one row, in index order, padded. Grid: (rows of
    the chunk,). For tiles that are not filtered.

    scores: [rows, score_stride] float32 of keys tile_start to tile_start + tile_keys. Candidates so far have smaller
    indices than any key of the tile and stand in index order, so "first in order" is "smallest index" across both.
    MANY: only rows of more than LANES entries, else only the others: two launches, for what many entries need of
    registers would slow down few.
    """
    row = tl.program_id(0)
    visible = visible_keys(positions, first_position, row, row_start, ratio, length, EXPLICIT)
    old_count = tl.minimum(tl.minimum(visible, tile_start), top_k)
    tile_count = tl.maximum(tl.minimum(visible - tile_start, tile_keys), 0)
    scores += row.to(tl.int64) * score_stride
    old_scores += row.to(tl.int64) * top_k
    old_indices += row.to(tl.int64) * top_k
    new_scores += row.to(tl.int64) * top_k
    new_indices += row.to(tl.int64) * top_k
    total = old_count + tile_count
    mine = total > LANES if MANY else total <= LANES
    if mine:
        if not MANY:
            _select_held(
                old_scores, old_indices, old_count, scores, tile_start, tile_count, top_k, new_scores, new_indices,
                LANES,
            )  # fmt: skip
        elif total <= 2 * LANES:
            _select_held(
                old_scores, old_indices, old_count, scores, tile_start, tile_count, top_k, new_scores, new_indices,
                2 * LANES,
            )  # fmt: skip
        else:
            _select_read(
                old_scores, old_indices, old_count, scores, tile_start, tile_count, top_k, new_scores, new_indices,
                BLOCK,
            )  # fmt: skip
        _pad(total, top_k, new_scores, new_indices, BLOCK)


@triton.jit(
    do_not_specialize=["top_k"],
    do_not_specialize_on_alignment=["old_scores", "old_indices", "new_scores", "new_indices"],
)
def order_kernel(
    old_scores, old_indices, new_scores, new_indices, top_k, LANES: tl.constexpr, WANT_SCORES: tl.constexpr
):  # fmt: skip
    """One row's results, from index order to score order, equal scores by index; padding stays last. Grid: (rows,).

    Score bits and place in one number, so that no two are equal and any sorting network is stable.
    """
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, LANES)
    inside = lane < top_k
    score = tl.load(old_scores + row * top_k + lane, mask=inside, other=float("-inf")).to(tl.int32, bitcast=True)
    ordered = score ^ ((score >> 31) & 0x7FFFFFFF)  # signed integers in the order of the floats
    packed = (ordered.to(tl.int64) << 32) | (LANES - 1 - lane).to(tl.int64)
    packed = tl.sort(packed, descending=True)
    place = LANES - 1 - (packed & (LANES - 1)).to(tl.int32)
    index = tl.load(old_indices + row * top_k + place, mask=inside, other=-1)
    tl.store(new_indices + row * top_k + lane, index, mask=inside)
    if WANT_SCORES:
        best = (packed >> 32).to(tl.int32)
        best = (best ^ ((best >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
        tl.store(new_scores + row * top_k + lane, best, mask=inside)
