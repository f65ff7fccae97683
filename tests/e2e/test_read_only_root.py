"""The service where all file systems are read-only but what the deployments mount, in a mount namespace of its own."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ENVIRONMENT = dict(re.findall(r"\b(HOME|TRITON_CACHE_DIR)=(\S+)", (ROOT / "Dockerfile").read_text()))
UNSHARE = ["unshare", "--user", "--map-root-user", "--mount"]
NO_MOUNTS = 77
MOUNTS = f"""
set -e
trap 'exit {NO_MOUNTS}' ERR
mount --make-rprivate /
for place in /run /var/cache /dev/shm; do mount -t tmpfs -o mode=0755 tmpfs $place; done
for place in /run/streamindex /var/cache/streamindex; do
    mkdir $place
    mount -t tmpfs -o mode=0700 tmpfs $place
done
for place in / /run /var/cache /dev/shm; do mount -o remount,bind,ro $place; done
exec "$@"
"""
# The service's socket, and what its starter keeps, are in the one directory; what is written besides is told.
INSIDE = """
import json, os
from pathlib import Path
import numpy as np
import streamindex_client
from streamindex_service.testing.service import RunningService

def is_writable(place):
    try:
        Path(place, "probe").touch()
    except OSError:
        return False
    return True

# a file system of its own is not what was made read-only above
PLACES = ["/", "/run", "/dev/shm", "/var/cache", *([] if os.path.ismount("/tmp") else ["/tmp"])]
keys = np.eye(64, dtype=np.float32)
with RunningService({"worker": {"device": "cpu"}, "memory": {"host_budget_bytes": "64MiB"}}) as service:
    with streamindex_client.connect(service.address) as client:
        cache = client.create_key_cache(heads=1, head_dim=64, ratio=1, key_format="fp32", layers=1)
        cache.append(layer=0, keys=keys)
        ones = np.ones((64, 1), np.float32)
        parts = list(cache.search(layer=0, q=keys[:, None], w=ones, top_k=1, start_position=63))
    places = [Path("/run/streamindex"), Path("/var/cache/streamindex")]
    print(json.dumps({
        "right": bool((np.concatenate([part.indices for part in parts])[:, 0] == np.arange(64)).all()),
        "code": service.process.poll(),
        "files": sorted(path.name for place in places for path in place.rglob("*") if not path.is_dir()),
        "writable": [place for place in PLACES if is_writable(place)],
    }))
"""


def test_nothing_is_written_but_the_socket() -> None:
    """On a CPU not even the cache of compiled kernels, nor anything in /tmp."""
    environment = {**os.environ, **ENVIRONMENT, "TMPDIR": "/run/streamindex", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [*UNSHARE, "bash", "-c", MOUNTS, "bash", sys.executable, "-c", INSIDE]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False, cwd=ROOT, env=environment)
    if done.returncode == NO_MOUNTS or done.stderr.startswith("unshare: "):
        pytest.skip(f"no mount namespaces for this user here: {done.stderr[:200]}")
    assert done.returncode == 0, done.stderr[-4000:]
    assert json.loads(done.stdout) == {
        "right": True,
        "code": None,
        "files": ["s.sock", "stderr", "stdout"],
        "writable": [],
    }
