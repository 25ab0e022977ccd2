"""The XFRM netlink sockets: requests and their outcome, and the kernel's events."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

from oepy.errors import OepyError, ParseError
from oepy.netlink import NLM_F_DUMP, NLMSG_DONE, NLMSG_ERROR, Frame, frame, parse_frames
from oepy.xfrm import pieces as p
from oepy.xfrm.algorithms import module_of
from oepy.xfrm.answers import parse
from oepy.xfrm.requests import Request
from oepy.xfrm.values import Answer, Policy, PolicyDeleted, Sa, SaDeleted

BATCH = 64  # requests in one system call
DUMP_SECONDS = 10  # without a word of the kernel in the middle of a list
_SOL_NETLINK = 270
_ADD_MEMBERSHIP, _DROP_MEMBERSHIP, _CAP_ACK, _EXT_ACK = 1, 2, 10, 11
_SO_SNDBUFFORCE, _SO_RCVBUFFORCE = 32, 33
_BUFFER = 4 << 20
_MESSAGE_BUFFER = 1 << 17
_MAX_SEQUENCE = 0xFFFFFFFF
MAX_ANSWERS = 4_000_000  # entries of one dump


class Refused(Exception):
    """The kernel refused a request: `errno`, and its own words where it has any."""

    def __init__(self, request: Request, number: int, reason: str = "") -> None:
        super().__init__(reason or os.strerror(number))
        self.request = request
        self.errno = number
        self.reason = reason


class Xfrm(Protocol):
    """The kernel's SAD and SPD, as the datapath sees them."""

    def carry_out(self, requests: Sequence[Request]) -> list[Refused | None]:
        """All of them in their order, and what became of each. One that is refused does not stop the rest."""

    def ask(self, requests: Sequence[Request]) -> list[Frame | None]:
        """The answer to each, None where there is no such entry. Raises OepyError."""

    def dump(self, request: Request) -> Iterator[Frame]:
        """All entries. Raises OepyError."""

    def close(self) -> None: ...


class XfrmSocket:
    """Of the calling thread's network namespace."""

    def __init__(self) -> None:
        """Raises OepyError with the mend."""
        self._socket = _open()
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, _BUFFER)
            self._socket.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _BUFFER)
            for option in (_CAP_ACK, _EXT_ACK):
                self._socket.setsockopt(_SOL_NETLINK, option, 1)
            patience = struct.pack("@ll", DUMP_SECONDS, 0)
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, patience)
        except OSError as error:
            self._socket.close()
            raise OepyError("not permitted to change IPsec", "run as root (CAP_NET_ADMIN)") from error
        self._sequence = 0

    def close(self) -> None:
        self._socket.close()

    def carry_out(self, requests: Sequence[Request]) -> list[Refused | None]:
        """See Xfrm. The kernel works a batch off within the system call."""
        outcome: list[Refused | None] = []
        for start in range(0, len(requests), BATCH):
            part = requests[start : start + BATCH]
            first = self._send(part)
            answered = {found.sequence: found for found in self._received() if found.kind == NLMSG_ERROR}
            for number, request in enumerate(part, first):
                told = answered.get(number)
                if told is None:
                    raise OepyError("the kernel did not answer a change of its SAs", "its log may say why")
                outcome.append(Refused(request, told.error, told.reason) if told.error else None)
        return outcome

    def ask(self, requests: Sequence[Request]) -> list[Frame | None]:
        """See Xfrm."""
        found: list[Frame | None] = []
        for start in range(0, len(requests), BATCH):
            part = requests[start : start + BATCH]
            first = self._send(part)
            answers: list[Frame | None] = [None] * len(part)
            for told in self._received():
                index = told.sequence - first
                if not 0 <= index < len(part):
                    continue
                if told.kind != NLMSG_ERROR:
                    answers[index] = told
                elif told.error not in (0, errno.ESRCH, errno.ENOENT):
                    raise explained(Refused(part[index], told.error, told.reason))
            found += answers
        return found

    def dump(self, request: Request) -> Iterator[Frame]:
        """See Xfrm."""
        number = self._send([request._replace(flags=request.flags | NLM_F_DUMP)])
        for _ in range(MAX_ANSWERS):
            for found in parse_frames(self._listed()):
                if found.sequence != number:
                    continue
                if found.kind == NLMSG_DONE:
                    return
                if found.kind == NLMSG_ERROR:
                    raise explained(Refused(request, found.error, found.reason))
                yield found

    def _listed(self) -> bytes:
        try:
            return self._socket.recv(_MESSAGE_BUFFER)
        except OSError as error:  # after DUMP_SECONDS without a word, too
            raise OepyError(f"the kernel did not list its SAs to the end: {error.strerror}") from error

    def _send(self, requests: Sequence[Request]) -> int:
        """The sequence number of the first one."""
        if self._sequence > _MAX_SEQUENCE - BATCH - 1:
            self._sequence = 0
        first = self._sequence + 1
        self._sequence += len(requests)
        data = b"".join(
            frame(request.kind, request.flags, request.body, number)
            for number, request in enumerate(requests, first)
        )
        try:
            self._socket.send(data)
        except OSError as error:
            raise OepyError(f"the kernel takes no changes of its SAs: {error.strerror}") from error
        return first

    def _received(self) -> Iterator[Frame]:
        while True:
            try:
                data = self._socket.recv(_MESSAGE_BUFFER, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return
            yield from parse_frames(data)


class EventSocket:
    """The kernel's multicasts of some groups; never blocks."""

    def __init__(self, groups: Iterable[int]) -> None:
        self._socket = _open()
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _BUFFER)
            self._socket.bind((0, 0))  # without an address of its own it would hear nothing
            for group in groups:
                self._socket.setsockopt(_SOL_NETLINK, _ADD_MEMBERSHIP, group)
        except OSError as error:
            self._socket.close()
            raise OepyError(f"no IPsec events: {error.strerror}", "run as root (CAP_NET_ADMIN)") from error
        self._socket.setblocking(False)

    def fileno(self) -> int:
        return self._socket.fileno()

    def receive(self) -> tuple[list[Answer], bool] | None:
        """What has come, and whether something before it was lost (the buffer was full). None for nothing."""
        try:
            data = self._socket.recv(_MESSAGE_BUFFER)
        except BlockingIOError:
            return None
        except OSError as error:
            if error.errno == errno.ENOBUFS:
                return [], True
            raise
        found = []
        for message in parse_frames(data):
            answer = read(message)
            if answer is not None:
                found.append(answer)
        return found, False

    @contextlib.contextmanager
    def listening(self, group: int) -> Iterator[None]:
        """To one more group, for a while."""
        self._socket.setsockopt(_SOL_NETLINK, _ADD_MEMBERSHIP, group)
        try:
            yield
        finally:
            self._socket.setsockopt(_SOL_NETLINK, _DROP_MEMBERSHIP, group)

    def close(self) -> None:
        self._socket.close()


