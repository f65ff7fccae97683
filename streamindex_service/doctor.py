"""`streamindex doctor`: looks at everything the service needs, and says what to do about what is missing.

torch is looked at in a process of its own, so that the command line never imports it and a broken driver cannot take
the doctor down.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from streamindex_service import doctor_files
from streamindex_service.config import Settings
from streamindex_service.findings import Finding, Level
from streamindex_service.ipc.segments import Segment

__all__ = ["Finding", "Level", "examine"]

_PROBE_TIMEOUT_S = 90.0
_MIB = 1 << 20
_MIN_FILES, _GOOD_FILES = 256, 4096
_MAX_SOCKET_PATH_BYTES = 107  # sun_path holds 108 with its NUL
_PROBE = """
import ctypes, json
found = {}
try:
    import torch
    found["torch"] = torch.__version__
    found["cuda_build"] = torch.version.cuda
    if torch.cuda.is_available():
        found["devices"] = [
            [torch.cuda.get_device_properties(i).name, torch.cuda.get_device_properties(i).total_memory,
             list(torch.cuda.get_device_capability(i))]
            for i in range(torch.cuda.device_count())
        ]
except Exception as error:
    found["torch_error"] = repr(error)
try:
    import triton
    found["triton"] = triton.__version__
except Exception as error:
    found["triton_error"] = repr(error)
try:
    version = ctypes.c_int()
    if ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version)) == 0:
        found["driver_cuda"] = version.value
except OSError:
    pass
print(json.dumps(found))
"""


def examine(settings: Settings, is_service: Callable[[str], bool]) -> Iterator[Finding]:
    """Look at everything, cheapest first. `is_service(target)` tells whether a StreamIndex service answers there."""
    yield check_python(sys.version_info[:2])
    yield from check_packages()
    yield check_shared_memory()
    yield check_open_files(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    yield check_host_memory(settings, available_bytes())
    if settings.server.tcp_address:
        yield check_tcp(settings.server.tcp_address, is_service)
    if settings.server.unix_socket:
        yield check_unix_socket(settings.server.unix_socket, is_service)
    yield from doctor_files.check_tls(settings.tls)
    yield from doctor_files.check_callers(settings.auth)
    yield from doctor_files.check_spill(settings.memory)
    yield from doctor_files.check_metrics_port(settings.metrics)
    yield from doctor_files.check_traces(settings.traces)
    found = probe_torch()
    yield check_torch(found)
    yield check_driver(found)
    yield check_device(settings.worker.device, found)
    yield check_triton(settings.worker.device, found)


def check_python(version: tuple[int, ...]) -> Finding:
    """The interpreter is one of those the tests run with."""
    text = ".".join(map(str, version))
    if (3, 11) <= version <= (3, 13):
        return Finding("python", Level.OK, text)
    return Finding("python", Level.WARN, f"{text} is not among 3.11 to 3.13", "Use Python 3.11, 3.12 or 3.13.")


def check_packages() -> Iterator[Finding]:
    """Distributions whose versions matter on the wire, against the ranges that this package declares."""
    ranges = {"grpcio": (1, 76), "protobuf": (6, 31, 1), "grpcio-health-checking": (1, 76), "pydantic": (2, 9)}
    for name, least in ranges.items():
        wanted = ".".join(map(str, least))
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            yield Finding(name, Level.FAIL, "not installed", f"pip install '{name}>={wanted}'")
            continue
        numbers = tuple(int(part) for part in version.split(".")[:3] if part.isdigit())
        if numbers < least or (name == "protobuf" and numbers >= (8,)):
            limit = "<8" if name == "protobuf" else ""
            yield Finding(name, Level.FAIL, version, f"pip install '{name}>={wanted}{limit and ',' + limit}'")
        else:
            yield Finding(name, Level.OK, version)


def check_shared_memory() -> Finding:
    """A memory segment can be made, written, and once sealed no longer be shortened."""
    try:
        segment = Segment.create(_MIB)
    except (OSError, AttributeError) as error:
        return Finding(
            "shared memory",
            Level.FAIL,
            f"memfd_create with seals does not work: {error}",
            "Use Linux 3.17 or later, and allow memfd_create and fcntl seals in the container's seccomp profile.",
        )
    try:
        segment.map[:4] = b"test"
        with contextlib.suppress(PermissionError):
            os.ftruncate(segment.fd, 0)
            return Finding(
                "shared memory", Level.FAIL, "a sealed segment could be shortened", "Use a kernel that honours seals."
            )
    finally:
        segment.close()
    return Finding("shared memory", Level.OK, "memfd segments can be made and sealed")


def check_open_files(limit: int) -> Finding:
    """The soft limit of file descriptors: one a connection, one a memory segment."""
    shown = "unlimited" if limit == resource.RLIM_INFINITY else str(limit)
    remedy = f"Raise it: ulimit -n {_GOOD_FILES}, or LimitNOFILE={_GOOD_FILES} in the service's unit."
    if limit == resource.RLIM_INFINITY or limit >= _GOOD_FILES:
        return Finding("open files", Level.OK, shown)
    level = Level.WARN if limit >= _MIN_FILES else Level.FAIL
    return Finding("open files", level, f"{shown}, fewer than {_GOOD_FILES}", remedy)


def available_bytes() -> int:
    """Memory that this process could still get: of the machine, or of its control group if that is less."""
    available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            available = 1024 * int(line.split()[1])
    group = Path("/sys/fs/cgroup")
    with contextlib.suppress(OSError, ValueError):
        left = int((group / "memory.max").read_text()) - int((group / "memory.current").read_text())
        available = min(available, max(0, left))
    return available


def check_host_memory(settings: Settings, available: int) -> Finding:
    """The host budget fits what is free."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    budget = int(settings.memory.host_budget_bytes) or total // 2
    text = f"{_gib(available)} available, host budget {_gib(budget)}"
    if budget <= available:
        return Finding("host memory", Level.OK, text)
    return Finding(
        "host memory",
        Level.WARN,
        text,
        "Set memory.host_budget_bytes (--host-budget) below what is available, or the kernel may end the service.",
    )


