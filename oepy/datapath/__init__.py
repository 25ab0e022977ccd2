"""ESP: the userland datapath over TUN."""
