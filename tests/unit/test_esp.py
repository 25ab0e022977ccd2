"""ESP SAs: both ends agree, and nothing but an authentic, fresh, permitted packet comes through."""

from __future__ import annotations

import dataclasses
from ipaddress import ip_address

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from oepy.datapath.esp.database import SaDatabase
from oepy.datapath.esp.replay import MAX_WINDOW, ReplayWindow, infer_sequence
from oepy.datapath.esp.sa import EspPair, ReplayError, SaEnded, SelectorError
from oepy.datapath.esp.suites import IntegrityError, make_transform
from oepy.errors import OepyError, ParseError, RemoteError
from oepy.model import EspSuite, Lifetime, SaKeys, Secret, TrafficSelector
from tests.fakes.datapath import (
    SUITES,
    esp_of,
    ipv4_packet,
    ipv6_packet,
    keys_of,
    pairs,
    sealed_plaintext,
    selector,
)


def _ends(**options: object) -> tuple[EspPair, EspPair]:
    one, other = pairs(**options)  # type: ignore[arg-type]
    return EspPair(one, 0.0), EspPair(other, 0.0)


def _open(pair: EspPair, datagram: bytes, now: float = 1.0) -> bytes | None:
    return pair.packet(pair.open(memoryview(datagram)), now)


PACKET = ipv4_packet("192.0.2.1", "192.0.2.2")
BACK = ipv4_packet("192.0.2.2", "192.0.2.1")


# -- both ends -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suite", SUITES, ids=str)
@given(length=st.integers(0, 70))
def test_what_one_end_seals_the_other_opens(suite: EspSuite, length: int) -> None:
    """For every suite and payload length, aligned as RFC 4303 §2.4 wants, and within the overhead."""
    a, b = _ends(suite=suite)
    for payload in (bytes(length), b"\xff" * length):
        packet = ipv4_packet("192.0.2.1", "192.0.2.2", payload)
        sealed = esp_of(a, packet)
        assert (len(sealed) - 8) % 4 == 0
        assert len(sealed) <= len(packet) + 8 + 16 + 32 + 17
        assert _open(b, sealed) == packet
    assert a.counters().packets_out == b.counters().packets_in == 2
    assert a.counters().bytes_out == b.counters().bytes_in
    assert b.last_in == 1.0


def test_ipv6_within_and_between_families() -> None:
    """IPv6 in an SA of its own, next header 41."""
    a, b = _ends(local="2001:db8::1", remote="2001:db8::2")
    packet = ipv6_packet("2001:db8::1", "2001:db8::2")
    assert _open(b, esp_of(a, packet)) == packet


def test_the_largest_packet_fits_the_wire() -> None:
    """A packet of the tunnel's MTU never makes more than 1500 bytes with outer IPv6, in any suite."""
    from oepy.datapath.routes import TUNNEL_MTU

    for suite in SUITES:
        a, _ = _ends(suite=suite)
        packet = ipv4_packet("192.0.2.1", "192.0.2.2", bytes(TUNNEL_MTU - 24))
        assert len(packet) == TUNNEL_MTU
        assert 40 + 8 + len(esp_of(a, packet)) <= 1500, str(suite)


def test_keys_of_the_wrong_length_and_unknown_suites_are_refused() -> None:
    """With a text that names the suite, and no key in it."""
    for suite, keys in (
        (EspSuite("aes128gcm16"), SaKeys(Secret(bytes(16)))),
        (EspSuite("aes256", "sha256"), SaKeys(Secret(bytes(32)), Secret(bytes(20)))),
        (EspSuite("3des", "sha1"), SaKeys(Secret(bytes(24)))),
        (EspSuite("aes256"), SaKeys(Secret(bytes(32)))),
    ):
        with pytest.raises(OepyError, match=suite.encryption):
            make_transform(suite, keys, 1)
    with pytest.raises(OepyError, match="AH"):
        EspPair(dataclasses.replace(pairs()[0], protocol="ah"), 0.0)


# -- what must not come through --------------------------------------------------------------------------


@pytest.mark.parametrize("suite", SUITES, ids=str)
def test_a_changed_packet_is_refused_and_moves_no_window(suite: EspSuite) -> None:
    """Each changed byte after the SPI, also in the sequence number; then the true packet still comes in."""
    a, b = _ends(suite=suite)
    sealed = esp_of(a, PACKET)
    for index in range(4, len(sealed)):
        changed = bytearray(sealed)
        changed[index] ^= 0x40
        with pytest.raises((IntegrityError, ReplayError)):
            _open(b, bytes(changed))
    assert _open(b, sealed) == PACKET


