"""What deployment files name is there: settings, commands, ports, paths, metrics; and what they promise is written."""

from __future__ import annotations

import configparser
import json
import re
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from loadtests.parameters import Parameters
from streamindex_service.cli import app
from streamindex_service.config import Settings, load
from tests.faults.soak import ALLOCATOR

ROOT = Path(__file__).parents[2]
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
DOCKERFILE = (ROOT / "Dockerfile").read_text()
KUBERNETES = ROOT / "deploy" / "kubernetes"
UNIT = ROOT / "deploy" / "systemd" / "streamindex.service"
USER = 10001
METRICS_PORT = 9464


def seconds(text: str) -> float:
    return float(text.removesuffix("s"))


def unit() -> configparser.RawConfigParser:
    """The systemd unit; of a key that is there several times the last value."""
    parser = configparser.RawConfigParser(strict=False)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read(UNIT)
    return parser


def manifest() -> dict[str, Any]:
    return yaml.safe_load((KUBERNETES / "statefulset.yaml").read_text())


def pod() -> dict[str, Any]:
    return manifest()["spec"]["template"]["spec"]


def container() -> dict[str, Any]:
    (only,) = pod()["containers"]
    return only


def kubernetes_settings(monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.delenv("STREAMINDEX_SERVER__UNIX_SOCKET", raising=False)
    return load(KUBERNETES / "streamindex.toml")


def stages() -> dict[str, list[str]]:
    """Instructions of the Dockerfile by stage; those of the stage that it is made from come first."""
    found: dict[str, list[str]] = {}
    stage = ""
    for line in re.sub(r"\\\n", " ", DOCKERFILE).splitlines():
        if begun := re.fullmatch(r"FROM (\S+) AS (\S+)", line):
            stage = begun[2]
            found[stage] = list(found.get(begun[1], []))
        elif stage and line and not line.startswith("#"):
            found[stage].append(re.sub(r"\s+", " ", line))
    return found


class TestNames:
    @pytest.mark.parametrize("path", ["Dockerfile", "docker-compose.yml", "deploy/systemd/streamindex.service"])
    def test_environment_variables_are_settings(self, path: str) -> None:
        names = re.findall(r"STREAMINDEX_([A-Z]+)__([A-Z_]+)", (ROOT / path).read_text())
        assert names
        for section, name in names:
            fields = type(getattr(Settings(), section.lower())).model_fields
            assert name.lower() in fields, f"{section}__{name}"

    def test_load_test_variables_are_parameters(self) -> None:
        names = [name for name in COMPOSE["services"]["locust"]["environment"] if name.startswith("LOADTEST_")]
        assert names
        assert {name.removeprefix("LOADTEST_").lower() for name in names} <= vars(Parameters()).keys()

    def test_the_settings_file_is_valid(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert kubernetes_settings(monkeypatch).worker.device == "cuda:0"

    def test_commands_and_their_options_exist(self) -> None:
        probes = [container()[name]["exec"]["command"] for name in ("startupProbe", "readinessProbe", "livenessProbe")]
        check = json.loads(re.search(r"HEALTHCHECK .*CMD (\[.*\])", DOCKERFILE)[1])  # type: ignore[index]
        serve = unit()["Service"]["ExecStart"].split()
        assert serve[0] == "/opt/streamindex/bin/streamindex"
        commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
        for words in (*probes, check, ["streamindex", *serve[1:]], ["streamindex", *container()["args"]]):
            options = {option for parameter in commands[words[1]].params for option in parameter.opts}
            assert {word for word in words[2:] if word.startswith("--")} <= options, words

    def test_the_dashboard_asks_the_source_that_is_provisioned(self) -> None:
        sources = yaml.safe_load((ROOT / "deploy/grafana/provisioning/datasources/prometheus.yml").read_text())
        board = json.loads((ROOT / "deploy/grafana/dashboards/streamindex.json").read_text())
        uids = {panel["datasource"]["uid"] for panel in board["panels"]}
        assert uids == {source["uid"] for source in sources["datasources"]}
        assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])


