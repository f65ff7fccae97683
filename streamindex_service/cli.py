"""The command line `streamindex`. Nothing heavy is imported before a command needs it; torch never is."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import re
import sys
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic import BaseModel, ValidationError
from rich.console import Console
from rich.table import Table

from streamindex_service import __version__
from streamindex_service.cli_connection import (
    EXIT_FAILED,
    EXIT_USAGE,
    CaOption,
    CertificateOption,
    CommandError,
    Connection,
    KeyOption,
    TokenOption,
    reported_errors,
)
from streamindex_service.config import Settings, load

if TYPE_CHECKING:
    from streamindex_client.model import Load

app = typer.Typer(
    name="streamindex",
    help="Exact top-k key search for sparse attention, as a service.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
config_app = typer.Typer(help="The settings.", no_args_is_help=True)
app.add_typer(config_app, name="config")
bench_app = typer.Typer(help="Measurements of this host.", no_args_is_help=True)
app.add_typer(bench_app, name="bench")
token_app = typer.Typer(help="Bearer tokens.", no_args_is_help=True)
app.add_typer(token_app, name="token")

_SECRET = re.compile(r"token|secret|password|key_file")

ConfigOption = Annotated[Path | None, typer.Option("--config", metavar="FILE", help="TOML file of settings.")]
AddressOption = Annotated[
    str | None, typer.Option(help="unix:///path or host:port; by default where these settings would listen.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


class KeyFormatName(StrEnum):
    """Key formats by name."""

    BF16 = "bf16"
    FP16 = "fp16"
    FP8_E4M3 = "fp8_e4m3"
    FP32 = "fp32"


class KvFormatName(StrEnum):
    """Names of `KvFormat`, without importing the operations."""

    BF16 = "bf16"
    FP8_D512 = "fp8_d512"
    FP8_D576 = "fp8_d576"


@app.command()
def serve(
    tcp: Annotated[str | None, typer.Option(metavar="HOST:PORT", help="TCP address; port 0: a free one.")] = None,
    unix: Annotated[str | None, typer.Option(metavar="PATH", help="Unix socket.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda:N.")] = None,
    implementation: Annotated[str | None, typer.Option(help="Top-k implementation by name.")] = None,
    device_budget: Annotated[str | None, typer.Option(metavar="BYTES", help="Device memory, as 8GiB.")] = None,
    host_budget: Annotated[str | None, typer.Option(metavar="BYTES", help="Host memory for keys, as 64GiB.")] = None,
    log_level: Annotated[str | None, typer.Option(help="debug, info, warning or error.")] = None,
    config: ConfigOption = None,
) -> None:
    """Run the service until SIGTERM or Ctrl-C; running calls drain first.

    Flags win over STREAMINDEX_SECTION__NAME variables, those over the file, that over the defaults.
    """
    settings = read_settings(
        config,
        server={"tcp_address": tcp, "unix_socket": unix},
        worker={"device": device, "implementation": implementation},
        memory={"device_budget_bytes": device_budget, "host_budget_bytes": host_budget},
        log={"level": log_level},
    )
    # gRPC writes lines of its own form for handshakes that fail, as many as somebody begins. It looks at this when it
    # is imported.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    from streamindex_service.frontend import server

    try:
        asyncio.run(server.serve(settings, on_listening=_say_listening))
    except server.ServeError as error:
        raise CommandError(f"{error}; `streamindex doctor` tells more") from error


@app.command()
def demo(
    keys: Annotated[int | None, typer.Option(min=1, help="Keys to upload; real data: at most 16,384.")] = None,
    queries: Annotated[int | None, typer.Option(min=1, help="Query rows; real data: at most 256.")] = None,
    synthetic: Annotated[bool, typer.Option("--synthetic", help="Seeded random data of any size.")] = False,
    top_k: Annotated[int, typer.Option(min=1, max=4096, help="Indices a row.")] = 512,
    ratio: Annotated[
        int | None, typer.Option(min=1, help="Tokens a key (synthetic); 1, of a pipeline 4.", show_default=False)
    ] = None,
    heads: Annotated[int, typer.Option(min=1, max=128, help="Indexer heads (synthetic).")] = 64,
    head_dim: Annotated[int, typer.Option(min=16, max=256, help="Elements of a key (synthetic).")] = 128,
    key_format: Annotated[KeyFormatName, typer.Option(help="Format of keys and queries.")] = KeyFormatName.BF16,
    seed: Annotated[int, typer.Option(min=0, help="Of the synthetic data.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda:N.")] = "auto",
    implementation: Annotated[str, typer.Option(help="Top-k implementation by name.")] = "",
    pipeline: Annotated[
        bool, typer.Option("--pipeline", help="Index and sparse attention, on seeded random data.")
    ] = False,
    attention_heads: Annotated[int, typer.Option(min=1, max=128, help="Attention heads (pipeline).")] = 64,
    window: Annotated[int, typer.Option(min=0, max=4096, help="Tokens of a window (pipeline).")] = 128,
    kv_format: Annotated[KvFormatName, typer.Option(help="Format of KV rows (pipeline).")] = KvFormatName.BF16,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line.")] = False,
) -> None:
    """Start the service, load a data set, search it or run the pipeline, check the answers against the reference."""
    from streamindex_service.demo import DemoError, DemoOptions, run

    try:
        options = DemoOptions(
            keys=keys,
            queries=queries,
            synthetic=synthetic,
            top_k=top_k,
            ratio=ratio,
            heads=heads,
            head_dim=head_dim,
            key_format=key_format.value,
            seed=seed,
            device=device,
            implementation=implementation,
            as_json=as_json,
            pipeline=pipeline,
            attention_heads=attention_heads,
            window=window,
            kv_format=kv_format.value,
        )
        wrong_rows = run(options)
    except DemoError as error:
        raise CommandError(str(error)) from error
    if wrong_rows:
        raise typer.Exit(EXIT_FAILED)


@app.command()
def health(
    address: AddressOption = None,
    config: ConfigOption = None,
    ca_file: CaOption = None,
    certificate_file: CertificateOption = None,
    key_file: KeyOption = None,
    token_file: TokenOption = None,
    alive: Annotated[
        bool, typer.Option("--alive", help="Ask whether it answers at all, as it does while it starts or drains.")
    ] = False,
) -> None:
    """Tell whether the service is ready; exit code 0 if it is. It needs no token; figures are for callers."""
    from streamindex_client import AuthenticationError

    target = address or default_address(read_settings(config))
    connection = Connection(target, ca_file, certificate_file, key_file, token_file)
    status = connection.health()
    if alive and status in ("SERVING", "NOT_SERVING"):
        typer.echo(f"{target}: {status}")
        return
    if status != "SERVING":
        raise CommandError(f"{target}: {status}")
    try:
        with connection.client() as client:
            load_now = client.load()
            capabilities = client.capabilities()
    except CommandError as error:
        if token_file is not None or not isinstance(error.__cause__, AuthenticationError):
            raise
        typer.echo(f"{target}: SERVING")
        return
    typer.echo(
        f"{target}: SERVING on {capabilities.device} with {capabilities.implementation}, "
        f"{load_now.running_searches} searches running, {load_now.queued_searches} waiting, "
        f"{load_now.worker_restarts} worker restarts"
    )


@app.command("load")
def show_load(
    address: AddressOption = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
    ca_file: CaOption = None,
    certificate_file: CertificateOption = None,
    key_file: KeyOption = None,
    token_file: TokenOption = None,
) -> None:
    """Show the service's budgets, queue and caches."""
    target = address or default_address(read_settings(config))
    with Connection(target, ca_file, certificate_file, key_file, token_file).client() as client:
        load_now = client.load()
    if as_json:
        typer.echo(json.dumps(_load_fields(load_now)))
    else:
        _print_load(Console(), load_now)


