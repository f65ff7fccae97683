"""The core through thousands of histories: two files play half of them each, for two processes."""

from __future__ import annotations

from streamindex_service.testing.simulation import History

CHUNK = 1000


def play(first: int) -> None:
    """A chunk of them. A failure names its seed: `python -m streamindex_service.testing.simulation SEED` tells it."""
    for seed in range(first, first + CHUNK):
        try:
            History(seed).run()
        except Exception as error:
            raise AssertionError(f"python -m streamindex_service.testing.simulation {seed}") from error
