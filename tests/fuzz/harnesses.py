"""What the fuzzer calls, one function a target: bytes in, nothing out. Each promises what its first line says;
any other exception, or a failed assertion, is a finding. Nothing here needs the fuzzer itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
from collections.abc import Callable
from dataclasses import replace
from ipaddress import ip_address

import dns.message
import dns.name
import dns.rcode
import dns.rdatatype
import dns.rrset
import yaml
from cryptography.hazmat.primitives.asymmetric import ed25519
from cryptography.x509 import ocsp

from oepy import dn
from oepy.connections.match import Matcher, _secret_rank, place_rank
from oepy.connections.model import ConnectionSet
from oepy.connections.reading import SECTIONS
from oepy.convert.render import render
from oepy.convert.run import convert
from oepy.datapath.esp.aggfrag import MAX_WAITING, Unpacker
from oepy.datapath.esp.coalesce import Coalescer
from oepy.datapath.esp.inner import inner_length
from oepy.datapath.esp.mss import clamp
from oepy.datapath.esp.offload import NONE, SIZE, Offload, parse
from oepy.datapath.esp.sa import EspPair
from oepy.datapath.esp.segment import segments
from oepy.dns.anchorfile import format_points, parse_points
from oepy.dns.message import Question, Reply, build_query, parse_reply
from oepy.dns.records import build_ipseckey, build_oe_text, is_oe_text, parse_ipseckey, parse_oe_text
from oepy.dns.streams import Connection, ConnectionLost
from oepy.dns.transport import NoReply
from oepy.dns.validator import Outcome, Validator
from oepy.errors import ConfigError, KeyFormatError, OepyError, ParseError, RemoteError
from oepy.ike.endpoint import SessionInfo
from oepy.ike.header import (
    FLAG_INITIATOR,
    FLAG_RESPONSE,
    VERSION_2,
    Exchange,
    Header,
    PayloadType,
    parse_header,
)
from oepy.ike.message import _seal
from oepy.ike.session import Session
from oepy.ike.settings import IkeSettings
from oepy.keys import from_public_key
from oepy.manual.checks import read_manual
from oepy.manual.pairing import pair_up
from oepy.manual.presenting import policy_mapping, sa_mapping
from oepy.model import Direction, KeyAlgorithm, PeerIdentity, PublicKey, SaPair, Secret, Security
from oepy.netlink import Frame, parse_frames
from oepy.resolvers import ResolverState
from oepy.trap import netlink, queue
from oepy.trap.packet import parse_flow
from oepy.x509.crl import read_crl
from oepy.x509.path import PathError
from oepy.x509.revocation import Standing, Unusable, read_ocsp
from oepy.x509.trust import Trust, accept
from oepy.xfrm import answers, pieces, requests, values
from tests.fakes.certificates import DNS, IP, MAIL, Holder, ocsp_response, points, responder, revocation_list
from tests.fakes.certificates import NOW as CERTIFICATES_NOW
from tests.fakes.connections import read_data
from tests.fakes.datapath import esp_of, pairs, sealed_plaintext
from tests.fakes.network_card import cut, transport_sum
from tests.fakes.signed_tree import NOW, standard_tree
from tests.sim.ike_net import Host, Net, request, two_hosts
from tests.sim.test_ike_collisions import COMMANDS, HYBRID, SETTINGS, Run

# ---- IKE ---------------------------------------------------------------------------------------------------

_QUIET = IkeSettings(liveness_interval=0.0, mobike=True)
_CLASSIC = replace(_QUIET, ike_offers=_QUIET.ike_offers[1:])  # no further key exchanges before IKE_AUTH
SCENES = (
    *("fresh", "init-sent", "half-open", "auth-sent", "established", "responder"),
    *("hybrid half-open", "hybrid auth-sent", "hybrid established", "hybrid rekeyed"),
)
_MAX_STEPS = 24


class Scene:
    """`host` is attacked, `peer` holds the other end. Rebuilt when an attack has changed anything."""

    def __init__(self, name: str, seed: int = 1) -> None:
        hybrid, name = name.startswith("hybrid"), name.removeprefix("hybrid ")
        a, b = two_hosts(_QUIET if hybrid else _CLASSIC)
        for host in (a, b):  # other keys and nonces than those of the seeds, whose proofs must not fit
            host.random.seed(f"{seed} {name} {host.name}")
        self.net = Net([a, b])
        self.host, self.peer = (b, a) if name in ("fresh", "half-open", "responder") else (a, b)
        rounds = {"fresh": 0, "init-sent": 0, "half-open": 2, "auth-sent": 2}.get(name)
        self.net.filter = lambda *_: rounds is None or len(self.net.carried) <= rounds
        if name != "fresh":
            a.ike.initiate(request(a, b), self.net.now)
        self.net.run(0.3)
        if name == "rekeyed":  # the peer's rekey waits for IKE_FOLLOWUP_KE
            lost = Exchange.IKE_FOLLOWUP_KE
            self.net.filter = lambda _, __, data: parse_header(data).exchange != lost
            b.ike.rekey_ike(b.ike.sessions()[0].session, self.net.now)
            self.net.run(0.1)
        self.net.filter = lambda *_: False
        self.was = self.look()

    def look(self) -> tuple[list[SessionInfo], dict[int, SaPair]]:
        return self.host.ike.sessions(), dict(self.host.pairs)

    def session(self, host: Host) -> Session | None:
        return next(iter(host.ike._context.by_number.values()), None)

    def throw(self, data: bytes) -> None:
        self.host.ike.receive(data, self.host.at, self.peer.at, self.net.now)
        self.net.flush(self.host)
        del self.net.carried[8:]
        self.host.events.clear()
        self.host.ike._context.counters.clear()


_scenes: dict[str, Scene] = {}


def _scene(choice: int) -> tuple[str, Scene]:
    name = SCENES[choice % len(SCENES)]
    if name not in _scenes:
        _scenes[name] = Scene(name)
    return name, _scenes[name]


def ike(data: bytes) -> None:
    """Datagrams by anybody, into an endpoint in several states: no exception, and no session that is
    established, or was begun by us, ends or changes its keys, its children or its peer.

    First byte: the state; second: 0 raw, 1 behind the live SPIs."""
    if len(data) < 2:
        return
    name, scene = _scene(data[0])
    body = data[2:]
    session = scene.session(scene.host)
    if data[1] & 1 and session is not None:
        body = session.spi_i + session.spi_r + body
    scene.throw(body)
    if name.split()[-1] in ("auth-sent", "established", "responder", "half-open", "rekeyed"):
        sessions, children = scene.look()
        assert all(info in sessions for info in scene.was[0])
        assert children == scene.was[1]
    if name == "init-sent":
        assert scene.host.ike.sessions()
    if scene.look() != scene.was:
        del _scenes[name]


_EXCHANGES = (
    *(Exchange.IKE_AUTH, Exchange.CREATE_CHILD_SA, Exchange.INFORMATIONAL, 99),
    *(Exchange.IKE_INTERMEDIATE, Exchange.IKE_FOLLOWUP_KE),
)


def ike_session(data: bytes) -> None:
    """Two honest peers, any commands of theirs at any time, datagrams that get lost, doubled and reordered: no
    exception, and in the end both have the same tunnels and nothing is left over.

    Each byte is a step: a command, or what becomes of one of the datagrams on their way."""
    if not data:
        return
    run = Run(HYBRID if data[0] & 1 else SETTINGS, ((), ()))
    for step in data[1 : 1 + _MAX_STEPS]:
        side, kind = step >> 3 & 1, step & 7
        waiting = run.net.waiting[side]
        if kind < len(COMMANDS):
            run.commands[side].append(COMMANDS[kind])
            run.take(("command", side, 0))
        elif waiting:
            at = (step >> 4) % len(waiting)
            if kind == 5:
                waiting.pop(at)
            elif kind == 6:
                waiting[at]()
            else:
                waiting.pop(at)()
    run.finish(ending=True)


def ike_sealed(data: bytes) -> None:
    """Messages by a hostile peer that holds the keys of the session, so that all inside of SK is its choice: no
    exception, and no IKE SA is established without proof.

    State, exchange, flags, type of the first payload; then the bytes inside."""
    if len(data) < 4:
        return
    name, scene = _scene(2 + data[0] % (len(SCENES) - 2))
    ours, theirs = scene.session(scene.host), scene.session(scene.peer)
    exchange = _EXCHANGES[data[1] % len(_EXCHANGES)]
    is_response = bool(data[2] & 1)
    if ours is None or ours.unprotect is None or ours.suite is None:
        return
    keys = theirs.transmit if theirs is not None and theirs.transmit is not None else None
    if keys is None:
        return
    number = ours.window.next_own if is_response else ours.window.next_peer
    flags = (0 if ours.initiator else FLAG_INITIATOR) | (FLAG_RESPONSE if is_response else 0)
    header = Header(ours.spi_i, ours.spi_r, 0, VERSION_2, exchange, flags, number)
    scene.throw(_seal(header, keys, kind=PayloadType.SK, first=data[3], fields=b"", plain=data[4:]))
    for info in scene.host.ike.sessions():
        if name.split()[-1] in ("half-open", "auth-sent"):
            assert info.state != "established"
    if scene.look() != scene.was:
        del _scenes[name]


# ---- DNS ---------------------------------------------------------------------------------------------------

QUESTION = Question(dns.name.from_text("1.2.0.192.in-addr.arpa."), int(dns.rdatatype.IPSECKEY))


def records(data: bytes) -> None:
    """IPSECKEY rdata and TXT strings: a record that builds the same bytes again and whose key loads, or
    ParseError or KeyFormatError.

    First byte: 0 IPSECKEY, 1 TXT in pieces of up to 255 bytes, 2 the same behind our tag."""
    if not data:
        return
    kind, body = data[0] % 3, data[1:]
    with contextlib.suppress(ParseError, KeyFormatError):
        if kind == 0:
            record = parse_ipseckey(body)
            assert build_ipseckey(record) == body
            from_public_key(record.public_key())
            return
        if kind == 2:
            body = b"X-IPsec-Server(10)=" + body
        strings = [body[at : at + 255] for at in range(0, len(body), 255)]
        is_oe_text(body)
        text = parse_oe_text(strings)
        assert parse_oe_text(build_oe_text(text)) == text


def dns_reply(data: bytes) -> None:
    """A resolver's datagram: a Reply to our very question, or ParseError. First byte: 1 puts our header and
    question in front."""
    if not data:
        return
    wire = data[1:]
    if data[0] & 1:
        wire = b"\x12\x34\x81\x80\x00\x01" + wire[:6].ljust(6, b"\0")
        wire += (QUESTION.name.to_wire() or b"") + b"\x00\x2d\x00\x01" + data[7:]
    with contextlib.suppress(ParseError):
        reply = parse_reply(wire, QUESTION, 0x1234)
        assert reply.question == QUESTION
        for rrset in (*reply.answer, *reply.authority):
            for rdata in rrset.rdatas:
                rdata.to_digestable()


class LyingTree:
    """The answers of the standard tree, made once, and what is true of the names below `QUESTIONS`."""

    QUESTIONS = tuple(
        Question(dns.name.from_text(owner), int(dns.rdatatype.from_text(kind)))
        for owner, kind in (
            ("www.example.", "A"),
            ("nothing.three.", "A"),
            ("a.wild.example.", "A"),
            ("www.child.three.", "A"),
            ("www.unsigned.example.", "A"),
            ("www.dn.example.", "A"),
            ("alias.three.", "A"),
            ("child.example.", "DS"),
        )
    )

    def __init__(self) -> None:
        self.tree = standard_tree()
        self.tree.delegate()
        self.kept: dict[Question, dns.message.Message] = {}
        self.orders: list[bytes] = []
        self.truth = [asyncio.run(self.look(question, [])) for question in self.QUESTIONS]
        self.known = list(self.kept.values())

    async def look(self, question: Question, orders: list[bytes]) -> Outcome:
        self.orders, self.number = orders, 0
        validator = Validator(self, self.tree.anchors(), lambda: NOW, lambda: 1000.0)
        return await validator.lookup(question.name, question.type)

    def states(self) -> tuple[ResolverState, ...]:
        return ()

    async def ask(self, question: Question) -> Reply | NoReply:
        if question not in self.kept:
            query = dns.message.make_query(question.name, question.type, want_dnssec=True, id=7)
            self.kept[question] = self.tree.answer(question, query) or query
        wire = self._lie(self.kept[question], self.number)
        self.number += 1
        try:
            return parse_reply(wire, question, 7)
        except ParseError as error:
            return NoReply(question, str(error))

    def _lie(self, truth: dns.message.Message, number: int) -> bytes:
        reply = dns.message.QueryMessage(7)
        reply.flags = truth.flags
        reply.sections = [list(section) for section in truth.sections]
        changes = []
        for which, kind, one, two in self.orders:
            if which % 24 != number:
                continue
            section = reply.sections[1 + kind % 2]
            if kind // 2 % 5 == 0 and section:
                del section[one % len(section)]
            elif kind // 2 % 5 == 1:
                other = self.known[one % len(self.known)].sections[1 + two % 2]
                section += [rrset for rrset in other if rrset not in section]
            elif kind // 2 % 5 == 2:
                reply.set_rcode(dns.rcode.Rcode(one % 4))
            elif kind // 2 % 5 == 3 and section:
                moved = self.QUESTIONS[two % len(self.QUESTIONS)].name
                taken = section.pop(one % len(section))
                section.append(dns.rrset.from_rdata_list(moved, taken.ttl, list(taken)))
            else:
                changes.append((one, two))
        wire = bytearray(reply.to_wire(max_size=65535))
        for one, two in changes:
            wire[12 + one * 5 % (len(wire) - 12)] ^= two
        return bytes(wire)


@functools.cache
def _lying_tree() -> LyingTree:
    return LyingTree()


def dns_chain(data: bytes) -> None:
    """Whatever a resolver changes, drops, moves or mixes: the truth, or bogus or indeterminate without data; never
    insecure where the name is signed. First byte: the question. Then orders of four bytes: which reply, what to
    do, where, with what."""
    if not data:
        return
    lying = _lying_tree()
    number = data[0] % len(lying.QUESTIONS)
    orders = [data[i : i + 4] for i in range(1, min(len(data), 65) - 3, 4)]
    outcome, truth = asyncio.run(lying.look(lying.QUESTIONS[number], orders)), lying.truth[number]
    if not outcome.is_usable:
        assert not outcome.rdatas
        return
    assert outcome.status is truth.status, (outcome, truth)
    if outcome.status is Security.SECURE:
        assert (outcome.rdatas, outcome.rcode) == (truth.rdatas, truth.rcode), (outcome, truth)
        assert outcome.ttl <= truth.ttl


class _Link(asyncio.Transport):
    """What a connection writes to goes nowhere."""

    def __init__(self) -> None:
        super().__init__()
        self.closed = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        pass

    def abort(self) -> None:
        self.closed = True

    def is_closing(self) -> bool:
        return self.closed


def dns_stream(data: bytes) -> None:
    """A resolver's TCP stream, cut anywhere: each question ends in a Reply to itself, in ParseError, or with the
    connection; nothing is kept of what was not asked. First byte: how long the pieces are."""
    if not data:
        return

    async def run() -> None:
        numbers = iter((0x1234, 0x1234, 0x1235, 0x1236))  # the first of equal ones is taken
        lost: list[int] = []
        connection = Connection(lambda: next(numbers), lambda: lost.append(1))
        connection.connection_made(_Link())

        def read(wire: bytes, identifier: int) -> Reply:
            return parse_reply(wire, QUESTION, identifier)

        asked = [
            asyncio.ensure_future(connection.exchange(lambda number: build_query(QUESTION, number), read))
            for _ in range(3)
        ]
        await asyncio.sleep(0)
        size = data[0] + 1
        for start in range(1, len(data), size):
            connection.data_received(data[start : start + size])
            assert connection.held <= 65537 + size
        await asyncio.sleep(0)
        asked[0].cancel()
        connection.connection_lost(None)
        for result in await asyncio.gather(*asked, return_exceptions=True):
            if not isinstance(result, Reply | asyncio.CancelledError):
                assert isinstance(result, ParseError | ConnectionLost), result
        assert not connection.waiting
        connection.close()

    asyncio.run(run())


def anchor_file(data: bytes) -> None:
    """A file of automatic trust anchors: points that are written as they were read, or ConfigError. First byte: odd
    puts a good head and key before the rest."""
    if not data:
        return
    text = data[1:].decode("utf-8", "replace")
    if data[0] & 1:
        text = _POINTS + text
    try:
        points = parse_points(text, "anchors.auto")
    except ConfigError:
        return
    assert parse_points(format_points(points), "again") == points
    for point in points:
        assert all(key.state.is_trusted for key in point.keys if key.key in point.anchor().keys)


_POINTS = (
    ";zone . checked 20270115080000 due 20270116080000\n"
    ". IN DNSKEY 257 3 15 l02Woi0iS8Aa25FQkUd9RMzZHJpBoRQwAQEX1SxZJA4= ;VALID since 20270115080000\n"
)


# ---- ESP ---------------------------------------------------------------------------------------------------


def esp(data: bytes) -> None:
    """ESP from outside and inner packets of a peer that holds the keys: an IP packet within the selectors, a
    dummy, or RemoteError.

    First byte: 0 a datagram, 1 the plaintext inside of an authentic one, 2 a packet outward, 3 AGGFRAG payloads,
    4 a super-packet to be cut, 5 packets to be put together."""
    if data:
        with contextlib.suppress(RemoteError):
            _ESP_KINDS[data[0] % len(_ESP_KINDS)](data[1:])


def _esp_pairs() -> tuple[EspPair, EspPair]:
    one, other = pairs()
    return EspPair(one, 0.0), EspPair(other, 0.0)


def _esp_datagram(body: bytes) -> None:
    ours, _ = _esp_pairs()
    assert ours.open_ahead(memoryview(body), 0, len(body)) == []
    ours.open(memoryview(body))
    raise AssertionError("nobody without the key makes an authentic packet")


def _esp_plaintext(body: bytes) -> None:
    ours, theirs = _esp_pairs()
    sealed = memoryview(sealed_plaintext(theirs, body))
    (plaintext,) = ours.open_ahead(sealed, 0, len(sealed))
    assert plaintext == body
    packet = ours.packet(plaintext, 1.0)
    assert packet is None or ours.selectors.allow_inward(packet)


def _esp_outward(body: bytes) -> None:
    ours, theirs = _esp_pairs()
    inner_length(body, {4: 4, 6: 41}.get(body[0] >> 4 if body else 0, 0), len(body))
    clamped = clamp(body, 1400)
    assert len(clamped) == len(body)
    if ours.selectors.allow_outward(body):
        assert theirs.packet(theirs.open(memoryview(esp_of(ours, body))), 1.0) is not None


def _esp_aggfrag(body: bytes) -> None:
    """A byte of flags, then payloads: sequence number, length, octets. Alone each is a packet or an error; what
    comes out has the length that it says."""
    unpacker, at = Unpacker(super_packets=bool(body[:1] < b"\x80")), 1
    while at + 2 <= len(body):
        sequence, length = body[at] % 32, body[at + 1]
        payload = body[at + 2 : at + 2 + length]
        at += 2 + length
        with contextlib.suppress(RemoteError):
            for parts, offload in unpacker.add(memoryview(payload), sequence):
                packet = b"".join(parts)
                assert inner_length(packet, 4 if packet[0] >> 4 == 4 else 41, len(packet)) == len(packet)
                if offload.gso:
                    _cut(packet, offload)
    assert len(unpacker._starts) <= MAX_WAITING
    assert len(unpacker._ends) <= MAX_WAITING


def _cut(packet: bytes, offload: Offload) -> list[bytes]:
    count, length, pieces = segments(memoryview(bytearray(packet)), offload)
    made = [bytes(header) + bytes(payload) for header, payload in pieces]
    assert len(made) == count
    assert sum(map(len, made)) == len(packet) + (count - 1) * length
    return made


def _esp_segments(body: bytes) -> None:
    """Ten bytes of virtio header, then the packet: the same pieces as a network card makes, or ParseError."""
    if len(body) < SIZE:
        return
    packet, offload = body[SIZE:], parse(memoryview(body))
    for piece in _cut(packet, offload):
        if piece[0] >> 4 == 4 or offload.checksum_start == 40:
            assert transport_sum(piece) == 0xFFFF


def _esp_coalesce(body: bytes) -> None:
    """A byte whether to verify, then packets: length, octets. All of them leave again, cut as they came."""
    crossings: list[tuple[bytes, Offload]] = []
    coalescer = Coalescer(
        lambda parts, header: crossings.append((b"".join(parts), parse(memoryview(header)))),
        lambda packet: crossings.append((packet, NONE)),
    )
    verify, at, packets = body[:1] < b"\x80", 1, []
    while at < len(body):
        packet = body[at + 1 : at + 1 + body[at]]
        at += 1 + body[at]
        with contextlib.suppress(RemoteError):
            version = 4 if packet[:1] < b"\x60" else 41
            packet = packet[: inner_length(packet, version, len(packet))]
            packets.append(packet)
            coalescer.add(packet, verify)
    coalescer.flush()
    left: list[bytes] = []
    for packet, offload in crossings:
        if offload.gso and not offload.flags and transport_sum(packet) != 0xFFFF:
            assert not verify
            return  # the kernel drops it: a segment was damaged
        left += cut(packet, offload)
    assert sorted(map(_unsigned, left)) == sorted(map(_unsigned, packets))


def _unsigned(packet: bytes) -> bytes:
    """Without the TCP or UDP checksum, of which 0 and 0xFFFF are the same."""
    start, number = (20, packet[9]) if packet[0] == 0x45 else (40, packet[6] if packet[0] >> 4 == 6 else 0)
    field = start + {6: 16, 17: 6}.get(number, len(packet))
    return packet[:field] + packet[field + 2 :]


_ESP_KINDS = (_esp_datagram, _esp_plaintext, _esp_outward, _esp_aggfrag, _esp_segments, _esp_coalesce)


# ---- trap --------------------------------------------------------------------------------------------------


def trap(data: bytes) -> None:
    """Netlink messages, queued packets and the flows in them: values, or ParseError.

    First byte: 0 a netlink datagram, 1 attributes, 2 an IP packet."""
    if not data:
        return
    kind, body = data[0] % 3, data[1:]
    with contextlib.suppress(ParseError):
        if kind == 0:
            for message in netlink.parse_messages(body):
                packet = queue.parse_packet(message)
                parse_flow(packet.payload, Direction.OUTPUT)
        elif kind == 1:
            queue.parse_packet(netlink.Message(0, 0, 0, body=body))
        else:
            parse_flow(body, Direction.FORWARD)


# ---- the kernel's SAD and SPD ------------------------------------------------------------------------------


def xfrm(data: bytes) -> None:
    """XFRM messages: values, which build and parse to the same values again, or ParseError.

    First byte: 0 a netlink datagram, else the kind of message, of which the rest is the body."""
    if not data:
        return
    kind, body = data[0], data[1:]
    with contextlib.suppress(ParseError):
        frames = list(parse_frames(body)) if kind == 0 else [Frame(kind, 0, 0, body)]
        for frame in frames:
            answer = answers.parse(frame)
            if isinstance(answer, values.Sa) and (answer.replay is None or answer.replay.bitmap):
                again = answers.parse(Frame(pieces.MSG_NEWSA, 0, 0, requests.sa_body(answer)))
                assert again == answer
            elif isinstance(answer, values.Policy):
                again = answers.parse(Frame(pieces.MSG_NEWPOLICY, 0, 0, requests.policy_body(answer)))
                assert again == answer


# ---- configuration -----------------------------------------------------------------------------------------


class _Nothing:
    """Files that are not there, but for one."""

    def include(self, name: str, file: str) -> tuple[str, bytes]:
        if name == "i":
            return "i", b"flow from 10.0.0.0/8 to any type deny\ninclude i\n"
        raise OepyError("no such file")

    def key(self, name: str, file: str) -> bytes:
        return self.include(name, file)[1]


def _converts(data: bytes, kind: str) -> None:
    text = data.decode("utf-8", "replace")
    done = convert([("f", text)], kind, _Nothing(), allow_weak=True)
    if not done.problems:
        section = yaml.load(render(done, "f", lambda *_: None), Loader=yaml.BaseLoader)["manual"]
        assert read_manual(section, lambda _: b"") == (done.manual, [])


def setkey(data: bytes) -> None:
    """A setkey file: problems with their lines, or SAs and policies that our own reader takes as they are."""
    _converts(data, "setkey")


def ipsec_conf(data: bytes) -> None:
    """OpenBSD's ipsec.conf: problems with their lines, or SAs and policies that our own reader takes so."""
    _converts(data, "ipsec.conf")


