"""USE_AGGFRAG between two endpoints: agreed on by both or by none, kept by rekeys."""

from __future__ import annotations

import dataclasses

import pytest

from oepy.ike import aggregation
from oepy.ike.aggregation import Aggregation, agreed_on, asked_for
from oepy.ike.flow import ChildRefused
from oepy.ike.notify import NotifyType
from oepy.ike.payloads import Notify, Payload, notify
from oepy.ike.settings import IkeSettings
from oepy.model import SaPair
from tests.sim.ike_net import Host, Net, assert_one_tunnel, request, two_hosts

CAN = IkeSettings(liveness_interval=0.0, aggregation=True)
CANNOT = IkeSettings(liveness_interval=0.0)


class _Answer:
    """Of a message only its notifies."""

    def __init__(self, *items: Notify) -> None:
        self._items = {item.type: item for item in items}

    def notify(self, kind: NotifyType) -> Notify | None:
        return self._items.get(kind)


def _connect(first: IkeSettings, second: IkeSettings) -> tuple[Host, Host, Net]:
    a, b = two_hosts(first)
    b.settings = second
    b.restart()
    net = Net([a, b])
    a.ike.initiate(request(a, b), net.now)
    net.run(5)
    return a, b, net


def _says(pair: SaPair) -> tuple[bool, bool, bool]:
    return pair.aggregation, pair.fragments, pair.super_packets


@pytest.mark.parametrize(
    ("first", "second", "agreed"),
    [(CAN, CAN, True), (CAN, CANNOT, False), (CANNOT, CAN, False), (CANNOT, CANNOT, False)],
)
def test_both_sides_aggregate_or_none(first: IkeSettings, second: IkeSettings, agreed: bool) -> None:
    """Whoever begins. A peer that does not know the notify answers without it, and the tunnel is a plain one."""
    a, b, _ = _connect(first, second)
    one, two = assert_one_tunnel(a, b)
    assert _says(one) == _says(two) == (agreed, True, agreed)


@pytest.mark.parametrize("by_initiator", [True, False])
def test_a_rekey_keeps_what_was_agreed_on(by_initiator: bool) -> None:
    """RFC 9347 §5.1: without a word, whoever rekeys."""
    a, b, net = _connect(CAN, CAN)
    host = a if by_initiator else b
    [spi] = host.pairs
    host.ike.rekey_child(spi, net.now)
    net.run(60)
    one, two = assert_one_tunnel(a, b)
    assert spi not in host.pairs
    assert _says(one) == _says(two) == (True, True, True)


def _flags(value: bytes) -> Notify:
    return Notify(NotifyType.USE_AGGFRAG, value)


OWN = Notify(NotifyType.OEPY_SUPER_PACKETS, b"oepy super-packets 1")


def test_what_a_request_asks_for() -> None:
    """D: whole packets only, so no super-packets; C, or a broken notify: no aggregation; a private number with
    another text is somebody else's."""
    assert asked_for(_Answer()) is None  # type: ignore[arg-type]
    for broken in (b"", b"\0\0", b"\2", b"\3"):
        assert asked_for(_Answer(_flags(broken))) is None  # type: ignore[arg-type]
    assert asked_for(_Answer(_flags(b"\0"))) == Aggregation(True, False)  # type: ignore[arg-type]
    assert asked_for(_Answer(_flags(b"\0"), OWN)) == Aggregation(True, True)  # type: ignore[arg-type]
    assert asked_for(_Answer(_flags(b"\1"), OWN)) == Aggregation(False, False)  # type: ignore[arg-type]
    other = dataclasses.replace(OWN, data=b"something else")
    assert asked_for(_Answer(_flags(b"\0"), other)) == Aggregation(True, False)  # type: ignore[arg-type]


def test_an_answer_to_no_question_ends_the_child() -> None:
    """The peer would send what nobody here could read."""
    assert agreed_on(_Answer(), asked=True) is None  # type: ignore[arg-type]
    assert agreed_on(_Answer(_flags(b"\0")), asked=True) == Aggregation(True, False)  # type: ignore[arg-type]
    for value, asked in ((b"\0", False), (b"\2", True), (b"", True)):
        with pytest.raises(ChildRefused):
            agreed_on(_Answer(_flags(value)), asked=asked)  # type: ignore[arg-type]


def test_the_notify_is_one_octet_of_flags() -> None:
    """RFC 9347 §5.1, as other implementations insist."""
    first: Payload = aggregation.payloads()[0]
    assert first == notify(NotifyType.USE_AGGFRAG, b"\0")
    assert first[1] == b"\0\0" + (16442).to_bytes(2, "big") + b"\0"
