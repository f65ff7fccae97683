"""The command line without a service: what it imports, prints and refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from streamindex_service import cli
from streamindex_service.config import Settings
from streamindex_service.frontend import server


@pytest.fixture(autouse=True)
def _no_settings_around(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("STREAMINDEX_")]:
        monkeypatch.delenv(name)


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Run a command in this process; its exit code."""
    monkeypatch.setattr(sys, "argv", ["streamindex", *arguments])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    return int(stopped.value.code or 0)


def test_start_up_imports_neither_torch_nor_grpc() -> None:
    program = "import sys, streamindex_service.cli; print([m for m in ('torch', 'grpc', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_frontend_imports_no_torch() -> None:
    program = "import sys, streamindex_service.cli, streamindex_service.frontend.server; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_help_names_every_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(monkeypatch, "--help") == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("serve", "demo", "health", "load", "top", "config", "doctor", "version"))


def test_flags_of_serve_become_settings(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[Settings] = []

    async def serve(settings: Settings, on_listening: Any) -> None:
        seen.append(settings)
        on_listening(server.Listening("127.0.0.1:7", "/run/x.sock"))

    monkeypatch.setattr(server, "serve", serve)
    monkeypatch.setenv("STREAMINDEX_WORKER__DEVICE", "cuda:3")
    monkeypatch.setenv("STREAMINDEX_WORKER__CPU_THREADS", "2")
    flags = "--tcp 127.0.0.1:7 --unix /run/x.sock --device cpu --implementation chunked --device-budget 1GiB"
    assert command(monkeypatch, "serve", *flags.split(), "--host-budget", "2GiB", "--log-level", "error") == 0
    (settings,) = seen
    assert (settings.server.tcp_address, settings.server.unix_socket) == ("127.0.0.1:7", "/run/x.sock")
    assert (settings.worker.device, settings.worker.implementation) == ("cpu", "chunked")
    assert settings.worker.cpu_threads == 2
    assert settings.memory.device_budget_bytes == 1 << 30
    assert settings.memory.host_budget_bytes == 2 << 30
    assert settings.log.level == "error"
    assert capsys.readouterr().out.strip().endswith("listens on 127.0.0.1:7 and unix:///run/x.sock")


def test_an_address_in_use_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    async def serve(settings: Settings, on_listening: Any) -> None:
        raise server.SocketInUseError("another server listens on /run/x.sock")

    monkeypatch.setattr(server, "serve", serve)
    assert command(monkeypatch, "serve") == cli.EXIT_FAILED
    assert "another server listens" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["serve", "--tcp", "0.0.0.0:1"],
        ["serve", "--device", "tpu"],
        ["serve", "--device-budget", "much"],
        ["config", "show", "--config", "/no/such/file.toml"],
        ["health", "--address", "nonsense"],
    ],
)
def test_wrong_settings_are_told_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    assert command(monkeypatch, *arguments) == cli.EXIT_USAGE
    shown = capsys.readouterr().err
    assert shown.startswith("streamindex: ")
    assert "Traceback" not in shown


def test_a_file_that_is_no_toml(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "x.toml"
    file.write_text("[server\n")
    assert command(monkeypatch, "config", "show", "--config", str(file)) == cli.EXIT_USAGE
    assert "cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["health", "load", "top"])
def test_no_service_is_exit_code_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, name: str
) -> None:
    assert command(monkeypatch, name, "--address", f"unix://{tmp_path}/absent.sock") == cli.EXIT_FAILED
    assert "UNAVAILABLE" in capsys.readouterr().err


def test_config_show_as_json(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("STREAMINDEX_LIMITS__MAX_TOP_K", "77")
    assert command(monkeypatch, "config", "show", "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["limits"]["max_top_k"] == 77
    assert shown["server"]["tcp_address"] == "127.0.0.1:50051"


def test_config_show_for_people(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(monkeypatch, "config", "show") == 0
    assert "worker.device" in capsys.readouterr().out


def test_secrets_are_masked() -> None:
    class Inner(BaseModel):
        auth_token: str = "t0p"
        password: str = ""
        tls_key_file: str = "/etc/key.pem"
        name: str = "x"

    class Outer(BaseModel):
        inner: Inner = Inner()

    shown = cli.masked(Outer())
    assert shown == {"inner": {"auth_token": "***", "password": "", "tls_key_file": "***", "name": "x"}}


def test_default_address_prefers_the_unix_socket() -> None:
    assert cli.default_address(cli.read_settings(None)) == "127.0.0.1:50051"
    both = cli.read_settings(None, server={"unix_socket": "/run/x.sock"})
    assert cli.default_address(both) == "unix:///run/x.sock"
    with pytest.raises(cli.CommandError):
        cli.default_address(cli.read_settings(None, server={"tcp_address": ""}))


@pytest.mark.parametrize("arguments", [["--keys", "99999"], ["--queries", "257"], ["--heads", "8"], ["--ratio", "4"]])
def test_the_demo_says_what_its_data_does_not_hold(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    assert command(monkeypatch, "demo", *arguments) == cli.EXIT_FAILED
    assert "--synthetic" in capsys.readouterr().err
