"""Sizes and rates of the load: options of locust's command line, or `LOADTEST_*` in the environment."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

KEY_FORMATS = ("bf16", "fp16", "fp32")
DECODED_KEYS = 256  # a sequence that has grown by so many is cut back to where it began
_PAGES_BYTES = 1 << 20  # what pages that are not full may come to
SCENARIOS = ("decode", "prefill", "upload", "tenants", "churn", "slow_reader", "abort", "arrivals")


def _parameter(default: Any, help_text: str, choices: tuple[str, ...] | None = None) -> Any:
    return field(default=default, metadata={"help": help_text, "choices": choices})


@dataclass(frozen=True)
class Parameters:
    """What the users do, how large it is, and how often. Rates are of one user, `arrivals_rate` of all together."""

    address: str = _parameter("127.0.0.1:50051", "the service: unix:///path or host:port")
    tokens_file: str = _parameter("", 'file of tokens, one a line, which the users take in turn; "" for none')
    tokens_processes: int = _parameter(1, "locust processes that the tokens are dealt out to")
    decode_users: int = _parameter(1, "users that decode")
    prefill_users: int = _parameter(1, "users that prefill in chunks")
    upload_users: int = _parameter(1, "users with long uploads")
    tenants_users: int = _parameter(1, "users that mix priorities and sizes")
    churn_users: int = _parameter(1, "users that open, use and drop caches, over a new connection each time")
    slow_reader_users: int = _parameter(1, "users that read answers slowly")
    abort_users: int = _parameter(1, "users that leave searches and uploads in the middle")
    arrivals_users: int = _parameter(0, "generators of arrivals at a fixed rate, whatever the service does")
    key_format: str = _parameter("bf16", "format of keys and queries", KEY_FORMATS)
    heads: int = _parameter(8, "indexer heads")
    head_dim: int = _parameter(64, "elements of a key")
    ratio: int = _parameter(4, "tokens a key")
    top_k: int = _parameter(64, "indices a row")
    context_keys: int = _parameter(4096, "keys of a cache that is searched")
    decode_sequences: int = _parameter(4, "sequences of a decode step; the n-th has 1/n of the context")
    decode_rate: float = _parameter(5.0, "decode steps a second")
    prefill_tokens: int = _parameter(8192, "tokens of a prompt")
    prefill_chunk_tokens: int = _parameter(1024, "tokens of a chunk of it")
    prefill_rate: float = _parameter(0.5, "prompts a second")
    upload_keys: int = _parameter(65_536, "keys of a long upload")
    upload_rate: float = _parameter(0.5, "long uploads a second")
    tenants_rate: float = _parameter(2.0, "searches of mixed tenants a second")
    tenants_batch_rows: int = _parameter(512, "query rows of a tenant's batch search")
    churn_keys: int = _parameter(512, "keys of a cache that is soon dropped")
    churn_rate: float = _parameter(1.0, "such caches a second")
    slow_reader_rows: int = _parameter(2048, "query rows of a search that is read slowly")
    slow_reader_rows_per_s: float = _parameter(1000.0, "rows of its answer that are read in a second")
    slow_reader_rate: float = _parameter(0.2, "such searches a second")
    abort_rows: int = _parameter(2048, "query rows of a search that is left")
    abort_keys: int = _parameter(32_768, "keys of an upload that is left")
    abort_rate: float = _parameter(0.5, "such pairs a second")
    arrivals_rate: float = _parameter(10.0, "arrivals a second, all generators together; Poisson")
    arrivals_rows: int = _parameter(1, "query rows of an arrival")
    arrivals_deadline_s: float = _parameter(5.0, "deadline of an arrival")
    max_outstanding: int = _parameter(2000, "arrivals of one generator that may be unanswered")
    call_timeout_s: float = _parameter(60.0, "deadline of every other call")
    max_attempts: int = _parameter(1, "attempts of a call; 1 shows every refusal")
    check_share: float = _parameter(0.25, "part of the answers that are compared with the reference, one row of each")
    load_seed: int = _parameter(0, "of tensors and choices")
    requests_dir: str = _parameter("", 'directory for one CSV of all calls a process; "" writes none')

    @classmethod
    def of(cls, options: Namespace | None) -> Parameters:
        """From locust's parsed command line."""
        return cls(**{each.name: getattr(options, each.name) for each in fields(cls)})

    def users(self) -> dict[str, int]:
        """How many users each scenario has, those with none left out."""
        counts = {name: getattr(self, f"{name}_users") for name in SCENARIOS}
        return {name: count for name, count in counts.items() if count}

    def quotas(self) -> dict[str, int]:
        """Limits of a caller that bear one user of any scenario, and not many of them together."""
        sequences = self.decode_sequences
        decoded = sum(max(1, self.context_keys // (number + 1)) + DECODED_KEYS for number in range(sequences))
        most_keys = max(
            decoded,
            sequences * self.context_keys,  # arrivals
            self.prefill_tokens // self.ratio,
            self.upload_keys,
            self.churn_keys,
            self.context_keys + self.abort_keys,
        )
        key_bytes = self.head_dim * (4 if self.key_format == "fp32" else 2)
        # a dropped cache's pages may be in use for a moment more, and so is an upload that was left
        return {
            "max_caller_caches": max(2, sequences),
            "max_caller_uploads": 2,
            "max_caller_host_bytes": 2 * most_keys * key_bytes + _PAGES_BYTES,
        }

    def with_texts(self, given: Mapping[str, str]) -> Parameters:
        """The same with some values replaced, given as text. Raises ValueError."""
        types: dict[str, Any] = {each.name: type(each.default) for each in fields(self)}
        unknown = given.keys() - types.keys()
        if unknown:
            raise ValueError(f"no such parameter: {', '.join(sorted(unknown))}")
        return replace(self, **{name: types[name](value) for name, value in given.items()})

    def arguments(self) -> list[str]:
        """As options of locust's command line."""
        return [f"--{each.name.replace('_', '-')}={getattr(self, each.name)}" for each in fields(self)]


def add_arguments(parser: ArgumentParser) -> None:
    """Add every parameter to locust's command line. Its parser reads the environment as well."""
    for each in fields(Parameters):
        names: dict[str, Any] = {"env_var": f"LOADTEST_{each.name.upper()}"}
        parser.add_argument(
            f"--{each.name.replace('_', '-')}",
            type=type(each.default),
            default=each.default,
            choices=each.metadata["choices"],
            help=each.metadata["help"],
            **names,
        )
