"""The initiator of `oepy bench ike`: the IKE room on real sockets, as many peers as are wanted from one process,
each with an address, an identity and a network of its own.

    python -m oepy.bench.ike_initiator < JOBS

Lines of JSON: first a Setup, then jobs, each answered by one line. `{"run": N, "at_once": C, "responder": ADDRESS}`
makes N handshakes, C at a time; `{"clear": true}` deletes all SAs.
"""

from __future__ import annotations

import json
import os
import select
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from ipaddress import IPv4Address, ip_address
from typing import Any

from oepy.errors import OepyError
from oepy.ike import events as ike
from oepy.ike.algorithms import parse_esp_proposal, parse_ike_proposal
from oepy.ike.authentication import sign_auth
from oepy.ike.endpoint import IkeEndpoint
from oepy.ike.settings import IkeSettings, Initiate, Retransmission
from oepy.keys import HostKey, parse_public
from oepy.model import IKE_PORT, Endpoint, PeerIdentity, Secret, TrafficSelector
from oepy.udp import open_ike_sockets

FIRST_OUTER, OUTER_NETWORK = IPv4Address("198.19.0.1"), "198.19.0.0/16"
FIRST_INNER, INNER_NETWORK = IPv4Address("10.0.0.1"), "10.0.0.0/8"
MAX_PEERS = 65_000
INITIATOR, RESPONDER = "peer.bench.example", "gw.bench.example"
ESP_PROPOSAL = "aes256gcm16-noesn"
CLEAR_SECONDS = 60.0
_READS = 64
# Longer than any handshake here takes: sending again is work that a quiet network does not ask for
_PATIENT = Retransmission(first=5.0, total=60.0)


@dataclass(frozen=True, slots=True)
class Setup:
    """`key` and `peer_key` are PEM, "" with a PSK."""

    proposal: str
    secret: str
    key: str = ""
    peer_key: str = ""

    def line(self) -> str:
        return json.dumps(asdict(self))


@dataclass(frozen=True, slots=True)
class Block:
    """What one job took. Seconds; `cpu` of this process for all of them."""

    times: list[float]
    wall: float
    cpu: float
    retransmits: int


class _Initiator:
    def __init__(self, setup: Setup) -> None:
        self._key = HostKey.from_pem(setup.key.encode()) if setup.key else None
        self._peer_keys = (parse_public(setup.peer_key),) if setup.peer_key else ()
        self._secret = Secret(setup.secret.encode())
        settings = IkeSettings(
            liveness_interval=0.0,
            force_encap=False,
            handshake=_PATIENT,
            established=_PATIENT,
            ike_offers=(parse_ike_proposal(setup.proposal),),
            esp_offers=(parse_esp_proposal(ESP_PROPOSAL),),
        )
        self._ike = IkeEndpoint(settings, os.urandom)
        self._sockets = open_ike_sockets(versions=(4,))
        self._by_descriptor = {sock.fileno(): sock for sock in (*self._sockets.ike, *self._sockets.nat_t)}
        self._poll = select.poll()
        for descriptor in self._by_descriptor:
            self._poll.register(descriptor, select.POLLIN)
        self._peers = 0
        self._spi = 0x1000
        self._begun: dict[int, float] = {}
        self._times: list[float] = []
        self._failure = ""

    def run(self, count: int, at_once: int, responder: str) -> Block:
        self._times = []
        before = self._ike.counters.get("retransmits", 0)
        cpu, wall = time.process_time(), time.perf_counter()
        begun = 0
        while len(self._times) < count:
            while len(self._begun) < at_once and begun < count:
                begun += 1
                self._begin(IPv4Address(responder))
            self._turn()
        return Block(
            self._times,
            time.perf_counter() - wall,
            time.process_time() - cpu,
            self._ike.counters.get("retransmits", 0) - before,
        )

    def _begin(self, responder: IPv4Address) -> None:
        self._peers = (self._peers + 1) % MAX_PEERS
        began = time.perf_counter()
        session = self._ike.initiate(
            Initiate(
                local=Endpoint(FIRST_OUTER + self._peers, IKE_PORT),
                remote=Endpoint(responder, IKE_PORT),
                local_ts=(TrafficSelector.of(FIRST_INNER + self._peers),),
                remote_ts=(TrafficSelector.of(responder),),
                identity=PeerIdentity.parse(INITIATOR),
                expected_identity=PeerIdentity.parse(RESPONDER),
                own_auth="psk" if self._key is None else "pubkey",
                psk=self._secret if self._key is None else None,
                remote_keys=self._peer_keys,
                initial_contact=False,
                authenticated_by="manual",
            ),
            time.monotonic(),
        )
        self._begun[session] = began
        self._pump()

    def _turn(self) -> None:
        timer = self._ike.next_timer()
        wait = 1.0 if timer is None else max(0.0, timer - time.monotonic())
        for descriptor, _ in self._poll.poll(1000 * wait):
            sock = self._by_descriptor[descriptor]
            for _ in range(_READS):
                datagram = self._sockets.receive(sock)
                if datagram is None:
                    break
                self._ike.receive(datagram.data, datagram.local, datagram.remote, time.monotonic())
                self._pump()
        if timer is not None and timer <= time.monotonic():
            self._ike.handle_timer(time.monotonic())
            self._pump()
        if self._failure:
            raise OepyError(f"a handshake failed: {self._failure}")

    def _pump(self) -> None:
        while events := self._ike.events():
            for event in events:
                self._handle(event)
        for datagram in self._ike.datagrams():
            self._sockets.send(datagram.data, datagram.local, datagram.remote)

    def _handle(self, event: ike.IkeEvent) -> None:
        match event:
            case ike.NeedSpi():
                self._spi += 1
                self._ike.answer(event.token, self._spi, time.monotonic())
            case ike.NeedSignature():
                assert self._key is not None
                proof = sign_auth(self._key.private, event.data, event.peer_hashes)
                self._ike.answer(event.token, proof, time.monotonic())
            case ike.ChildUp():
                self._times.append(time.perf_counter() - self._begun.pop(event.session))
            case ike.SessionFailed():
                self._failure = f"{event.text} {event.notify}".strip()

    def clear(self) -> None:
        now = time.monotonic()
        for info in self._ike.sessions():
            self._ike.terminate(info.session, now)
        self._pump()
        deadline = now + CLEAR_SECONDS
        while self._ike.counters["sessions"]:
            self._turn()
            if time.monotonic() > deadline:
                raise OepyError(f"the responder answers no Delete within {CLEAR_SECONDS:.0f} s")


def _jobs() -> Iterator[dict[str, Any]]:
    while line := sys.stdin.readline():
        yield json.loads(line)


def main() -> None:
    jobs = _jobs()
    initiator = _Initiator(Setup(**next(jobs)))
    for job in jobs:
        answer: dict[str, Any] = {}
        try:
            if "run" in job:
                ip_address(job["responder"])
                answer = asdict(initiator.run(job["run"], job["at_once"], job["responder"]))
            else:
                initiator.clear()
        except OepyError as error:
            answer = {"error": str(error)}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