def manual_section(data: bytes) -> None:
    """A `manual:` section as JSON: a set that is the same when it is written and read again, or problems."""
    try:
        section = json.loads(data)
    except (ValueError, RecursionError):
        return
    manual, problems = read_manual(section, lambda name: name.encode())
    if not problems:
        again = {
            "sas": [sa_mapping(sa) for sa in manual.sas],
            "policies": [policy_mapping(policy) for policy in manual.policies],
        }
        assert read_manual(again, lambda _: b"") == (manual, [])
        pair_up(manual)


def connections(data: bytes) -> None:
    """`connections:` and the rest as JSON: problems, each with its place and its mend and never a secret; or
    connections of which the matcher finds those that fit, the most exact first, and the secret of the best pair."""
    try:
        sections = json.loads(data)
    except (ValueError, RecursionError):
        return
    if not isinstance(sections, dict):
        return
    configured, problems = read_data(sections, CONNECTION_SECRETS, CONNECTION_KEYS)
    for problem in problems:
        assert problem.path[0] in SECTIONS
        assert 0 < len(problem.text) < 2000
        assert not any(secret.decode() in problem.text for secret in CONNECTION_SECRETS.values())
    if problems:
        return
    assert read_data(sections, CONNECTION_SECRETS, CONNECTION_KEYS)[0] == configured
    matcher = Matcher(configured)
    resolved = {"gw.example": frozenset((ip_address("192.0.2.9"),))}
    places = [ip_address(text) for text in ("192.0.2.1", "192.0.2.9", "2001:db8::1")]
    names = [PeerIdentity.parse(text) for text in ("a.example", "gw.example", "me@a.example", "192.0.2.1")]
    for remote in places:
        found = matcher.by_address(places[0], remote, resolved)
        ranks = [place_rank(connection.remote_addrs, remote, resolved) for connection in found]
        assert None not in ranks
        assert ranks == sorted(ranks, key=lambda rank: rank or 0)
        assert {one.name for one in found} == {
            one.name
            for one in configured.connections
            if place_rank(one.remote_addrs, remote, resolved) is not None
            and place_rank(one.local_addrs, places[0], resolved) is not None
        }
        for name in names:
            fitting = matcher.by_identity(places[0], remote, name, None, resolved)
            assert all(one in found and one.remote.id.matches(name) for one in fitting)
            exactness = [one.remote.id.rank for one in fitting]
            assert exactness == sorted(exactness)
    for ours in names:
        for theirs in names:
            secret = matcher.secret([ours], [theirs])
            assert secret == _best_secret(configured, ours, theirs)