def test_a_packet_is_taken_once() -> None:
    """A replay is refused and counted, in order and out of order."""
    a, b = _ends()
    sealed = [esp_of(a, PACKET) for _ in range(5)]
    for index in (3, 0, 4, 1, 2):
        assert _open(b, sealed[index]) == PACKET
    for datagram in sealed:
        with pytest.raises(ReplayError):
            _open(b, datagram)
    assert b.counters().replayed == 5


def test_tfc_padding_is_cut_off_and_dummies_vanish() -> None:
    """RFC 4303 §2.7 and §2.6: bytes behind the inner packet's end, and next header 59."""
    a, b = _ends()
    assert _open(b, sealed_plaintext(a, PACKET + bytes(100) + b"\x00\x04")) == PACKET
    assert _open(b, sealed_plaintext(a, b"anything" + b"\x00\x3b")) is None


@pytest.mark.parametrize(
    "plaintext",
    [
        b"\x04",
        b"",
        b"\x00\x04",
        PACKET + b"\x02\x01\x02\x04",  # padding that is not 1, 2
        PACKET + b"\xff\x04",  # more padding than there is
        PACKET + b"\x00\x29",  # next header says IPv6
        PACKET + b"\x00\x06",  # no IP packet: transport mode
        PACKET[:-1] + b"\x00\x04",  # shorter than its length field says
        b"\x41" + PACKET[1:] + b"\x00\x04",  # a header of one word
        ipv6_packet("2001:db8::1", "2001:db8::2")[:39] + b"\x00\x29",
    ],
)
def test_an_authentic_but_malformed_packet_is_refused(plaintext: bytes) -> None:
    """By ParseError, counted, whatever its sender authenticated."""
    a, b = _ends()
    with pytest.raises(ParseError):
        _open(b, sealed_plaintext(a, plaintext))
    assert b.malformed == 1


def test_selectors_hold_in_both_directions() -> None:
    """Inner addresses outside of the selectors are refused outward, and inward after authentication."""
    a, b = _ends()
    for packet in (
        ipv4_packet("192.0.2.9", "192.0.2.2"),
        ipv4_packet("192.0.2.1", "192.0.2.9"),
        ipv6_packet("2001:db8::1", "2001:db8::2"),
    ):
        assert not a.selectors.allow_outward(packet)
        number = 41 if packet[0] >> 4 == 6 else 4
        with pytest.raises(SelectorError):
            _open(b, sealed_plaintext(a, packet + bytes(2) + bytes((0, number))))
    assert b.counters().selector_mismatches == 3


def test_protocol_and_port_selectors_hold() -> None:
    """A pair for udp/53 of the peer carries nothing else; fragments without ports do not pass either."""
    a, _ = _ends(selectors=(selector("192.0.2.1"), selector("192.0.2.2", 17, 53)))
    assert a.selectors.allow_outward(ipv4_packet("192.0.2.1", "192.0.2.2", ports=(9, 53)))
    later = bytearray(ipv4_packet("192.0.2.1", "192.0.2.2", ports=(9, 53)))
    later[7] = 5
    for packet in (
        ipv4_packet("192.0.2.1", "192.0.2.2", ports=(53, 54)),
        ipv4_packet("192.0.2.1", "192.0.2.2", protocol=6, ports=(9, 53)),
        bytes(later),
    ):
        assert not a.selectors.allow_outward(packet)


@given(st.binary(max_size=120))
def test_random_datagrams_end_in_a_remote_error(data: bytes) -> None:
    """Parse, or RemoteError, never anything else."""
    _, b = _ends()
    datagram = b.pair.spi_in.to_bytes(4, "big") + data
    with pytest.raises(RemoteError):
        _open(b, datagram)


@pytest.mark.parametrize("suite", SUITES, ids=str)
def test_truncated_datagrams_end_in_a_remote_error(suite: EspSuite) -> None:
    """A true packet cut off at any length."""
    a, b = _ends(suite=suite)
    sealed = esp_of(a, PACKET)
    for length in range(len(sealed)):
        with pytest.raises(RemoteError):
            _open(b, sealed[:length])


@given(st.binary(min_size=1, max_size=80), st.sampled_from([4, 41, 59, 6]))
@example(b"\x45", 4)
@example(b"\x45\0\0\x04", 4)
def test_random_authentic_payloads_end_in_a_remote_error_or_a_permitted_packet(
    data: bytes, number: int
) -> None:
    """Even a peer that holds the keys cannot make the parser do anything else."""
    a, b = _ends()
    try:
        packet = _open(b, sealed_plaintext(a, data + bytes((0, number))))
    except RemoteError:
        return
    assert packet is None or b.selectors.allow_inward(packet)


# -- lifetimes -------------------------------------------------------------------------------------------


