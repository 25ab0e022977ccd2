"""Encapsulating Security Payload (RFC 4303) without IO: packets in, packets out."""
