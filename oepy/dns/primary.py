"""One connection to an authoritative server: questions, and updates (RFC 2136), over TCP, signed with TSIG.

Many messages are under way at once (RFC 7766 §6.2.1.1). With a key, an answer counts only when its TSIG is right.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import socket
from collections.abc import Sequence

import dns.exception
import dns.flags
import dns.message
import dns.name
import dns.rcode
import dns.rdata
import dns.rdataclass
import dns.rdatatype
import dns.tsig
import dns.update

from oepy.dns.publish import CNAME, KINDS, Change, Found, FoundSet, Wanted, ancestors
from oepy.dns.sockets import open_socket
from oepy.errors import OepyError
from oepy.model import IpAddress

CONNECT_SECONDS = 5.0
ANSWER_SECONDS = 20.0  # without any answer; a primary that signs as it goes takes its time
MAX_UNDERWAY = 64

Message = dns.message.Message


class ServerError(OepyError):
    """A server that cannot be asked, or that refuses."""


class StaleError(Exception):
    """A prerequisite failed: the zone changed since it was read. Nothing was changed: read and plan anew."""


class LostError(ServerError):
    """The connection broke: what was under way may or may not have been done."""


class Server:
    """An authoritative server. One task at a time may use it; `close` it at the end."""

    def __init__(self, address: IpAddress, port: int, key: dns.tsig.Key | None, mark: int = 0) -> None:
        self.address, self.port = address, port
        self._key = key
        self._mark = mark
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    def __str__(self) -> str:
        return f"{self.address}" if self.port == 53 else f"{self.address} port {self.port}"

    async def close(self) -> None:
        streams, self._streams = self._streams, None
        if streams is not None:
            streams[1].close()
            with contextlib.suppress(OSError):
                await streams[1].wait_closed()

    # ---- what is asked -----------------------------------------------------------------------------------

    async def ask(self, questions: Sequence[tuple[dns.name.Name, int]]) -> list[Message | str]:
        """An answer to each question, in order; a text in place of one that cannot be read. Raises ServerError."""
        queries: list[Message] = []
        for name, rdtype in questions:
            queries.append(dns.message.make_query(name, dns.rdatatype.RdataType.make(rdtype), flags=0))
        try:
            return await self._exchange(queries)
        except LostError:  # servers close idle connections; to ask again does no harm
            return await self._exchange(queries)

    async def soa(self, zone: dns.name.Name) -> tuple[int, int]:
        """Serial and negative TTL (RFC 2308 §5, in seconds). Raises ServerError where it lacks the zone."""
        (answer,) = await self.ask([(zone, int(dns.rdatatype.SOA))])
        if isinstance(answer, str):
            raise ServerError(f"{self}: {answer}")
        rrset = next((r for r in answer.answer if r.rdtype == dns.rdatatype.SOA and r.name == zone), None)
        if answer.rcode() != dns.rcode.NOERROR or rrset is None or not answer.flags & dns.flags.AA:
            raise self.refusal(zone, dns.rcode.to_text(answer.rcode()) if answer.rcode() else "no authority")
        return int(rrset[0].serial), min(int(rrset.ttl), int(rrset[0].minimum))

    async def find(self, owners: Sequence[dns.name.Name]) -> list[Found]:
        """The key records at these names, in order. Raises ServerError."""
        answers = await self.ask([(owner, kind) for owner in owners for kind in KINDS])
        step = len(KINDS)
        return [self._found(owner, answers[at * step : (at + 1) * step]) for at, owner in enumerate(owners)]

    def _found(self, owner: dns.name.Name, answers: Sequence[Message | str]) -> Found:
        sets: dict[int, FoundSet] = {}
        for kind, answer in zip(KINDS, answers, strict=True):
            if isinstance(answer, str):
                return Found(unreadable=answer)
            if answer.rcode() not in (dns.rcode.NOERROR, dns.rcode.NXDOMAIN):
                return Found(unreadable=f"{self} answers {dns.rcode.to_text(answer.rcode())}")
            if not answer.flags & dns.flags.AA:
                return Found(unreadable=f"{self} does not have the zone of this name (it is delegated away)")
            for rrset in answer.answer:
                if rrset.name == owner and rrset.rdtype == CNAME:
                    return Found(alias=rrset[0].target)
                if rrset.name == owner and rrset.rdtype == kind:
                    sets[kind] = FoundSet(
                        int(rrset.ttl), frozenset(rdata.to_wire() or b"" for rdata in rrset)
                    )
        return Found(sets)

    async def update(self, zone: dns.name.Name, changes: Sequence[Change], *, unread: bool = False) -> None:
        """All changes or none (RFC 2136 §3.7). `unread`: planned on the assumption that there are no key records at
        these names, which the message then demands. Raises StaleError, LostError, ServerError."""
        await self._send_update(zone, build_first(zone, changes) if unread else build_update(zone, changes))

    async def demand(self, wanted: Sequence[Wanted]) -> None:
        """Nothing is changed; StaleError unless each name has exactly the key records wanted (their TTL does not
        count, RFC 2136 §2.4.2). Raises LostError, ServerError."""
        await self._send_update(wanted[0].zone, build_demand(wanted))

    async def _send_update(self, zone: dns.name.Name, message: dns.update.UpdateMessage) -> None:
        (answer,) = await self._exchange([message])
        if isinstance(answer, str):
            raise ServerError(f"{self}: {answer}")
        rcode = answer.rcode()
        if rcode in (dns.rcode.NXRRSET, dns.rcode.YXRRSET, dns.rcode.NXDOMAIN, dns.rcode.YXDOMAIN):
            raise StaleError(dns.rcode.to_text(rcode))
        if rcode != dns.rcode.NOERROR:
            raise self.refusal(zone, dns.rcode.to_text(rcode))

    def refusal(self, zone: dns.name.Name, rcode: str) -> ServerError:
        mend = _MENDS.get(rcode, "its log says more").format(
            zone=zone, key=self._key.name if self._key else ""
        )
        return ServerError(f"{self} answers {rcode} for the zone {zone}", mend)

    # ---- the wire ----------------------------------------------------------------------------------------

    async def _exchange(self, messages: Sequence[Message]) -> list[Message | str]:
        for identifier, message in enumerate(messages, secrets.randbelow(0x8000)):
            message.id = identifier & 0xFFFF
            if self._key is not None:
                message.use_tsig(self._key)
        waiting = {message.id: at for at, message in enumerate(messages)}
        results: list[Message | str] = [""] * len(messages)
        slots = asyncio.Semaphore(MAX_UNDERWAY)
        reader, writer = await self._open()

        async def send() -> None:
            for message in messages:
                await slots.acquire()
                wire = message.to_wire(max_size=65535)
                writer.write(len(wire).to_bytes(2, "big") + wire)
                await writer.drain()

        sender = asyncio.create_task(send())
        try:
            while waiting:
                async with asyncio.timeout(ANSWER_SECONDS):
                    wire = await reader.readexactly(int.from_bytes(await reader.readexactly(2), "big"))
                at = waiting.pop(int.from_bytes(wire[:2], "big"), None)
                if at is None:
                    raise ServerError(f"{self} answers what was not asked")
                results[at] = self._read(wire, messages[at])
                slots.release()
        except TimeoutError:
            await self.close()
            raise LostError(f"{self} does not answer", "is it busy? run the command again") from None
        except (OSError, asyncio.IncompleteReadError):
            await self.close()
            raise LostError(f"{self} closed the connection", "run the command again") from None
        except BaseException:
            await self.close()
            raise
        finally:
            sender.cancel()
            with contextlib.suppress(asyncio.CancelledError, OSError):
                await sender
        return results

    def _read(self, wire: bytes, query: Message) -> Message | str:
        """A text where the answer is right but holds what cannot be read. Raises ServerError for a wrong TSIG."""
        try:
            answer = dns.message.from_wire(wire, keyring=self._key or False, request_mac=query.mac)
        except (dns.tsig.PeerBadKey, dns.message.UnknownTSIGKey):
            raise ServerError(
                f"{self} does not know the TSIG key", f"add it there: {self._key_name}"
            ) from None
        except dns.tsig.PeerBadTime:
            raise ServerError(f"{self} and this host do not agree on the time", "set both clocks") from None
        except (dns.tsig.PeerError, dns.tsig.BadSignature, dns.tsig.BadKey, dns.tsig.BadAlgorithm):
            raise ServerError(
                f"the TSIG of {self} is wrong", f"compare the secret of {self._key_name}"
            ) from None
        except dns.tsig.BadTime:
            raise ServerError(f"the TSIG of {self} is of another time", "set both clocks") from None
        except (dns.exception.DNSException, ValueError, OverflowError) as error:
            return f"{self} answers what cannot be read ({type(error).__name__})"
        if self._key is not None and not answer.had_tsig:
            rcode = dns.rcode.to_text(answer.rcode())
            raise ServerError(
                f"{self} answers {rcode} without TSIG", f"does it know the key {self._key_name}?"
            )
        if not query.is_response(answer):
            raise ServerError(f"{self} answers another question")
        return answer

    @property
    def _key_name(self) -> str:
        return str(self._key.name) if self._key else "(none)"

    async def _open(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if self._streams is not None and not self._streams[0].at_eof():
            return self._streams
        channel = open_socket(self.address, socket.SOCK_STREAM, self._mark)
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                await asyncio.get_running_loop().sock_connect(channel, (str(self.address), self.port))
        except (OSError, TimeoutError) as error:
            channel.close()
            reason = getattr(error, "strerror", None) or "no answer"
            raise ServerError(
                f"cannot reach {self} over TCP ({reason})", "give --server and --port"
            ) from None
        self._streams = await asyncio.open_connection(sock=channel)
        return self._streams


_MENDS = {
    "NOTAUTH": "give its primary server with --server, and check that it knows the TSIG key",
    "REFUSED": "allow the key {key} there: in BIND `update-policy {{ grant {key} zonesub IPSECKEY TXT; }};`",
    "NOTZONE": "a name lies outside of this zone: check the zones",
    "NOTIMP": "it takes no updates: give its primary server with --server",
    "SERVFAIL": "its log says why (often: it cannot write its journal, or the zone is frozen)",
    "FORMERR": "it cannot read the update: its log says more",
    "no authority": "give the zone's primary server with --server",
    "NXDOMAIN": "give the zone's primary server with --server",
}


def build_update(zone: dns.name.Name, changes: Sequence[Change]) -> dns.update.UpdateMessage:
    """The message of RFC 2136: prerequisites (§2.4.2, §2.4.3), then for each RRset what goes and what comes."""
    message = dns.update.UpdateMessage(zone)
    for change in changes:
        message.absent(change.owner, dns.rdatatype.CNAME)
        for rrset in change.sets:
            if rrset.before is None:
                message.absent(change.owner, dns.rdatatype.RdataType.make(rrset.type))
            else:
                message.present(change.owner, *_rdatas(rrset.type, sorted(rrset.before.data)))
            for rdata in _rdatas(rrset.type, rrset.removed):
                message.delete(change.owner, rdata)
            if rrset.added:
                message.add(change.owner, rrset.ttl, *_rdatas(rrset.type, rrset.added))
    return message


def build_first(zone: dns.name.Name, changes: Sequence[Change]) -> dns.update.UpdateMessage:
    """An update of names that nobody has read: they must have no key records, and be in this very zone."""
    message = dns.update.UpdateMessage(zone)
    _demand_place(message, zone, [change.owner for change in changes])
    for change in changes:
        for kind in KINDS:
            message.absent(change.owner, dns.rdatatype.RdataType.make(kind))
        for rrset in change.sets:
            message.add(change.owner, rrset.ttl, *_rdatas(rrset.type, rrset.added))
    return message


def build_demand(wanted: Sequence[Wanted]) -> dns.update.UpdateMessage:
    """Prerequisites alone: a question about many names in one message."""
    zone = wanted[0].zone
    message = dns.update.UpdateMessage(zone)
    _demand_place(message, zone, [one.owner for one in wanted])
    for one in wanted:
        for kind in KINDS:
            datas = sorted(record.data for record in one.records if record.type == kind)
            if datas:
                message.present(one.owner, *_rdatas(kind, datas))
            else:
                message.absent(one.owner, dns.rdatatype.RdataType.make(kind))
    return message


def _demand_place(
    message: dns.update.UpdateMessage, zone: dns.name.Name, owners: Sequence[dns.name.Name]
) -> None:
    """No alias, and no delegation at the names or above them: records below one would be in another zone."""
    for owner in owners:
        message.absent(owner, dns.rdatatype.CNAME)
    for name in (*ancestors(owners, zone), *(owner for owner in owners if owner != zone)):
        message.absent(name, dns.rdatatype.NS)


def _rdatas(kind: int, datas: Sequence[bytes]) -> list[dns.rdata.Rdata]:
    rdtype = dns.rdatatype.RdataType.make(kind)
    return [dns.rdata.GenericRdata(dns.rdataclass.IN, rdtype, data) for data in datas]
