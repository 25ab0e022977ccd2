"""libunbound by ctypes, as a validator to compare with: no package of Python's is needed for it."""

from __future__ import annotations

import ctypes
import ctypes.util
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from oepy.errors import OepyError

SECURE, INSECURE, BOGUS, FAILED = "secure", "insecure", "bogus", "failed"


@dataclass(frozen=True)
class Said:
    """`status` is one of the four words above; `ttl` in seconds, -1 where not told; `why` for people."""

    status: str
    why: str = ""
    ttl: int = -1


class _Result(ctypes.Structure):
    _fields_ = [
        ("qname", ctypes.c_char_p),
        ("qtype", ctypes.c_int),
        ("qclass", ctypes.c_int),
        ("data", ctypes.c_void_p),
        ("len", ctypes.c_void_p),
        ("canonname", ctypes.c_char_p),
        ("rcode", ctypes.c_int),
        ("answer_packet", ctypes.c_void_p),
        ("answer_len", ctypes.c_int),
        ("havedata", ctypes.c_int),
        ("nxdomain", ctypes.c_int),
        ("secure", ctypes.c_int),
        ("bogus", ctypes.c_int),
        ("why_bogus", ctypes.c_char_p),
        ("was_ratelimited", ctypes.c_int),
        ("ttl", ctypes.c_int),
    ]


_Callback = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int, ctypes.POINTER(_Result))


def _library() -> ctypes.CDLL:
    try:
        library = ctypes.CDLL(ctypes.util.find_library("unbound") or "libunbound.so.8")
    except OSError:
        raise OepyError("libunbound is not installed", "run scripts/install-system test") from None
    pointer, text, number = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int
    library.ub_ctx_create.restype = pointer
    library.ub_strerror.restype = text
    library.ub_ctx_set_option.argtypes = [pointer, text, text]
    library.ub_ctx_set_fwd.argtypes = [pointer, text]
    library.ub_ctx_add_ta.argtypes = [pointer, text]
    library.ub_ctx_async.argtypes = [pointer, number]
    library.ub_ctx_delete.argtypes = [pointer]
    library.ub_wait.argtypes = [pointer]
    library.ub_resolve_free.argtypes = [pointer]
    library.ub_resolve.argtypes = [pointer, text, number, number, pointer]
    library.ub_resolve_async.argtypes = [pointer, text, number, number, pointer, _Callback, pointer]
    return library


_OPTIONS = {
    "do-ip6": "no",
    "do-not-query-localhost": "no",
    "unblock-lan-zones": "yes",
    "trust-anchor-signaling": "no",
    "qname-minimisation": "no",
    "aggressive-nsec": "no",
    "module-config": "validator iterator",
    "msg-cache-slabs": "1",
    "rrset-cache-slabs": "1",
    "infra-cache-slabs": "1",
    "key-cache-slabs": "1",
}


class Unbound:
    """One context with its own caches, which forwards to `host`; `anchors` are zone-file lines. Raises
    OepyError where libunbound is missing or refuses."""

    def __init__(
        self, host: str, port: int, anchors: Iterable[str], options: Mapping[str, str] | None = None
    ) -> None:
        self._library = _library()
        self._context = self._library.ub_ctx_create()
        for option, value in (_OPTIONS | dict(options or {})).items():
            self._must(self._library.ub_ctx_set_option(self._context, f"{option}:".encode(), value.encode()))
        self._must(self._library.ub_ctx_set_fwd(self._context, f"{host}@{port}".encode()))
        for anchor in anchors:
            self._must(self._library.ub_ctx_add_ta(self._context, anchor.encode()))
        self._must(self._library.ub_ctx_async(self._context, 1))  # by threads, should it come to that

    def _must(self, code: int) -> None:
        if code:
            raise OepyError(f"libunbound: {self._library.ub_strerror(code).decode()}")

    def ask(self, name: str, rdtype: int) -> Said:
        result = ctypes.POINTER(_Result)()
        self._must(self._library.ub_resolve(self._context, name.encode(), rdtype, 1, ctypes.byref(result)))
        return self._said(result)

    def ask_all(self, names: Iterable[str], rdtype: int) -> list[Said]:
        """All at once; in the order of the answers."""
        said: list[Said] = []

        def take(_: int, code: int, result: ctypes._Pointer[_Result]) -> None:
            said.append(Said(FAILED, f"error {code}") if code else self._said(result))

        callback = _Callback(take)
        for name in names:
            self._must(
                self._library.ub_resolve_async(self._context, name.encode(), rdtype, 1, None, callback, None)
            )
        self._must(self._library.ub_wait(self._context))
        return said

    def _said(self, result: ctypes._Pointer[_Result]) -> Said:
        found = result.contents
        why = (found.why_bogus or b"").decode()
        if found.bogus:
            said = Said(BOGUS, why)
        elif found.secure:
            said = Said(SECURE, "", found.ttl)
        elif found.rcode not in (0, 3):
            said = Said(FAILED, f"rcode {found.rcode} {why}")
        else:
            said = Said(INSECURE, why, found.ttl)
        self._library.ub_resolve_free(result)
        return said

    def close(self) -> None:
        self._library.ub_ctx_delete(self._context)
