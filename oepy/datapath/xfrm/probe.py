"""What this kernel can: found out by trying, in the calling thread's network namespace."""

from __future__ import annotations

import os
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address

from oepy.datapath.xfrm import device
from oepy.errors import OepyError
from oepy.model import IpAddress, Secret
from oepy.xfrm import requests
from oepy.xfrm import values as v
from oepy.xfrm.algorithms import CIPHERS
from oepy.xfrm.ids import AUTOMATIC_REQIDS
from oepy.xfrm.socket import Xfrm, XfrmSocket, explained

# Documentation's addresses (RFC 5737, RFC 3849): no packet ever finds these SAs
_ENDS: dict[str, tuple[IpAddress, IpAddress]] = {
    "ESP over IPv4": (IPv4Address("192.0.2.1"), IPv4Address("192.0.2.2")),
    "ESP over IPv6": (IPv6Address("2001:db8::1"), IPv6Address("2001:db8::2")),
}
_SUITE = CIPHERS["aes256gcm16"]
_PROBE_IF_ID = AUTOMATIC_REQIDS[0]


@dataclass(frozen=True, slots=True)
class Trial:
    """`error` is None where it works."""

    what: str
    error: OepyError | None = None


@dataclass(frozen=True, slots=True)
class Abilities:
    esp: tuple[Trial, ...]  # of each family that the kernel has
    interface: Trial

    @property
    def missing(self) -> OepyError | None:
        """Why the kernel's ESP is not to be used; None where it is."""
        return next((trial.error for trial in self.esp if trial.error is not None), None)


def probe() -> Abilities:
    """Tries an SA of each family and an XFRM interface; each is removed at once. Never raises."""
    try:
        xfrm: Xfrm = XfrmSocket()
    except OepyError as error:
        return Abilities((Trial("ESP", error),), Trial("XFRM interface", error))
    try:
        trials = [Trial(what, _try_sa(xfrm, *ends)) for what, ends in _ENDS.items() if _has(ends[0])]
    finally:
        xfrm.close()
    return Abilities(tuple(trials), Trial("XFRM interface", _try_interface()))


def _has(address: IpAddress) -> bool:
    """Whether the kernel has this family at all."""
    return address.version == 4 or os.path.exists("/proc/sys/net/ipv6")


def _try_sa(xfrm: Xfrm, source: IpAddress, destination: IpAddress) -> OepyError | None:
    key = Secret(os.urandom(_SUITE.key + _SUITE.salt))
    sa = v.Sa(
        source,
        destination,
        256 + int.from_bytes(os.urandom(3), "big"),
        reqid=AUTOMATIC_REQIDS[0],
        aead=v.Algorithm(_SUITE.kernel, key, _SUITE.icv_bits),
        limits=v.Limits(hard_seconds=10),
        flags=v.SaFlag.AF_UNSPEC | v.SaFlag.ESN,
        replay=v.Replay(64),
    )
    (refused,) = xfrm.carry_out([requests.new_sa(sa)])
    if refused is not None:
        return explained(refused)
    xfrm.carry_out([requests.delete_sa(sa.id)])
    return None


def _try_interface() -> OepyError | None:
    name = f"oe-{os.urandom(4).hex()}"
    try:
        device.make(name, _PROBE_IF_ID)
    except OepyError as error:
        return error
    device.remove(name, _PROBE_IF_ID)
    return None
