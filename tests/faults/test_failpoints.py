"""Frontend and worker hand over to each other; one of them is killed, or hangs, exactly there.

python -m tests.faults.kill_loop does the same for as long as one likes.
"""

from __future__ import annotations

import os
import resource
import signal
from pathlib import Path

import grpc
import numpy as np
import pytest

from streamindex_service.testing import failpoints
from streamindex_service.testing.failpoints import Action, Failpoints, Point, Seam, install, process_state
from streamindex_service.worker.__main__ import LINK_FAILED_EXIT_CODE
from tests.support.calls import Calls, query_chunks, search_header
from tests.support.faulty_service import FaultyService, is_gone
from tests.support.kill_rounds import KillRounds, settings
from tests.support.services import wait_for
from tests.support.tensors import Draw, Kind, expected

GROUPS = {
    "start": ("canary", "ready"),
    "segments": ("segment",),
    "pages": ("pages", "promotion", "eviction", "view"),
    "tiles": ("tile",),
    "uploads": ("rows", "upload"),
    "disk": ("spill",),
}


def points_of(group: str) -> list[Point]:
    return [point for point in Point if point.partition(".")[0] in GROUPS[group]]


@pytest.fixture(scope="module")
def spill_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("spill")


@pytest.fixture(scope="module")
def service(spill_dir):
    with FaultyService(settings(spill_dir)) as running:
        yield running


@pytest.fixture(scope="module")
def rounds(service, spill_dir):
    return KillRounds(service, spill_dir)


@pytest.mark.parametrize("group", GROUPS)
def test_a_worker_killed_at_a_hand_over_costs_no_key_and_no_bit(rounds, group):
    rounds.play(points_of(group), Action.KILL_WORKER)


def test_a_step_that_fails_in_the_worker_costs_no_bit(rounds):
    """What builds on it must not be believed: a tile would read pages that never came."""
    rounds.play([Point.SEGMENT_RECEIVED, Point.PAGES_RECEIVED, Point.PAGES_COPIED], Action.FAIL_CALL)


def test_every_point_has_its_turn():
    assert sorted(point for group in GROUPS for point in points_of(group)) == sorted(Point)


def test_a_worker_that_hangs_at_a_hand_over_is_replaced(rounds):
    rounds.play([Point.SEGMENT_RECEIVED, Point.TILE_TORN], Action.STOP_WORKER)


def test_a_worker_that_can_take_no_descriptor_is_replaced_at_once(service, rounds):
    kind, draw = Kind(heads=2, head_dim=64), Draw(8)
    keys, queries = draw.keys(kind, 900), draw.queries(kind, 3, start_position=900)
    (worker,) = service.worker_pids()
    with Calls(service.address) as calls, calls.cache(kind, keys) as cache:
        _, hard = resource.prlimit(worker, resource.RLIMIT_NOFILE)
        resource.prlimit(worker, resource.RLIMIT_NOFILE, (3, hard))
        with calls.search_call() as call:
            call.send(search_header(kind, cache.id, 9, start_position=900), *query_chunks(kind, queries, 3))
            refusal = call.refusal()
        assert (refusal.code, refusal.error.reason) == (grpc.StatusCode.UNAVAILABLE, "WORKER_LOST")
        found, _ = calls.search(kind, cache.id, queries, 9)
        assert np.array_equal(found, expected(kind, keys, queries, 9)[0])
        assert worker not in service.worker_pids()
    assert f'"exit_code": {LINK_FAILED_EXIT_CODE}, "hung": false' in service.log_tail()


def test_a_frontend_killed_at_a_hand_over_leaves_nothing(rounds):
    rounds.play_frontend(Point.UPLOAD_COMMITTED)


def test_a_worker_that_hangs_does_not_outlive_its_frontend(service, rounds, spill_dir):
    """The last of the service: nobody is left to watch the worker."""
    processes = service.processes()
    (worker,) = service.worker_pids()
    os.kill(worker, signal.SIGSTOP)
    wait_for(lambda: process_state(worker) == "T")
    service.process.kill()
    service.process.wait()
    wait_for(lambda: all(is_gone(pid) for pid in processes))
    assert os.listdir(spill_dir) == []


# The points themselves.


def test_a_point_acts_once_for_one_of_those_who_come_by(tmp_path):
    points = Failpoints(tmp_path)
    assert points.take(Point.TILE_SENT) is None
    points.arm(Point.TILE_SENT, Action.STOP_WORKER)
    assert not points.was_reached(Point.TILE_SENT)
    assert points.take(Point.TILE_BEGUN) is None
    assert points.take(Point.TILE_SENT) is Action.STOP_WORKER
    assert points.was_reached(Point.TILE_SENT)
    assert points.take(Point.TILE_SENT) is None
    points.arm(Point.TILE_SENT, Action.KILL_WORKER)
    assert not points.was_reached(Point.TILE_SENT)
    points.disarm()
    assert points.take(Point.TILE_SENT) is None


def test_wrappers_come_by_before_or_after_and_only_where_they_are_asked_to():
    class Owner:
        def act(self, number):
            seen.append(number)
            return -number

    seen: list[object] = []
    seams = [
        Seam(Point.TILE_SUBMITTED, Owner, "act", after=False, when=lambda owner, number: number > 1),
        Seam(Point.TILE_SENT, Owner, "act", after=True),
    ]
    install(seams, seen.append)
    assert (Owner().act(1), Owner().act(2)) == (-1, -2)
    assert seen == [1, Point.TILE_SENT, Point.TILE_SUBMITTED, 2, Point.TILE_SENT]
    with pytest.raises(AttributeError):
        install([Seam(Point.TILE_SENT, Owner, "gone", after=True)], seen.append)


def test_the_service_has_no_way_to_its_failpoints():
    """No module outside of the tests' tools imports or names them; test_import_rules sees what a process loads."""
    package = Path(failpoints.__file__).parents[1]
    modules = [path for path in package.rglob("*.py") if "testing" not in path.relative_to(package).parts]
    assert len(modules) > 100
    for path in modules:
        text = path.read_text()
        assert "failpoint" not in text, path
        assert "faulty" not in text, path
