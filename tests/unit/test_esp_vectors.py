"""ESP as published: RFC 7634 appendix A, and draft-mcgrew-gcm-test-01 (cases 1, 7 and 3 of its list)."""

from __future__ import annotations

from ipaddress import ip_address

import pytest

from oepy.datapath.esp.sa import EspPair
from oepy.datapath.esp.suites import IntegrityError, make_transform
from oepy.model import EspSuite, SaKeys, Secret
from tests.fakes.datapath import pairs

_CASES = {
    "gcm-128-esn": (
        EspSuite("aes128gcm16", esn=True),
        "4c80cdefbb5d10da906ac73c3613a634 2e443b68",
        ("00004321", 0x8765432100000000, "4956ed7e3b244cfe"),
        "45000048699a000080114db7c0a80102c0a801010a9bf15638d3010000010000"
        "00000000045f736970045f756470037369700963796265726369747902646b00"
        "0021000101020201",
        "fecf537e729d5b07dc30df528dd22b768d1b98736696a6fd348509fa13ceac34"
        "cfa2436f14a3f3cf65925bf1f4a13c5d15b21e1884f5ff6247aeabb786b93bce"
        "61bc17d768fd9732459018148f6cbe722fd04796562dfdb4",
    ),
    "gcm-192": (
        EspSuite("aes192gcm16", esn=False),
        "feffe9928665731c6d6a8f9467308308feffe9928665731c cafebabe",
        ("0000a5f8", 0x0000000A, "facedbaddecaf888"),
        "45000028a4ad4000400678800a01038f0a010612802306b8cb712602dd6bb03e501016d075680001",
        "a5b1f8066029aea40e598b8122de02420938b3ab33f828e687b8858b5bfbdbd0"
        "315b27452144cc7795457b9652037f5318027b5b4cd7a636",
    ),
    "gcm-256": (
        EspSuite("aes256gcm16", esn=False),
        "abbccddef00112233445566778899aababbccddef00112233445566778899aab 11223344",
        ("4a2cbfe3", 2, "0102030405060708"),
        "4500003069a6400080062690c0a801029389155e0a9e008b2dc57ee000000000"
        "7002400020bf0000020405b40101040201020201",
        "ff425c9b724599df7a3bcd510194e00d6a78107f1b0b1cbf06efae9d65a5d763"
        "748a637985771d347f0545659f14e99def842d8eb335f4eecfdbf831824b4c4915956c96",
    ),
    "chacha20poly1305": (
        EspSuite("chacha20poly1305", esn=False),
        "808182838485868788898a8b8c8d8e8f909192939495969798999a9b9c9d9e9f a0a1a2a3",
        ("01020304", 5, "1011121314151617"),
        "45000054a6f200004001e778c6336405c000020508005b7a3a080000553bec10"
        "0007362708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f20212223"
        "2425262728292a2b2c2d2e2f303132333435363701020204",
        "24039428b97f417e3c13753a4f05087b67c352e6a7fab1b982d466ef407ae5c6"
        "14ee8099d52844eb61aa95dfab4c02f72aa71e7c4c4f64c9befe2facc638e8f3"
        "cbec163fac469b502773f6fb94e664da9165b82829f641e076aaa8266b7fb0f7"
        "b11b369907e1ad43",
    ),
}


@pytest.mark.parametrize("name", _CASES)
def test_the_published_packet_opens_to_the_published_plaintext(name: str) -> None:
    """Key, salt, IV, AAD and tag are put together as the documents do it; one flipped bit is refused."""
    suite, key, (spi, sequence, iv), plaintext, sealed = _CASES[name]
    transform = make_transform(suite, SaKeys(Secret(bytes.fromhex(key))), int(spi, 16))
    header = bytes.fromhex(spi) + (sequence & 0xFFFFFFFF).to_bytes(4, "big")
    body = bytes.fromhex(iv + sealed)
    assert transform.open(memoryview(header + body), sequence).hex() == plaintext
    changed = bytearray(header + body)
    changed[28] ^= 1
    with pytest.raises(IntegrityError):
        transform.open(memoryview(bytes(changed)), sequence)
    with pytest.raises(IntegrityError):
        transform.open(memoryview(header[:4] + b"\xff\xff\xff\xfe" + body), sequence ^ 1)


def test_the_whole_packet_of_rfc_7634_comes_out_of_its_sa() -> None:
    """The RFC's ESP packet, with header and trailer, gives its ICMP packet from 198.51.100.5 to 192.0.2.5."""
    suite, key, (spi, sequence, iv), plaintext, sealed = _CASES["chacha20poly1305"]
    pair, _ = pairs("192.0.2.5", "198.51.100.5", suite=suite, spis=(0x01020304, 0x2002))
    keyed = SaKeys(Secret(bytes.fromhex(key)))
    object.__setattr__(pair, "keys_in", keyed)
    esp = EspPair(pair, 0.0)
    packet = esp.packet(esp.open(memoryview(bytes.fromhex(spi + f"{sequence:08x}" + iv + sealed))), 1.0)
    assert packet is not None
    assert packet.hex() == plaintext[: 0x54 * 2]
    assert ip_address(packet[12:16]) == ip_address("198.51.100.5")
