"""Who may import whom: in the text of every module, and in what a fresh interpreter has loaded afterwards."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CLIENT = ROOT / "client"
OURS = "streamindex_service"
STANDARD = set(sys.stdlib_module_names)


@dataclass(frozen=True)
class Rule:
    """What a package may import: parts of the service by name, other distributions by their top-level names."""

    folder: Path
    parts: set[str] = field(default_factory=set)
    others: set[str] = field(default_factory=set)
    never_loaded: set[str] = field(default_factory=set)

    @property
    def name(self) -> str:
        base = CLIENT if self.folder.is_relative_to(CLIENT) else ROOT
        return ".".join(self.folder.relative_to(base).parts)


SERVICE = ROOT / OURS
CONTRACT = {"streamindex"}
RULES = {
    "core": Rule(
        SERVICE / "core",
        {"core", "errors"},
        never_loaded={"torch", "grpc", "numpy", "google", "pydantic", "structlog", "streamindex", f"{OURS}.ipc"},
    ),
    "ops": Rule(
        SERVICE / "ops",
        {"ops"},
        {"torch", "numpy", "triton"},
        never_loaded={"grpc", "google", "streamindex", f"{OURS}.core", f"{OURS}.ipc", f"{OURS}.errors"},
    ),
    "ipc": Rule(
        SERVICE / "ipc",
        {"ipc", "core", "errors"},
        {"google"},
        never_loaded={"grpc", "torch", f"{OURS}.ops", f"{OURS}.worker", f"{OURS}.frontend"},
    ),
    "worker": Rule(
        SERVICE / "worker",
        {"worker", "ops", "ipc", "core", "errors", "telemetry"},
        {"torch", "numpy", "google"},
        never_loaded={
            "grpc",
            "grpc_health",
            "streamindex",
            "prometheus_client",
            "opentelemetry",
            f"{OURS}.frontend",
            f"{OURS}.testing",
        },
    ),
    "telemetry": Rule(
        SERVICE / "telemetry",
        {"telemetry"},
        {"structlog"},
        never_loaded={
            "grpc",
            "torch",
            "numpy",
            "google",
            "streamindex",
            "prometheus_client",
            "opentelemetry",
            f"{OURS}.core",
        },
    ),
    "tracing": Rule(
        SERVICE / "tracing",
        {"tracing", "telemetry", "config", ""},
        {"opentelemetry"},
        never_loaded={"torch", "numpy", f"{OURS}.core", f"{OURS}.frontend", f"{OURS}.worker"},
    ),
    "frontend": Rule(
        SERVICE / "frontend",
        {"frontend", "core", "ipc", "errors", "config", "telemetry", "tracing", ""},
        {"grpc", "grpc_health", "grpc_reflection", "google", "numpy", "structlog", "prometheus_client"} | CONTRACT,
        never_loaded={
            "torch",
            "triton",
            "opentelemetry",
            f"{OURS}.tracing",
            f"{OURS}.ops",
            f"{OURS}.worker",
            f"{OURS}.testing",
        },
    ),
    "client": Rule(
        CLIENT / "streamindex_client",
        set(),
        {"streamindex_client", "grpc", "google", "numpy", "crc32c"} | CONTRACT,
        never_loaded={"torch", "opentelemetry", "pydantic", "structlog", "typer", OURS},
    ),
    "contract": Rule(
        CLIENT / "streamindex",
        set(),
        {"grpc", "google", "numpy", "crc32c"} | CONTRACT,
        never_loaded={"torch", "streamindex_client", OURS},
    ),
}
NAMED = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
# Its users choose whether there is a torch or OpenTelemetry; they are looked for when a tensor or a call comes, never
# before.
OPTIONAL = {"client": {"torch", "opentelemetry"}}


def modules(rule: Rule) -> list[Path]:
    found = sorted(rule.folder.rglob("*.py"))
    assert found, f"{rule.folder} has no modules"
    return found


def imports(path: Path, top_level_only: bool = False) -> set[str]:
    """Full names that a module imports; `from a import b` counts as both `a` and `a.b`."""
    names: set[str] = set()
    tree = ast.parse(path.read_text())
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def part_of(name: str) -> str:
    """The part of the service that a name belongs to, "" for the service itself."""
    inner = name.split(".")[1:]
    return inner[0] if inner and ((SERVICE / inner[0]).is_dir() or (SERVICE / f"{inner[0]}.py").exists()) else ""


@NAMED
def test_the_text_of_every_module_keeps_to_the_rule(rule):
    optional = next((OPTIONAL.get(name, set()) for name, other in RULES.items() if other is rule), set())
    for path in modules(rule):
        for name in imports(path):
            top = name.partition(".")[0]
            if top in STANDARD:
                continue
            if top == OURS:
                is_package = name == OURS
                assert is_package or part_of(name) in rule.parts, f"{path} imports {name}"
            else:
                assert top in rule.others | optional, f"{path} imports {name}"
        for name in imports(path, top_level_only=True):
            assert name.partition(".")[0] not in optional, f"{path} imports {name} before it is needed"


@NAMED
def test_a_fresh_interpreter_loads_nothing_that_is_forbidden(rule):
    base = CLIENT if rule.folder.is_relative_to(CLIENT) else ROOT
    names = []
    for path in modules(rule):
        if path.name in ("triton.py", "__main__.py"):  # kernels need their compiler; a main runs
            continue
        relative = path.relative_to(base).with_suffix("")
        names.append(".".join(relative.parts[:-1] if relative.name == "__init__" else relative.parts))
    if rule is RULES["worker"]:
        names.append(f"{OURS}.worker.__main__")  # it does nothing when it is only imported
    program = (
        "import importlib, json, sys\n"
        f"for name in {names!r}: importlib.import_module(name)\n"
        "print(json.dumps(sorted(sys.modules)))"
    )
    path = os.pathsep.join(map(str, (ROOT, CLIENT, os.environ.get("PYTHONPATH", ""))))
    environment = {**os.environ, "PYTHONPATH": path}
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=False)
    assert run.returncode == 0, run.stderr
    loaded = set(json.loads(run.stdout.splitlines()[-1]))
    assert set(names) <= loaded
    assert not rule.never_loaded & loaded


@pytest.mark.parametrize("name", ["utils", "util", "helpers", "helper", "misc", "common", "shared", "stuff"])
def test_no_module_is_a_grab_bag(name):
    product = [path for folder in (SERVICE, CLIENT, ROOT / "proto") for path in folder.rglob("*")]
    assert len(product) > 50
    assert [path for path in product if path.stem == name] == []


def test_nothing_received_is_ever_evaluated():
    """No pickle, torch.load, eval or exec, and no attribute looked up under a name that came over the wire."""
    names = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
    for path in sorted((*SERVICE.rglob("*.py"), *CLIENT.rglob("*.py"))):
        assert not names & {name.partition(".")[0] for name in imports(path)}, path
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            assert called not in ("eval", "exec", "torch.load", "compile"), f"{path}:{node.lineno} calls {called}"
