"""tshark as an independent reader of our ESP: given the keys, it must see the inner packet."""

from __future__ import annotations

import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from oepy.datapath.esp.sa import EspPair
from oepy.model import EspSuite
from tests.fakes.datapath import esp_of, ipv4_packet, pairs

pytestmark = pytest.mark.interop

_CIPHERS = {
    "aes128gcm16": "AES-GCM with 16 octet ICV [RFC4106]",
    "aes256gcm16": "AES-GCM with 16 octet ICV [RFC4106]",
    "aes256": "AES-CBC [RFC3602]",
    "null": "NULL",
}
_MACS = {
    "": "NULL",
    "sha256": "HMAC-SHA-256-128 [RFC4868]",
    "sha384": "HMAC-SHA-384-192 [RFC4868]",
    "sha512": "HMAC-SHA-512-256 [RFC4868]",
}


def _udp_encapsulated(esp: bytes) -> bytes:
    udp = struct.pack("!HHHH", 4500, 4500, 8 + len(esp), 0) + esp
    head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(udp), 0, 0, 64, 17, 0)
    return head + bytes((192, 0, 2, 1)) + bytes((192, 0, 2, 2)) + udp


@pytest.mark.parametrize(
    "suite",
    [
        EspSuite("aes128gcm16", "", False),
        EspSuite("aes256gcm16", "", False),
        EspSuite("aes256", "sha256", False),
        EspSuite("aes256", "sha384", False),
        EspSuite("aes256", "sha512", False),
        EspSuite("null", "sha256", False),
    ],
    ids=str,
)
def test_tshark_reads_what_we_seal(suite: EspSuite, tmp_path: Path) -> None:
    """Inner ports appear, and where there is an HMAC, tshark finds it good (it checks no AEAD tag)."""
    assert shutil.which("tshark"), "tshark is missing: apt-get install tshark"
    one, _ = pairs(suite=suite)
    inner = ipv4_packet("192.0.2.1", "192.0.2.2", bytes.fromhex("000a0000abcd"), ports=(1111, 2222))
    esp = esp_of(EspPair(one, 0.0), inner)
    packet = _udp_encapsulated(esp)
    file = tmp_path / "esp.pcap"
    file.write_bytes(
        struct.pack("=IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, 65535, 101)
        + struct.pack("=IIII", 1, 0, len(packet), len(packet))
        + packet
    )
    keys = one.keys_out
    association = ",".join(
        f'"{field}"'
        for field in (
            *("IPv4", "192.0.2.1", "192.0.2.2", f"0x{one.spi_out:08x}"),
            *(_CIPHERS[suite.encryption], "0x" + keys.encryption.reveal().hex()),
            *(_MACS[suite.integrity], "0x" + keys.integrity.reveal().hex()),
        )
    )
    done = subprocess.run(
        [
            *("tshark", "-n", "-r", str(file), "-T", "fields", "-e", "udp.dstport", "-e", "esp.icv_good"),
            *("-o", "esp.enable_encryption_decode:TRUE", "-o", "esp.enable_authentication_check:TRUE"),
            *("-o", f"uat:esp_sa:{association}"),
        ],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    ports, good = done.stdout.rstrip("\n").split("\t")
    assert ports == "4500,2222"
    if suite.integrity:
        assert good == "1"
