"""Addresses of the service, and the options of the channel to it."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from streamindex_client.errors import InputError
from streamindex_client.options import MAX_MESSAGE_BYTES

if TYPE_CHECKING:
    from streamindex_client.options import ClientOptions

__all__ = ["channel_options", "grpc_target"]

_HOST_PORT = re.compile(r"(\[[0-9A-Fa-f:.%]+\]|[^\s:/\[\]]+):([0-9]{1,5})")
_RECONNECT_FIRST_S = 0.1


def grpc_target(address: str) -> str:
    """gRPC's form of `unix:///run/x.sock`, `host:port`, `tcp://host:port` or `dns:///host:port`. Raises InputError."""
    if address.startswith("unix:"):
        if address.removeprefix("unix:").removeprefix("//"):
            return address
    elif address.startswith(("dns:", "ipv4:", "ipv6:")):
        return address
    else:
        match = _HOST_PORT.fullmatch(address.removeprefix("tcp://"))
        if match and 0 < int(match[2]) < 1 << 16:
            return match[0]
    raise InputError("target", f"{address!r} is none of unix:///path, host:port, tcp://host:port, dns:///host:port")


def channel_options(options: ClientOptions) -> list[tuple[str, int]]:
    """Arguments of the channel: message lengths, reconnection, keepalive; retries are this library's own."""
    pause_ms = max(1, int(options.reconnect_max_s * 1000))
    arguments = [
        ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
        ("grpc.enable_retries", 0),
        ("grpc.initial_reconnect_backoff_ms", min(pause_ms, int(_RECONNECT_FIRST_S * 1000))),
        ("grpc.max_reconnect_backoff_ms", pause_ms),
        ("grpc.use_local_subchannel_pool", 1),
    ]
    if options.keepalive_s is not None:
        arguments.append(("grpc.keepalive_time_ms", max(1, int(options.keepalive_s * 1000))))
    return arguments