class TestImage:
    @pytest.mark.parametrize("stage", ["service", "load"])
    def test_it_does_not_run_as_root(self, stage: str) -> None:
        users = [line.split()[1] for line in stages()[stage] if line.startswith("USER ")]
        assert users[-1] == f"{USER}:{USER}"

    def test_what_is_copied_is_there_and_travels(self) -> None:
        admitted = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
        copied = {
            word
            for line in DOCKERFILE.splitlines()
            if line.startswith("COPY ") and "--from" not in line
            for word in line.split()[1:-1]
        }
        assert copied == admitted
        assert all((ROOT / name).exists() for name in copied)

    def test_the_service_is_what_a_plain_build_makes(self) -> None:
        assert list(stages())[-1] == "service"


class TestCompose:
    def test_profiles(self) -> None:
        profiles = {name: service["profiles"] for name, service in COMPOSE["services"].items()}
        everything = ["gpu", "cpu", "observe", "load"]
        assert profiles.pop("namespace") == everything
        assert {profile for each in profiles.values() for profile in each} == set(everything)

    @pytest.mark.parametrize("name", sorted(COMPOSE["services"]))
    def test_containers_can_do_little(self, name: str) -> None:
        service = COMPOSE["services"][name]
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]

    def test_all_share_one_network_and_nothing_is_published_beyond_this_host(self) -> None:
        services = dict(COMPOSE["services"])
        ports = services.pop("namespace")["ports"]
        assert all(service["network_mode"] == "service:namespace" for service in services.values())
        assert not any("ports" in service for service in services.values())
        assert all(port.startswith("127.0.0.1:") for port in ports)
        published = {port.rpartition(":")[2] for port in ports}
        listening = {
            services["grafana"]["environment"]["GF_SERVER_HTTP_PORT"],
            next(each for each in services["prometheus"]["command"] if "listen-address" in each).rpartition(":")[2],
            services["locust"]["command"][services["locust"]["command"].index("--web-port") + 1],
        }
        assert published == listening

    @pytest.mark.parametrize("name", ["gpu", "cpu"])
    def test_running_searches_are_waited_for(self, name: str) -> None:
        service = COMPOSE["services"][name]
        drain_s = float(service["environment"]["STREAMINDEX_SERVER__DRAIN_S"])
        assert seconds(service["stop_grace_period"]) >= drain_s + 10

    @pytest.mark.parametrize("name", ["gpu", "cpu"])
    def test_compiled_code_may_be_executed(self, name: str) -> None:
        """Docker mounts a tmpfs without the right to, and the root file system is read-only."""
        cache = re.search(r"TRITON_CACHE_DIR=(\S+)", DOCKERFILE)[1]  # type: ignore[index]
        service = COMPOSE["services"][name]
        assert any(cache.startswith(volume.rpartition(":")[2]) for volume in service["volumes"])
        assert not any(cache.startswith(mount.partition(":")[0]) for mount in service["tmpfs"])

    def test_volumes_are_declared(self) -> None:
        mounted = {
            re.sub(r"^\$\{\w+:-(\w+)\}", r"\1", volume).partition(":")[0]
            for service in COMPOSE["services"].values()
            for volume in service.get("volumes", ())
        }
        assert {name for name in mounted if not name.startswith(".")} == COMPOSE["volumes"].keys()
        assert all((ROOT / name).is_dir() for name in mounted if name.startswith("."))

    def test_prometheus_looks_where_metrics_are(self) -> None:
        scrapes = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text())["scrape_configs"]
        assert [each["static_configs"] for each in scrapes] == [[{"targets": [f"127.0.0.1:{METRICS_PORT}"]}]]


