"""What each caller holds, and may."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from streamindex_service.errors import HostQuotaError, TooManyError


@dataclass(frozen=True, slots=True)
class Quota:
    """Of one caller. `host_bytes` counts pages, spilled or not, shared ones once; None is no quota."""

    caches: int | None = None
    host_bytes: int | None = None
    uploads: int | None = None


NO_QUOTA = Quota()


@dataclass(slots=True, eq=False)
class Account:
    """One caller's."""

    caller: str
    quota: Quota
    caches: int = 0
    host_bytes: int = 0
    uploads: int = 0

    def open_cache(self) -> None:
        """One more cache. Raises TooManyError with the figures."""
        if self.quota.caches is not None and self.caches >= self.quota.caches:
            raise TooManyError(
                f"a caller may have {self.quota.caches} key caches",
                metadata={"key_caches": self.caches, "limit": self.quota.caches},
            )
        self.caches += 1

    def close_cache(self) -> None:
        """One less."""
        self.caches -= 1
        assert self.caches >= 0, "a cache was closed twice"

    def open_upload(self) -> None:
        """One more upload that is not committed. Raises TooManyError with the figures."""
        if self.quota.uploads is not None and self.uploads >= self.quota.uploads:
            raise TooManyError(
                f"a caller may have {self.quota.uploads} open uploads",
                metadata={"open_uploads": self.uploads, "limit": self.quota.uploads},
            )
        self.uploads += 1

    def close_upload(self) -> None:
        """One less."""
        self.uploads -= 1
        assert self.uploads >= 0, "an upload was closed twice"

    def room(self, page_bytes: int, pages: int) -> int:
        """Of so many pages, how many it may take now. Raises HostQuotaError with the figures when that is none."""
        if self.quota.host_bytes is None:
            return pages
        room = min(pages, (self.quota.host_bytes - self.host_bytes) // page_bytes)
        if room <= 0:
            raise HostQuotaError(
                "the caller's quota of host memory is used up",
                metadata={
                    "needed_bytes": page_bytes,
                    "reserved_bytes": self.host_bytes,
                    "quota_bytes": self.quota.host_bytes,
                },
            )
        return room

    def take(self, size_bytes: int) -> None:
        """So many bytes of pages more, or less."""
        self.host_bytes += size_bytes
        assert self.host_bytes >= 0, "a page was given back twice"


class Accounts:
    """All callers that hold anything."""

    def __init__(self, quota: Quota) -> None:
        self.quota = quota  # of each
        self._accounts: dict[str, Account] = {}

    def __len__(self) -> int:
        return len(self._accounts)

    def __iter__(self) -> Iterator[Account]:
        return iter(self._accounts.values())

    def of(self, caller: str) -> Account:
        """A caller's account."""
        account = self._accounts.get(caller)
        if account is None:
            account = self._accounts[caller] = Account(caller, self.quota)
        return account

    def forget_if_empty(self, account: Account) -> None:
        """One who holds nothing is not remembered: callers come and go."""
        if not account.caches and not account.host_bytes and not account.uploads:
            self._accounts.pop(account.caller, None)
