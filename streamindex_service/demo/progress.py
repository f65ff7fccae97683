"""How long work shows how far it is: a bar on a terminal, a few plain lines elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

_PLAIN_STEPS = 4


@contextmanager
def progress(console: Console, title: str, total: int) -> Iterator[Callable[[int], None]]:
    """Gives a function that is called with how much is done, up to `total`."""
    if not console.is_terminal:
        yield _PlainSteps(console, title, total)
        return
    columns = (TextColumn("{task.description:28}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(title, total=max(1, total))
        yield lambda done: bar.update(task, completed=done)


class _PlainSteps:
    """A line at each quarter."""

    def __init__(self, console: Console, title: str, total: int) -> None:
        self._console, self._title, self._total = console, title, max(1, total)
        self._told = 0

    def __call__(self, done: int) -> None:
        step = _PLAIN_STEPS * min(done, self._total) // self._total
        if step > self._told:
            self._told = step
            self._console.print(f"{self._title}: {100 * step // _PLAIN_STEPS} %", highlight=False)
