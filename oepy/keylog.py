"""Key logs that Wireshark and tshark read: `ikev2_decryption_table` and `esp_sa`.

Put the two files into a Wireshark profile's directory (or point tshark's WIRESHARK_CONFIG_DIR at theirs) and
switch on "Attempt to detect/decode encrypted ESP payloads". Whoever has these files reads the traffic, so
they are made with mode 0600 and only where the configuration asks for them.

Wireshark has no name for ChaCha20-Poly1305 in either table (as of 4.0): such SAs give no line.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from oepy.errors import OepyError
from oepy.model import Endpoint, SaKeys, SaPair, Secret

IKE_FILE = "ikev2_decryption_table"
ESP_FILE = "esp_sa"

_IKE_ENCRYPTION = {
    "aes128gcm16": "AES-GCM-128 with 16 octet ICV [RFC5282]",
    "aes192gcm16": "AES-GCM-192 with 16 octet ICV [RFC5282]",
    "aes256gcm16": "AES-GCM-256 with 16 octet ICV [RFC5282]",
    "aes128": "AES-CBC-128 [RFC3602]",
    "aes192": "AES-CBC-192 [RFC3602]",
    "aes256": "AES-CBC-256 [RFC3602]",
}
_IKE_INTEGRITY = {
    "": "NONE [RFC4306]",
    "sha256": "HMAC_SHA2_256_128 [RFC4868]",
    "sha384": "HMAC_SHA2_384_192 [RFC4868]",
    "sha512": "HMAC_SHA2_512_256 [RFC4868]",
}
_ESP_ENCRYPTION = {
    "aes128gcm16": "AES-GCM with 16 octet ICV [RFC4106]",
    "aes192gcm16": "AES-GCM with 16 octet ICV [RFC4106]",
    "aes256gcm16": "AES-GCM with 16 octet ICV [RFC4106]",
    "aes128": "AES-CBC [RFC3602]",
    "aes192": "AES-CBC [RFC3602]",
    "aes256": "AES-CBC [RFC3602]",
    "null": "NULL",
}
_ESP_INTEGRITY = {
    "": "NULL",
    "sha256": "HMAC-SHA-256-128 [RFC4868]",
    "sha384": "HMAC-SHA-384-192 [RFC4868]",
    "sha512": "HMAC-SHA-512-256 [RFC4868]",
}


def ike_line(
    spis: tuple[bytes, bytes],
    encryption: str,
    sk_e: tuple[Secret, Secret],
    integrity: str,
    sk_a: tuple[Secret, Secret],
) -> str | None:
    """A line of `ikev2_decryption_table`; each tuple is initiator, responder. None where Wireshark has no
    name for the algorithm."""
    if encryption not in _IKE_ENCRYPTION or integrity not in _IKE_INTEGRITY:
        return None
    fields = [spi.hex() for spi in spis]
    fields += [secret.reveal().hex() for secret in sk_e]
    fields.append(f'"{_IKE_ENCRYPTION[encryption]}"')
    fields += [secret.reveal().hex() for secret in sk_a]
    fields.append(f'"{_IKE_INTEGRITY[integrity]}"')
    return ",".join(fields)


def esp_lines(pair: SaPair) -> list[str]:
    """The two lines of `esp_sa` for a pair: inbound, outbound. Empty where Wireshark has no name for the
    algorithm."""
    if pair.suite.encryption not in _ESP_ENCRYPTION:
        return []

    def line(source: Endpoint, target: Endpoint, spi: int, keys: SaKeys) -> str:
        integrity = keys.integrity.reveal().hex()
        encryption = keys.encryption.reveal().hex()
        fields = (
            f"IPv{source.address.version}",
            str(source.address),
            str(target.address),
            f"0x{spi:08x}",
            _ESP_ENCRYPTION[pair.suite.encryption],
            f"0x{encryption}" if encryption else "",
            _ESP_INTEGRITY[pair.suite.integrity],
            f"0x{integrity}" if integrity else "",
        )
        return ",".join(f'"{field}"' for field in fields)

    return [
        line(pair.remote, pair.local, pair.spi_in, pair.keys_in),
        line(pair.local, pair.remote, pair.spi_out, pair.keys_out),
    ]


class KeyLog:
    """Appends to the two files in `directory`. Raises OepyError where others could read them."""

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self._directory = Path(directory)
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)

    def write_ike(self, line: str | None) -> None:
        if line is not None:
            self._append(IKE_FILE, [line])

    def write_esp(self, pair: SaPair) -> None:
        self._append(ESP_FILE, esp_lines(pair))

    def _append(self, name: str, lines: list[str]) -> None:
        if not lines:
            return
        path = self._directory / name
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
        with os.fdopen(os.open(path, flags, 0o600), "a", encoding="ascii") as file:
            status = os.fstat(file.fileno())
            if status.st_uid != os.geteuid() or stat.S_IMODE(status.st_mode) & 0o077:
                raise OepyError(f"key log {path} is open to others", f"chmod 600 {path}, owned by this user")
            file.write("\n".join(lines) + "\n")
