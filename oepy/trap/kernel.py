"""The trap's hands: netlink sockets, and `nft` for what is loaded once."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
from collections.abc import Iterable, Sequence

from oepy.errors import OepyError
from oepy.trap import netlink as nl
from oepy.trap import queue, tables
from oepy.trap.rules import COMMENT, TABLES

NFT_SECONDS = 120.0
_SOL_NETLINK = 270
_NETLINK_NO_ENOBUFS = 5
_SO_SNDBUFFORCE = 32
_SO_RCVBUFFORCE = 33
_QUEUE_BUFFER = 8 << 20
_BATCH_BUFFER = 16 << 20
_MESSAGE_BUFFER = 65_536
# errno values by which a kernel says that it does not know an expression
_UNKNOWN = frozenset((errno.ENOENT, errno.EOPNOTSUPP, errno.EINVAL))


class NetlinkRefused(Exception):
    """The kernel refused a request; `errno` says why."""

    def __init__(self, number: int) -> None:
        super().__init__(os.strerror(number))
        self.errno = number


def load(text: str) -> None:
    """One transaction of nft. Raises OepyError with the mend."""
    try:
        done = subprocess.run(
            ["nft", "-f", "-"], input=text, capture_output=True, text=True, timeout=NFT_SECONDS, check=False
        )
    except FileNotFoundError as error:
        raise OepyError("the `nft` command is missing", "install the package nftables") from error
    except subprocess.TimeoutExpired as error:
        raise OepyError(f"nft did not end within {NFT_SECONDS:.0f} s", "use fewer prefixes") from error
    if done.returncode == 0:
        return
    reason = " ".join(done.stderr.split())[:600]
    if "Operation not permitted" in reason:
        raise OepyError("not permitted to load packet filter rules", "run as root (CAP_NET_ADMIN)")
    raise OepyError(f"nft refused the rules: {reason}", "the kernel needs nf_tables with fib and ct (inet)")


def current_namespace() -> str:
    """Names the calling thread's network namespace."""
    return os.readlink("/proc/thread-self/ns/net")


def open_socket() -> socket.socket:
    """A netfilter netlink socket of the calling thread's network namespace."""
    try:
        return socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, nl.NETLINK_NETFILTER)
    except OSError as error:
        raise OepyError(
            f"no netfilter netlink socket: {error.strerror}", "the kernel needs CONFIG_NETFILTER_NETLINK"
        ) from error


def _force(sock: socket.socket, option: int, size: int) -> None:
    try:
        sock.setsockopt(socket.SOL_SOCKET, option, size)
    except PermissionError as error:
        raise OepyError("not permitted to use netfilter", "run as root (CAP_NET_ADMIN)") from error


def exchange(sock: socket.socket, data: bytes) -> list[nl.Message]:
    """Send requests and return the answers. The kernel works them off within the send call, so the answers
    are there when it returns. Raises NetlinkRefused for the first error among them."""
    sock.send(data)
    answers: list[nl.Message] = []
    while True:
        try:
            received = sock.recv(_MESSAGE_BUFFER, socket.MSG_DONTWAIT)
        except BlockingIOError:
            break
        answers.extend(nl.parse_messages(received))
    for answer in answers:
        if answer.kind == nl.NLMSG_ERROR and answer.error:
            raise NetlinkRefused(answer.error)
    return answers


