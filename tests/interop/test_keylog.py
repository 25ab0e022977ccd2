"""tshark, with our key logs alone, reads what two endpoints said and what ESP carried."""

from __future__ import annotations

import hashlib
import hmac
import os
import struct
import subprocess
from dataclasses import replace
from ipaddress import IPv4Address
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from oepy.errors import OepyError
from oepy.ike.algorithms import parse_esp_proposal, parse_ike_proposal
from oepy.ike.events import IkeKeys
from oepy.ike.settings import IkeSettings
from oepy.keylog import ESP_FILE, KeyLog, ike_line
from oepy.model import Endpoint, SaPair
from tests.sim.ike_net import Net, assert_one_tunnel, request, two_hosts

pytestmark = pytest.mark.interop


def checksum(data: bytes) -> int:
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def ip_packet(source: IPv4Address, target: IPv4Address, protocol: int, body: bytes) -> bytes:
    head = (
        struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(body), 0, 0, 64, protocol, 0)
        + source.packed
        + target.packed
    )
    return head[:10] + struct.pack("!H", checksum(head)) + head[12:] + body


def udp_packet(source: Endpoint, target: Endpoint, body: bytes) -> bytes:
    assert isinstance(source.address, IPv4Address)
    assert isinstance(target.address, IPv4Address)
    head = struct.pack("!HHHH", source.port, target.port, 8 + len(body), 0)
    return ip_packet(source.address, target.address, 17, head + body)


def pcap(packets: list[bytes]) -> bytes:
    output = struct.pack("<IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, 65535, 101)
    for number, packet in enumerate(packets):
        output += struct.pack("<IIII", number, 0, len(packet), len(packet)) + packet
    return output


def esp(pair: SaPair, sequence: int, inner: bytes) -> bytes:
    """An ESP packet on the outbound SA of a pair, made with cryptography alone (RFC 4303, 4106, 3602)."""
    head = struct.pack("!II", pair.spi_out, sequence)
    key = pair.keys_out.encryption.reveal()
    padding = -(len(inner) + 2) % 16
    plain = inner + bytes(range(1, padding + 1)) + bytes((padding, 4))
    if pair.suite.encryption.endswith("gcm16"):
        iv = sequence.to_bytes(8, "big")
        return head + iv + AESGCM(key[:-4]).encrypt(key[-4:] + iv, plain, head)
    iv = os.urandom(16)
    encryptor = Cipher(algorithms.AES(key), modes.CBC(iv)).encryptor()
    body = head + iv + encryptor.update(plain) + encryptor.finalize()
    return body + hmac.new(pair.keys_out.integrity.reveal(), body, hashlib.sha256).digest()[:16]


@pytest.mark.parametrize(
    ("ike", "esp_text"),
    [
        ("aes256gcm16-prfsha256-x25519", "aes128gcm16-noesn"),
        ("aes128gcm16-prfsha384-ecp384", "aes256gcm16-noesn"),
        ("aes256-sha512-ecp256", "aes128-sha256-noesn"),
    ],
)
def test_tshark_decrypts_ike_and_esp(tmp_path: Path, ike: str, esp_text: str) -> None:
    """The IKE_AUTH payloads and an inner ping appear in clear text in tshark's output."""
    settings = IkeSettings(
        liveness_interval=0.0,
        key_log=True,
        ike_offers=(parse_ike_proposal(ike),),
        esp_offers=(parse_esp_proposal(esp_text),),
    )
    a, b = two_hosts(settings)
    net = Net([a, b])
    a.ike.initiate(request(a, b), net.now)
    net.run(5)
    one, _ = assert_one_tunnel(a, b)
    log = KeyLog(tmp_path / "keys")
    for event in a.of(IkeKeys):
        assert isinstance(event, IkeKeys)
        log.write_ike(
            ike_line(
                (event.spi_i, event.spi_r),
                event.encryption,
                (event.sk_ei, event.sk_er),
                event.integrity,
                (event.sk_ai, event.sk_ar),
            )
        )
    log.write_esp(one)
    assert isinstance(one.local.address, IPv4Address)
    assert isinstance(one.remote.address, IPv4Address)
    ping = ip_packet(one.local.address, one.remote.address, 1, b"\x08\0\xf7\xff\0\0\0\0")
    packets = [
        udp_packet(source, target, (bytes(4) if target.port == 4500 else b"") + data)
        for _, source, target, data in net.carried
    ]
    packets.append(udp_packet(one.local, one.remote, esp(one, 1, ping)))
    capture = tmp_path / "a.pcap"
    capture.write_bytes(pcap(packets))
    result = subprocess.run(
        ["tshark", "-r", str(capture), "-V", "-o", "esp.enable_encryption_decode:TRUE"],
        env=os.environ | {"WIRESHARK_CONFIG_DIR": str(tmp_path / "keys")},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert "Payload: Identification - Initiator (35)" in result.stdout, result.stderr
    assert "Traffic Selector - Responder (45)" in result.stdout
    assert "Digital Signature" in result.stdout
    assert "Echo (ping) request" in result.stdout
    assert "incorrect" not in result.stdout.lower().replace("checksum: 0x", "")
    assert "Malformed" not in result.stdout


def test_the_log_is_private(tmp_path: Path) -> None:
    """Made with 0600; a file that others may read is not written to."""
    a, b = two_hosts()
    net = Net([a, b])
    a.ike.initiate(request(a, b), net.now)
    net.run(5)
    one, _ = assert_one_tunnel(a, b)
    log = KeyLog(tmp_path)
    log.write_esp(one)
    path = tmp_path / ESP_FILE
    assert path.stat().st_mode & 0o777 == 0o600
    path.chmod(0o644)
    with pytest.raises(OepyError, match="chmod 600"):
        log.write_esp(one)
    assert not a.of(IkeKeys)


def test_an_algorithm_without_a_name_gives_no_line(tmp_path: Path) -> None:
    """ChaCha20-Poly1305: nothing is written that Wireshark would stumble over."""
    a, b = two_hosts()
    net = Net([a, b])
    a.ike.initiate(request(a, b), net.now)
    net.run(5)
    one, _ = assert_one_tunnel(a, b)
    KeyLog(tmp_path).write_esp(replace(one, suite=replace(one.suite, encryption="chacha20poly1305")))
    assert not (tmp_path / ESP_FILE).exists()
