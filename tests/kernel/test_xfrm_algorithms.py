"""Every algorithm in every mode and family through the second kernel, proven on the wire.

a (198.18.0.1, 2001:2::1) ── wire ── b (198.18.0.2, 2001:2::2), SAs given by hand.
"""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator, Iterator

import pytest
import pytest_asyncio

from oepy.model import EspSuite, SaPair
from tests.fakes.datapath import pairs
from tests.kernel.xfrm_harness import SECRET, Host, both_ways, bound, join, part, tap, two_hosts
from tests.net.harness import A4, A6, B4, B6, Wired, wired

pytestmark = [pytest.mark.kernel, pytest.mark.root, pytest.mark.asyncio(loop_scope="module")]

ESP_SUITES = [
    *(EspSuite(name, "", esn) for name in ("aes128gcm16", "aes256gcm16") for esn in (True, False)),
    EspSuite("aes192gcm16"),
    EspSuite("chacha20poly1305"),
    EspSuite("aes128", "sha256"),
    EspSuite("aes192", "sha384"),
    EspSuite("aes256", "sha512"),
    EspSuite("aes256", "sha256", esn=False),
    EspSuite("aes128ctr", "sha256"),
    EspSuite("aes192ctr", "sha384"),
    EspSuite("aes256ctr", "sha512"),
    EspSuite("aes128", "sha1"),
    EspSuite("null", "sha256"),
]
AH_SUITES = [EspSuite("", mac, esn) for mac in ("sha256", "sha384", "sha512") for esn in (True, False)]
# mode, outer, inner
TUNNELS = [("tunnel", outer, inner) for outer in (4, 6) for inner in (4, 6)]
TRANSPORTS = [("transport", version, version) for version in (4, 6)]
ENDS = {4: (A4, B4), 6: (A6, B6)}
WIDTH = {4: 32, 6: 128}


@pytest.fixture(scope="module")
def net() -> Iterator[Wired]:
    with wired() as made:
        yield made


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def hosts(net: Wired) -> AsyncIterator[tuple[Host, Host]]:
    async with two_hosts(net) as both:
        yield both


def pair_of(
    suite: EspSuite, mode: str, outer: int, inner: int, protocol: str = "esp", **more: object
) -> SaPair:
    inside = tuple(f"{address}/{WIDTH[inner]}" for address in ENDS[inner])
    pair, _ = pairs(*ENDS[outer], suite=suite, inner=(inside[0], inside[1]))
    return dataclasses.replace(pair, mode=mode, protocol=protocol, encap=False, **more)  # type: ignore[arg-type]


async def carried(hosts: tuple[Host, Host], pair: SaPair, inner: int) -> None:
    """A datagram each way; on the wire nothing but ESP or AH between the outer addresses."""
    a, b = hosts
    await join(a, b, pair)
    # In transport mode the policies take the packets, and nothing is marked
    mark = 0x10000000 if pair.mode == "tunnel" else 0
    one, other = (
        bound(a.namespace, ENDS[inner][0], 7001, mark),
        bound(b.namespace, ENDS[inner][1], 7001, mark),
    )
    with tap(b.namespace) as wire:
        assert await both_ways(one, other), (
            str(pair.suite),
            pair.mode,
            pair.protocol,
            a.ip("-s", "xfrm", "state"),
        )
        packets = wire.packets()
    one.close()
    other.close()
    assert [packet.kind for packet in packets] == [pair.protocol] * 2
    assert {str(packet.source) for packet in packets} == {str(pair.local.address), str(pair.remote.address)}
    if pair.suite.encryption not in ("null", ""):
        assert not any(SECRET in data for data in wire.raw)
    (counters,) = await b.datapath.counters()
    assert (counters.packets_in, counters.packets_out) == (1, 1)
    await part(a, b, pair)


@pytest.mark.parametrize("suite", ESP_SUITES, ids=str)
async def test_esp(hosts: tuple[Host, Host], suite: EspSuite) -> None:
    """Tunnel and transport, IPv4, IPv6 and each in the other."""
    for mode, outer, inner in (*TUNNELS, *TRANSPORTS):
        await carried(hosts, pair_of(suite, mode, outer, inner), inner)


@pytest.mark.parametrize("suite", AH_SUITES, ids=str)
async def test_ah(hosts: tuple[Host, Host], suite: EspSuite) -> None:
    """The same."""
    for mode, outer, inner in (*TUNNELS, *TRANSPORTS):
        await carried(hosts, pair_of(suite, mode, outer, inner, "ah"), inner)


@pytest.mark.parametrize("outer", [4, 6])
@pytest.mark.parametrize("suite", [EspSuite("aes256gcm16"), EspSuite("aes256", "sha256")], ids=str)
async def test_esp_in_udp(hosts: tuple[Host, Host], suite: EspSuite, outer: int) -> None:
    """Port 4500 to port 4500 (RFC 3948), tunnel and transport, and the daemon's socket sees none of it."""
    _, b = hosts
    for mode, inner in (("tunnel", 4), ("tunnel", 6), ("transport", outer)):
        pair = dataclasses.replace(pair_of(suite, mode, outer, inner), encap=True)
        with tap(b.namespace) as wire:
            await carried(hosts, pair, inner)
            assert {(packet.source_port, packet.destination_port) for packet in wire.packets()} == {
                (4500, 4500)
            }
        for sock in b.sockets.nat_t:
            assert b.sockets.receive(sock) is None


async def test_ip_xfrm_reads_what_we_meant(hosts: tuple[Host, Host]) -> None:
    """An independent reader of the kernel's SAD and SPD."""
    a, _ = hosts
    pair = dataclasses.replace(pair_of(EspSuite("aes256gcm16"), "tunnel", 4, 6), replay_window=4096)
    await a.datapath.install(dataclasses.replace(pair, encap=True))
    state = a.ip("xfrm", "state", "get", "src", B4, "dst", A4, "proto", "esp", "spi", "0x1001")
    for words in (
        "mode tunnel",
        "flag af-unspec esn",
        "aead rfc4106(gcm(aes)) 0x" + "01" * 36 + " 128",
        "replay_window 4096",
        "encap type espinudp sport 4500 dport 4500",
        "if_id 0x4545",
    ):
        assert words in state, state
    outward = a.ip("-s", "xfrm", "state", "get", "src", A4, "dst", B4, "proto", "esp", "spi", "0x2002")
    for words in ("output-mark 0x20000000/0x30000000", "nopmtudisc", "extra_flag dont-encap-dscp"):
        assert words in outward, outward
    policy = a.ip(
        "xfrm", "policy", "get", "src", f"{A6}/128", "dst", f"{B6}/128", "dir", "out", "if_id", "0x4545"
    )
    assert f"tmpl src {A4} dst {B4}" in policy
    assert "spi 0x00002002" in policy
    await a.datapath.remove(pair.spi_in)
