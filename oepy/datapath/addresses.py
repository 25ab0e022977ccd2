"""Addresses that a peer gave this host: on the tunnel's device, with routes that choose them as sources.

A table of its own is asked before the main one, by everything but the daemon's own packets: its routes lead to
the tunnel's device and name the source. Protection does not hang on it: the trap marks what goes into the tunnel,
and the mark decides.
"""

from __future__ import annotations

import asyncio
import errno
import functools
import socket
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from ipaddress import ip_address
from typing import Any

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from oepy.datapath.routes import DUMMY_ADDRESS, PROTOCOL, netlink, without_absent
from oepy.errors import OepyError
from oepy.model import MARK_MASK, MARK_OWN, IpAddress, IpNetwork

TABLE = 17735
RULE_PRIORITY = 1774  # after the marks', before the main table's
_FIB_RULE_INVERT = 0x2
_IFA_F_NODAD = 0x02
_FAMILY = {4: socket.AF_INET, 6: socket.AF_INET6}


class DeviceAddresses:
    """Implements `interfaces.HostAddresses` on the datapath's device, which belongs to oepy alone: an address there
    that is not one of these is a leftover."""

    def __init__(self, device: str) -> None:
        self.device = device

    async def apply(self, addresses: Collection[IpAddress], routes: Mapping[IpNetwork, IpAddress]) -> None:
        """Only the difference to what is there; also what somebody else took away comes back. Raises OepyError."""
        # pyroute2 has an event loop of its own, and wants a thread where none is running
        work = functools.partial(_apply, self.device, set(addresses), dict(routes))
        with ThreadPoolExecutor(1) as thread:
            await asyncio.get_running_loop().run_in_executor(thread, work)


def _apply(device: str, addresses: set[IpAddress], routes: dict[IpNetwork, IpAddress]) -> None:
    with netlink() as route:
        index = next(iter(route.link_lookup(ifname=device)), 0)
        if not index and addresses:
            raise OepyError(f"there is no device {device} for {', '.join(map(str, addresses))}")
        present = _addresses_of(route, index) if index else set()
        for address in addresses - present:
            flags: dict[str, Any] = {"flags": _IFA_F_NODAD} if address.version == 6 else {}
            route.addr("replace", index=index, address=str(address), prefixlen=address.max_prefixlen, **flags)
        for version, family in _FAMILY.items():
            wanted = {net: source for net, source in routes.items() if net.version == version}
            _settle_family(route, family, index, wanted)
        for address in present - addresses:
            without_absent(
                route.addr, "del", index=index, address=str(address), prefixlen=address.max_prefixlen
            )


def _settle_family(route: IPRoute, family: int, index: int, wanted: dict[IpNetwork, IpAddress]) -> None:
    there = _routes_of(route, family)
    for gone in there.keys() - {str(network) for network in wanted}:
        without_absent(route.route, "del", family=family, table=TABLE, proto=PROTOCOL, dst=gone)
    for network, source in wanted.items():
        if there.get(str(network)) != (str(source), index):
            route.route(
                "replace",
                family=family,
                table=TABLE,
                proto=PROTOCOL,
                dst=str(network),
                oif=index,
                prefsrc=str(source),
            )
    rule = {
        "family": family,
        "priority": RULE_PRIORITY,
        "table": TABLE,
        "fwmark": MARK_OWN,
        "fwmask": MARK_MASK,
        "flags": _FIB_RULE_INVERT,
        "protocol": PROTOCOL,
    }
    stands = _has_rule(route, family)
    if wanted and not stands:
        route.rule("add", **rule)
    elif stands and not wanted:
        without_absent(route.rule, "del", **rule)


def _has_rule(route: IPRoute, family: int) -> bool:
    try:
        return any(
            rule.get_attr("FRA_PROTOCOL") == PROTOCOL and rule.get_attr("FRA_TABLE") == TABLE
            for rule in route.get_rules(family=family)
        )
    except NetlinkError as error:
        if error.code not in (errno.EAFNOSUPPORT, errno.EOPNOTSUPP):
            raise
        return False  # no IPv6 here


def _routes_of(route: IPRoute, family: int) -> dict[str, tuple[str, int]]:
    """Source and device by destination."""
    found = {}
    for item in route.get_routes(family=family, table=TABLE):
        if item["proto"] == PROTOCOL:
            default = "0.0.0.0" if family == socket.AF_INET else "::"  # noqa: S104 - no socket is bound to it
            network = f"{item.get_attr('RTA_DST') or default}/{item['dst_len']}"
            found[network] = (item.get_attr("RTA_PREFSRC") or "", item.get_attr("RTA_OIF") or 0)
    return found


def _addresses_of(route: IPRoute, index: int) -> set[IpAddress]:
    found = set()
    for item in route.get_addr(index=index):
        address = ip_address(item.get_attr("IFA_LOCAL") or item.get_attr("IFA_ADDRESS"))
        if not address.is_link_local and str(address) != DUMMY_ADDRESS:
            found.add(address)
    return found
