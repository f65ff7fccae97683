"""Who calls: the owner of caches, uploads and quotas.

A caller proves who it is by a bearer token, by a certificate of an authority that the settings name, or, on the unix
socket, by the user that its process runs as. A token says more than the host or the user that it is used by, so it
wins. Where the settings ask for none of these, the service listens on loopback and unix sockets alone, and all callers
are one.

Who calls is found out once a call, before any servicer is reached (`rpc.CallInterceptor`); servicers ask `current`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from streamindex_service.errors import PermissionDeniedError, UnauthenticatedError
from streamindex_service.frontend.call import CURRENT
from streamindex_service.frontend.tokens import TokenFile

ANONYMOUS = "anonymous"
_SCHEME = "bearer "

Identify = Callable[[Any], str]
"""From a call's context to the caller's identity. Raises UnauthenticatedError, PermissionDeniedError."""


def anonymous(context: Any) -> str:
    """Everybody is the same caller."""
    return ANONYMOUS


def current(context: Any) -> str:
    """The caller of the call that is being served, as the interceptor found it."""
    call = CURRENT.get()
    assert call is not None, "a servicer was reached around the interceptor"
    assert call.caller, "a servicer was reached before the caller was known"
    return call.caller


def authenticator(
    tokens: TokenFile | None, *, certificates: bool, uid_of: Callable[[str], int | None] | None = None
) -> Identify:
    """What the settings ask for: tokens, certificates that the handshake has verified, users of the unix socket (of a
    gRPC peer), any of them, or nothing."""
    if tokens is None and not certificates and uid_of is None:
        return anonymous

    def identify(context: Any) -> str:
        if tokens is not None:
            token = _bearer(context)
            if token is not None:
                name = tokens.name_of(token)
                if name is None:
                    raise PermissionDeniedError
                return f"token:{name}"
        subject = _subject(context) if certificates else None
        if subject is not None:
            return f"certificate:{subject}"
        uid = uid_of(context.peer()) if uid_of is not None else None
        if uid is None:
            raise UnauthenticatedError
        return f"uid:{uid}"

    return identify


def _bearer(context: Any) -> str | None:
    """The token of the call; None when there is none. Raises PermissionDeniedError for credentials of another kind."""
    given = [value for key, value in context.invocation_metadata() or () if key == "authorization"]
    if not given:
        return None
    (value, *more) = given
    if more or not isinstance(value, str) or not value[: len(_SCHEME)].lower() == _SCHEME:
        raise PermissionDeniedError
    return value[len(_SCHEME) :]


def _subject(context: Any) -> str | None:
    """The name in the client's certificate: its first alternative name, else the common name."""
    properties = context.auth_context()
    for key in ("x509_subject_alternative_name", "x509_common_name"):
        for name in properties.get(key, ()):
            text: str = name.decode(errors="replace")
            if text:
                return text
    return None
