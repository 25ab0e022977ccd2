"""ESP: the userland datapath over TUN."""

from oepy.datapath.tun.datapath import TunDatapath

__all__ = ["TunDatapath"]
