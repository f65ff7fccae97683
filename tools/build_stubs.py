"""Build the protobuf stubs from `proto/`; with `--check`, only say whether the committed ones are up to date."""

from __future__ import annotations

import argparse
import importlib.resources
import sys
import tempfile
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent
# proto package folder -> where its Python package is rooted
OUTPUTS = {"streamindex/v1": ROOT / "client", "streamindex_service/ipc/v1": ROOT}


def build(package: str, out: Path) -> list[Path]:
    """Write the stubs of one proto package below `out`; return their paths relative to it."""
    protos = sorted(str(p.relative_to(ROOT / "proto")) for p in (ROOT / "proto" / package).glob("*.proto"))
    include = str(importlib.resources.files("grpc_tools") / "_proto")
    arguments = ["protoc", f"-I{ROOT / 'proto'}", f"-I{include}", f"--python_out={out}", f"--pyi_out={out}"]
    if package == "streamindex/v1":
        arguments.append(f"--grpc_python_out={out}")
    if protoc.main([*arguments, *protos]) != 0:
        raise SystemExit(f"protoc failed on {package}")
    for services in (out / package).glob("*_pb2_grpc.py"):
        if "Stub(object)" not in services.read_text():  # a file without services
            services.unlink()
    return sorted(p.relative_to(out) for p in (out / package).glob("*_pb2*"))


def check() -> int:
    """Compare the committed stubs with fresh ones; return the number of files that differ."""
    stale = 0
    for package, root in OUTPUTS.items():
        with tempfile.TemporaryDirectory() as scratch:
            fresh = build(package, Path(scratch))
            committed = sorted(p.relative_to(root) for p in (root / package).glob("*_pb2*"))
            for path in sorted({*fresh, *committed}):
                one, other = Path(scratch) / path, root / path
                if not (one.exists() and other.exists() and one.read_bytes() == other.read_bytes()):
                    sys.stderr.write(f"{path} is not what proto/ says: run `make stubs`\n")
                    stale += 1
    return stale


def main() -> int:
    """Build or check."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    if parser.parse_args().check:
        return 1 if check() else 0
    for package, root in OUTPUTS.items():
        for path in build(package, root):
            print(path)  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())
