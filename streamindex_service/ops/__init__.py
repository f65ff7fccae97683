"""Operations on device tensors: one folder per operation, torch here, Triton only in modules named ``triton``.

Nothing here imports Triton, the network or the rest of the service; a kernel module is imported when its
implementation is first run.
"""

from streamindex_service.ops.formats import KeyFormat
from streamindex_service.ops.kv_rows import KvFormat, KvRows
from streamindex_service.ops.paged_keys import PAGE_KEYS, PagedKeys

__all__ = ["PAGE_KEYS", "KeyFormat", "KvFormat", "KvRows", "PagedKeys"]
