"""The commands against a running service, over both sockets."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from streamindex_service import cli
from streamindex_service.frontend.tokens import new_token
from streamindex_service.testing.service import RunningService, ServiceStartError
from tests.support.calls import Calls


@pytest.fixture(scope="module")
def service() -> Iterator[RunningService]:
    with RunningService({"worker": {"device": "cpu"}}, tcp=True, warnings_as_errors=True) as running:
        yield running


def streamindex(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "streamindex_service", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("kind", ["address", "tcp_address"])
def test_health(service: RunningService, kind: str) -> None:
    done = streamindex("health", "--address", getattr(service, kind))
    assert done.returncode == 0, done.stderr
    assert "SERVING on cpu" in done.stdout


def test_health_needs_no_token_and_tells_alive_from_ready(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """As probes ask it, of a service whose callers need tokens."""
    token, line = new_token("caller")
    (tmp_path / "tokens").write_text(line)
    (tmp_path / "right").write_text(token)
    (tmp_path / "wrong").write_text(new_token("caller")[0])
    settings = {"worker": {"device": "cpu"}, "auth": {"token_file": str(tmp_path / "tokens")}}
    with RunningService(settings) as service, Calls(service.address) as calls:

        def health(*options: str) -> tuple[Any, str]:
            monkeypatch.setattr(sys, "argv", ["streamindex", "health", "--address", service.address, *options])
            with pytest.raises(SystemExit) as ended:
                cli.main()
            return ended.value.code or 0, capsys.readouterr().out.removeprefix(service.address).strip()

        calls.metadata = (("authorization", f"Bearer {token}"),)
        assert health() == (0, ": SERVING")
        assert health("--alive") == (0, ": SERVING")
        code, text = health("--token-file", str(tmp_path / "right"))
        assert code == 0
        assert "on cpu" in text
        assert health("--token-file", str(tmp_path / "wrong")) == (1, "")
        with calls.append_call() as call:
            call.rpc.initial_metadata()  # a call that runs: the service drains for its sake
            service.process.send_signal(signal.SIGTERM)
            calls.wait_health(2)
            assert health() == (1, "")
            assert health("--alive") == (0, ": NOT_SERVING")
        assert service.process.wait(30) == 0
        assert health("--alive") == (1, "")


def test_load_for_people(service: RunningService) -> None:
    done = streamindex("load", "--address", service.address)
    assert done.returncode == 0, done.stderr
    assert all(word in done.stdout for word in ("hbm", "host", "ingress", "running_searches"))


def test_load_as_json(service: RunningService) -> None:
    done = streamindex("load", "--address", service.address, "--json")
    load = json.loads(done.stdout)
    assert load["ready"] is True
    assert set(load["ledgers"]) == {"hbm", "host", "ingress"}
    assert all(ledger["limit_bytes"] > 0 for ledger in load["ledgers"].values())


def test_top(service: RunningService) -> None:
    done = streamindex("top", "--address", service.address, "--count", "3", "--interval", "0.1")
    assert done.returncode == 0, done.stderr
    words = ("ready", "hbm", "host", "ingress", "keys there", "interactive", "standard", "batch", "caller")
    assert all(word in done.stdout for word in words)


def test_bench_transport() -> None:
    done = streamindex("bench", "transport", "--mib", "16", "--rounds", "1", "--json")
    assert done.returncode == 0, done.stderr
    rates = json.loads(done.stdout)
    ways = ["socket", "gRPC stream", "AppendKeys"]
    assert [(rate["kind"], rate["way"]) for rate in rates] == [(kind, way) for kind in ("unix", "tcp") for way in ways]
    for rate in rates:
        (socket,) = [each for each in rates if each["kind"] == rate["kind"] and each["way"] == "socket"]
        assert rate["bytes_per_s"] > 0
        assert rate["share_of_socket"] == pytest.approx(rate["bytes_per_s"] / socket["bytes_per_s"])
        assert (rate["share_of_grpc"] is None) == (rate["way"] == "socket")


def test_doctor_knows_a_running_service(service: RunningService) -> None:
    done = streamindex("doctor", "--tcp", service.tcp_address, "--unix", str(service.socket_path), "--json")
    assert done.returncode == 0, done.stdout
    found = {finding["name"]: finding for finding in json.loads(done.stdout)}
    assert "a StreamIndex service answers there" in found["tcp port"]["text"]
    assert "a StreamIndex service answers there" in found["unix socket"]["text"]


def test_a_socket_in_use_is_refused_in_one_line(service: RunningService) -> None:
    done = streamindex("serve", "--tcp", "", "--unix", str(service.socket_path), "--device", "cpu")
    assert done.returncode == 1
    assert "another server listens" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_unix_socket_is_its_owners(service: RunningService) -> None:
    assert stat.S_IMODE(service.socket_path.stat().st_mode) == 0o600


def test_stop_leaves_nothing() -> None:
    with RunningService({"worker": {"device": "cpu"}}) as running:
        pids = [running.process.pid, *running.worker_pids()]
        assert len(pids) == 2
        directory = running.socket_path.parent
        assert running.stop() == 0
    assert not directory.exists()
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]


def test_a_killed_frontend_takes_its_worker_along() -> None:
    with RunningService({"worker": {"device": "cpu"}}) as running:
        (worker,) = running.worker_pids()
        watch = os.pidfd_open(worker)
        os.kill(running.process.pid, signal.SIGKILL)
        import select

        assert select.select([watch], [], [], 10.0)[0], "the worker outlived its frontend"
        os.close(watch)


def test_a_service_that_cannot_start_shows_its_log() -> None:
    with pytest.raises(ServiceStartError, match="loopback"), RunningService({"server": {"tcp_address": "0.0.0.0:1"}}):
        pass
