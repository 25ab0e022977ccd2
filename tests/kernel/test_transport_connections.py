"""A connection in transport mode over the kernel's ESP with XFRM interfaces: past the device, and never in the
clear. Two daemons of ours on one wire."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from oepy.lab.capture import Capture
from oepy.lab.probe import ping
from tests.net.daemon_host import Host, kinds, two_with_a_secret
from tests.net.harness import A4, A6, B4, B6, wired

pytestmark = [pytest.mark.kernel, pytest.mark.root, pytest.mark.timeout(900)]
IDS = ("a.example", "b.example")


def section(number: int, version: int) -> dict[str, Any]:
    ends = (A4, B4) if version == 4 else (A6, B6)
    child = {"mode": "transport", "start_action": "trap", "local_ts": ["dynamic"], "remote_ts": ["dynamic"]}
    connection = {
        "local_addrs": [ends[number]],
        "remote_addrs": [ends[1 - number]],
        "local": {"auth": "psk", "id": IDS[number]},
        "remote": {"auth": "psk", "id": IDS[1 - number]},
        "children": {"net": child},
    }
    secrets = [{"type": "ike", "id": list(IDS), "secret_file": "psk"}]
    return {"datapath": "auto", "connections": {"pair": connection}, "secrets": secrets}


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[tuple[Host, Host]]:
    with wired() as net, two_with_a_secret(net.a, net.b, tmp_path) as made:
        yield made


@pytest.mark.parametrize("version", [4, 6])
def test_the_first_packet_is_held_and_nothing_goes_in_the_clear(
    hosts: tuple[Host, Host], tmp_path: Path, version: int
) -> None:
    """Held until the SA is there, then through it; a reload loses none; without the peer nothing leaves."""
    one, other = hosts
    target = B4 if version == 4 else B6
    for number, host in enumerate(hosts):
        host.start({}, **section(number, version))
    with Capture(one.namespace, ["eth0"], tmp_path / "wire.pcap") as capture:
        assert None not in ping(one.namespace, target, count=3, timeout=15), one.log() + other.log()
        (sa,) = one.json("sas")
        assert (sa["mode"], sa["encap"], sa["connection"]) == ("transport", False, "pair/net")
        one.reload({}, **section(0, version))
        assert None not in ping(one.namespace, target, count=3, timeout=5), one.log() + other.log()
        other.stop()
        assert ping(one.namespace, target, count=5, timeout=0.5) == [None] * 5
        capture.flush()
        assert kinds(capture) == {"ike", "esp"}
