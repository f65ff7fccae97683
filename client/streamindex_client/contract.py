"""The calls of the service, read off the contract's own descriptors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from google.protobuf import message_factory
from streamindex.v1 import attention_pb2, key_cache_pb2, search_pb2, server_pb2

__all__ = [
    "APPEND_KEYS",
    "CREATE_KEY_CACHE",
    "DELETE_KEY_CACHE",
    "FORK_KEY_CACHE",
    "GET_CAPABILITIES",
    "GET_KEY_CACHE",
    "GET_LOAD",
    "LIST_KEY_CACHES",
    "QUERY_UPLOAD",
    "REQUEST_ID",
    "SEARCH",
    "SEARCH_BATCH",
    "SPARSE_ATTEND",
    "SPARSE_ATTEND_BATCH",
    "TRUNCATE_KEYS",
    "WATCH_LOAD",
    "Method",
]

REQUEST_ID = "x-request-id"
"""Metadata key under which a call's id travels, for the server's log."""


@dataclass(frozen=True, slots=True)
class Method:
    """One call: its path, and the class of its response."""

    path: str
    response: Any


def _method(file: Any, service: str, name: str) -> Method:
    descriptor = file.DESCRIPTOR.services_by_name[service].methods_by_name[name]
    path = f"/{descriptor.containing_service.full_name}/{name}"
    return Method(path, message_factory.GetMessageClass(descriptor.output_type))


CREATE_KEY_CACHE = _method(key_cache_pb2, "KeyCacheService", "CreateKeyCache")
GET_KEY_CACHE = _method(key_cache_pb2, "KeyCacheService", "GetKeyCache")
LIST_KEY_CACHES = _method(key_cache_pb2, "KeyCacheService", "ListKeyCaches")
DELETE_KEY_CACHE = _method(key_cache_pb2, "KeyCacheService", "DeleteKeyCache")
TRUNCATE_KEYS = _method(key_cache_pb2, "KeyCacheService", "TruncateKeys")
FORK_KEY_CACHE = _method(key_cache_pb2, "KeyCacheService", "ForkKeyCache")
APPEND_KEYS = _method(key_cache_pb2, "KeyCacheService", "AppendKeys")
QUERY_UPLOAD = _method(key_cache_pb2, "KeyCacheService", "QueryUpload")
SEARCH = _method(search_pb2, "SearchService", "Search")
SEARCH_BATCH = _method(search_pb2, "SearchService", "SearchBatch")
SPARSE_ATTEND = _method(attention_pb2, "AttentionService", "SparseAttend")
SPARSE_ATTEND_BATCH = _method(attention_pb2, "AttentionService", "SparseAttendBatch")
GET_CAPABILITIES = _method(server_pb2, "ServerService", "GetCapabilities")
GET_LOAD = _method(server_pb2, "ServerService", "GetLoad")
WATCH_LOAD = _method(server_pb2, "ServerService", "WatchLoad")