def test_packets_and_bytes_alarm_softly_and_end_hard() -> None:
    """Soft once, then hard once; after that nothing is sealed, nor opened."""
    a, b = _ends(lifetime=Lifetime(soft_packets=2, hard_packets=4))
    alarms = []
    sealed = b""
    for _ in range(4):
        sealed = esp_of(a, PACKET)
        alarms += a.new_alarms(0.0)
    assert alarms == ["soft-expire", "hard-expire"]
    with pytest.raises(SaEnded):
        esp_of(a, PACKET)
    for _ in range(4):
        _open(a, esp_of(b, BACK))
    c, d = _ends(lifetime=Lifetime(soft_bytes=len(PACKET), hard_bytes=2 * len(PACKET)))
    _open(d, esp_of(c, PACKET))
    assert (c.new_alarms(0.0), d.new_alarms(0.0)) == (["soft-expire"], ["soft-expire"])
    _open(d, esp_of(c, PACKET))
    assert d.new_alarms(0.0) == ["hard-expire"]
    with pytest.raises(SaEnded):
        _open(d, sealed)


def test_a_hard_limit_alone_ends_the_sa() -> None:
    """Without a soft one, by packets and by bytes, in both directions."""
    for lifetime in (Lifetime(hard_packets=2), Lifetime(hard_bytes=2 * len(PACKET))):
        a, b = _ends(lifetime=lifetime)
        for _ in range(2):
            _open(b, esp_of(a, PACKET))
        assert a.new_alarms(0.0) == b.new_alarms(0.0) == ["hard-expire"]
        with pytest.raises(SaEnded):
            esp_of(a, PACKET)


def test_time_alarms() -> None:
    """Soft and hard seconds count from the installation."""
    one, _ = pairs(lifetime=Lifetime(soft_seconds=10, hard_seconds=20))
    pair = EspPair(one, 100.0)
    assert pair.new_alarms(109.9) == []
    assert pair.new_alarms(110.0) == ["soft-expire"]
    assert pair.new_alarms(119.0) == []
    assert pair.new_alarms(120.0) == ["hard-expire"]


def test_sequence_numbers_never_wrap() -> None:
    """Without ESN the 2^32nd packet is not sent, and a rekey is asked for well before."""
    a, _ = _ends(suite=EspSuite("aes128gcm16", esn=False))
    a._sequence = 0xFFFFFFFE
    esp_of(a, PACKET)
    with pytest.raises(SaEnded):
        esp_of(a, PACKET)
    assert a.budget_out.soft_packets < 0xFFFFFFFF * 0.9


def test_extended_numbers_cross_the_32_bit_line() -> None:
    """Sealed below, at and above 2^32, opened in and out of order."""
    a, b = _ends()
    a._sequence = 0xFFFFFFFC
    b._window.update(0xFFFFFFFC)
    sealed = [esp_of(a, PACKET) for _ in range(8)]
    for index in (0, 5, 1, 7, 2, 3, 6, 4):
        assert _open(b, sealed[index]) == PACKET
    assert b._window.top == 0x100000004


# -- window and numbers against naive models -------------------------------------------------------------


@given(
    st.integers(1, MAX_WINDOW),
    st.lists(st.one_of(st.integers(0, 300), st.integers(0, 10_000), st.integers(0, 2**40)), max_size=60),
)
def test_the_window_is_as_the_naive_one(size: int, numbers: list[int]) -> None:
    """A set of everything seen and the highest number decide the same, for any order and size."""
    window, seen, top = ReplayWindow(size), set[int](), 0
    for number in numbers:
        expected = number > 0 and number > top - size and number not in seen
        assert window.check(number) == expected, number
        if expected:
            window.update(number)
            seen.add(number)
            top = max(top, number)


@given(st.integers(1, 256), st.lists(st.integers(-300, 300), max_size=200))
def test_the_window_is_as_the_naive_one_when_it_creeps(size: int, steps: list[int]) -> None:
    """Numbers close to each other, as on a real path that reorders."""
    window, seen, top = ReplayWindow(size), set[int](), 0
    number = 1000
    for step in steps:
        number = max(1, top + step)
        expected = number > top - size and number not in seen
        assert window.check(number) == expected
        if expected:
            window.update(number)
            seen.add(number)
            top = max(top, number)


@given(
    st.integers(1, MAX_WINDOW),
    st.integers(0, 2**50),
    st.integers(-(2**31) + MAX_WINDOW + 1, 2**31 - MAX_WINDOW - 1),
)
def test_the_high_bits_are_inferred(size: int, top: int, distance: int) -> None:
    """A number within the window or up to 2^31 ahead of it is told from its low bits alone; one from before
    the window is never taken for itself."""
    number = top + distance
    if number <= 0:
        return
    inferred = infer_sequence(number & 0xFFFFFFFF, top, size)
    if number > top - size:
        assert inferred == number
    else:
        assert inferred != number


