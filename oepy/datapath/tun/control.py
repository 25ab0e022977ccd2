"""What the daemon and the datapath process say to each other, over two Unix sequential-packet sockets.

control: one JSON object a packet. Requests carry `id` and `op`, answers the same `id` and `result` or
    `error`; what has no `id` is an event. Keys travel here and nowhere else.
ike: one IKE message a packet with the endpoints it came between, process → daemon only.
"""

from __future__ import annotations

import base64
import dataclasses
import json
import struct
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Any

from oepy.errors import ParseError
from oepy.interfaces import DatapathEvent
from oepy.model import (
    Authenticated,
    Copied,
    Endpoint,
    EspSuite,
    IdType,
    Lifetime,
    Mark,
    Marks,
    PeerIdentity,
    SaCounters,
    SaKeys,
    SaPair,
    Secret,
    TrafficSelector,
)

MAX_MESSAGE = 256 * 1024
SPIS_PER_ANSWER = 500  # counters are asked for in slices, so that no answer outgrows MAX_MESSAGE

_IKE_HEADER = struct.Struct("!B16sH16sH")

Json = dict[str, Any]


def encode(message: Json) -> bytes:
    """Raises ValueError beyond MAX_MESSAGE."""
    data = json.dumps(message, separators=(",", ":")).encode()
    if len(data) > MAX_MESSAGE:
        raise ValueError(f"control message of {len(data)} bytes")
    return data


def decode(data: bytes) -> Json:
    """Raises ParseError."""
    try:
        message = json.loads(data)
    except ValueError as error:
        raise ParseError("control message is no JSON") from error
    if not isinstance(message, dict):
        raise ParseError("control message is no object")
    return message


# -- SA pairs --------------------------------------------------------------------------------------------


def _encode_endpoint(endpoint: Endpoint) -> list[Any]:
    return [str(endpoint.address), endpoint.port]


def _encode_keys(keys: SaKeys) -> list[str]:
    return [base64.b64encode(secret.reveal()).decode() for secret in (keys.encryption, keys.integrity)]


def _encode_selectors(selectors: tuple[TrafficSelector, ...]) -> list[list[Any]]:
    return [[str(ts.start), str(ts.end), ts.protocol, ts.start_port, ts.end_port] for ts in selectors]


def encode_pair(pair: SaPair) -> Json:
    return {
        "spi_in": pair.spi_in,
        "spi_out": pair.spi_out,
        "local": _encode_endpoint(pair.local),
        "remote": _encode_endpoint(pair.remote),
        "suite": dataclasses.astuple(pair.suite),
        "keys_in": _encode_keys(pair.keys_in),
        "keys_out": _encode_keys(pair.keys_out),
        "local_ts": _encode_selectors(pair.local_ts),
        "remote_ts": _encode_selectors(pair.remote_ts),
        "authenticated": pair.authenticated.value,
        "peer": [pair.peer.type.value, pair.peer.data.hex()],
        "encap": pair.encap,
        "mode": pair.mode,
        "natted": pair.natted,
        "protocol": pair.protocol,
        "replay_window": pair.replay_window,
        "lifetime": dataclasses.astuple(pair.lifetime),
        "connection": pair.connection,
        "aggregation": [pair.aggregation, pair.fragments, pair.super_packets],
        "tfc_padding": pair.tfc_padding,
        "copied": dataclasses.astuple(pair.copied),
        "priority": pair.priority,
        "marks": dataclasses.astuple(pair.marks),
    }


def _decode_endpoint(value: list[Any]) -> Endpoint:
    return Endpoint(ip_address(value[0]), value[1])


def _decode_keys(value: list[str]) -> SaKeys:
    return SaKeys(*(Secret(base64.b64decode(text)) for text in value))


def _decode_selectors(value: list[list[Any]]) -> tuple[TrafficSelector, ...]:
    return tuple(TrafficSelector(ip_address(item[0]), ip_address(item[1]), *item[2:]) for item in value)


def decode_pair(value: Json) -> SaPair:
    """The mirror of `encode_pair`. Only our own daemon writes this: anything else is a bug and surfaces."""
    return SaPair(
        spi_in=value["spi_in"],
        spi_out=value["spi_out"],
        local=_decode_endpoint(value["local"]),
        remote=_decode_endpoint(value["remote"]),
        suite=EspSuite(*value["suite"]),
        keys_in=_decode_keys(value["keys_in"]),
        keys_out=_decode_keys(value["keys_out"]),
        local_ts=_decode_selectors(value["local_ts"]),
        remote_ts=_decode_selectors(value["remote_ts"]),
        authenticated=Authenticated(value["authenticated"]),
        peer=PeerIdentity(IdType(value["peer"][0]), bytes.fromhex(value["peer"][1])),
        encap=value["encap"],
        mode=value["mode"],
        natted=value["natted"],
        protocol=value["protocol"],
        replay_window=value["replay_window"],
        lifetime=Lifetime(*value["lifetime"]),
        connection=value["connection"],
        aggregation=value["aggregation"][0],
        fragments=value["aggregation"][1],
        super_packets=value["aggregation"][2],
        tfc_padding=value["tfc_padding"],
        copied=Copied(*value["copied"]),
        priority=value["priority"],
        marks=Marks(*(None if mark is None else Mark(*mark) for mark in value["marks"])),
    )


# -- counters and events ---------------------------------------------------------------------------------


def encode_counters(counters: SaCounters) -> list[Any]:
    return list(dataclasses.astuple(counters))


def decode_counters(value: list[Any]) -> SaCounters:
    return SaCounters(*value)


def encode_event(event: DatapathEvent) -> Json:
    return {
        "event": event.kind,
        "spi": event.spi,
        "peer": None if event.peer is None else str(event.peer),
        "source": None if event.source is None else str(event.source),
        "detail": event.detail,
    }


def decode_event(value: Json) -> DatapathEvent:
    peer, source = (None if value[name] is None else ip_address(value[name]) for name in ("peer", "source"))
    return DatapathEvent(value["event"], value["spi"], peer, value["detail"], source)


# -- IKE messages ----------------------------------------------------------------------------------------


def encode_ike(data: bytes, local: Endpoint, remote: Endpoint) -> bytes:
    return (
        _IKE_HEADER.pack(
            local.address.version,
            local.address.packed.ljust(16, b"\0"),
            local.port,
            remote.address.packed.ljust(16, b"\0"),
            remote.port,
        )
        + data
    )


def decode_ike(message: bytes) -> tuple[bytes, Endpoint, Endpoint]:
    """The IKE message, its local and its remote endpoint. Raises ParseError."""
    if len(message) < _IKE_HEADER.size or message[0] not in (4, 6):
        raise ParseError("IKE frame without a whole header")
    version, local, local_port, remote, remote_port = _IKE_HEADER.unpack_from(message)
    endpoints = [
        Endpoint(IPv4Address(packed[:4]) if version == 4 else IPv6Address(packed), port)
        for packed, port in ((local, local_port), (remote, remote_port))
    ]
    return message[_IKE_HEADER.size :], endpoints[0], endpoints[1]
