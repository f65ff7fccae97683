"""Named loads: what the users do, for how long, and the settings of the service that is started for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from loadtests.parameters import Parameters

_MIB = 1 << 20


@dataclass(frozen=True)
class Profile:
    """A load. `processes`: locust processes beside the one that counts; 0 is a single one."""

    name: str
    seconds: int
    processes: int
    parameters: Parameters
    settings: Mapping[str, Mapping[str, Any]]


CPU = Profile(
    name="cpu",
    seconds=40,
    processes=0,
    parameters=Parameters(
        decode_users=2,
        churn_users=2,
        prefill_tokens=4096,
        prefill_chunk_tokens=512,
        prefill_rate=0.2,
        upload_rate=0.3,
        tenants_batch_rows=128,
        slow_reader_rows=1024,
    ),
    settings={
        "worker": {"device": "cpu", "cpu_threads": 1},
        "memory": {
            "device_budget_bytes": 256 * _MIB,
            "host_budget_bytes": 256 * _MIB,
            "ingress_budget_bytes": 64 * _MIB,
            "workspace_bytes": 32 * _MIB,
        },
        "log": {"level": "warning"},
    },
)

# The indexer of DeepSeek-V4-Flash at 262,144 tokens. When each sequence of a step was a tile by itself, six users of 80
# sequences a second and more each left a worker no time for anything else: lower bands then moved by their age alone.
H200 = Profile(
    name="h200",
    seconds=600,
    processes=6,
    parameters=Parameters(
        decode_users=3,
        prefill_users=2,
        upload_users=2,
        tenants_users=4,
        churn_users=4,
        slow_reader_users=2,
        abort_users=2,
        heads=64,
        head_dim=128,
        top_k=512,
        context_keys=65_536,
        decode_sequences=8,
        decode_rate=10.0,
        prefill_tokens=32_768,
        prefill_chunk_tokens=2048,
        prefill_rate=0.1,
        upload_keys=262_144,
        upload_rate=0.2,
        tenants_rate=5.0,
        tenants_batch_rows=2048,
        churn_keys=4096,
        churn_rate=4.0,
        slow_reader_rows=4096,
        abort_rows=4096,
        abort_keys=131_072,
        abort_rate=0.5,
        arrivals_rate=50.0,
        check_share=0.05,
    ),
    settings={
        "worker": {"device": "cuda:0"},
        "memory": {"device_budget_bytes": 4096 * _MIB, "host_budget_bytes": 16_384 * _MIB},
        "log": {"level": "warning"},
    },
)

PROFILES = {profile.name: profile for profile in (CPU, H200)}
