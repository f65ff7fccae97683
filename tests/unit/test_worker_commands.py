"""The worker's queue: tiles by band, as late as may be; everything else in its order."""

from __future__ import annotations

import threading

import pytest

from streamindex_service.ipc.v1 import worker_pb2 as pb
from streamindex_service.worker.commands import MOST_ISSUED, Command, Commands
from tests.support.core_world import VirtualClock

AHEAD_S = 0.001
INTERACTIVE, STANDARD, BATCH = 1, 2, 3


def tile(tile_id, band=STANDARD, estimated_s=0.004):
    message = pb.SearchTile(tile_id=tile_id, band=band, estimated_us=int(1e6 * estimated_s))
    return Command(pb.ToWorker(search_tile=message))


def attend(tile_id, band=STANDARD, estimated_s=0.004):
    message = pb.AttendTile(tile_id=tile_id, band=band, estimated_us=int(1e6 * estimated_s))
    return Command(pb.ToWorker(attend_tile=message))


def load(operation_id):
    return Command(pb.ToWorker(load_pages=pb.LoadPages(operation_id=operation_id)))


@pytest.fixture
def clock():
    return VirtualClock()


@pytest.fixture
def commands(clock, monkeypatch):
    """A queue whose waits take no time; the clock goes on by what was waited for."""
    made = Commands(AHEAD_S, clock)

    def wait(seconds=None):
        assert seconds is not None, "it would wait for something to be finished"
        clock.advance(seconds)

    monkeypatch.setattr(made._changed, "wait", wait)
    return made


def take(commands):
    command, cancelled = commands.take()
    number = command.message.load_pages.operation_id if command.tile is None else command.tile.tile_id
    return -number if cancelled else number


def test_of_the_tiles_that_wait_those_of_the_highest_band_go_first(commands):
    for command in (tile(1, BATCH), tile(2, STANDARD), tile(3, BATCH), tile(4, INTERACTIVE), tile(5, INTERACTIVE)):
        commands.put(command)
    taken = []
    for _ in range(5):
        taken.append(take(commands))
        commands.finished(taken[-1])
    assert taken == [4, 5, 2, 1, 3]


def test_attention_and_searches_do_not_wait_for_each_other(commands, clock):
    start_s = clock.now_s
    for command in (attend(1, estimated_s=0.5), attend(2), tile(3), tile(4, INTERACTIVE), attend(5, INTERACTIVE)):
        commands.put(command)
    assert [take(commands) for _ in range(2)] == [4, 5]  # the highest band first, the first that came
    assert clock.now_s == start_s
    commands.finished(4)
    assert take(commands) == 3  # though the device still has attention
    assert clock.now_s == start_s
    commands.cancel([2])
    commands.finished(5)
    assert take(commands) == 1
    assert clock.now_s == start_s
    assert take(commands) == -2
    commands.finished(1)
    commands.finished(3)
    commands.close()
    assert commands.take() is None


def test_what_is_no_tile_goes_at_once_and_in_order(commands):
    for command in (tile(1), load(2), tile(3), load(4)):
        commands.put(command)
    assert [take(commands) for _ in range(3)] == [2, 4, 1]


def test_the_next_tile_goes_shortly_before_the_device_is_done(commands, clock):
    start_s = clock.now_s
    for number in (1, 2):
        commands.put(tile(number, estimated_s=0.004))
    assert take(commands) == 1
    assert clock.now_s == start_s
    assert take(commands) == 2
    assert clock.now_s - start_s == pytest.approx(0.004 - AHEAD_S)


def test_one_in_a_hurry_goes_before_a_tile_that_the_device_has_not_been_given(commands, clock):
    commands.put(tile(1, BATCH))
    assert take(commands) == 1
    commands.put(tile(2, BATCH))
    clock.advance(0.002)
    commands.put(tile(3, INTERACTIVE))
    assert [take(commands), take(commands)] == [3, 2]


def test_a_tile_that_ends_early_makes_way_at_once(commands, clock):
    for number in (1, 2):
        commands.put(tile(number, estimated_s=60.0))  # a bad estimate
    assert take(commands) == 1
    commands.finished(1)
    now_s = clock.now_s
    assert take(commands) == 2
    assert clock.now_s == now_s


def test_the_device_has_few_tiles_however_short_they_are(commands):
    for number in range(1, MOST_ISSUED + 2):
        commands.put(tile(number, estimated_s=0.0))
    assert [take(commands) for _ in range(MOST_ISSUED)] == list(range(1, MOST_ISSUED + 1))
    with pytest.raises(AssertionError, match="finished"):
        commands.take()
    commands.finished(1)
    assert take(commands) == MOST_ISSUED + 1


def test_cancelled_tiles_are_told_and_forgotten(commands):
    commands.put(tile(1, estimated_s=60.0))
    assert take(commands) == 1
    for number in (2, 3, 4):
        commands.put(tile(number, estimated_s=60.0))
    commands.cancel([1, 2, 4, 99])  # one has begun, one is not known
    assert take(commands) == -2  # without waiting for the device
    commands.finished(1)
    assert [take(commands), take(commands)] == [3, -4]
    assert not commands._cancelled


def test_a_tile_whose_pages_are_still_copied_lets_others_go_before_it(commands, clock):
    lacking = {1, 3, 6}
    commands._lacks_pages = lambda tile: tile.tile_id in lacking
    start_s = clock.now_s
    for command in (tile(1, INTERACTIVE), tile(2), tile(3), tile(4), attend(6), attend(7, BATCH)):
        commands.put(command)
    assert [take(commands), take(commands)] == [2, 7]
    assert clock.now_s == start_s
    commands.finished(2)
    assert take(commands) == 4
    for number in (4, 7):
        commands.finished(number)
    with pytest.raises(AssertionError, match="finished"):  # though the device has nothing
        commands.take()
    lacking.clear()
    assert [take(commands), take(commands), take(commands)] == [1, 6, 3]


def test_a_tile_that_lacks_pages_can_be_cancelled(commands):
    commands._lacks_pages = lambda tile: True
    commands.put(tile(1))
    commands.cancel([1])
    commands.close()
    assert take(commands) == -1
    assert commands.take() is None


def test_the_end_comes_after_all_tiles(commands):
    commands.put(tile(1))
    commands.close()
    assert take(commands) == 1
    assert commands.take() is None


@pytest.mark.timeout(30)
def test_who_waits_is_woken():
    """By each thing that may end a wait; the estimates alone would keep the last tile back for an hour."""
    commands = Commands(AHEAD_S)
    taken, first = [], threading.Event()

    def run() -> None:
        taken.append(take(commands))
        first.set()
        taken.append(take(commands))

    waiting = threading.Thread(target=run)
    waiting.start()
    commands.put(tile(1, estimated_s=3600.0))
    assert first.wait(20)
    commands.put(tile(2))
    commands.finished(1)
    waiting.join(20)
    assert taken == [1, 2]


@pytest.mark.timeout(30)
def test_who_waits_for_pages_is_woken_when_they_are_there():
    """At the end too: no tile is left behind."""
    asked, lacking = threading.Event(), [True]

    def lacks_pages(_):
        asked.set()
        return lacking[0]

    commands, taken = Commands(AHEAD_S, lacks_pages=lacks_pages), []
    waiting = threading.Thread(target=lambda: taken.extend([take(commands), commands.take()]))
    commands.put(tile(1))
    commands.close()
    waiting.start()
    assert asked.wait(20)
    lacking[0] = False
    commands.finished(99)  # a copy of pages
    waiting.join(20)
    assert taken == [1, None]
