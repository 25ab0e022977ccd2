"""What the daemon's own UDP sockets need beside the kernel's IPsec."""

from __future__ import annotations

import errno
import socket

from oepy.errors import OepyError
from oepy.model import IpNetwork
from oepy.udp import UdpSocket
from oepy.xfrm import requests
from oepy.xfrm import values as v

_IP_XFRM_POLICY, _IPV6_XFRM_POLICY = 17, 35
_UDP_ENCAP, _UDP_ENCAP_ESPINUDP = 100, 2
_NETWORKS: dict[int, IpNetwork] = {4: v.ANY_NETWORK, 6: v.ANY_NETWORK_6}


def bypass(sock: UdpSocket) -> None:
    """No policy of the host holds for this socket, in either direction: IKE must pass where nothing else may.
    Raises OepyError."""
    level, option = (
        (socket.IPPROTO_IP, _IP_XFRM_POLICY)
        if sock.version == 4
        else (socket.IPPROTO_IPV6, _IPV6_XFRM_POLICY)
    )
    everything = v.Selector(_NETWORKS[sock.version], _NETWORKS[sock.version])
    for direction in (v.PolicyDirection.IN, v.PolicyDirection.OUT):
        policy = v.Policy(direction, everything)
        try:
            sock.socket.setsockopt(level, option, requests.policy_info(policy))
        except OSError as error:
            mend = "run as root (CAP_NET_ADMIN)" if error.errno == errno.EPERM else "use `datapath: tun`"
            raise OepyError(f"IKE cannot bypass the kernel's IPsec: {error.strerror}", mend) from error


def decapsulate(sock: UdpSocket) -> None:
    """The kernel takes ESP out of this socket's datagrams (RFC 3948) and leaves us IKE. Raises OepyError."""
    try:
        sock.socket.setsockopt(socket.IPPROTO_UDP, _UDP_ENCAP, _UDP_ENCAP_ESPINUDP)
    except OSError as error:
        raise OepyError(
            f"this kernel takes no ESP in UDP over IPv{sock.version}: {error.strerror}",
            "it needs CONFIG_XFRM; or use `datapath: tun`",
        ) from error
