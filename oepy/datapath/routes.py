"""How marked packets get into the tunnel: a table of their own, chosen by the mark.

The table ends in `unreachable default`: where the device is gone, marked packets are refused and never leave
in the clear. All rules and routes carry our protocol number, by which leftovers of an earlier run are
recognised; nothing else is ever touched.
"""

from __future__ import annotations

import contextlib
import errno
import socket
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from oepy.errors import OepyError
from oepy.model import MARK_MASK, MARK_PRIVATE, MAX_USERLAND_MARKS, Mark

# 1500 on the wire - 40 outer IPv6 - 8 UDP - 8 ESP header - 16 CBC IV - 32 ICV of HMAC-SHA2-512 = 1396 for
# payload and trailer; CBC rounds to blocks of 16: 1392; less the trailer's 2. Over IPv4, and with an AEAD,
# the packet stays below 1500 with room to spare.
TUNNEL_MTU = 1390

TABLE = 17733
# Of marks of connections, each with a device of its own; their rules come before the one for all
MARK_TABLES = range(17740, 17740 + MAX_USERLAND_MARKS)
RULE_PRIORITY = 1773
_PRIVATE = Mark(MARK_PRIVATE, MARK_MASK)
# With rp_filter in loose mode the kernel refuses whatever comes in by a device without any IPv4 address
# (fib_validate_source). So it gets the dummy address of RFC 7600 §4.8, in scope host: never a source.
DUMMY_ADDRESS = "192.0.0.8"
PROTOCOL = 173  # rtnetlink's protocol number for our routes and rules; below 256, not in rt_protos
_SCOPE_HOST = 254
_METRIC_DEVICE = 100
_METRIC_UNREACHABLE = 4_000_000
_FAMILIES = (socket.AF_INET, socket.AF_INET6)
# Documentation's addresses (RFC 5737, RFC 3849): nobody has a route of their own for them
_PROBE: dict[int, str] = {socket.AF_INET: "192.0.2.1", socket.AF_INET6: "2001:db8::1"}
_UNREACHABLE = frozenset((errno.EHOSTUNREACH, errno.ENETUNREACH))
_ABSENT = frozenset((errno.ENOENT, errno.ESRCH, errno.ENODEV, errno.EADDRNOTAVAIL))


@contextlib.contextmanager
def netlink() -> Iterator[IPRoute]:
    route = IPRoute()
    try:
        yield route
    except NetlinkError as error:
        if error.code == errno.EPERM:
            raise OepyError("not permitted to change routes", "run as root (CAP_NET_ADMIN)") from error
        raise OepyError(f"the kernel refused a route or rule: {error}") from error
    finally:
        route.close()


def _families(route: IPRoute) -> list[int]:
    """AF_INET, and AF_INET6 where the kernel has it."""
    found: list[int] = []
    for family in _FAMILIES:
        try:
            list(route.get_rules(family=family))
        except NetlinkError as error:
            if error.code not in (errno.EAFNOSUPPORT, errno.EOPNOTSUPP):
                raise
        else:
            found.append(family)
    return found


def without_absent(call: Any, *arguments: Any, **named: Any) -> None:
    """Take something away that may be gone already: an address, a route, a rule."""
    try:
        call(*arguments, **named)
    except NetlinkError as error:
        if error.code not in _ABSENT:
            raise


def _our_rules(route: IPRoute, family: int, tables: Collection[int]) -> list[Any]:
    return [
        rule
        for rule in route.get_rules(family=family)
        if rule.get_attr("FRA_PROTOCOL") == PROTOCOL and rule.get_attr("FRA_TABLE") in tables
    ]


def _settle(name: str) -> None:
    """The device's own sysctls: decrypted packets come from addresses that the main table routes elsewhere
    (rp_filter loose; the kernel takes the larger of this and `all`), and no IPv6 chatter of its own. IPv6
    ones are missing where the host has none."""
    settings = {
        f"ipv4/conf/{name}/rp_filter": "2",
        f"ipv4/conf/{name}/accept_redirects": "0",
        f"ipv4/conf/{name}/send_redirects": "0",
        f"ipv6/conf/{name}/autoconf": "0",
        f"ipv6/conf/{name}/accept_ra": "0",
        f"ipv6/conf/{name}/accept_redirects": "0",
        f"ipv6/conf/{name}/addr_gen_mode": "1",
        f"ipv6/conf/{name}/router_solicitations": "0",
    }
    for path, value in settings.items():
        file = Path("/proc/sys/net") / path
        if file.exists():
            file.write_text(value)


def with_private(mark: Mark | None) -> Mark:
    """What a packet has that goes through the tunnel of a child with this mark."""
    return _PRIVATE.joined(mark)


def set_up(device: str, mtu: int, mark: Mark | None = None, table: int = TABLE) -> None:
    """Bring the device up and lead marked packets to it, or only those with a connection's mark beside. Idempotent:
    what is right already stays, so that at no moment a marked packet finds the main table. Raises OepyError."""
    wanted = with_private(mark)
    _settle(device)
    with netlink() as route:
        index = route.link_lookup(ifname=device)[0]
        route.link("set", index=index, mtu=mtu, state="up", txqlen=1000)
        route.addr("replace", index=index, address=DUMMY_ADDRESS, prefixlen=32, scope=_SCOPE_HOST)
        for family in _families(route):
            common = {"family": family, "table": table, "proto": PROTOCOL}
            route.route("replace", dst="default", type="unreachable", priority=_METRIC_UNREACHABLE, **common)
            route.route("replace", dst="default", oif=index, priority=_METRIC_DEVICE, **common)
            if not _our_rules(route, family, (table,)):
                route.rule(
                    "add",
                    family=family,
                    priority=RULE_PRIORITY - (mark is not None),
                    table=table,
                    fwmark=wanted.value,
                    fwmask=wanted.mask,
                    protocol=PROTOCOL,
                )


def stand(device: str, mark: Mark | None = None) -> bool:
    """Whether a marked packet would go to the device, in every family: the kernel is asked for one route, as
    the host's whole table may be long. Raises OepyError."""
    with netlink() as route:
        index = next(iter(route.link_lookup(ifname=device)), 0)
        for family in _families(route):
            try:
                (found,) = route.route(
                    "get", family=family, dst=_PROBE[family], mark=with_private(mark).value
                )
            except NetlinkError as error:
                if error.code not in _UNREACHABLE:
                    raise
                return False
            if found.get_attr("RTA_OIF") != index:
                return False
    return True


def tear_down(tables: Collection[int] = (TABLE, *MARK_TABLES)) -> None:
    """Remove our rules and routes of these tables. Only when nothing is marked for them any more."""
    with netlink() as route:
        for family in _families(route):
            used = {TABLE} & {*tables}
            for rule in _our_rules(route, family, tables):
                used.add(rule.get_attr("FRA_TABLE"))
                without_absent(
                    route.rule,
                    "del",
                    family=family,
                    priority=rule.get_attr("FRA_PRIORITY"),
                    table=rule.get_attr("FRA_TABLE"),
                    fwmark=rule.get_attr("FRA_FWMARK"),
                    fwmask=rule.get_attr("FRA_FWMASK"),
                    protocol=PROTOCOL,
                )
            for table in used:
                without_absent(route.flush_routes, family=family, table=table, proto=PROTOCOL)


def forget_marks() -> None:
    """Rules of connections' marks that an earlier run has left: the devices have gone with it, so that what has the
    marks would go nowhere."""
    tear_down(MARK_TABLES)
