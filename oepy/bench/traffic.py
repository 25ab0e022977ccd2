"""Sender and receiver of the benchmarks: `python -m oepy.bench.traffic send|receive JSON`, each in a namespace.

What is reported is what the receiver got. UDP runs in a closed loop: the receiver counts in a page that both
have mapped, and the sender keeps a window of packets on their way. So no queue overflows for long, and a slow
tunnel is not measured by how it copes with a flood. Whatever is lost leaves the window after a moment. Several
destinations have their turns in bursts, as flows have.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import socket
import sys
import time
from typing import Any

WINDOW = 400  # datagrams on their way: less than a TUN device's queue of 500
_BURST = 16
_LOST_SECONDS = 0.02  # without progress: what is missing is lost
_PAUSE_SECONDS = 0.0001
_TCP_CHUNK = 256 * 1024
_STOP = b"stop"
_COUNT = slice(0, 8)


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def send(job: dict[str, Any]) -> None:
    if job["kind"] == "tcp":
        _send_tcp(job)
    else:
        _send_udp(job)


def _send_tcp(job: dict[str, Any]) -> None:
    with socket.socket(_family(job["to"][0])) as sock:
        sock.settimeout(5.0)
        sock.connect((job["to"][0], job["port"]))
        chunk = os.urandom(_TCP_CHUNK)
        end = time.monotonic() + job["seconds"]
        while time.monotonic() < end:
            sock.sendall(chunk)


def _send_udp(job: dict[str, Any]) -> None:
    shared = mmap.mmap(job["page"], mmap.PAGESIZE)
    socks = []
    for address in job["to"]:
        sock = socket.socket(_family(address), socket.SOCK_DGRAM)
        sock.bind((job["source"], 0))
        sock.connect((address, job["port"]))
        socks.append(sock)
    payload = os.urandom(job["size"])
    sends = [sock.send for sock in socks]
    at, count, sent, written_off = 0, len(sends), 0, 0
    end = time.monotonic() + job["seconds"]
    while (now := time.monotonic()) < end:
        received = int.from_bytes(shared[_COUNT], sys.byteorder)
        moved = now
        while sent - received - written_off > WINDOW - _BURST:
            time.sleep(_PAUSE_SECONDS)
            fresh = int.from_bytes(shared[_COUNT], sys.byteorder)
            now = time.monotonic()
            if fresh != received:
                received, moved = fresh, now
            elif now - moved > _LOST_SECONDS:
                written_off = sent - received
        for _ in range(_BURST):
            try:
                sends[at](payload)
            except OSError:  # a full queue: as good as lost on the way
                continue
            sent += 1
        at = at + 1 if at + 1 < count else 0
    time.sleep(0.05)
    for _ in range(3):
        with contextlib.suppress(OSError):  # the first one was enough, and nobody listens any more
            sends[0](_STOP)
    print(json.dumps({"sent": sent}), flush=True)


def receive(job: dict[str, Any]) -> None:
    result = _receive_tcp(job) if job["kind"] == "tcp" else _receive_udp(job)
    print(json.dumps(result), flush=True)


def _receive_tcp(job: dict[str, Any]) -> dict[str, float]:
    with socket.create_server(("" if not job["source"] else job["source"], job["port"])) as server:
        print("ready", flush=True)
        server.settimeout(10.0)
        sock, _ = server.accept()
        buffer, total, begun = bytearray(1 << 20), 0, time.monotonic()
        while count := sock.recv_into(buffer):
            total += count
        return {"bytes": total, "packets": 0, "seconds": time.monotonic() - begun}


def _receive_udp(job: dict[str, Any]) -> dict[str, float]:
    shared = mmap.mmap(job["page"], mmap.PAGESIZE)
    shared[_COUNT] = bytes(8)
    with socket.socket(_family(job["to"][0]), socket.SOCK_DGRAM) as sock:
        sock.setsockopt(socket.SOL_SOCKET, 33, 8 << 20)  # SO_RCVBUFFORCE
        sock.bind(("", job["port"]))
        print("ready", flush=True)
        sock.settimeout(job["seconds"] + 5.0)
        buffer, packets, total, begun, last = bytearray(65_536), 0, 0, 0.0, 0.0
        sock.recv_into(buffer)
        begun = time.monotonic()
        sock.settimeout(1.0)
        try:
            while (count := sock.recv_into(buffer)) != len(_STOP):
                packets += 1
                total += count
                if not packets & 15:
                    shared[_COUNT] = packets.to_bytes(8, sys.byteorder)
                    last = time.monotonic()
        except TimeoutError:
            pass
        return {"bytes": total, "packets": packets, "seconds": max(last - begun, 1e-9)}


if __name__ == "__main__":
    {"send": send, "receive": receive}[sys.argv[1]](json.loads(sys.argv[2]))
