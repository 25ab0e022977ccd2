"""The tunnel's device: an XFRM interface. What is routed to it leaves by the SAs of its if_id or not at all, and
what such SAs have decrypted arrives from it."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from oepy.errors import OepyError
from oepy.model import XFRM_IF_ID

_KIND = "xfrm"
_MEND = "load the module xfrm_interface (modprobe xfrm_interface), or use `datapath: tun`"


@contextlib.contextmanager
def _netlink() -> Iterator[IPRoute]:
    route = IPRoute()
    try:
        yield route
    finally:
        route.close()


def _if_id_of(route: IPRoute, index: int) -> int:
    """0 for a device of another kind."""
    (link,) = route.get_links(index)
    info = link.get_attr("IFLA_LINKINFO")
    if info is None or info.get_attr("IFLA_INFO_KIND") != _KIND:
        return 0
    data = info.get_attr("IFLA_INFO_DATA")
    return int(data.get_attr("IFLA_XFRM_IF_ID") or 0) if data is not None else 0


def make(name: str, if_id: int = XFRM_IF_ID) -> None:
    """The device is there when this returns; one that an earlier run has left is taken over as it is, with its
    routes. Raises OepyError with the mend."""
    with _netlink() as route:
        index = next(iter(route.link_lookup(ifname=name)), 0)
        if index and _if_id_of(route, index) == if_id:
            return
        if index:
            raise OepyError(
                f"there is a device {name} that is not ours",
                f"stop the program that made it, `ip link delete {name}`, or choose another `device:`",
            )
        try:
            route.link("add", ifname=name, kind=_KIND, xfrm_if_id=if_id)
        except NetlinkError as error:
            raise _refused(name, error) from error


def remove(name: str, if_id: int = XFRM_IF_ID) -> None:
    """Of a device that is not ours, or not there: nothing."""
    with _netlink() as route:
        index = next(iter(route.link_lookup(ifname=name)), 0)
        if index and _if_id_of(route, index) == if_id:
            with contextlib.suppress(NetlinkError):
                route.link("del", index=index)


def _refused(name: str, error: NetlinkError) -> OepyError:
    if error.code == errno.EPERM:
        return OepyError(f"not permitted to make the device {name}", "run as root (CAP_NET_ADMIN)")
    if error.code == errno.EOPNOTSUPP:
        return OepyError("this kernel has no XFRM interfaces", _MEND)
    if error.code == errno.EEXIST:
        return OepyError(
            f"there is an XFRM interface with our if_id {XFRM_IF_ID} already",
            "`ip -d link show type xfrm` names it: delete it, or stop what uses it",
        )
    return OepyError(f"cannot make the device {name}: {os.strerror(error.code)}", _MEND)
