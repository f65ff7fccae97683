"""What errors hold on to once they were told of."""

from __future__ import annotations


def let_go_of_frames(error: BaseException) -> None:
    """Take the frames from an error, and from those that it came of.

    They hold chunks, views of segments, and streams that hold tasks that hold the error: a circle, which would wait for
    the garbage collector with all its memory (decision 0037). The frames themselves are left alone: one error may come
    to several calls, of which others are still in the middle of telling of it.
    """
    each: BaseException | None = error
    while each is not None:
        each.__traceback__ = None
        each = each.__cause__ or each.__context__