def _best_secret(configured: ConnectionSet, ours: PeerIdentity, theirs: PeerIdentity) -> Secret | None:
    """The same by looking at every secret."""
    ranked = [
        (rank, number)
        for number, shared in enumerate(configured.secrets)
        if (rank := _secret_rank(shared.ids, (ours,), (theirs,))) is not None
    ]
    return configured.secrets[min(ranked)[1]].secret if ranked else None


CONNECTION_SECRETS = {"psk": b"xyzzy of two", "other": b"0x" + b"ab" * 20, "bad": b"0sxyzzy=of=none"}
CONNECTION_KEYS = {"peer": PublicKey(KeyAlgorithm.EDDSA, bytes(32))}


def _fixed_site() -> tuple[dict[str, Holder], dict[str, bytes]]:
    """The same bytes in every run: EdDSA is deterministic. Holders, and what their CA says of them."""

    def key(number: int) -> ed25519.Ed25519PrivateKey:
        return ed25519.Ed25519PrivateKey.from_private_bytes(bytes((number,)) * 32)

    root = Holder("Root", key=key(1), serial=1)
    middle = Holder("Middle", root, key=key(2), serial=2, extensions=[points("http://ca.example/root")])
    names = [DNS("gw.example"), MAIL("gw@example"), IP(ip_address("192.0.2.1"))]
    leaf = Holder("gw", middle, ca=False, key=key(3), serial=3, alternatives=names)
    revoked = Holder(
        "bad", root, ca=False, key=key(4), serial=4, extensions=[responder("http://ca.example/ask")]
    )
    stranger = Holder("gw", Holder("Other", key=key(5), serial=5), ca=False, key=key(6), serial=6)
    answer = ocsp_response(revoked, root, ocsp.OCSPCertStatus.REVOKED, digest=None)
    holders = {"root": root, "middle": middle, "leaf": leaf, "revoked": revoked, "stranger": stranger}
    return holders, {"crl": revocation_list(root, revoked), "ocsp": answer}


