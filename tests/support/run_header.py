"""Where and with what a long run was made, for its result."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from datetime import UTC, datetime
from typing import Any


def run_header(module: str, arguments: list[str]) -> dict[str, Any]:
    """Commit, date, versions, host and command."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    changed = subprocess.run(["git", "status", "--porcelain", "-uno"], capture_output=True, text=True, check=False)
    versions = {name: importlib.metadata.version(name) for name in ("grpcio", "numpy", "protobuf", "torch")}
    return {
        "commit": commit.stdout.strip() + (" with changes" if changed.stdout.strip() else ""),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        **versions,
        "system": f"{platform.system()} {platform.machine()}, {platform.libc_ver()[0]} {platform.libc_ver()[1]}",
        "cpus": len(os.sched_getaffinity(0)),
        "command": " ".join([f"python -m {module}", *arguments]),
    }
