"""A small site's CA in a directory: `ca.key` (0600), `ca.pem` (with those above it), `ca.crl`, `settings.json`, and
`index`, to which a line is added for each certificate before anybody sees it, and for each revocation.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from cryptography import x509
from cryptography.hazmat.primitives import serialization

from oepy.errors import KeyFormatError, UsageError
from oepy.keys import HostKey, read_passphrase
from oepy.x509.certificates import Certificate, load, subject_of
from oepy.x509.issuing import (
    REASONS,
    SERIAL_BYTES,
    Places,
    Subject,
    issue,
    make_ca,
    make_crl,
    serial_from,
)

PEM = serialization.Encoding.PEM
MAX_LINE = 64 * 1024  # bytes in the index; certificates are shorter


@dataclass(frozen=True, slots=True)
class Issued:
    """One certificate in the index. Times in seconds since 1970; `revoked` 0 where it is not."""

    serial: int
    subject: str
    names: tuple[str, ...]
    not_after: float
    revoked: float = 0.0
    reason: str = ""

    def state(self, now: float) -> str:
        return "revoked" if self.revoked else "expired" if now > self.not_after else "good"


class Authority:
    """The CA in one directory. `wall_clock` in seconds since 1970. All raise OepyError."""

    def __init__(
        self, directory: Path, wall_clock: Callable[[], float], random: Callable[[int], bytes] = os.urandom
    ) -> None:
        self.directory = directory
        self._wall_clock, self._random = wall_clock, random
        self.key_file, self.certificate_file = directory / "ca.key", directory / "ca.pem"
        self.crl_file = directory / "ca.crl"
        self._index, self._settings = directory / "index", directory / "settings.json"

    # ---- making --------------------------------------------------------------------------------------------

    def make(
        self,
        name: str,
        kind: str,
        *,
        days: int,
        path_length: int | None,
        places: Places,
        above: Authority | None = None,
        encrypt: bool = False,
    ) -> Certificate:
        """Places are for the certificates that it will issue. Interrupted, it leaves at most a key without a
        certificate, which the next try takes."""
        if self.certificate_file.exists():
            raise UsageError(f"{self.directory} holds a CA already", "take another directory")
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not self.key_file.exists():
            passphrase = read_passphrase(self.key_file) if encrypt else None
            HostKey.generate(kind).save(self.key_file, passphrase)
        key = HostKey.load(self.key_file)
        issuer = None if above is None else (above.certificate(), above.key())
        made = make_ca(
            name,
            key,
            serial=self._serial(),
            now=self._wall_clock(),
            days=days,
            path_length=path_length,
            issuer=issuer,
            places=above.places() if above is not None else Places(),
        )
        if above is not None:
            above.note(made)
        write_public_file(self._settings, json.dumps(asdict(places)).encode())
        chain = [made] if above is None else [made, *above.chain()]
        write_public_file(self.certificate_file, b"".join(one.public_bytes(PEM) for one in chain))
        self.sign_list(7)
        return made

    # ---- reading -------------------------------------------------------------------------------------------

    def key(self) -> HostKey:
        return HostKey.load(self.key_file)

    def chain(self) -> tuple[Certificate, ...]:
        """Its own certificate first; the root last."""
        if not self.certificate_file.exists():
            raise UsageError(
                f"{self.directory} holds no CA", "make one with `oepy pki ca`, or name it by --dir"
            )
        return load(str(self.certificate_file))

    def certificate(self) -> Certificate:
        return self.chain()[0]

    def places(self) -> Places:
        try:
            data = json.loads(self._settings.read_bytes())
            return Places(tuple(data["crl_uris"]), tuple(data["ocsp_uris"]))
        except (OSError, ValueError, KeyError, TypeError):
            raise UsageError(
                f"{self._settings} cannot be read", 'write {"crl_uris": [], "ocsp_uris": []} into it'
            ) from None

    def issued(self) -> list[Issued]:
        """In the order of their issue."""
        found: dict[int, Issued] = {}
        for number, line in enumerate(self._lines(), 1):
            try:
                entry = json.loads(line)
                serial = int(entry["serial"], 16)
                if "revoked" in entry:
                    known = found[serial]
                    found[serial] = Issued(
                        *(serial, known.subject, known.names, known.not_after),
                        *(float(entry["revoked"]), str(entry["reason"])),
                    )
                else:
                    found[serial] = Issued(
                        serial, str(entry["subject"]), tuple(entry["names"]), float(entry["not_after"])
                    )
            except (ValueError, KeyError, TypeError):
                raise UsageError(
                    f"{self._index}: line {number} cannot be read", "restore it from a copy"
                ) from None
        return list(found.values())

    def _lines(self) -> list[str]:
        try:
            text = self._index.read_text(encoding="ascii")
        except FileNotFoundError:
            return []
        except (OSError, ValueError) as error:
            raise UsageError(f"{self._index} cannot be read: {error}") from None
        # A line without its end is one that a crash cut off: nobody has seen its certificate
        return text.split("\n")[:-1]

    # ---- deeds ---------------------------------------------------------------------------------------------

    def issue(self, wanted: Subject, days: int) -> tuple[Certificate, ...]:
        """The certificate, and those between it and the root."""
        chain, key = self.chain(), self.key()
        made = issue(
            *(wanted, chain[0], key),
            serial=self._serial(),
            now=self._wall_clock(),
            days=days,
            places=self.places(),
        )
        self.note(made)
        return (made, *(one for one in chain if one.subject != one.issuer))

    def note(self, certificate: Certificate) -> None:
        from oepy.x509.identity import identities_of

        names = [str(identity) for identity in identities_of(certificate)]
        self._append(
            {
                "serial": f"{certificate.serial_number:x}",
                "subject": subject_of(certificate),
                "names": names,
                "not_after": certificate.not_valid_after_utc.timestamp(),
            }
        )

    def revoke(self, serial: int, reason: str) -> Issued:
        """Takes effect for peers with the next list, which `sign_list` makes."""
        if reason not in REASONS:
            raise UsageError(f"{reason!r}: one of {', '.join(REASONS)}")
        with self._locked():
            known = next((one for one in self.issued() if one.serial == serial), None)
            if known is None:
                raise UsageError(f"no certificate {serial:x} was issued here", "see `oepy pki list`")
            if known.revoked:
                raise UsageError(f"{known.subject} ({serial:x}) is revoked already")
            now = self._wall_clock()
            self._append({"serial": f"{serial:x}", "revoked": now, "reason": reason}, locked=True)
            return Issued(known.serial, known.subject, known.names, known.not_after, now, reason)

    def sign_list(self, days: int) -> x509.CertificateRevocationList:
        """All that are revoked and have not expired (RFC 5280 §3.3)."""
        with self._locked():
            now = self._wall_clock()
            revoked = [one for one in self.issued() if one.revoked and one.not_after > now]
            crl = make_crl(
                *(self.certificate(), self.key()),
                ((one.serial, one.revoked, one.reason) for one in revoked),
                number=self._next_number(),
                now=now,
                days=days,
            )
            write_public_file(self.crl_file, crl.public_bytes(PEM))
            return crl

    def _next_number(self) -> int:
        """RFC 5280 §5.2.3: greater than all before, also where lists were lost."""
        last = 0
        with contextlib.suppress(OSError, ValueError, x509.ExtensionNotFound):
            before = x509.load_pem_x509_crl(self.crl_file.read_bytes())
            last = before.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number
        return max(last + 1, int(self._wall_clock()))

    def _serial(self) -> int:
        return serial_from(self._random(SERIAL_BYTES))

    # ---- files ---------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        try:
            descriptor = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise UsageError(f"{self.directory}: {error.strerror}", "make a CA with `oepy pki ca`") from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def _append(self, entry: dict[str, Any], *, locked: bool = False) -> None:
        """On disk before this returns."""
        with contextlib.nullcontext() if locked else self._locked():
            try:
                descriptor = os.open(
                    self._index, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600
                )
                with os.fdopen(descriptor, "r+b") as stream:
                    self._drop_torn_line(stream)
                    stream.write(json.dumps(entry).encode("ascii") + b"\n")
                    stream.flush()
                    os.fsync(stream.fileno())
            except OSError as error:
                raise KeyFormatError(f"cannot write {self._index}: {error.strerror}") from None

    @staticmethod
    def _drop_torn_line(stream: BinaryIO) -> None:
        """At the end, where a crash may have cut one off."""
        size = stream.seek(0, os.SEEK_END)
        start = stream.seek(max(size - MAX_LINE, 0))
        tail = stream.read()
        stream.seek(start + tail.rfind(b"\n") + 1)
        stream.truncate()


def write_public_file(path: Path, data: bytes) -> None:
    """Certificates and lists, which everybody may read: whole or not at all. Raises KeyFormatError."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o644)
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise KeyFormatError(f"cannot write {path}: {error.strerror}") from None
