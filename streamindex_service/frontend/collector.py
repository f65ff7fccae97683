"""What is left to Python's garbage collector: decision 0037."""

from __future__ import annotations

import gc

_MIDDLE_BEFORE_FULL = 100  # collections of the middle generation before a full one; Python has 10


def spare_what_stays() -> None:
    """What is there now stays: the collector need not look through it again and again (7 % of an upload's time).

    And calls leave nothing for a full collection, for which nobody is answered while it looks at the pages of all
    caches: one for every 700,000 objects that there are more, not for every 70,000.
    """
    gc.collect()
    gc.freeze()
    young, middle, _ = gc.get_threshold()
    gc.set_threshold(young, middle, _MIDDLE_BEFORE_FULL)


def let_go_of_frames(error: BaseException) -> None:
    """Take the frames from an error, and from those that it came of.

    They hold chunks, views of segments, and streams that hold tasks that hold the error: a circle, which would wait for
    the collector with all its memory. The frames themselves are left alone: one error may come to several calls, of
    which others are still in the middle of telling of it.
    """
    each: BaseException | None = error
    while each is not None:
        each.__traceback__ = None
        each = each.__cause__ or each.__context__