class TestKubernetes:
    def test_resources_of_the_kustomization_exist(self) -> None:
        names = yaml.safe_load((KUBERNETES / "kustomization.yaml").read_text())
        files = [*names["resources"], *names["configMapGenerator"][0]["files"]]
        assert {*files, "kustomization.yaml"} == {path.name for path in KUBERNETES.iterdir()}

    def test_it_can_do_little(self) -> None:
        assert pod()["securityContext"]["runAsNonRoot"] is True
        assert {pod()["securityContext"][name] for name in ("runAsUser", "runAsGroup", "fsGroup")} == {USER}
        assert pod()["automountServiceAccountToken"] is False
        assert container()["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }

    def test_running_searches_are_waited_for(self, monkeypatch: pytest.MonkeyPatch) -> None:
        drain_s = kubernetes_settings(monkeypatch).server.drain_s
        before_s = float(container()["lifecycle"]["preStop"]["exec"]["command"][1])
        assert pod()["terminationGracePeriodSeconds"] >= before_s + drain_s + 10

    def test_it_is_not_killed_while_it_starts_drains_or_replaces_a_worker(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        settings = kubernetes_settings(monkeypatch)
        start = container()["startupProbe"]
        assert start["periodSeconds"] * start["failureThreshold"] > settings.worker.ready_timeout_s
        assert "--alive" in container()["livenessProbe"]["exec"]["command"], "not ready while a worker is replaced"
        for name in ("startupProbe", "readinessProbe"):
            assert "--alive" not in container()[name]["exec"]["command"]

    def test_probes_need_no_token(self) -> None:
        """Of the commands `health` alone does without: with tokens in force others are refused, and the pod killed."""
        for name in ("startupProbe", "readinessProbe", "livenessProbe"):
            assert container()[name]["exec"]["command"][:2] == ["streamindex", "health"]

    def test_probes_use_the_socket_that_the_service_has(self, monkeypatch: pytest.MonkeyPatch) -> None:
        address = f"unix://{kubernetes_settings(monkeypatch).server.unix_socket}"
        for name in ("startupProbe", "readinessProbe", "livenessProbe"):
            assert container()[name]["exec"]["command"][-1] == address

    def test_the_budget_fits_the_limit(self, monkeypatch: pytest.MonkeyPatch) -> None:
        memory = kubernetes_settings(monkeypatch).memory
        limit = int(container()["resources"]["limits"]["memory"].removesuffix("Gi")) << 30
        assert limit >= memory.host_budget_bytes + memory.ingress_budget_bytes + (8 << 30)
        assert container()["resources"]["limits"]["nvidia.com/gpu"] == "1"

    def test_what_is_written_is_mounted(self) -> None:
        mounts = {mount["mountPath"]: mount["name"] for mount in container()["volumeMounts"]}
        assert mounts.keys() >= {"/tmp", "/run/streamindex", "/var/cache/streamindex"}
        assert set(mounts.values()) == {volume["name"] for volume in pod()["volumes"]}


def test_memory_is_allocated_as_the_soak_had_it() -> None:
    """Its limits to growth hold with these variables."""
    for text in (DOCKERFILE, UNIT.read_text()):
        assert all(f"{name}={value}" in text for name, value in ALLOCATOR.items())


class TestSystemd:
    def test_running_searches_are_waited_for(self) -> None:
        drain_s = load(UNIT.with_name("streamindex.toml")).server.drain_s
        assert float(unit()["Service"]["TimeoutStopSec"]) >= drain_s + 10
        assert unit()["Service"]["KillMode"] == "mixed", "the worker is not stopped before the drain"

    def test_the_socket_is_in_the_runtime_directory(self) -> None:
        text = UNIT.read_text()
        socket = re.search(r"UNIX_SOCKET=(\S+)", text)[1]  # type: ignore[index]
        assert Path(socket).parent == Path("/run") / unit()["Service"]["RuntimeDirectory"]
        assert re.search(r"TRITON_CACHE_DIR=(\S+)", text)[1].startswith(  # type: ignore[index]
            f"/var/cache/{unit()['Service']['CacheDirectory']}/"
        )

    def test_the_user_is_made(self) -> None:
        users = UNIT.with_name("streamindex.sysusers.conf").read_text()
        assert re.search(rf"^u {unit()['Service']['User']} ", users, re.MULTILINE)

    def test_it_can_do_little(self) -> None:
        service = unit()["Service"]
        assert service["CapabilityBoundingSet"] == ""
        assert (service["NoNewPrivileges"], service["ProtectSystem"]) == ("yes", "strict")
        assert "PrivateDevices" not in service, "it would hide the GPU"
