"""The kernel's side of XFRM: what only the kernel sends, and a kernel in memory."""

from __future__ import annotations

import contextlib
import errno
import socket
from collections.abc import Iterator, Sequence

from oepy.model import IpAddress
from oepy.netlink import Frame
from oepy.xfrm import pieces as p
from oepy.xfrm import requests
from oepy.xfrm import values as v
from oepy.xfrm.answers import parse
from oepy.xfrm.requests import Request
from oepy.xfrm.socket import Refused


def expire_body(sa: v.Sa, hard: bool) -> bytes:
    return requests.sa_body(sa, bytes((hard,)) + bytes(7))


def policy_expire_body(policy: v.Policy, hard: bool) -> bytes:
    whole = requests.policy_body(policy)
    return whole[: p.POLICY.size] + bytes((hard,)) + bytes(7) + whole[p.POLICY.size :]


def acquire_body(acquire: v.Acquire) -> bytes:
    whole = requests.policy_body(acquire.policy)
    head = p.ACQUIRE.pack(
        p.ID.pack(acquire.destination.packed, bytes(4), acquire.protocol),
        acquire.source.packed,
        p.build_selector(acquire.selector),
        whole[: p.POLICY.size],
        *(p.ALL_ALGORITHMS,) * 3,
        acquire.sequence,
    )
    return head + whole[p.POLICY.size :]


def mapping_body(mapping: v.Mapping) -> bytes:
    identity = requests.delete_sa(mapping.id).body[: p.SA_ID.size]
    ports = p.TWO_PORTS.pack(mapping.old_port, mapping.new_port)
    return p.MAPPING.pack(
        identity, mapping.reqid, mapping.old_source.packed, mapping.new_source.packed, ports
    )


class FakeKernel:
    """SAD and SPD in memory, behind the seam `socket.Xfrm`; speaks in the kernel's bytes.

    `asked` are all requests but dumps. `refusing` maps a kind of message to the errno that it gets.
    """

    def __init__(self) -> None:
        self.sas: dict[tuple[IpAddress, int, int], v.Sa] = {}
        self.policies: dict[v.PolicyId, v.Policy] = {}
        self.asked: list[Request] = []
        self.refusing: dict[int, int] = {}
        self.closed = False
        self.keeps = False  # an update changes nothing, as of an SA that has keys

    # -- socket.Xfrm

    def carry_out(self, requests: Sequence[Request]) -> list[Refused | None]:
        return [self._carry_out(request) for request in requests]

    def ask(self, asked: Sequence[Request]) -> list[Frame | None]:
        found: list[Frame | None] = []
        for request in asked:
            answer = parse(Frame(p.MSG_DELSA, 0, 0, request.body))
            assert isinstance(answer, v.SaDeleted)
            sa = self.sas.get(_key(answer.id))
            found.append(None if sa is None else Frame(p.MSG_NEWSA, 0, 0, requests.sa_body(sa)))
        return found

    def dump(self, request: Request) -> Iterator[Frame]:
        if request.kind == p.MSG_GETSA:
            return iter([Frame(p.MSG_NEWSA, 0, 0, requests.sa_body(sa)) for sa in self.sas.values()])
        bodies = [requests.policy_body(policy) for policy in self.policies.values()]
        return iter([Frame(p.MSG_NEWPOLICY, 0, 0, body) for body in bodies])

    def close(self) -> None:
        self.closed = True

    # -- for tests

    def kinds(self) -> list[int]:
        return [request.kind for request in self.asked]

    def policy(self, direction: v.PolicyDirection, destination: str) -> v.Policy | None:
        """The one with this destination, of those that have templates of an SA."""
        found = [
            policy
            for policy in self.policies.values()
            if policy.direction is direction and str(policy.selector.destination) == destination
        ]
        assert len(found) < 2
        return found[0] if found else None

    # -- inside

    def _carry_out(self, request: Request) -> Refused | None:
        self.asked.append(request)
        number = self.refusing.get(request.kind) or self._change(request)
        return Refused(request, number) if number else None

    def _change(self, request: Request) -> int:
        answer = parse(Frame(request.kind, 0, 0, request.body))
        match answer:
            case v.Sa():
                if (_key(answer.id) in self.sas) != (request.kind == p.MSG_UPDSA):
                    return errno.ESRCH if request.kind == p.MSG_UPDSA else errno.EEXIST
                if not (self.keeps and request.kind == p.MSG_UPDSA):
                    self.sas[_key(answer.id)] = answer
            case v.SaDeleted(name):
                return 0 if self.sas.pop(_key(name), None) else errno.ESRCH
            case v.Policy():
                if request.kind == p.MSG_NEWPOLICY and answer.id in self.policies:
                    return errno.EEXIST
                self.policies[answer.id] = answer
            case v.PolicyDeleted(name):
                return 0 if self.policies.pop(name, None) else errno.ENOENT
            case _:
                raise AssertionError(f"not in this fake: {answer}")
        return 0


class FakeEvents:
    """`events` are handed out by the next `receive`; `lost` once says that some were."""

    def __init__(self) -> None:
        self.ours, self.theirs = socket.socketpair()
        self.ours.setblocking(False)
        self.events: list[v.Answer] = []
        self.lost = False
        self.groups: list[int] = []

    def fileno(self) -> int:
        return self.ours.fileno()

    def send(self, *events: v.Answer, lost: bool = False) -> None:
        self.events += events
        self.lost = lost
        self.theirs.send(b"x")

    def receive(self) -> tuple[list[v.Answer], bool] | None:
        try:
            self.ours.recv(1)
        except BlockingIOError:
            return None
        events, self.events = self.events, []
        lost, self.lost = self.lost, False
        return events, lost

    @contextlib.contextmanager
    def listening(self, group: int) -> Iterator[None]:
        self.groups.append(group)
        yield

    def close(self) -> None:
        self.ours.close()
        self.theirs.close()


def _key(name: v.SaId) -> tuple[IpAddress, int, int]:
    return name.destination, name.spi, name.protocol
