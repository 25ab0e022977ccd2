"""Of the configuration what gives addresses to clients, and asks for them: `pools:`, `vips`; and names of PPKs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from ipaddress import ip_address

from oepy.connections.fields import Fields, Path, Problem, Refused, text_of
from oepy.connections.model import AddressPool, Connection, ConnectionSet
from oepy.leases import parse_range
from oepy.model import IpAddress
from oepy.policy import parse_prefix

MAX_POOLS = 1000
MAX_PPK_NAME = 255  # octets
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}\Z")
_DOMAIN = re.compile(r"[A-Za-z0-9_-]{1,63}(\.[A-Za-z0-9_-]{1,63})*\.?\Z")


def ppk_name(value: object) -> str:
    name = text_of(value)
    if not name or len(name.encode()) > MAX_PPK_NAME:
        raise Refused(f"{name[:60]!r}: the name of a PPK, {MAX_PPK_NAME} octets at most")
    return name


def virtual_address(value: object) -> IpAddress:
    text = text_of(value)
    try:
        return ip_address(text)
    except ValueError:
        raise Refused(f"{text[:60]!r}: an address, or 0.0.0.0 or :: for any that the peer gives") from None


def _domain(value: object) -> str:
    text = text_of(value)
    if len(text) > 253 or not _DOMAIN.match(text):
        raise Refused(f"{text[:60]!r} is no domain; write it like corp.example")
    return text.rstrip(".").lower()


def read_pools(value: object, problems: list[Problem]) -> tuple[AddressPool, ...]:
    if value is None:
        return ()
    if not isinstance(value, dict):
        problems.append(Problem(("pools",), "a mapping is expected: `clients: {addrs: 10.3.0.0/24}`"))
        return ()
    if len(value) > MAX_POOLS:
        problems.append(Problem(("pools",), f"{len(value)} pools; at most {MAX_POOLS}"))
    found = []
    for name, item in list(value.items())[:MAX_POOLS]:
        path: Path = ("pools", str(name)[:64])
        if not _NAME.match(str(name)):
            problems.append(Problem(path, "a name has letters, digits, `_`, `-` and `.`, 64 at most"))
            continue
        found.append(_pool(str(name), Fields(item, path, problems)))
    return tuple(found)


def _pool(name: str, fields: Fields) -> AddressPool:
    def addrs(value: object) -> str:
        parse_range(text_of(value))
        return text_of(value)

    missing = fields.right and fields.left.get("addrs") is None
    made = AddressPool(
        name,
        fields.take("addrs", "", addrs),
        fields.take_list("dns", (), lambda value: ip_address(text_of(value))),
        fields.take_list("subnet", (), lambda value: parse_prefix(text_of(value), "10.1.0.0/16")),
        fields.take_list("domain", (), _domain),
    )
    fields.finish()
    if missing:
        fields.wrong("addrs is missing: 10.3.0.0/24, or 10.3.0.10-10.3.0.99")
    return made


def missing_pools(configured: ConnectionSet) -> Iterator[Problem]:
    known = {pool.name for pool in configured.pools}
    for connection in configured.connections:
        for index, name in enumerate(connection.pools):
            if name not in known:
                text = f"there is no pool {name[:60]!r}; name it under `pools:`"
                yield Problem(("connections", connection.name, "pools", index), text)


def check_vips(connection: Connection, fields: Fields) -> None:
    """What asks for addresses has to begin, and its children have those as their side."""
    if not connection.vips:
        return
    families = [address.version for address in connection.vips]
    if len(families) != len(set(families)):
        fields.wrong("one address of each family", "vips")
    if not connection.initiates:
        fields.wrong("whoever asks for an address begins: name the peer in remote_addrs", "vips")
    for child in connection.children:
        dynamic = [selector for selector in child.local_ts if selector.network is None]
        path = ("children", child.name)
        if dynamic and (len(child.local_ts) > 1 or dynamic[0].protocol):
            text = "with vips, local_ts is `dynamic` alone (the addresses that we get), or prefixes"
            fields.wrong(text, *path, "local_ts")
        if child.trap and not child.start:
            text = "with vips, the address has to be there before the first packet: start, or trap|start"
            fields.wrong(text, *path, "start_action")
        if child.by_interface:
            text = (
                "with vips, what is assigned is on the tunnel's own device; leave if_id_in and if_id_out away"
            )
            fields.wrong(text, *path, "if_id_out" if child.if_id_out else "if_id_in")
        if child.marks.outward is not None:
            text = "with vips, routes choose the source of what goes there, whatever its mark; leave mark_out away"
            fields.wrong(text, *path, "mark_out")
        if child.mode == "transport":
            fields.wrong("transport mode is between outer addresses, and has no vips", *path, "mode")
