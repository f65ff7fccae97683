"""Each finding of the doctor, good and bad; a bad one says what to do."""

from __future__ import annotations

import os
import resource
import socket
from pathlib import Path
from typing import Any

import pytest

from streamindex_service import doctor
from streamindex_service.config import Settings, load
from streamindex_service.doctor import Finding, Level

GPU = {"torch": "2.10.0", "cuda_build": "12.8", "devices": [["NVIDIA H200", 150 << 30, [9, 0]]], "driver_cuda": 12080}


def nobody(target: str) -> bool:
    return False


def somebody(target: str) -> bool:
    return True


def is_bad(finding: Finding, level: Level) -> bool:
    """Bad, and with a remedy."""
    return finding.level is level and bool(finding.remedy)


def test_a_whole_examination_of_this_machine() -> None:
    findings = list(doctor.examine(load(None, server={"tcp_address": "127.0.0.1:0"}), nobody))
    names = [finding.name for finding in findings]
    assert {"python", "grpcio", "protobuf", "shared memory", "open files", "host memory", "tcp port"} <= set(names)
    assert {"torch", "driver", "device", "triton"} <= set(names)
    assert len(names) == len(set(names))
    assert not [finding for finding in findings if finding.level is Level.FAIL]
    assert all(finding.remedy for finding in findings if finding.level is not Level.OK)


@pytest.mark.parametrize(("version", "level"), [((3, 11), Level.OK), ((3, 13), Level.OK), ((3, 10), Level.WARN)])
def test_python(version: tuple[int, int], level: Level) -> None:
    assert doctor.check_python(version).level is level


@pytest.mark.parametrize(
    ("limit", "level"),
    [(resource.RLIM_INFINITY, Level.OK), (65536, Level.OK), (1024, Level.WARN), (64, Level.FAIL)],
)
def test_open_files(limit: int, level: Level) -> None:
    finding = doctor.check_open_files(limit)
    assert finding.level is level
    assert (level is Level.OK) == (not finding.remedy)


def test_a_missing_package_and_an_old_one(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"grpcio": "1.60.0", "protobuf": "8.0.0", "pydantic": "2.9"}

    def version(name: str) -> str:
        if name not in versions:
            raise doctor.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(doctor.metadata, "version", version)
    found = {finding.name: finding for finding in doctor.check_packages()}
    assert is_bad(found["grpcio"], Level.FAIL)
    assert is_bad(found["protobuf"], Level.FAIL)
    assert is_bad(found["grpcio-health-checking"], Level.FAIL)
    assert found["pydantic"].level is Level.OK


def test_shared_memory_that_is_forbidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> int:
        raise PermissionError("not permitted")

    assert doctor.check_shared_memory().level is Level.OK
    monkeypatch.setattr(os, "memfd_create", refuse)
    assert is_bad(doctor.check_shared_memory(), Level.FAIL)


def test_a_host_budget_beyond_what_is_free() -> None:
    settings = load(None, memory={"host_budget_bytes": "2GiB"})
    assert doctor.check_host_memory(settings, 3 << 30).level is Level.OK
    assert is_bad(doctor.check_host_memory(settings, 1 << 30), Level.WARN)


def test_a_port_that_is_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        assert is_bad(doctor.check_tcp(address, nobody), Level.FAIL)
        assert doctor.check_tcp(address, somebody).level is Level.OK
    assert doctor.check_tcp(address, nobody).level is Level.OK


def test_unix_sockets(tmp_path: Path) -> None:
    path = tmp_path / "s.sock"
    assert doctor.check_unix_socket(str(path), nobody).level is Level.OK
    path.touch()
    assert is_bad(doctor.check_unix_socket(str(path), nobody), Level.WARN)
    assert doctor.check_unix_socket(str(path), somebody).level is Level.OK
    assert is_bad(doctor.check_unix_socket(str(tmp_path / "absent" / "s.sock"), nobody), Level.FAIL)
    assert is_bad(doctor.check_unix_socket("/tmp/" + "x" * 120, nobody), Level.FAIL)


def test_torch_that_is_missing_or_old() -> None:
    assert is_bad(doctor.check_torch({"torch_error": "ModuleNotFoundError"}), Level.FAIL)
    assert is_bad(doctor.check_torch({"torch": "2.4.1+cpu"}), Level.FAIL)
    assert doctor.check_torch(GPU).level is Level.OK


def test_a_driver_that_torch_cannot_use() -> None:
    assert doctor.check_driver({}).level is Level.OK
    assert doctor.check_driver(GPU).level is Level.OK
    assert is_bad(doctor.check_driver({"driver_cuda": 12080}), Level.WARN)
    assert is_bad(doctor.check_driver({"driver_cuda": 11040, "cuda_build": "12.8"}), Level.WARN)


@pytest.mark.parametrize(
    ("wanted", "found", "level"),
    [
        ("auto", {}, Level.OK),
        ("cpu", GPU, Level.OK),
        ("auto", GPU, Level.OK),
        ("cuda:0", GPU, Level.OK),
        ("cuda:1", GPU, Level.FAIL),
        ("cuda:0", {}, Level.FAIL),
        ("auto", {"devices": [["Old", 8 << 30, [7, 0]]]}, Level.WARN),
    ],
)
def test_devices(wanted: str, found: dict[str, Any], level: Level) -> None:
    assert doctor.check_device(wanted, found).level is level


def test_triton_matters_on_a_gpu_alone() -> None:
    assert doctor.check_triton("auto", {}).level is Level.OK
    assert doctor.check_triton("cpu", GPU).level is Level.OK
    assert is_bad(doctor.check_triton("auto", GPU), Level.WARN)
    assert doctor.check_triton("auto", {**GPU, "triton": "3.6.0"}).level is Level.OK


def test_a_torch_that_kills_its_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_PROBE", "import sys; sys.exit('no such library')")
    assert "no such library" in doctor.probe_torch()["torch_error"]


def test_a_torch_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_PROBE", "import time; time.sleep(60)")
    monkeypatch.setattr(doctor, "_PROBE_TIMEOUT_S", 0.2)
    assert "more than" in doctor.probe_torch()["torch_error"]


def test_sockets_are_looked_at_only_where_they_are_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "probe_torch", lambda: GPU)
    names = {finding.name for finding in doctor.examine(Settings(server={"tcp_address": ""}), nobody)}  # type: ignore[arg-type]
    assert "tcp port" not in names
    assert "unix socket" not in names
