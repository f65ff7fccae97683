from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional

DESCRIPTOR: _descriptor.FileDescriptor

class KeyFormat(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    KEY_FORMAT_UNSPECIFIED: _ClassVar[KeyFormat]
    KEY_FORMAT_BF16: _ClassVar[KeyFormat]
    KEY_FORMAT_FP16: _ClassVar[KeyFormat]
    KEY_FORMAT_FP32: _ClassVar[KeyFormat]
    KEY_FORMAT_FP8_E4M3: _ClassVar[KeyFormat]

class KvFormat(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    KV_FORMAT_UNSPECIFIED: _ClassVar[KvFormat]
    KV_FORMAT_BF16: _ClassVar[KvFormat]
    KV_FORMAT_FP8_D512: _ClassVar[KvFormat]
    KV_FORMAT_FP8_D576: _ClassVar[KvFormat]

class ResultOrder(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    RESULT_ORDER_UNSPECIFIED: _ClassVar[ResultOrder]
    RESULT_ORDER_SCORE: _ClassVar[ResultOrder]
    RESULT_ORDER_INDEX: _ClassVar[ResultOrder]

class SearchMode(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SEARCH_MODE_UNSPECIFIED: _ClassVar[SearchMode]
    SEARCH_MODE_EXACT: _ClassVar[SearchMode]

class Priority(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PRIORITY_UNSPECIFIED: _ClassVar[Priority]
    PRIORITY_INTERACTIVE: _ClassVar[Priority]
    PRIORITY_STANDARD: _ClassVar[Priority]
    PRIORITY_BATCH: _ClassVar[Priority]
KEY_FORMAT_UNSPECIFIED: KeyFormat
KEY_FORMAT_BF16: KeyFormat
KEY_FORMAT_FP16: KeyFormat
KEY_FORMAT_FP32: KeyFormat
KEY_FORMAT_FP8_E4M3: KeyFormat
KV_FORMAT_UNSPECIFIED: KvFormat
KV_FORMAT_BF16: KvFormat
KV_FORMAT_FP8_D512: KvFormat
KV_FORMAT_FP8_D576: KvFormat
RESULT_ORDER_UNSPECIFIED: ResultOrder
RESULT_ORDER_SCORE: ResultOrder
RESULT_ORDER_INDEX: ResultOrder
SEARCH_MODE_UNSPECIFIED: SearchMode
SEARCH_MODE_EXACT: SearchMode
PRIORITY_UNSPECIFIED: Priority
PRIORITY_INTERACTIVE: Priority
PRIORITY_STANDARD: Priority
PRIORITY_BATCH: Priority

class Error(_message.Message):
    __slots__ = ("code", "reason", "message", "field", "metadata", "retry_after_ms")
    class MetadataEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    CODE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    FIELD_FIELD_NUMBER: _ClassVar[int]
    METADATA_FIELD_NUMBER: _ClassVar[int]
    RETRY_AFTER_MS_FIELD_NUMBER: _ClassVar[int]
    code: int
    reason: str
    message: str
    field: str
    metadata: _containers.ScalarMap[str, str]
    retry_after_ms: int
    def __init__(self, code: _Optional[int] = ..., reason: _Optional[str] = ..., message: _Optional[str] = ..., field: _Optional[str] = ..., metadata: _Optional[_Mapping[str, str]] = ..., retry_after_ms: _Optional[int] = ...) -> None: ...
