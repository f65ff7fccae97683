"""Rows shared out over threads, on a CPU: several rows at a time, each by one thread."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import pairwise

import torch


def share_rows(fill: Callable[[int, int], None], start: int, stop: int, most: int | None = None) -> None:
    """Call `fill` for parts of the rows [start, stop), in as many threads as torch would use, `most` at a time; each of
    them uses one.

    Blocks of a few rows are too small to be worth several threads each: on a busy machine those would wait at every
    barrier for the one that does not run (20 to 100 times slower, measured with 2 threads on 2 cores that something
    else uses too).
    """
    threads = torch.get_num_threads()
    # A single row goes to the pool too: torch may add up in another order where it has all its threads.
    if threads == 1:
        fill(start, stop)
        return
    parts = max(1, min(threads, stop - start, most or threads))
    cuts = [start + (stop - start) * part // parts for part in range(parts + 1)]
    pool = _row_threads(threads)
    for done in [pool.submit(fill, *cut) for cut in pairwise(cuts)]:
        done.result()


@lru_cache(maxsize=1)
def _row_threads(count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count, thread_name_prefix="rows", initializer=torch.set_num_threads, initargs=(1,))
