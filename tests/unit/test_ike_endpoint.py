"""The endpoint against bytes that nobody meant well: parse or counter, no exception, no state change."""

from __future__ import annotations

import functools
import logging
from ipaddress import IPv4Address

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oepy.errors import MisuseError
from oepy.ike.endpoint import IkeEndpoint, SessionInfo
from oepy.ike.events import ChildUp, IkeKeys, NeedSpi
from oepy.ike.header import FLAG_INITIATOR, FLAG_RESPONSE, Exchange, Header, build_header, parse_header
from oepy.ike.message import build_plain
from oepy.ike.notify import NotifyType
from oepy.ike.payloads import notify
from oepy.ike.session import Session
from oepy.ike.settings import IkeSettings
from oepy.ike.states import TRANSITIONS, Happening, State
from oepy.model import Endpoint
from tests.sim.ike_net import Host, Net, request, two_hosts

FAR = Endpoint(IPv4Address("203.0.113.9"), 500)


@functools.cache
def talk() -> tuple[Host, Host, Net, list[bytes]]:
    """An established pair with both rekeys and a liveness check behind it, and all its datagrams."""
    a, b = two_hosts(IkeSettings(liveness_interval=0.0))
    net = Net([a, b])
    session = a.ike.initiate(request(a, b), net.now)
    net.run(2)
    a.ike.rekey_child(next(iter(a.pairs)), net.now)
    net.run(2)
    a.ike.rekey_ike(session, net.now)
    net.run(2)
    a.ike.check_liveness(session, net.now)
    net.run(2)
    return a, b, net, [data for *_, data in net.carried]


def established(host: Host) -> list[SessionInfo]:
    return [info for info in host.ike.sessions() if info.state == "established"]


def throw(host: Host, data: bytes, local: Endpoint, remote: Endpoint) -> None:
    """The established sessions stay as they are, and nothing is told to the daemon."""
    before = established(host)
    host.ike.receive(data, local, remote, 1000.0)
    host.ike.datagrams()
    assert established(host) == before
    assert host.ike.events() == []


@given(st.binary(max_size=300))
def test_random_bytes(data: bytes) -> None:
    """Counted, and nothing else."""
    _, b, _, _ = talk()
    throw(b, data, b.at, FAR)


