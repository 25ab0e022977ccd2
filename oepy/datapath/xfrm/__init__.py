"""The kernel's own ESP and AH: SAs and policies over an XFRM netlink socket."""
