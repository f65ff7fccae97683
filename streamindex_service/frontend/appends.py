"""A few rows that come with a step, and are written before anything of it is answered."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

from streamindex.framing import Chunk

from streamindex_service.core.layers import KeyCache
from streamindex_service.core.specs import CacheSpec, RowKind
from streamindex_service.errors import CacheNotFoundError, InvalidArgumentError, NonFiniteError, ServiceError
from streamindex_service.frontend import tensors
from streamindex_service.frontend.row_checks import row_check
from streamindex_service.frontend.service import Service
from streamindex_service.frontend.staging import commit_upload, write_rows


@dataclass(frozen=True, slots=True)
class FewRows:
    """Rows of one kind, in whose bytes nothing is wrong, and the row of the layer that the first is written to.

    `chunk` has the bytes of `row_count` rows as a `KeyChunk` has them: the rows, and the scales beside them.
    """

    kind: RowKind
    first_row: int
    chunk: Chunk

    @classmethod
    def checked(
        cls,
        service: Service,
        spec: CacheSpec,
        kind: RowKind,
        first_row: int,
        row_count: int,
        parts: dict[str, bytes],
    ) -> FewRows:
        """parts: rows and the scales beside them, by the names of their fields. Raises InvalidArgumentError,
        NonFiniteError."""
        most = service.settings.limits.max_batch_rows
        if row_count > most:
            raise InvalidArgumentError(
                f"at most {most} rows; longer uploads are streams",
                field="append.row_count",
                metadata={"limit": most},
            )
        names = tuple(parts)
        rows, scales = (memoryview(part) for part in parts.values())
        chunk = Chunk(0, row_count, (rows, scales), None)
        tensors.check_part_sizes(chunk, names, _row_bytes(spec, kind))
        checks = row_check(spec, kind)
        try:
            checks.rows(rows, 0)
        except NonFiniteError as error:
            error.field = names[0]  # a check calls them by their kind, as the metadata do
            raise
        checks.scales(scales, 0)
        return cls(kind, first_row, chunk)

    def check_place(self, service: Service, cache: KeyCache, layer: int) -> None:
        """Whether they may be written to the layer as it is now.

        Raises CacheNotFoundError, InvalidArgumentError, NoKvRowsError, OffsetGapError.
        """
        rows, most = service.caches.layer(cache, layer, self.kind), service.settings.limits.max_layer_keys
        service.uploads.check_start(cache, rows, self.first_row, self.chunk.row_count, most)


async def append_rows(service: Service, cache: KeyCache, layer: int, few: FewRows) -> None:
    """Write them at once, as a whole or not at all.

    Raises what `check_place` raises, TooManyError, HostMemoryError, SpillUnreadableError; LayerChangedError for a layer
    that was truncated meanwhile.
    """
    rows, most, uploads = few.chunk.row_count, service.settings.limits.max_layer_keys, service.uploads
    row_bytes = _row_bytes(cache.spec, few.kind)
    upload = await service.room.make(lambda: uploads.start(cache, layer, few.first_row, rows, most, few.kind))
    uploads.attach(upload)
    try:
        await service.room.make(lambda: uploads.hold(upload, rows))
        write_rows(service, upload, [few.chunk], row_bytes)
        upload.rows_held = rows
        await commit_upload(service, upload, row_bytes)
        service.counters.upload_bytes += few.chunk.payload_bytes
    finally:
        uploads.close(upload)


@contextlib.contextmanager
def naming(field: str) -> Iterator[None]:
    """What is wrong is told with the field that it is in; that the cache is gone is not wrong with any."""
    try:
        yield
    except CacheNotFoundError:
        raise
    except ServiceError as error:
        within = error.field.rpartition(".")[2]
        error.field = f"{field}.{within}" if within else field
        raise


def _row_bytes(spec: CacheSpec, kind: RowKind) -> tuple[int, int]:
    form = spec.form(kind)
    return form.row_bytes, form.scale_bytes
