"""Collects wheels for a CUDA host without a network that has Python 3.12, torch and Triton already.

    tools/wheelhouse.py DEST

What is collected: the dependencies of the service and the client with their extras `dev` and `load`, and what those
depend on, under constraints.txt. Left out: torch, Triton and the CUDA packages, which the host has; the linters, which
have no business there. On the host:

    pip install --no-index --no-deps --target DIR DEST/*.whl
    PYTHONPATH=DIR make gpu-check VENV= PYTHON=python3
"""

from __future__ import annotations

import subprocess
import sys
import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path

from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PYTHON = "3.12"
PLATFORMS = ("manylinux2014_x86_64", "manylinux_2_17_x86_64", "manylinux_2_28_x86_64", "linux_x86_64")
MAX_TOTAL_BYTES = 55 << 20
LEFT_OUT = ("torch", "triton", "streamindex-client", "streamindex-service", "buf-bin", "mypy", "ruff")
_ROUNDS = 5  # of looking for what markers of another Python ask for
_ENVIRONMENT = {**default_environment(), "python_version": PYTHON, "python_full_version": f"{PYTHON}.0", "extra": ""}


def wanted() -> list[Requirement]:
    """The requirements that the project's files name, without those left out."""
    texts: list[str] = []
    for file in (ROOT / "pyproject.toml", ROOT / "client" / "pyproject.toml"):
        project = tomllib.loads(file.read_text())["project"]
        texts += project["dependencies"]
        for extra in ("dev", "load"):
            texts += project.get("optional-dependencies", {}).get(extra, [])
    return [requirement for requirement in map(Requirement, texts) if _belongs(requirement)]


def missing(folder: Path) -> list[Requirement]:
    """What the collected wheels require on the host's Python and is not among them.

    pip evaluates markers for the Python that it runs on, which may be another than the host's.
    """
    have = {_name(wheel) for wheel in folder.glob("*.whl")}
    found: dict[str, Requirement] = {}
    for wheel in folder.glob("*.whl"):
        for requirement in _requirements(wheel):
            name = canonicalize_name(requirement.name)
            if _belongs(requirement) and name not in have:
                found[name] = requirement
    return list(found.values())


def download(requirements: list[Requirement], folder: Path) -> None:
    """Fetch wheels for the host, and of what they depend on. Raises CalledProcessError."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--only-binary", ":all:", "--dest", str(folder)]
    command += ["--python-version", PYTHON, "--implementation", "cp", "--constraint", str(ROOT / "constraints.txt")]
    for platform in PLATFORMS:
        command += ["--platform", platform]
    # a marker that the host's Python satisfies was looked at already
    command += [_without_marker(each) for each in requirements]
    subprocess.run(command, check=True)  # noqa: S603


def main() -> None:
    """Collect, check the size, tell how to install."""
    if len(sys.argv) != 2:
        sys.exit(f"usage: {sys.argv[0]} DEST")
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for wheel in folder.glob("*.whl"):
        wheel.unlink()
    needed = wanted()
    for _ in range(_ROUNDS):
        try:
            download(needed, folder)
        except subprocess.CalledProcessError as error:
            sys.exit(f"pip could not collect the wheels (exit code {error.returncode})")
        for wheel in folder.glob("*.whl"):
            if _name(wheel) in LEFT_OUT or _name(wheel).startswith("nvidia-cu"):
                sys.exit(f"{wheel.name} came along: a dependency asks for what the host has")
        needed = missing(folder)
        if not needed:
            break
    else:
        sys.exit(f"still missing: {', '.join(map(str, needed))}")
    wheels = sorted(folder.glob("*.whl"))
    total = sum(wheel.stat().st_size for wheel in wheels)
    report(folder, wheels, total)
    if total > MAX_TOTAL_BYTES:
        sys.exit(f"{total / (1 << 20):.1f} MiB, more than the {MAX_TOTAL_BYTES >> 20} MiB that may be carried")


def report(folder: Path, wheels: list[Path], total: int) -> None:
    """Print what was collected."""
    lines = [f"{wheel.stat().st_size / (1 << 20):7.2f} MiB  {wheel.name}" for wheel in wheels]
    lines += [
        f"{total / (1 << 20):7.2f} MiB in {len(wheels)} wheels, for Python {PYTHON}",
        f"left out: {', '.join(LEFT_OUT)} and all CUDA packages",
        f"on the host: python3 -m pip install --no-index --no-deps --target DIR {folder}/*.whl",
        "             PYTHONPATH=DIR make gpu-check VENV= PYTHON=python3",
    ]
    sys.stdout.write("\n".join(lines) + "\n")


def _belongs(requirement: Requirement) -> bool:
    if requirement.marker is not None and not requirement.marker.evaluate(_ENVIRONMENT):
        return False
    return canonicalize_name(requirement.name) not in LEFT_OUT


def _without_marker(requirement: Requirement) -> str:
    bare = Requirement(str(requirement))
    bare.marker = None
    return str(bare)


def _name(wheel: Path) -> str:
    return canonicalize_name(wheel.name.split("-")[0])


def _requirements(wheel: Path) -> list[Requirement]:
    with zipfile.ZipFile(wheel) as archive:
        member = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        headers = Parser().parsestr(archive.read(member).decode(), headersonly=True)
    return [Requirement(text) for text in headers.get_all("Requires-Dist") or []]


if __name__ == "__main__":
    main()
