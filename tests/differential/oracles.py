"""libunbound and delv as oracles: one question, one status, in the validator's words."""

from __future__ import annotations

import ctypes
import ctypes.util
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tests.differential.responder import HOST

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


def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(ctypes.util.find_library("unbound") or "libunbound.so.8")
    library.ub_ctx_create.restype = ctypes.c_void_p
    library.ub_strerror.restype = ctypes.c_char_p
    pointer, text = ctypes.c_void_p, ctypes.c_char_p
    library.ub_ctx_set_option.argtypes = [pointer, text, text]
    library.ub_ctx_set_fwd.argtypes = [pointer, text]
    library.ub_ctx_add_ta.argtypes = [pointer, text]
    library.ub_ctx_delete.argtypes = [pointer]
    library.ub_resolve_free.argtypes = [pointer]
    library.ub_resolve.argtypes = [pointer, text, ctypes.c_int, ctypes.c_int, pointer]
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
    """One context with its own caches; `anchors` are zone-file lines."""

    def __init__(self, port: int, anchors: list[str]) -> None:
        self._library = _library()
        self._context = self._library.ub_ctx_create()
        for option, value in _OPTIONS.items():
            self._must(self._library.ub_ctx_set_option(self._context, f"{option}:".encode(), value.encode()))
        self._must(self._library.ub_ctx_set_fwd(self._context, f"{HOST}@{port}".encode()))
        for anchor in anchors:
            self._must(self._library.ub_ctx_add_ta(self._context, anchor.encode()))

    def _must(self, code: int) -> None:
        if code:
            raise RuntimeError(f"libunbound: {self._library.ub_strerror(code).decode()}")

    def ask(self, name: str, rdtype: int) -> Said:
        result = ctypes.POINTER(_Result)()
        self._must(self._library.ub_resolve(self._context, name.encode(), rdtype, 1, ctypes.byref(result)))
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


def start_delv(port: int, anchors: list[str], name: str, kind: str) -> tuple[subprocess.Popen[str], Path]:
    """delv takes one anchored zone, of which it needs the name."""
    zone = anchors[0].split()[0]
    entries = []
    for line in anchors:
        owner, _, record, a, b, c, *data = line.split()
        word = "static-ds" if record == "DS" else "static-key"
        entries.append(f'{owner} {word} {a} {b} {c} "{"".join(data)}";')
    with tempfile.NamedTemporaryFile("w", prefix="oepy-delv-", delete=False) as file:
        file.write("trust-anchors {\n" + "\n".join(entries) + "\n};\n")
    command = ["delv", f"@{HOST}", "-p", str(port), "-a", file.name, f"+root={zone}", name, kind]
    return (
        subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT),
        Path(file.name),
    )


def read_delv(started: tuple[subprocess.Popen[str], Path]) -> Said:
    process, path = started
    try:
        text, _ = process.communicate(timeout=30)
    finally:
        if process.poll() is None:
            process.kill()
        path.unlink()
    return Said(_delv_status(text), " / ".join(text.strip().splitlines()[:4]))


def _delv_status(text: str) -> str:
    """Each part of an alias chain has a line of its own; the weakest counts."""
    notes = [line for line in text.splitlines() if line.startswith("; ")]
    failed = "resolution failed" in text and "resolution failed: ncache" not in text  # which is a mere "none"
    if failed:
        # As far as delv tells: a proof or a signature that is wanted and not there.
        broken = ("broken trust chain", "insecurity proof failed", "no valid", "must be secure")
        return BOGUS if any(word in text for word in broken) else FAILED
    if any(line.startswith(("; unsigned answer", "; negative response, unsigned")) for line in notes):
        return INSECURE
    if any("fully validated" in line for line in notes):
        return SECURE
    return FAILED
