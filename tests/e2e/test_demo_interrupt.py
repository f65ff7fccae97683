"""Ctrl-C at moments in which it must not be lost, nor leave anything."""

from __future__ import annotations

import signal
import subprocess
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from streamindex_service.demo.interrupt import interrupt_closes
from streamindex_service.testing.service import RunningService


class ClosedError(Exception):
    pass


@pytest.mark.parametrize("fails", [True, False])
def test_an_interrupt_closes_and_is_raised_at_the_end(fails: bool) -> None:
    closed = threading.Event()
    lock = threading.Condition()

    def work() -> None:
        with lock:
            signal.raise_signal(signal.SIGINT)  # no KeyboardInterrupt here, whatever is held
        assert closed.wait(30)
        if fails:
            raise ClosedError

    with pytest.raises(KeyboardInterrupt), interrupt_closes(closed.set):
        work()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_interrupt_is_raised_at_once() -> None:
    released = threading.Event()

    def work() -> None:
        signal.raise_signal(signal.SIGINT)
        try:
            signal.raise_signal(signal.SIGINT)
        finally:
            released.set()
        raise AssertionError

    with pytest.raises(KeyboardInterrupt), interrupt_closes(lambda: assert_true(released.wait(30))):
        work()


def assert_true(value: bool) -> None:
    assert value


def test_without_an_interrupt_nothing_happens() -> None:
    closed = threading.Event()
    with interrupt_closes(closed.set):
        pass
    with pytest.raises(ClosedError), interrupt_closes(closed.set):
        raise ClosedError
    assert not closed.is_set()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.fixture
def _own_temporary_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


@pytest.mark.usefixtures("_own_temporary_files")
def test_an_interrupt_while_the_service_is_started_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    processes = watch_processes(monkeypatch, lambda: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        RunningService().start()
    assert processes
    assert all(process.returncode is not None for process in processes)
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("_own_temporary_files")
def test_an_interrupt_while_the_service_is_stopped_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    processes = watch_processes(monkeypatch, lambda: None)
    service = RunningService()
    service._launch()
    monkeypatch.setattr(service, "worker_pids", lambda: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        service.stop()
    assert all(process.returncode is not None for process in processes)
    assert not list(tmp_path.iterdir())


def watch_processes(monkeypatch: pytest.MonkeyPatch, begun: Callable[[], None]) -> list[subprocess.Popen[bytes]]:
    """Processes as they are started; `begun` is called before whoever starts one knows of it."""
    processes = []
    start = subprocess.Popen

    def popen(*arguments, **options):
        process = start(*arguments, **options)
        processes.append(process)
        begun()
        return process

    monkeypatch.setattr(subprocess, "Popen", popen)
    return processes