def read(message: Frame) -> Answer | None:
    """None too for an entry of another program that is beyond us: it cannot be ours."""
    try:
        return parse(message)
    except ParseError:
        return None


def _open() -> socket.socket:
    try:
        return socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, p.NETLINK_XFRM)
    except OSError as error:
        raise OepyError(
            f"no IPsec in this kernel: {error.strerror}", "it needs CONFIG_XFRM_USER (modprobe xfrm_user)"
        ) from error


# ---- what a refusal means ----------------------------------------------------------------------------------


def explained(refused: Refused) -> OepyError:
    """For the user: what was refused, why, and the mend."""
    number, what = refused.errno, _subject(refused.request)
    words = f" ({refused.reason})" if refused.reason else ""
    if number == errno.EPERM:
        return OepyError(f"not permitted: {what}", "run as root (CAP_NET_ADMIN)")
    if number == errno.EEXIST:
        return OepyError(
            f"{what}: there is one already", "choose another SPI or selector, or delete that one"
        )
    if number in (errno.ESRCH, errno.ENOENT) and refused.request.kind in (p.MSG_DELSA, p.MSG_DELPOLICY):
        return OepyError(f"{what}: there is none", "`ip xfrm state` and `ip xfrm policy` list what there is")
    if number in (errno.ENOSYS, errno.EPROTONOSUPPORT, errno.EOPNOTSUPP, errno.ENOENT):
        return OepyError(f"{what}: this kernel lacks it{words}", _module_mend(refused.request))
    if number == errno.ENOBUFS:
        return OepyError(f"{what}: the kernel is out of memory for it", "free memory, or allow fewer tunnels")
    return OepyError(f"{what}: the kernel refused it: {os.strerror(number)}{words}")


def _subject(request: Request) -> str:
    answer = read(Frame(request.kind, 0, 0, request.body))
    if isinstance(answer, Sa):
        return f"the {_name(answer.protocol)} SA {answer.spi:#010x} to {answer.destination}"
    if isinstance(answer, SaDeleted):
        return f"the {_name(answer.id.protocol)} SA {answer.id.spi:#010x} to {answer.id.destination}"
    if isinstance(answer, Policy | PolicyDeleted):
        found = answer.id
        way = found.direction.name.lower()
        return f"the `{way}` policy {found.selector.source} → {found.selector.destination}"
    return f"XFRM request {request.kind:#x}"


def _name(protocol: int) -> str:
    return {50: "ESP", 51: "AH"}.get(protocol, f"protocol {protocol}")


def _module_mend(request: Request) -> str:
    answer = read(Frame(request.kind, 0, 0, request.body))
    if not isinstance(answer, Sa):
        return "load the module xfrm_user"
    family = "6" if answer.destination.version == 6 else "4"
    names = ["ah" + family if answer.protocol == 51 else "esp" + family]
    for algorithm in (answer.aead, answer.encryption, answer.integrity):
        if algorithm is not None:
            names.append(module_of(algorithm.name) or algorithm.name)
    return f"load the kernel's modules for it (modprobe -a {' '.join(names)}), or use `datapath: tun`"