@pytest.mark.parametrize("size", [MAX_WINDOW + 1, -1])
def test_a_window_has_a_bound(size: int) -> None:
    """More than MAX_WINDOW, and less than nothing, is refused."""
    with pytest.raises(ValueError, match="window"):
        ReplayWindow(size)


# -- the database ----------------------------------------------------------------------------------------


def test_a_rekeyed_pair_sends_and_the_old_one_still_receives() -> None:
    """The newest sending pair is taken; a pair that only receives is not; removal falls back."""
    database = SaDatabase()
    old, new = EspPair(pairs()[0], 0.0), EspPair(pairs(spis=(0x1003, 0x2004))[0], 0.0)
    database.add(old)
    database.enable_sending(old)
    database.add(new)
    assert database.outbound(PACKET) is old
    database.enable_sending(new)
    assert database.outbound(PACKET) is new
    assert database.by_spi.get(b"\x00\x00\x10\x01") is old
    database.remove(0x1003)
    assert database.outbound(PACKET) is old
    database.remove(0x1001)
    assert database.outbound(PACKET) is None
    assert len(database) == 0
    database.remove(0x1001)


def test_the_narrowest_selector_carries_the_packet() -> None:
    """A host's SA goes before a /24's, and that before a /8's; IPv6 ranges do not catch IPv4."""
    database = SaDatabase()
    found = {}
    for index, inner in enumerate(("10.0.0.0/8", "10.1.2.0/24", "10.1.2.3/32", "::/0")):
        remote = "192.0.2.2"
        selectors = (selector("0.0.0.0/0"), selector(inner))
        pair = EspPair(pairs(remote=remote, selectors=selectors, spis=(0x1000 + index, 1))[0], 0.0)
        database.add(pair)
        database.enable_sending(pair)
        found[inner] = pair
    for destination, inner in (
        ("10.1.2.3", "10.1.2.3/32"),
        ("10.1.2.4", "10.1.2.0/24"),
        ("10.9.9.9", "10.0.0.0/8"),
    ):
        assert database.outbound(ipv4_packet("192.0.2.1", destination)) is found[inner]
    assert database.outbound(ipv4_packet("192.0.2.1", "11.0.0.1")) is None


@given(
    st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60), st.booleans(), st.booleans()), max_size=12),
    st.sets(st.integers(0, 11)),
    st.integers(0, 70),
    st.sampled_from([52, 53]),
)
def test_the_right_pair_is_found_among_any(
    ranges: list[tuple[int, int, bool, bool]], removed: set[int], host: int, port: int
) -> None:
    """As a walk through all of them decides: narrowest remote, local selector, then with a port, then the newest;
    and what is removed leaves nothing behind."""
    database, model = SaDatabase(), []
    for index, (one, other, ported, wide) in enumerate(ranges):
        low, high = sorted((one, other))
        base = int(ip_address("10.0.0.0"))
        remote = TrafficSelector(
            ip_address(base + low),
            ip_address(base + high),
            17 if ported else 0,
            *((53, 53) if ported else ()),
        )
        local = selector("0.0.0.0/0" if wide else "192.0.2.1")
        pair = EspPair(pairs(selectors=(local, remote), spis=(0x1000 + index, 1))[0], 0.0)
        database.add(pair)
        database.enable_sending(pair)
        direct = not ported and not wide and low == high
        width = (1 << 32) - 1 if wide else 0
        rank = (high - low, width, 0 if ported else 2, not direct, -index)
        model.append((rank, low, high, ported, pair))
    for index in removed & set(range(len(ranges))):
        database.remove(0x1000 + index)
    packet = ipv4_packet("192.0.2.1", str(ip_address(int(ip_address("10.0.0.0")) + host)), ports=(9, port))
    fitting = [
        (rank, pair)
        for index, (rank, low, high, ported, pair) in enumerate(model)
        if index not in removed and low <= host <= high and (not ported or port == 53)
    ]
    expected = min(fitting, key=lambda item: item[0])[1] if fitting else None
    assert database.outbound(packet) is expected
    for index in range(len(ranges)):
        database.remove(0x1000 + index)
    assert not database._prefixes
    assert not database._direct


def test_an_spi_is_taken_once() -> None:
    """The second pair with one inbound SPI is refused."""
    database = SaDatabase()
    database.add(EspPair(pairs()[0], 0.0))
    with pytest.raises(ValueError, match="in use"):
        database.add(EspPair(pairs()[0], 0.0))
    assert keys_of(EspSuite("null", "sha256"), 1).integrity.reveal() == bytes([2]) * 32