@app.command()
def top(
    address: AddressOption = None,
    config: ConfigOption = None,
    interval: Annotated[float, typer.Option(min=0.1, max=60.0, help="Seconds between two looks.")] = 1.0,
    count: Annotated[int, typer.Option(min=0, help="End after so many looks; 0: Ctrl-C ends it.")] = 0,
    ca_file: CaOption = None,
    certificate_file: CertificateOption = None,
    key_file: KeyOption = None,
    token_file: TokenOption = None,
) -> None:
    """Show the service's load as it changes: budgets, device, queue by priority and caller."""
    target = address or default_address(read_settings(config))
    from streamindex_service.top import watch

    with reported_errors():
        loads = Connection(target, ca_file, certificate_file, key_file, token_file).watched(interval)
        watch(itertools.islice(loads, count) if count else loads, Console(), target)


@config_app.command("show")
def config_show(config: ConfigOption = None, as_json: JsonOption = False) -> None:
    """Show the effective settings; secrets are masked."""
    shown = masked(read_settings(config))
    if as_json:
        typer.echo(json.dumps(shown))
        return
    table = Table("setting", "value", box=None)
    for section, values in shown.items():
        for name, value in values.items():
            table.add_row(f"{section}.{name}", json.dumps(value))
    Console(soft_wrap=True).print(table)


