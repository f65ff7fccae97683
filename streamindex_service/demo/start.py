"""What every form of the demo begins and ends with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
from pydantic import ValidationError
from rich.console import Console
from rich.table import Table
from streamindex_client.errors import StreamIndexError

from streamindex_service.config import WorkerSettings
from streamindex_service.demo.options import DemoError, DemoOptions
from streamindex_service.ops.formats import KeyFormat
from streamindex_service.ops.implementations import UnsupportedImplementationError
from streamindex_service.ops.topk.api import find_implementation
from streamindex_service.testing.service import RunningService, ServiceStartError

Result = TypeVar("Result")


def check_choices(options: DemoOptions) -> None:
    """Refuse at once what the service's worker could never start with."""
    try:
        WorkerSettings(device=options.device)
    except ValidationError as error:
        raise DemoError(f"device {options.device!r} is none of auto, cpu, cuda:N") from error
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    on_gpu = options.device.startswith("cuda") or (options.device == "auto" and gpus > 0)
    if options.device.startswith("cuda:") and int(options.device[5:]) >= gpus:
        message = f"device {options.device} is not there: torch sees {gpus} GPUs"
        raise DemoError(f"{message}; `streamindex doctor` tells more")
    if options.implementation:
        try:
            find_implementation(options.implementation, "cuda" if on_gpu else "cpu", KeyFormat(options.key_format))
        except UnsupportedImplementationError as error:
            raise DemoError(str(error)) from error


def with_service(console: Console, options: DemoOptions, work: Callable[[str], Result]) -> Result:
    """Start the service and do the work at its address. Raises DemoError."""
    settings = {
        "worker": {"device": options.device, "implementation": options.implementation},
        "log": {"level": "warning"},
    }
    console.print("Starting the service …", highlight=False)
    try:
        with RunningService(settings) as service:
            try:
                return work(service.address)
            except StreamIndexError as error:
                raise DemoError(f"{error}\n{service.log_tail()}".rstrip()) from error
    except ServiceStartError as error:
        raise DemoError(str(error)) from error


def show_rows(console: Console, rows: Mapping[str, str]) -> None:
    """Names and what is to be said of them: a table on a terminal, lines elsewhere."""
    if not console.is_terminal:
        for name, value in rows.items():
            console.print(f"{name}: {value}", highlight=False)
        return
    table = Table(box=None, show_header=False)
    for name, value in rows.items():
        table.add_row(name, value)
    console.print(table)