@given(st.data())
@settings(max_examples=300)
def test_changed_datagrams_of_a_real_talk(data: st.DataObject) -> None:
    """Bits flipped, cut, sent back to the sender or to the peer, from the right address or another."""
    a, b, _, datagrams = talk()
    original = bytearray(data.draw(st.sampled_from(datagrams)))
    for bit in data.draw(st.lists(st.integers(0, len(original) * 8 - 1), max_size=4)):
        original[bit // 8] ^= 1 << bit % 8
    cut = data.draw(st.integers(0, len(original)))
    changed = bytes(original[:cut] if data.draw(st.booleans()) else original)
    host, peer = data.draw(st.sampled_from([(a, b), (b, a)]))
    throw(host, changed, host.at, data.draw(st.sampled_from([peer.at, FAR])))


@given(st.data())
def test_headers_with_the_right_spis(data: st.DataObject) -> None:
    """Live SPIs with any exchange, flags, message ID and rest: who sees the wire changes nothing."""
    a, b, _, _ = talk()
    [info] = established(b)
    spis = bytes.fromhex(info.spi_i), bytes.fromhex(info.spi_r)
    body = data.draw(st.binary(max_size=120))
    exchange = data.draw(st.one_of(st.sampled_from(sorted(Exchange)), st.integers(0, 255)))
    flags = data.draw(st.sampled_from((0, FLAG_INITIATOR, FLAG_RESPONSE, FLAG_INITIATOR | FLAG_RESPONSE)))
    first = data.draw(st.one_of(st.just(46), st.just(53), st.integers(0, 255)))
    header = Header(*spis, first, 0x20, exchange, flags, data.draw(st.integers(0, 5)))
    throw(b, build_header(header, 28 + len(body)) + body, b.at, a.at)


def test_an_old_request_is_answered_from_the_cache_only_if_identical() -> None:
    """The very bytes of the last request get the very bytes of its response; one bit more gets nothing."""
    a, b = two_hosts(IkeSettings(liveness_interval=0.0))
    net = Net([a, b])
    a.ike.initiate(request(a, b), net.now)
    net.run(2)
    auth = next(data for *_, target, data in net.carried if parse_header(data).exchange == Exchange.IKE_AUTH)
    answer = [data for *_, data in net.carried][-1]
    for _ in range(3):
        b.ike.receive(auth, b.at, a.at, net.now)
        assert [datagram.data for datagram in b.ike.datagrams()] == [answer]
    changed = auth[:-1] + bytes((auth[-1] ^ 1,))
    b.ike.receive(changed, b.at, a.at, net.now)
    assert b.ike.datagrams() == []
    assert b.ike.events() == []


def test_unprotected_errors_end_nothing() -> None:
    """INVALID_IKE_SPI or AUTHENTICATION_FAILED in the clear, with the right SPIs, is counted and ignored."""
    a, b, _, _ = talk()
    [info] = established(a)
    for kind in (NotifyType.INVALID_IKE_SPI, NotifyType.AUTHENTICATION_FAILED, NotifyType.INVALID_SYNTAX):
        for message_id in range(4):
            header = Header(
                bytes.fromhex(info.spi_i),
                bytes.fromhex(info.spi_r),
                0,
                0x20,
                Exchange.INFORMATIONAL,
                FLAG_RESPONSE,
                message_id,
            )
            throw(a, build_plain(header, [notify(kind)]), a.at, b.at)


def test_a_higher_version_is_told_ours_at_a_limited_rate() -> None:
    """INVALID_MAJOR_VERSION (RFC 7296 §2.5), a few a second; IKEv1 is counted."""
    a, _ = two_hosts()
    data = build_header(Header(b"i" * 8, bytes(8), 0, 0x30, 34, FLAG_INITIATOR, 0), 28)
    for _ in range(100):
        a.ike.receive(data, a.at, FAR, 5.0)
    answers = a.ike.datagrams()
    assert 0 < len(answers) <= 10
    assert parse_header(answers[0].data).version == 0x20
    a.ike.receive(build_header(Header(b"i" * 8, bytes(8), 0, 0x10, 2, 0, 0), 28), a.at, FAR, 5.0)
    assert a.ike.counters["ikev1"] == 1
    assert a.ike.datagrams() == []


def test_a_flood_of_forged_beginnings_is_bounded() -> None:
    """Half-open sessions stop at the limits, the rest cost a cookie each, and in time all are gone."""
    a, b = two_hosts(IkeSettings(cookie_threshold=10, max_half_open_per_prefix=20))
    net = Net([a, b])
    net.filter = lambda *_: False
    a.ike.initiate(request(a, b), net.now)
    net.flush(a)
    template = net.carried[0][3]
    for number in range(500):
        forged = number.to_bytes(8, "big") if number else b"x" * 8
        source = Endpoint(IPv4Address(0xCB007100 + number * 256 % 0x10000), 500)
        b.ike.receive(forged + template[8:], b.at, source, net.now)
    assert b.ike.counters["half_open"] == 10
    assert b.ike.counters["cookies_sent"] == 490
    assert b.ike.next_timer() is not None
    b.ike.handle_timer(net.now + 60)
    assert b.ike.counters["half_open"] == b.ike.counters["sessions"] == 0
    assert b.ike.events() == []


def test_a_flood_from_one_prefix_does_not_shut_out_the_others() -> None:
    """A quarter of a prefix's limit makes it need cookies; another prefix begins without one."""
    a, b = two_hosts(IkeSettings())
    net = Net([a, b])
    net.filter = lambda *_: False
    a.ike.initiate(request(a, b), net.now)
    net.flush(a)
    template = net.carried[0][3]
    for number in range(1, 200):
        b.ike.receive(number.to_bytes(8, "big") + template[8:], b.at, FAR, net.now)
    assert b.ike.counters["half_open"] == 16
    b.ike.datagrams()
    b.ike.receive(template, b.at, a.at, net.now)
    assert b.ike.counters["half_open"] == 17


@pytest.mark.parametrize("side", ["a", "b"])
def test_late_and_empty_answers(side: str) -> None:
    """An unknown token does nothing; None for a question, on either side, ends the attempt on both."""
    a, b = two_hosts()
    a.ike.answer(4711, 1, 0.0)
    assert a.ike.counters["late_answers"] == 1
    net = Net([a, b])
    (a if side == "a" else b).reply = lambda question: None  # type: ignore[method-assign]
    a.ike.initiate(request(a, b), net.now)
    net.run(60)
    assert not a.pairs
    assert not b.pairs
    assert not a.ike.sessions()
    assert not b.ike.sessions()


def test_commands_for_what_is_gone_are_ignored() -> None:
    """Unknown sessions and SPIs: nothing happens."""
    a, _ = two_hosts()
    a.ike.rekey_child(1, 0.0)
    a.ike.delete_child(1, 0.0)
    a.ike.rekey_ike(1, 0.0)
    a.ike.terminate(1, 0.0)
    a.ike.check_liveness(1, 0.0)
    a.ike.traffic_seen(1, 0.0)
    assert a.ike.session(1) is None
    assert a.ike.datagrams() == []


def test_nothing_is_established_without_evidence() -> None:
    """The state setter refuses ESTABLISHED without a proof, and every transition that is not in the table."""
    a, b = two_hosts()
    a.ike.initiate(request(a, b), 0.0)
    [session] = a.ike._context.by_number.values()
    assert isinstance(session, Session)
    for happening in Happening:
        if (State.INIT_SENT, happening) not in TRANSITIONS:
            with pytest.raises(MisuseError):
                session.move(happening)
    session.move(Happening.INIT_ANSWERED)
    with pytest.raises(MisuseError, match="proof"):
        session.move(Happening.PROVEN)


def test_secrets_stay_out_of_repr_and_events(caplog: pytest.LogCaptureFixture) -> None:
    """Keys show as their size, nothing is logged, and key events come only when asked for."""
    caplog.set_level(logging.DEBUG)
    a, b, _, _ = talk()
    for host in (a, b):
        assert not host.of(IkeKeys)
        for event in host.of(ChildUp):
            assert isinstance(event, ChildUp)
            for keys in (event.pair.keys_in, event.pair.keys_out):
                assert keys.encryption.reveal().hex() not in repr(event)
                assert repr(keys.encryption.reveal())[2:-1] not in repr(event)
    assert not caplog.records


def test_nothing_of_a_handshake_outlives_it() -> None:
    """After establishment a session has no nonces, shares, messages, flows or questions."""
    a, b = two_hosts(IkeSettings(liveness_interval=0.0))
    net = Net([a, b])
    a.ike.initiate(request(a, b), net.now)
    net.run(5)
    for host in (a, b):
        [session] = host.ike._context.by_number.values()
        assert session.handshake is None
        assert session.own is None
        assert session.serving is None
        assert session.queue is None
        assert session.window.outstanding is None
        assert not host.ike._context.questions
        assert not host.ike._context.half_open
        assert not hasattr(session, "__dict__")


def test_nothing_of_a_session_outlives_it() -> None:
    """After the end every table of the endpoint is empty, on both sides."""
    a, b = two_hosts(IkeSettings(liveness_interval=0.0))
    net = Net([a, b])
    session = a.ike.initiate(request(a, b), net.now)
    net.run(5)
    a.ike.rekey_ike(session, net.now)
    a.ike.rekey_child(next(iter(a.pairs)), net.now)
    net.run(5)
    a.ike.terminate(session, net.now)
    net.run(5)
    for host in (a, b):
        context = host.ike._context
        for table in (context.by_spi, context.by_number, context.by_remote, context.by_identity):
            assert not table
        for table in (
            context.by_child,
            context._alike,
            context.half_open,
            context.half_open_of,
            context.questions,
        ):
            assert not table
        assert host.ike.next_timer() is None


def test_an_unanswered_question_ends_the_attempt() -> None:
    """The daemon never answers: the exchange ends by itself."""
    a, b = two_hosts()
    session = a.ike.initiate(request(a, b), 0.0)
    net = Net([a, b])
    net.hosts.pop(a.at.address)
    while (timer := a.ike.next_timer()) is not None and timer < 200:
        a.ike.handle_timer(timer)
        for datagram in a.ike.datagrams():
            b.ike.receive(datagram.data, datagram.remote, datagram.local, timer)
        for datagram in b.ike.datagrams():
            a.ike.receive(datagram.data, datagram.remote, datagram.local, timer)
    questions = [event for event in a.ike.events() if isinstance(event, NeedSpi)]
    assert len(questions) == 1
    assert a.ike.session(session) is None


def test_an_endpoint_alone_waits_for_nothing() -> None:
    """No session, no timer."""
    assert IkeEndpoint(IkeSettings(), bytes).next_timer() is None
