"""The supervisor and the frontend's side of a worker, with processes that stand in for one."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from functools import partial

import pytest

from streamindex_service.core.ledger import Ledger
from streamindex_service.errors import PoisonError, ServiceError, WorkerLostError
from streamindex_service.frontend.device import DeviceWorker
from streamindex_service.frontend.host_memory import Block, HostExtents, SharedSegment
from streamindex_service.frontend.tiles import TileDue, TilePart, TilePlace, TileSpec, search_tile
from streamindex_service.frontend.views import View
from streamindex_service.ipc import supervisor as module
from streamindex_service.ipc.supervisor import Supervisor, WorkerEvents, WorkerOptions
from streamindex_service.ipc.v1 import worker_pb2 as pb

# What stands in for a worker: says that it is ready, answers pings, and does what a tile's rows say.
STAND_IN = """
import os, socket, sys, time
from streamindex_service.ipc import link
from streamindex_service.ipc.running import RunningTiles
from streamindex_service.ipc.v1 import worker_pb2 as pb
sock = socket.socket(fileno=int(sys.argv[1]))
running = RunningTiles.receive(link.receive(sock)[1])
link.send(sock, pb.FromWorker(ready=pb.Ready(device_name="stand-in")))
if os.environ.get("STAND_IN") == "ends at once":
    os._exit(0)
while True:
    try:
        message = pb.ToWorker.FromString(link.receive(sock)[0])
    except link.LinkClosedError:
        sys.exit(0)
    kind = message.WhichOneof("message")
    if kind == "ping":
        link.send(sock, pb.FromWorker(pong=pb.Pong(sequence=message.ping.sequence)))
    elif kind == "shutdown":
        sys.exit(0)
    elif kind == "search_tile":
        what, tile = message.search_tile.rows, message.search_tile.tile_id
        if what:  # others wait here
            running.add(tile)
        if what in (1, 3):
            running.remove(tile)
        if what == 1:
            link.send(sock, pb.FromWorker(tile_done=pb.TileDone(tile_id=tile, device_us=5)))
        elif what == 2:
            os._exit(3)
        elif what == 3:
            failure = pb.FAILURE_KIND_INTERNAL
            link.send(sock, pb.FromWorker(failed=pb.Failed(id=tile, kind=failure, detail="/secret/path")))
        elif what == 4:
            time.sleep(1000)
        elif what == 6:
            link.send(sock, pb.FromWorker(failed=pb.Failed(id=tile, kind=pb.FAILURE_KIND_DEVICE)))
            os._exit(3)