class Tables:
    """Changes in nf_tables over a socket of its own."""

    def __init__(self) -> None:
        self._socket = open_socket()
        _force(self._socket, _SO_SNDBUFFORCE, _BATCH_BUFFER)
        self._sequence = 0

    def close(self) -> None:
        self._socket.close()

    def transaction(self, messages: Iterable[bytes]) -> None:
        """All or nothing; committed when this returns. Raises NetlinkRefused."""
        self._sequence += 1
        exchange(self._socket, tables.batch(messages, self._sequence))

    def table_comment(self, name: str) -> bytes | None:
        """What is written on a table of ours or of others; None where there is no such table."""
        try:
            answers = exchange(self._socket, tables.get_table(name))
        except NetlinkRefused as refused:
            if refused.errno == errno.ENOENT:
                return None
            raise
        return b"".join(tables.table_userdata(m) for m in answers if m.kind == tables.MSG_NEWTABLE)

    def any_table(self) -> bool:
        """Whether an earlier run has left its table or its guard."""
        return any(self.table_comment(name) is not None for name in TABLES)

    def refuse_foreign(self) -> None:
        """Raises OepyError where a table of our name is not ours."""
        for name in TABLES:
            try:
                comment = self.table_comment(name)
            except NetlinkRefused as refused:
                raise _not_usable(refused) from refused
            if comment is not None and COMMENT.encode() not in comment:
                raise OepyError(
                    f"there is an nftables table `inet {name}` that oepy did not make",
                    f"rename it, or remove it with `nft delete table inet {name}`",
                )

    def insert_queue_rules(self, table: str, queues: Iterable[tuple[str, int, bool]]) -> str:
        """`queues`: chain, number, and whether packets pass while nobody reads it. By nftables' own expression
        or, where the kernel lacks it, by the xt target. Returns which."""
        wanted = tuple(queues)
        for native in (True, False):
            try:
                self.transaction(
                    tables.insert_queue_rule(table, chain, number, bypass=bypass, native=native)
                    for chain, number, bypass in wanted
                )
            except NetlinkRefused as refused:
                if not (native and refused.errno in _UNKNOWN):
                    raise _not_usable(refused) from refused
            else:
                return "native" if native else "xt"
        raise AssertionError("both ways returned or raised")


def _not_usable(refused: NetlinkRefused) -> OepyError:
    if refused.errno == errno.EPERM:
        return OepyError("not permitted to change the packet filter", "run as root (CAP_NET_ADMIN)")
    return OepyError(
        f"this kernel cannot queue packets to us ({refused})",
        "it needs nft_queue, or nft_compat with xt_NFQUEUE (modprobe nft_queue)",
    )


class QueueSocket:
    """The packets' queues, and the verdicts back."""

    def __init__(self, numbers: Sequence[int], max_length: int) -> None:
        self._socket = open_socket()
        try:
            _force(self._socket, _SO_RCVBUFFORCE, _QUEUE_BUFFER)
            _force(self._socket, _SO_SNDBUFFORCE, _QUEUE_BUFFER)
            self._socket.setsockopt(_SOL_NETLINK, _NETLINK_NO_ENOBUFS, 1)
            for number in numbers:
                self._bind(number, max_length)
        except BaseException:
            self._socket.close()
            raise
        self._socket.setblocking(False)

    def _bind(self, number: int, max_length: int) -> None:
        try:
            answers = exchange(self._socket, queue.bind(number) + queue.configure(number, max_length))
        except NetlinkRefused as refused:
            # EPERM: a queue of another socket; that we may use queues at all, _force has shown
            if refused.errno in (errno.EBUSY, errno.EPERM):
                raise OepyError(
                    f"packet queue {number} is taken", "stop the oepy that runs already (`oepy status`)"
                ) from refused
            raise _not_usable(refused) from refused
        # Rules of a run that was killed still queue: what comes in between the answers must not stay for ever
        early = [queue.parse_packet(answer) for answer in answers if answer.kind == queue.MSG_PACKET]
        self.send([queue.verdict(packet.queue, packet.id, queue.DROP) for packet in early])

    def fileno(self) -> int:
        return self._socket.fileno()

    def receive(self) -> bytes | None:
        """The next datagram, None for none."""
        try:
            return self._socket.recv(_MESSAGE_BUFFER)
        except BlockingIOError:
            return None

    def send(self, verdicts: Sequence[bytes]) -> None:
        """All of them in one system call for each hundred or so."""
        for start in range(0, len(verdicts), 256):
            self._socket.send(b"".join(verdicts[start : start + 256]))

    def close(self) -> None:
        """The kernel drops whatever is still held."""
        self._socket.close()