X509_SITE, X509_WORDS = _fixed_site()


def certificates(data: bytes) -> None:
    """Whatever certificates, lists, responses and names come: an error of its own kind, or what a CA has signed."""
    kind, body = data[0] % 4 if data else 0, data[1:]
    root = X509_SITE["root"].certificate
    revoked = X509_SITE["revoked"].certificate
    if kind == 0:
        sent = []
        while body and len(sent) < 12:
            size = int.from_bytes(body[:2], "big")
            sent.append(body[2 : 2 + size])
            body = body[2 + size :]
        # By what is signed: the signature around it has more than one encoding
        genuine = [
            X509_SITE[name].certificate.tbs_certificate_bytes for name in ("middle", "leaf", "revoked")
        ]
        for name in ("gw.example", "CN=gw", "192.0.2.1", "gw@example"):
            with contextlib.suppress(PathError):
                path = accept(Trust((root,)), sent, PeerIdentity.parse(name), CERTIFICATES_NOW)
                assert path.leaf.tbs_certificate_bytes in genuine
                assert path.anchor == root
    elif kind == 1:
        with contextlib.suppress(Unusable):
            assert (
                read_crl(body, root, CERTIFICATES_NOW).status(revoked, CERTIFICATES_NOW).standing
                is Standing.REVOKED
            )
    elif kind == 2:
        with contextlib.suppress(Unusable):
            assert read_ocsp(body, revoked, root, CERTIFICATES_NOW).standing is Standing.REVOKED
    else:
        with contextlib.suppress(ParseError):
            name = dn.read(body)
            assert sum(map(len, name)) <= dn.MAX_ATTRIBUTES
            assert dn.same(body, body)
        assert dn.to_text(body).isprintable()
        with contextlib.suppress(ValueError):
            assert dn.same(
                dn.parse(body.decode("utf-8", "replace")), dn.parse(body.decode("utf-8", "replace"))
            )


HARNESSES: dict[str, Callable[[bytes], None]] = {
    "ike": ike,
    "ike_sealed": ike_sealed,
    "ike_session": ike_session,
    "records": records,
    "dns_reply": dns_reply,
    "dns_chain": dns_chain,
    "dns_stream": dns_stream,
    "anchor_file": anchor_file,
    "esp": esp,
    "trap": trap,
    "xfrm": xfrm,
    "setkey": setkey,
    "ipsec_conf": ipsec_conf,
    "manual_section": manual_section,
    "certificates": certificates,
    "connections": connections,
}
