"""The table of running tiles: what a worker was at is known after any death of it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from streamindex_service.ipc.running import SLOTS, RunningTiles
from streamindex_service.ipc.segments import Segment

# Adds the tiles of its second argument and takes out those of its third; then it kills itself.
WORKER = """
import os, signal, sys
from streamindex_service.ipc.running import RunningTiles
tiles = RunningTiles.receive(int(sys.argv[1]))
for tile in eval(sys.argv[2]):
    tiles.add(tile)
for tile in eval(sys.argv[3]):
    tiles.remove(tile)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def tiles():
    made = RunningTiles.create()
    yield made
    made.close()


def test_it_outlives_the_process_that_wrote_it(tiles):
    command = [sys.executable, "-c", WORKER, str(tiles.fd), "[9, 4, 7, 2**64 - 1]", "[4]"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    assert subprocess.run(command, pass_fds=[tiles.fd], env=environment, timeout=60).returncode == -9
    assert tiles.oldest_first() == [9, 7, 2**64 - 1]


def test_the_order_is_that_of_the_giving_though_places_are_used_again(tiles):
    listed = []
    for number in range(3 * SLOTS):
        listed.append(1000 - number)
        tiles.add(1000 - number)
        if len(listed) > 5:
            tiles.remove(listed.pop(2 * (number % 3)))  # as two lanes are done with theirs: in no order
        assert tiles.oldest_first() == listed


def test_a_tile_that_is_tried_again_is_as_old_as_it_was(tiles):
    for tile in (1, 2, 1):
        tiles.add(tile)
    assert tiles.oldest_first() == [1, 2]
    tiles.remove(1)
    tiles.remove(1)
    assert tiles.oldest_first() == [2]


def test_one_too_many_takes_nobody_s_place(tiles):
    for tile in range(1, SLOTS + 2):
        tiles.add(tile)
    assert tiles.oldest_first() == list(range(1, SLOTS + 1))
    tiles.remove(SLOTS + 1)
    tiles.remove(1)
    tiles.add(SLOTS + 2)
    assert tiles.oldest_first() == [*range(2, SLOTS + 1), SLOTS + 2]


def test_other_memory_is_not_taken_for_it():
    segment = Segment.create(4096)
    with pytest.raises(ValueError, match="not as long"):
        RunningTiles.receive(segment.fd)
    segment.close()