@token_app.command("new")
def token_new(
    name: Annotated[str, typer.Argument(help="Whose it is: letters, digits, or any of . _ @ -")],
    as_json: JsonOption = False,
) -> None:
    """Print a new token, once, and the line with its hash for the service's auth.token_file.

    The token goes to standard output and the line to standard error, so that each can be sent to a file of its own:
    streamindex token new trainer >trainer.token 2>>tokens
    """
    from streamindex_service.frontend.tokens import new_token

    try:
        token, line = new_token(name)
    except ValueError as error:
        raise CommandError(str(error), EXIT_USAGE) from error
    if as_json:
        typer.echo(json.dumps({"token": token, "line": line}))
        return
    typer.echo(token)
    typer.echo(line, err=True)


@app.command()
def doctor(
    tcp: Annotated[str | None, typer.Option(metavar="HOST:PORT", help="TCP address to try.")] = None,
    unix: Annotated[str | None, typer.Option(metavar="PATH", help="Unix socket to try.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda:N.")] = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Look at everything the service needs and say what to do; exit code 1 when something will not work."""
    settings = read_settings(config, server={"tcp_address": tcp, "unix_socket": unix}, worker={"device": device})
    from streamindex_service.doctor import Level, examine

    console = Console(soft_wrap=True)
    styles = {Level.OK: "green", Level.WARN: "yellow", Level.FAIL: "bold red"}
    findings = []
    for finding in examine(settings, lambda target: Connection(target).health() == "SERVING"):
        findings.append(finding)
        if not as_json:
            style = styles[finding.level]
            console.print(f"[{style}]{finding.level:4}[/]  {finding.name:22}  ", end="")
            console.print(finding.text, markup=False, highlight=False)
            if finding.remedy:
                console.print(f"      → {finding.remedy}", markup=False, highlight=False)
    if as_json:
        fields = [{"name": f.name, "level": f.level, "text": f.text, "remedy": f.remedy} for f in findings]
        typer.echo(json.dumps(fields))
    if any(finding.level is Level.FAIL for finding in findings):
        raise typer.Exit(EXIT_FAILED)


@bench_app.command()
def transport(
    mib: Annotated[int, typer.Option(min=16, max=8192, help="Size of the tensor; three times that is used.")] = 256,
    rounds: Annotated[int, typer.Option(min=1, max=100, help="Times that it is sent each way.")] = 5,
    as_json: JsonOption = False,
) -> None:
    """Show how fast this host moves tensors over a unix socket and TCP, and what share of that the service reaches."""
    from streamindex_service.bench import transport as bench
    from streamindex_service.testing.service import ServiceStartError

    try:
        with reported_errors():
            rates = bench.transport(mib << 20, rounds)
    except ServiceStartError as error:
        raise CommandError(str(error)) from error
    if as_json:
        typer.echo(json.dumps([asdict(rate) for rate in rates]))
    else:
        Console(soft_wrap=True).print(bench.table(rates))


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(__version__)


def read_settings(config: Path | None, **sections: dict[str, Any]) -> Settings:
    """Settings from flags (those that are None were not given), environment and file. Raises CommandError."""
    flags = {
        section: given
        for section, values in sections.items()
        if (given := {name: value for name, value in values.items() if value is not None})
    }
    try:
        return load(config, **flags)
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors()]
        raise CommandError("settings are wrong:\n  " + "\n  ".join(lines), EXIT_USAGE) from error
    except (OSError, ValueError) as error:
        raise CommandError(f"settings cannot be read: {error}", EXIT_USAGE) from error


def masked(settings: BaseModel) -> dict[str, Any]:
    """The settings as plain values; a value that is set and whose name says that it is secret reads "***"."""
    return {
        name: masked(value) if isinstance(value, BaseModel) else "***" if _SECRET.search(name) and value else value
        for name, value in ((name, getattr(settings, name)) for name in type(settings).model_fields)
    }


def default_address(settings: Settings) -> str:
    """Where a service with these settings listens: its unix socket if it has one. Raises CommandError."""
    if settings.server.unix_socket:
        return f"unix://{Path(settings.server.unix_socket).absolute()}"
    if settings.server.tcp_address:
        return settings.server.tcp_address
    raise CommandError("these settings name no address; give --address", EXIT_USAGE)


def main() -> None:
    """Run the command line; every expected failure is one line on standard error."""
    try:
        app()
    except CommandError as error:
        typer.echo(f"streamindex: {error}", err=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        typer.echo("streamindex: interrupted", err=True)
        sys.exit(130)


def _say_listening(listening: Any) -> None:
    places = [listening.tcp_address, listening.unix_socket and f"unix://{listening.unix_socket}"]
    metrics = f", metrics on http://{listening.metrics}/" if listening.metrics else ""
    typer.echo(f"StreamIndex Service {__version__} listens on " + " and ".join(filter(None, places)) + metrics)
    sys.stdout.flush()


def _load_fields(load_now: Load) -> dict[str, Any]:
    ledgers = {
        name: {each: getattr(ledger, each) for each in ("limit_bytes", "reserved_bytes", "peak_bytes", "spare_bytes")}
        for name, ledger in load_now.ledgers.items()
    }
    names = [name for name in type(load_now).__dataclass_fields__ if name not in ("ledgers", "residency")]
    figures = {name: getattr(load_now, name) for name in names}
    return {**figures, "residency": asdict(load_now.residency), "ledgers": ledgers}


def _print_load(console: Console, load_now: Load) -> None:
    ledgers = Table("budget", "limit MiB", "reserved MiB", "peak MiB", "spare MiB", "used")
    for column in ledgers.columns[1:]:
        column.justify = "right"
    for name, ledger in load_now.ledgers.items():
        share = ledger.reserved_bytes / ledger.limit_bytes if ledger.limit_bytes else 0.0
        sizes = (ledger.limit_bytes, ledger.reserved_bytes, ledger.peak_bytes, ledger.spare_bytes)
        ledgers.add_row(name, *(f"{size / (1 << 20):,.1f}" for size in sizes), f"{share:.1%}")
    console.print(ledgers)
    figures = Table("figure", "value", box=None)
    figures.columns[1].justify = "right"
    for name, value in _load_fields(load_now).items():
        if name == "residency":
            for residency, caches in value.items():
                figures.add_row(f"key_caches: {residency}", str(caches))
        elif name != "ledgers":
            figures.add_row(name, str(value))
    console.print(figures)
