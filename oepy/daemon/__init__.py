"""Wires the rooms: one event loop, the sockets, the timers."""
