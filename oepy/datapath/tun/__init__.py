"""The userland datapath: ESP between a TUN device and UDP sockets, in a process of its own."""

from oepy.datapath.tun.datapath import TunDatapath

__all__ = ["TunDatapath"]
