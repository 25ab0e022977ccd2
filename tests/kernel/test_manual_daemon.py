"""Manual keys in a daemon on the kernel's datapath: beside the trap, and against the userland datapath."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from oepy.lab.capture import Capture
from oepy.lab.probe import ping
from tests.fakes import manual
from tests.net.daemon_host import Host, kinds
from tests.net.harness import A4, A6, B4, B6, Wired, wired

pytestmark = [pytest.mark.kernel, pytest.mark.root, pytest.mark.timeout(500)]

XFRM = {"datapath": "xfrm", "policy": {"default": "private"}}
AH = {"protocol": "ah", "encryption": None, "encryption_key": None, "encap": None, "mode": "transport"}


@pytest.fixture(scope="module")
def net() -> Iterator[Wired]:
    with wired() as made:
        yield made


@pytest.fixture
def hosts(net: Wired, tmp_path: Path) -> Iterator[tuple[Host, Host]]:
    a, b = Host(net.a, tmp_path / "a"), Host(net.b, tmp_path / "b")
    try:
        yield a, b
    finally:
        for host in (a, b):
            host.stop()
            host.namespace.run("ip", "xfrm", "policy", "flush")
            host.namespace.run("ip", "xfrm", "state", "flush")


def test_esp_and_ah_beside_a_trap_that_holds_all_else(
    net: Wired, hosts: tuple[Host, Host], tmp_path: Path
) -> None:
    """Every destination is `private`, and nobody has a key: only what manual policies cover gets through, ESP in
    tunnel mode for IPv4 and AH in transport mode for IPv6. Stopped, the configuration's entries are gone and its
    traffic stays shut."""
    a, b = hosts
    transport = {"protocol": "ah", "mode": "transport"}
    for host, near4, far4, near6, far6 in ((a, A4, B4, A6, B6), (b, B4, A4, B6, A6)):
        section = {
            "sas": [*manual.sas(A4, B4, encap=None), *manual.sas(A6, B6, **AH)],
            "policies": [
                *manual.policies(near4, far4),
                *manual.policies(near6, far6, template=transport),
            ],
        }
        host.begin(section, **XFRM)
    for host in hosts:
        host.wait_until_ready()
    with Capture(net.wire.namespace, net.wire.ports, tmp_path / "c", incoming_only=True) as capture:
        assert None not in ping(net.a, B4, count=3, timeout=2.0)
        assert None not in ping(net.a, B6, count=3, timeout=2.0)
        capture.flush()
        seen = [packet for packet in capture.packets() if packet.kind not in ("nd", "multicast")]
        assert {packet.protocol for packet in seen} == {50, 51}
        assert len(seen) >= 12
    assert {sa["protocol"] for sa in a.json("sas")} == {"esp", "ah"}
    assert all(sa["authenticated"] == "manual" and sa["packets_out"] >= 3 for sa in a.json("sas"))
    assert a.json("explain", B4)["disposition"] == "private"
    assert a.process is not None
    a.process.terminate()
    a.process.wait(30)
    assert a.namespace.run("ip", "xfrm", "state").stdout == ""
    assert ping(net.a, B4, count=2, timeout=0.3) == [None] * 2


def test_the_kernel_talks_to_userland(net: Wired, hosts: tuple[Host, Host], tmp_path: Path) -> None:
    """The same keys on the two datapaths, ESP in UDP: each reads what the other sends. Here the kernel's own trap
    is beside them; when the daemon is stopped, what demands an SA stays shut, with whom all is clear otherwise."""
    a, b = hosts
    a.begin(manual.section(A4, B4), datapath="xfrm", trap="acquire")
    b.begin(manual.section(B4, A4), datapath="tun")
    for host in hosts:
        host.wait_until_ready()
    with Capture(net.wire.namespace, net.wire.ports, tmp_path / "c", incoming_only=True) as capture:
        assert None not in ping(net.a, B4, count=3, timeout=2.0)
        assert None not in ping(net.b, A4, count=3, timeout=2.0)
        capture.flush()
        assert kinds(capture) == {"esp"}
        assert [sa["packets_in"] for sa in (*a.json("sas"), *b.json("sas"))] == [6, 6]
        assert a.process is not None
        a.process.terminate()
        a.process.wait(30)
        assert ping(net.a, B4, count=2, timeout=0.3) == [None] * 2
        capture.flush()
        assert kinds(capture) == {"esp"}
