"""Addresses for clients, out of pools: who has which, also after a restart. No IO, no clock.

A client that comes again gets what it had before, as long as nobody else needs it; one that comes twice at the same
time (a reauthentication, the same name on two machines) has the one address twice. What is free longest goes first.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address

from oepy.errors import UsageError
from oepy.model import IpAddress, IpNetwork

MAX_REMEMBERED = 65_536  # clients of one pool, present and past
MAX_NAME = 512

_VERSION = 1


def parse_range(text: str) -> tuple[IpAddress, IpAddress]:
    """`10.3.0.0/24` (without network and broadcast address) or `10.3.0.10-10.3.0.99`. Raises UsageError."""
    try:
        if "-" in text:
            start, end = (ip_address(part.strip()) for part in text.split("-", 1))
        else:
            network = _network(text)
            start, end = network[0], network[-1]
            if network.num_addresses > 2:
                start, end = start + 1, end - 1 if network.version == 4 else end
    except ValueError as error:
        raise UsageError(f"address pool {text!r}: {error}") from None
    if start.version != end.version or int(start) > int(end):
        raise UsageError(f"address pool {text!r} runs backwards, or from one family into the other")
    return start, end


def _network(text: str) -> IpNetwork:
    return IPv6Network(text, strict=False) if ":" in text else IPv4Network(text, strict=False)


@dataclass
class Pool:
    """The addresses `start` to `end`, both included."""

    start: IpAddress
    end: IpAddress
    excluded: frozenset[IpAddress] = frozenset()  # the gateway's own, the servers'
    _held: dict[str, set[int]] = field(default_factory=dict)  # client → its sessions
    _of_session: dict[int, str] = field(default_factory=dict)
    _absent: OrderedDict[str, None] = field(default_factory=OrderedDict)  # away longest first
    _address_of: dict[str, int] = field(default_factory=dict)  # of present and past ones
    _client_at: dict[int, str] = field(default_factory=dict)
    _next: int = 0  # offset of the first address that nobody ever had

    @classmethod
    def of(cls, text: str, excluded: frozenset[IpAddress] = frozenset()) -> Pool:
        return cls(*parse_range(text), excluded)

    @property
    def size(self) -> int:
        return int(self.end) - int(self.start) + 1

    def acquire(self, client: str, session: int, wanted: IpAddress | None = None) -> IpAddress | None:
        """The client's address, for this session; None where the pool is used up. `wanted` is given where it is
        free or the client's own."""
        if len(client) > MAX_NAME or (client not in self._held and len(self._held) >= MAX_REMEMBERED):
            return None
        known = self._address_of.get(client)
        if client not in self._held:
            free = None if wanted is None else self._free(wanted)
            known = free if free is not None else known
        if known is None:
            known = self._unused()
        if known is None:
            return None
        self._assign(client, known)
        self._absent.pop(client, None)
        self._held.setdefault(client, set()).add(session)
        self._of_session[session] = client
        return self._address(known)

    def release(self, session: int) -> None:
        """The session has ended; unknown ones are ignored. The address stays the client's until it is needed."""
        client = self._of_session.pop(session, None)
        if client is None:
            return
        sessions = self._held[client]
        sessions.discard(session)
        if not sessions:
            del self._held[client]
            self._absent[client] = None

    def holders(self) -> dict[str, IpAddress]:
        """Present clients and their addresses."""
        return {client: self._address(self._address_of[client]) for client in self._held}

    # ---- after a restart ----

    def dump(self) -> str:
        """Text for `load`: who had which address, the one that has been away longest first."""
        leases = [
            [client, str(self._address(self._address_of[client]))] for client in (*self._absent, *self._held)
        ]
        return json.dumps({"version": _VERSION, "leases": leases})

    def load(self, text: str) -> int:
        """Take up what `dump` wrote; nobody is present. The number of leases taken; those outside of the pool, as
        after a change of configuration, are left out. Raises UsageError for a text that `dump` did not write."""
        try:
            document = json.loads(text)
            rows = [(str(client), ip_address(address)) for client, address in document["leases"]]
            if document["version"] != _VERSION or any(len(client) > MAX_NAME for client, _ in rows):
                raise ValueError
        except (ValueError, TypeError, KeyError):
            raise UsageError(
                "this is no list of leases", "remove the file: clients get new addresses"
            ) from None
        taken = 0
        for client, address in rows[-MAX_REMEMBERED:]:
            offset = self._free(address)
            if offset is not None and client not in self._address_of and offset not in self._client_at:
                self._assign(client, offset)
                self._absent[client] = None
                taken += 1
        return taken

    # ---- within ----

    def _address(self, offset: int) -> IpAddress:
        kind = IPv4Address if self.start.version == 4 else IPv6Address
        return kind(int(self.start) + offset)

    def _free(self, address: IpAddress) -> int | None:
        """The offset of an address that is in the pool and nobody present has."""
        if address.version != self.start.version or not int(self.start) <= int(address) <= int(self.end):
            return None
        offset = int(address) - int(self.start)
        if address in self.excluded or self._client_at.get(offset) in self._held:
            return None
        return offset

    def _unused(self) -> int | None:
        """One that nobody ever had, else that of the client which has been away longest."""
        if len(self._address_of) < MAX_REMEMBERED:
            while self._next < self.size:
                offset = self._next
                self._next += 1
                if offset not in self._client_at and self._address(offset) not in self.excluded:
                    return offset
        oldest = next(iter(self._absent), None)
        return None if oldest is None else self._address_of[oldest]

    def _assign(self, client: str, offset: int) -> None:
        before = self._client_at.get(offset)
        if before is not None and before != client:
            self._address_of.pop(before, None)
            self._absent.pop(before, None)
        had = self._address_of.pop(client, None)
        if had is not None and had != offset:
            del self._client_at[had]
            self._next = min(self._next, had)
        self._address_of[client] = offset
        self._client_at[offset] = client