def check_tcp(address: str, is_service: Callable[[str], bool]) -> Finding:
    """The TCP port is free, or a StreamIndex service holds it."""
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    if port == "0":
        return Finding("tcp port", Level.OK, f"{address}: a free one will be taken")
    try:
        doctor_files.try_to_bind(host, int(port))
    except OSError as error:
        if is_service(address):
            return Finding("tcp port", Level.OK, f"{address}: a StreamIndex service answers there")
        remedy = "Stop what listens there, or choose another address with --tcp HOST:PORT (port 0 takes a free one)."
        return Finding("tcp port", Level.FAIL, f"{address}: {error.strerror or error}", remedy)
    return Finding("tcp port", Level.OK, f"{address} is free")


def check_unix_socket(path: str, is_service: Callable[[str], bool]) -> Finding:
    """A socket can be made at that path."""
    name = "unix socket"
    if len(os.fsencode(path)) > _MAX_SOCKET_PATH_BYTES:
        remedy = f"Choose a path of at most {_MAX_SOCKET_PATH_BYTES} bytes with --unix."
        return Finding(name, Level.FAIL, f"{path}: too long", remedy)
    parent = Path(path).absolute().parent
    if not parent.is_dir():
        return Finding(name, Level.FAIL, f"{parent} is no directory", f"Make it: mkdir -p {parent}")
    if not os.access(parent, os.W_OK | os.X_OK):
        return Finding(name, Level.FAIL, f"{parent} is not writable", "Choose another path with --unix.")
    if Path(path).exists():
        if is_service(f"unix://{Path(path).absolute()}"):
            return Finding(name, Level.OK, f"{path}: a StreamIndex service answers there")
        return Finding(name, Level.WARN, f"{path} exists and nobody answers there", f"Remove it: rm {path}")
    return Finding(name, Level.OK, f"{path} can be made")


def probe_torch() -> dict[str, Any]:
    """What another interpreter finds of torch, Triton and the driver; {"torch_error": …} when it finds nothing."""
    try:
        done = subprocess.run(  # noqa: S603
            [sys.executable, "-c", _PROBE], capture_output=True, text=True, timeout=_PROBE_TIMEOUT_S, check=False
        )
        found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    except subprocess.TimeoutExpired:
        return {"torch_error": f"importing it took more than {_PROBE_TIMEOUT_S:.0f} s"}
    except (IndexError, ValueError):
        return {"torch_error": (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]}
    return found


def check_torch(found: dict[str, Any]) -> Finding:
    """torch can be imported and is new enough."""
    if "torch" not in found:
        return Finding("torch", Level.FAIL, str(found.get("torch_error", "not found")), "pip install 'torch>=2.10'")
    version = str(found["torch"])
    build = f"CUDA {found['cuda_build']}" if found.get("cuda_build") else "without CUDA"
    if tuple(int(part) for part in version.split("+")[0].split(".")[:2] if part.isdigit()) < (2, 10):
        return Finding("torch", Level.FAIL, version, "pip install 'torch>=2.10'")
    return Finding("torch", Level.OK, f"{version}, built {build}")


def check_driver(found: dict[str, Any]) -> Finding:
    """The NVIDIA driver, where there is one."""
    version = found.get("driver_cuda")
    if version is None:
        return Finding("driver", Level.OK, "no NVIDIA driver: searches run on the CPU")
    text = f"supports CUDA {version // 1000}.{version % 1000 // 10}"
    if found.get("devices"):
        return Finding("driver", Level.OK, text)
    if found.get("cuda_build"):
        remedy = "Look at nvidia-smi; update the driver if it is older than torch's CUDA; check CUDA_VISIBLE_DEVICES."
    else:
        remedy = "This torch was built without CUDA: install a CUDA build of torch to use the GPU."
    return Finding("driver", Level.WARN, f"{text}, but torch sees no GPU", remedy)


def check_device(wanted: str, found: dict[str, Any]) -> Finding:
    """The device that worker.device names is there."""
    devices: list[list[Any]] = found.get("devices") or []
    if wanted == "cpu" or (wanted == "auto" and not devices):
        return Finding("device", Level.OK, f"cpu, {os.cpu_count()} cores")
    index = 0 if wanted == "auto" else int(wanted.partition(":")[2])
    if index >= len(devices):
        remedy = "Use --device auto or cpu, or make the GPU visible to this process (see driver)."
        return Finding("device", Level.FAIL, f"{wanted}: torch sees {len(devices)} GPUs", remedy)
    name, total, (major, minor) = devices[index]
    text = f"cuda:{index}: {name}, {_gib(total)}, compute capability {major}.{minor}"
    if major < 8:
        return Finding("device", Level.WARN, text, "Kernels are made for compute capability 8.0 and later.")
    return Finding("device", Level.OK, text)


def check_triton(wanted: str, found: dict[str, Any]) -> Finding:
    """Triton is there when a GPU will be used."""
    if "triton" in found:
        return Finding("triton", Level.OK, str(found["triton"]))
    if wanted == "cpu" or not found.get("devices"):
        return Finding("triton", Level.OK, "not installed; a CPU does not need it")
    remedy = "Install the Triton that your torch build names as its dependency; without it searches run as `chunked`."
    return Finding("triton", Level.WARN, "not installed", remedy)


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / (1 << 30):.1f} GiB"
