"""IKEv2 without IO: bytes and time in, bytes and events out."""