"""
HELD_BACK, DONE, EXITS, DEFECT, HANGS, RUNS, DEVICE_FAILS = range(7)  # what becomes of a tile


def tile_message(view, block, rows, tile_id):
    place = TilePlace(rows, 0, 0, 0, 0, None)
    return search_tile(
        tile_id,
        [pb.SearchSequence(view_id=view.view_id, rows=place.rows)],
        TileSpec(1, 1, 1, 0),
        block,
        place,
        1,
        TilePart(),
        TileDue(),
    )


class Events:
    """What a supervisor tells, as a queue."""

    def __init__(self):
        self.queue = asyncio.Queue()

    def put(self, name, value=None):
        self.queue.put_nowait((name, value))

    async def wait(self, name):
        while True:
            found, value = await asyncio.wait_for(self.queue.get(), 20)
            if found == name:
                return value


@pytest.fixture
async def stand_in(tmp_path, monkeypatch):
    """A running supervisor over stand-ins, the device in front of it, and its events."""
    script = tmp_path / "stand_in.py"
    script.write_text(STAND_IN)
    popen = module.subprocess.Popen
    monkeypatch.setattr(
        module.subprocess,
        "Popen",
        lambda command, **others: popen([sys.executable, str(script), command[-1]], **others),
    )
    environment = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    options = WorkerOptions("cpu", "", 0, 1, 20.0, 0.05, 0.4, 100.0, 0.05, 0.2, environment)
    events = Events()
    device = DeviceWorker(HostExtents(lambda segment_id: None, Ledger("host", 1 << 30)), 2, time.monotonic)

    class Governor:
        epoch = 1

        def device_ready(self):
            events.put("governor ready")

        def device_lost(self):
            events.put("governor lost")

    device.governor = Governor()

    def ready(info):
        device.on_ready()
        events.put("ready", info)

    def down(running):
        device.on_down(running)
        events.put("down")

    def lost(blamed):
        device.on_lost(blamed)
        events.put("lost", blamed)

    told = WorkerEvents(ready, down, lost, unusable=lambda why: None, log=lambda *args, **figures: None)
    running = Supervisor(options, told)
    device.supervisor = running
    running.start()
    await events.wait("ready")
    shared = SharedSegment.create(4096, writable_by_worker=True)
    block = Block(shared, 0, shared.data)

    def tile(what, key="request"):
        link = running.link
        view = View(link.next_id(), link, asyncio.get_running_loop().create_future(), (), (), frozenset(), 0, False)
        return device.submit((view,), block, key, partial(tile_message, view, block, what))[1]

    yield running, device, events, tile
    await running.stop(grace_s=2.0)
    shared.segment.close()


async def test_a_tile_is_answered(stand_in):
    running, _, _, tile = stand_in
    assert (await tile(1)).tile_done.device_us == 5
    assert running.restarts == 0


async def test_a_defect_of_the_worker_tells_the_caller_nothing(stand_in):
    _, _, _, tile = stand_in
    with pytest.raises(ServiceError) as caught:
        await tile(3)
    assert (caught.value.reason, str(caught.value)) == ("INTERNAL", "internal error")
    assert "/secret/path" in caught.value.detail
    assert (await tile(1)).tile_done.device_us == 5  # the worker lives


async def test_a_worker_that_exits_loses_its_tiles_and_is_replaced(stand_in):
    running, _, events, tile = stand_in
    old = running.link
    tiles = [tile(2), tile(1), tile(1)]
    for future in tiles:
        with pytest.raises(WorkerLostError):
            await future
    assert await events.wait("lost") is True
    await events.wait("ready")
    assert running.link is not old
    assert running.restarts == 1
    assert (await tile(1)).tile_done.device_us == 5
    assert old.process.poll() == 3


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
async def test_a_worker_killed_from_outside_is_nobodys_fault(stand_in, number):
    running, device, events, tile = stand_in
    for _ in range(3):
        waiting = tile(RUNS, key="unlucky")
        assert (await tile(DONE)).tile_done.device_us == 5  # by now it has the other one too
        running.link.process.send_signal(number)
        with pytest.raises(WorkerLostError):
            await waiting
        assert await events.wait("lost") is False
        await events.wait("ready")
    device.refuse_poison("unlucky")


async def test_a_worker_that_hangs_is_killed(stand_in):
    running, _, events, tile = stand_in
    waiting = tile(4)
    with pytest.raises(WorkerLostError):
        await waiting
    assert await events.wait("lost") is True
    await events.wait("ready")
    assert (await tile(1)).tile_done.device_us == 5
    assert running.restarts == 1


async def test_the_request_that_kills_twice_is_poison_and_its_neighbours_are_not(stand_in):
    _, device, events, tile = stand_in
    for death in range(2):
        device.refuse_poison("killer")
        tiles = [tile(2, "killer"), tile(1, "neighbour")]
        for future in tiles:
            with pytest.raises(WorkerLostError):
                await future
        assert await events.wait("lost") is True, death
        await events.wait("ready")
    with pytest.raises(PoisonError) as caught:
        device.refuse_poison("killer")
    assert caught.value.metadata == {"workers_lost": "2"}
    assert caught.value.retry_after_ms is None
    device.refuse_poison("neighbour")


@pytest.mark.parametrize("end", [EXITS, HANGS, DEVICE_FAILS])
async def test_blamed_is_what_the_device_had_not_what_waited_in_the_worker(stand_in, end):
    """Whatever the worker dies of: those of a lower band, or whose pages are being copied, are overtaken."""
    _, device, events, tile = stand_in
    for _ in range(2):
        tiles = [tile(HELD_BACK, "waits"), tile(end, "killer"), tile(HELD_BACK, "comes later")]
        for future in tiles:
            with pytest.raises(WorkerLostError):
                await future
        assert await events.wait("lost") is True
        await events.wait("ready")
    with pytest.raises(PoisonError):
        device.refuse_poison("killer")
    device.refuse_poison("waits")
    device.refuse_poison("comes later")


async def test_of_what_the_device_had_the_oldest_is_blamed(stand_in):
    _, device, events, tile = stand_in
    for _ in range(2):
        assert (await tile(DONE, "done")).tile_done.device_us == 5
        tiles = [tile(HELD_BACK, "waits"), tile(RUNS, "oldest"), tile(EXITS, "younger")]
        for future in tiles:
            with pytest.raises(WorkerLostError):
                await future
        assert await events.wait("lost") is True
        await events.wait("ready")
    with pytest.raises(PoisonError):
        device.refuse_poison("oldest")
    for key in ("done", "waits", "younger"):
        device.refuse_poison(key)


async def test_a_worker_that_dies_with_nothing_on_the_device_is_nobody_s_fault(stand_in):
    running, device, events, tile = stand_in
    for _ in range(2):
        waiting = tile(HELD_BACK, "waits")
        assert (await tile(DONE, "done")).tile_done.device_us == 5
        running.link.process.send_signal(signal.SIGUSR1)  # as by a fault
        with pytest.raises(WorkerLostError):
            await waiting
        assert await events.wait("lost") is True
        await events.wait("ready")
    for key in ("waits", "done"):
        device.refuse_poison(key)


async def test_who_has_not_learnt_that_the_worker_is_gone_is_not_accused_of_the_next_death(stand_in):
    running, device, events, tile = stand_in
    for _ in range(2):
        dead = running.link
        running.link.process.kill()
        assert await events.wait("lost") is False
        # a search that still has the old worker's view sends another tile
        view = View(1, dead, (), (), frozenset(), 0, False)
        segment = SharedSegment.create(4096, writable_by_worker=True)
        block = Block(segment, 0, segment.data)
        _, late = device.submit((view,), block, "late", partial(tile_message, view, block, 1))
        with pytest.raises(WorkerLostError):
            await late
        segment.segment.close()
        await events.wait("ready")
        running.link.next_id()
        with pytest.raises(WorkerLostError):
            await tile(2, "killer")
        assert await events.wait("lost") is True
        await events.wait("ready")
    device.refuse_poison("late")
    with pytest.raises(PoisonError):
        device.refuse_poison("killer")


async def test_a_worker_that_is_gone_when_its_readiness_is_heard_of_was_never_ready(stand_in, monkeypatch):
    """Both arrive in one turn of the loop. Were it told of as ready, nobody would learn that its memory is gone."""
    running, _, events, tile = stand_in
    spawn, told = running._spawn, []
    while not events.queue.empty():
        events.queue.get_nowait()

    def spawn_one_that_ends_at_once():
        monkeypatch.setattr(running, "_spawn", spawn)
        monkeypatch.setitem(running._options.environment, "STAND_IN", "ends at once")
        worker = spawn()
        monkeypatch.delitem(running._options.environment, "STAND_IN")
        assert worker.process.wait(20) == 0  # the loop has seen nothing of it so far
        return worker

    monkeypatch.setattr(running, "_spawn", spawn_one_that_ends_at_once)
    running.link.process.kill()
    while len(told) < 5:
        told.append((await asyncio.wait_for(events.queue.get(), 20))[0])
    assert told == ["governor lost", "down", "lost", "governor ready", "ready"]
    assert running.restarts == 1
    assert (await tile(1)).tile_done.device_us == 5
    assert events.queue.empty()


async def test_stop_leaves_no_process(stand_in):
    running, _, _, tile = stand_in
    process = running.link.process
    waiting = tile(0)
    await running.stop(grace_s=2.0)
    assert process.poll() is not None
    with pytest.raises(WorkerLostError):
        await waiting
