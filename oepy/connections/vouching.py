"""Opportunistic encryption by certificates: `identity.certs` and `policy.certificates`, read as one connection."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from oepy.connections.model import ANY, Connection, ConnectionSet, IdPattern, LocalAuth, RemoteAuth
from oepy.errors import OepyError
from oepy.manual.reading import Problem
from oepy.model import IdType, PeerIdentity, PublicKey

if TYPE_CHECKING:
    from oepy.x509.certificates import Certificate

NAME = "opportunistic"
MAX_CERTIFIED_PEERS = 10_000


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the configuration says. `certs` are shown to peers that ask; `cacerts` vouch for others."""

    identity: PeerIdentity | None
    certs: Sequence[str]
    cacerts: Sequence[str]
    revocation: str


@dataclass(frozen=True, slots=True)
class Files:
    """Each raises OepyError."""

    load: Callable[[str], tuple[str, tuple[Certificate, ...]]]  # where a file is, and what is in it
    host_key: Callable[[], PublicKey]
    key_of: Callable[[Certificate], PublicKey]
    identities: Callable[[Certificate], list[PeerIdentity]]


@dataclass(slots=True)
class _Reading:
    files: Files
    read: dict[str, tuple[Certificate, ...]] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def all_of(self, names: Sequence[str], path: tuple[str, ...]) -> tuple[str, ...]:
        found = []
        for index, name in enumerate(names):
            try:
                file, self.read[file] = self.files.load(name)
                found.append(file)
            except OepyError as error:
                self.problems.append(Problem((*path, index), str(error)))
        return tuple(found)


def add_vouching(
    connections: ConnectionSet, wanted: Wanted, files: Files
) -> tuple[ConnectionSet, list[Problem]]:
    """The same, with what opportunistic peers are shown and trusted by."""
    reading = _Reading(files)
    certs = reading.all_of(wanted.certs, ("identity", "certs"))
    cacerts = reading.all_of(wanted.cacerts, ("policy", "certificates", "cacerts"))
    if certs and not reading.problems:
        reading.problems += _own_problems(wanted.identity, reading.read[certs[0]][0], files)
    vouching = Connection(
        NAME,
        LocalAuth("x509", wanted.identity, certs=certs),
        RemoteAuth("x509", IdPattern(ANY), cacerts=cacerts, revocation=wanted.revocation),
        children=(),
        send_cert="unproven",  # libreswan does not ask, and could not know us otherwise
    )
    certificates: Mapping[str, tuple[Certificate, ...]] = {**connections.certificates, **reading.read}
    return replace(connections, certificates=certificates, vouching=vouching), reading.problems


def _own_problems(identity: PeerIdentity | None, own: Certificate, files: Files) -> list[Problem]:
    place = ("identity", "certs", 0)
    problems = []
    try:
        if files.key_of(own) != files.host_key():
            mend = "name its key in identity.key, or have a certificate made for this one"
            problems.append(
                Problem(place, f"the first certificate is of another key than identity.key; {mend}")
            )
    except OepyError as error:
        problems.append(Problem(place, f"the certificate's key is not there: {error}"))
    speaks = files.identities(own)
    names = ", ".join(map(str, speaks[:4]))
    if identity is None and not any(name.as_address() is not None for name in speaks):
        named = next((str(name) for name in speaks if name.type is IdType.FQDN), names)
        text = f"it speaks for {names}, and this host shows its address: set identity.id to {named}"
        problems.append(Problem(place, text))
    elif identity is not None and not any(identity.same_as(name) for name in speaks):
        problems.append(
            Problem(place, f"it speaks for {names}, not for identity.id {identity}; they must agree")
        )
    return problems


__all__ = ["MAX_CERTIFIED_PEERS", "Files", "Wanted", "add_vouching"]
