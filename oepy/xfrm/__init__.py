"""The kernel's IPsec over netlink (XFRM): values, their bytes, the sockets, and by what our entries are known.

Shared by the datapath, which puts SAs and their policies there, by the kernel's own trap, and by manual keying.
"""
