"""Keys of connections' children over the kernel's ESP."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from oepy.lab.capture import Capture
from tests.net.daemon_host import Host
from tests.net.harness import A4, listen_udp, udp
from tests.net.test_connection_keys import (
    FAR,
    NEAR,
    Children,
    bring_up,
    hosts,
    section,
    the_lower_priority_wins,
)

__all__ = ["hosts"]  # the fixture

pytestmark = [pytest.mark.root, pytest.mark.kernel]


def test_the_lower_priority_wins(hosts: tuple[Host, Host]) -> None:
    """As with userland ESP."""
    the_lower_priority_wins(hosts, "xfrm")


def test_what_is_copied_between_the_headers(hosts: tuple[Host, Host], tmp_path: Path) -> None:
    """A packet with DSCP EF, ECT(1) and DF: as it is outside, and as it arrives. By default ECN alone is copied; a
    load with other keys reaches the SAs."""
    one, other = hosts
    inside = 0xB9
    child = {"local_ts": [f"{NEAR}/32"], "remote_ts": [f"{FAR}/32"]}
    for place, (ours, theirs, outside, df, arrives) in enumerate(
        (
            ({}, {}, 0x01, False, inside),
            (
                {"copy_dscp": "out", "copy_ecn": False, "copy_df": True},
                {"copy_dscp": "out"},
                0xB8,
                True,
                inside,
            ),
            ({"copy_dscp": "no"}, {"copy_dscp": "in"}, 0x01, False, 0x01),
        )
    ):
        for number, (host, keys) in enumerate(zip(hosts, (ours, theirs), strict=True)):
            children: Children = {"net": {**child, **keys}}
            change = host.reload if place else host.start
            change({}, **section(number, children), datapath="xfrm")
        bring_up(hosts)
        listener = listen_udp(other.namespace, FAR, 7200)
        listener.setsockopt(socket.IPPROTO_IP, socket.IP_RECVTOS, 1)
        listener.setblocking(True)
        listener.settimeout(15)
        sender = udp(one.namespace, FAR, 7200, source=NEAR)
        sender.setsockopt(socket.IPPROTO_IP, socket.IP_TOS, inside)
        sender.setsockopt(socket.IPPROTO_IP, 10, 2)  # IP_MTU_DISCOVER, IP_PMTUDISC_DO: with DF
        with Capture(other.namespace, ["eth0"], tmp_path / f"{place}.pcap") as capture, listener, sender:
            sender.send(b"marked")
            _, ancillary, _, _ = listener.recvmsg(100, socket.CMSG_SPACE(1))
            capture.flush()
            (frame,) = [
                frame.data
                for frame in capture.frames()
                if (packet := frame.packet()) and packet.kind == "esp" and str(packet.source) == A4
            ]
        assert (frame[15], bool(frame[20] & 0x40)) == (outside, df), (ours, one.log())
        assert [value[0] for _, _, value in ancillary] == [arrives], (theirs, other.log())
