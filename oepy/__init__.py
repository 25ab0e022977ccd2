"""Opportunistic encryption for IP, in Python."""

__version__ = "0.1.0"
