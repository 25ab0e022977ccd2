"""What the daemon knows, as JSON-ready values for the control socket. Key names are those of the contract in
docs/cli.md; nothing here changes anything."""

from __future__ import annotations

import base64
from typing import Any

from oepy.connections.manager import ChildState
from oepy.connections.model import Selector
from oepy.engine.entry import Entry
from oepy.engine.table import State
from oepy.ike.endpoint import SessionInfo
from oepy.manual.model import PROTOCOL_NAMES, ManualPolicy
from oepy.model import Insecure, IpAddress, KeyAnswer, PeerKey, SaCounters, SaPair, Secure
from oepy.policy import Match

_DISPOSITION = {
    State.NEW: "held",
    State.LOOKUP: "held",
    State.NEGOTIATING: "held",
    State.PRIVATE: "private",
    State.CLEAR: "clear",
    State.BLOCKED: "blocked",
}
STATIC_DISPOSITION = {"clear": "clear", "clear-or-private": "clear", "block": "blocked"}


def disposition(state: State) -> str:
    return _DISPOSITION[state]


def key_view(record: PeerKey) -> dict[str, Any]:
    return {
        "algorithm": record.key.algorithm.name,
        "public_key": base64.b64encode(record.key.data).decode(),
        "gateway": record.gateway_text,
        "gateway_type": int(record.gateway_type),
        "precedence": record.precedence,
        "record": record.record,
        "owner": record.owner,
        "ttl": record.ttl,
    }


def answer_view(answer: KeyAnswer | None) -> dict[str, Any] | None:
    if answer is None:
        return None
    keys = answer.keys if isinstance(answer, (Secure, Insecure)) else ()
    return {
        "status": type(answer).__name__.lower(),
        "owner": answer.owner,
        "reason": answer.reason,
        "ttl": answer.ttl,
        "seconds": round(answer.elapsed, 6),
        "questions": answer.questions,
        "notes": list(answer.notes),
        "keys": [key_view(record) for record in keys],
    }


def sa_view(pair: SaPair, counters: SaCounters | None, since: float, now: float) -> dict[str, Any]:
    soft = pair.lifetime.soft_seconds
    counted = counters or SaCounters(pair.spi_in)
    return {
        "spi_in": f"{pair.spi_in:08x}",
        "spi_out": f"{pair.spi_out:08x}",
        "peer": str(pair.remote.address),
        "peer_id": str(pair.peer),
        "local": str(pair.local),
        "remote": str(pair.remote),
        "mode": pair.mode,
        "protocol": pair.protocol,
        "encap": pair.encap,
        "aggregation": pair.aggregation,
        "algorithm": str(pair.suite),
        "local_ts": [str(ts) for ts in pair.local_ts],
        "remote_ts": [str(ts) for ts in pair.remote_ts],
        "authenticated": pair.authenticated.value,
        "bytes_in": counted.bytes_in,
        "bytes_out": counted.bytes_out,
        "packets_in": counted.packets_in,
        "packets_out": counted.packets_out,
        "replayed": counted.replayed,
        "integrity_failures": counted.integrity_failures,
        "selector_mismatches": counted.selector_mismatches,
        "established": round(now - since, 3),
        "rekey_in": round(since + soft - now, 3) if soft else None,
        "connection": pair.connection,
    }


def ike_view(session: SessionInfo) -> dict[str, Any]:
    """Of the IKE SA; its SPIs as in the header, in hex: each is the end's that chose it."""
    return {
        "state": session.state,
        "algorithms": session.suite,
        "peer_id": str(session.identity),
        "initiator": session.initiator,
        "spi_i": session.spi_i,
        "spi_r": session.spi_r,
        "encap": session.encap,
    }


def entry_view(entry: Entry, held: int, now: float) -> dict[str, Any]:
    tunnel = entry.tunnels[-1] if entry.tunnels else None
    return {
        "destination": str(entry.destination),
        "group": entry.group.value,
        "prefix": entry.prefix,
        "disposition": disposition(entry.state),
        "state": entry.state.value,
        "reason": entry.reason,
        "authenticated": tunnel.authenticated.value if tunnel else None,
        "spi_in": f"{tunnel.spi_in:08x}" if tunnel else None,
        "held_packets": held,
        "since": round(now - entry.since, 3),
        "expires_in": round(entry.expires - now, 3) if entry.expires is not None else None,
    }


def explanation(
    entry: Entry, held: int, now: float, sa: dict[str, Any] | None, ike: dict[str, Any] | None
) -> dict[str, Any]:
    """The whole story of one destination."""
    view = entry_view(entry, held, now)
    view["dns"] = answer_view(entry.answer)
    view["waited"] = {"dns_seconds": entry.dns_seconds, "ike_seconds": entry.ike_seconds}
    view["ike"] = {
        "candidates": [str(candidate.gateway) for candidate in entry.candidates],
        "tried": entry.tried,
        "failures_in_a_row": entry.failures,
        "last_error": entry.last_error,
        **(ike or {}),
    }
    view["sa"] = sa
    view["next"] = _next_step(entry, now)
    return view


def _next_step(entry: Entry, now: float) -> str:
    left = f"{max(entry.expires - now, 0):.0f} s" if entry.expires is not None else ""
    match entry.state:
        case State.CLEAR | State.BLOCKED:
            return f"the first packet after {left} asks the DNS again"
        case State.PRIVATE:
            return "the SA is rekeyed in time, and let go when it is idle"
        case State.LOOKUP | State.NEGOTIATING:
            return f"packets are held, {left} at most"
        case _:
            return "the next packet is held and the DNS is asked"


def would_be(destination: str, match: Match, answer: KeyAnswer | None, outcome: str) -> dict[str, Any]:
    """The story of a destination that nobody has talked to yet."""
    group = match.group.value
    return {
        "destination": destination,
        "group": group,
        "prefix": match.prefix,
        "disposition": STATIC_DISPOSITION.get(group, "held"),
        "state": State.NEW.value,
        "reason": outcome,
        "dns": answer_view(answer),
        "ike": None,
        "sa": None,
        "since": 0.0,
        "expires_in": None,
        "next": outcome,
    }


def manual_policy_view(policy: ManualPolicy) -> dict[str, Any]:
    """In the form of the groups' rules, with what these have not."""
    selector = policy.selector
    protocol = PROTOCOL_NAMES.get(selector.protocol, str(selector.protocol)) if selector.protocol else None
    return {
        "prefix": str(selector.dst),
        "protocol": protocol,
        "port": selector.dport or None,
        "group": "manual",
        "source": str(selector.src),
        "source_port": selector.sport or None,
        "direction": policy.direction,
        "action": policy.action,
        "priority": policy.priority,
    }


def manual_explanation(
    destination: IpAddress, policy: ManualPolicy, sa: dict[str, Any] | None
) -> dict[str, Any]:
    """The story of a destination that a manual policy settles."""
    if policy.action == "ipsec":
        what = "private" if sa is not None else "blocked" if policy.required else "clear"
        reason = "an SA keyed by hand" if sa is not None else "the policy's SA is not there"
    else:
        what = {"bypass": "clear", "block": "blocked"}[policy.action]
        reason = f"action {policy.action}"
    return {
        "destination": str(destination),
        "group": "manual",
        "prefix": str(policy),
        "disposition": what,
        "state": what,
        "reason": f"manual policy: {reason}",
        "trap": "manual policies come before the groups",
        "dns": None,
        "ike": None,
        "sa": sa,
        "since": sa["established"] if sa is not None else 0.0,
        "expires_in": None,
        "next": "nothing: it stays so until the policy or its SA is changed",
    }


def child_view(state: ChildState, held: int, now: float) -> dict[str, Any]:
    """One child of a connection."""
    connection, child = state.connection, state.child
    return {
        "connection": connection.name,
        "child": child.name,
        "name": state.label,
        "state": state.state.value,
        "since": round(now - state.since, 3),
        "reason": state.last_error,
        "local_addrs": [str(place) for place in connection.local_addrs],
        "remote_addrs": [str(place) for place in connection.remote_addrs],
        "local_id": str(connection.local.id) if connection.local.id else None,
        "remote_id": connection.remote.id.text,
        "local_auth": connection.local.auth,
        "remote_auth": connection.remote.auth,
        "local_ts": [str(selector) for selector in child.local_ts],
        "remote_ts": [str(selector) for selector in child.remote_ts],
        "mode": child.mode,
        "priority": child.priority or None,
        "marks": {
            name: str(mark) if mark else None
            for name, mark in (
                ("mark_in", child.marks.inward),
                ("mark_out", child.marks.outward),
                ("set_mark_in", child.marks.set_inward),
                ("set_mark_out", child.marks.set_outward),
            )
        },
        "start_action": "|".join(["trap"] * child.trap + ["start"] * child.start) or "none",
        "held_packets": held,
        "retry_in": round(state.retry_at - now, 3) if state.retry_at is not None else None,
        "sas": [
            {
                "spi_in": f"{spi:08x}",
                "spi_out": f"{tunnel.pair.spi_out:08x}",
                "peer": str(tunnel.pair.remote.address),
                "peer_id": str(tunnel.pair.peer),
                "local_ts": [str(ts) for ts in tunnel.pair.local_ts],
                "remote_ts": [str(ts) for ts in tunnel.pair.remote_ts],
                "established": round(now - tunnel.since, 3),
            }
            for spi, tunnel in state.tunnels.items()
        ],
    }


def connection_explanation(
    destination: IpAddress,
    state: ChildState,
    sa: dict[str, Any] | None,
    ike: dict[str, Any] | None,
    held: int,
    now: float,
) -> dict[str, Any]:
    """The story of a destination that belongs to a connection."""
    what = "private" if sa is not None else "held" if state.trapped else "clear"
    nexts = {
        "private": "the SA is rekeyed in time",
        "held": "the next packet is held, and the connection is brought up for it",
        "clear": "the next policy decides: this child does not hold its traffic",
    }
    return {
        "destination": str(destination),
        "group": "connection",
        "prefix": state.label,
        "disposition": what,
        "state": state.state.value,
        "reason": f"connection {state.label} is {state.state.value}"
        + (f": {state.last_error}" if state.last_error and sa is None else ""),
        "connection": child_view(state, held, now),
        "dns": None,
        "ike": None if ike is None else {"candidates": [], "tried": 0, "last_error": "", **ike},
        "sa": sa,
        "since": round(now - state.since, 3),
        "expires_in": None,
        "next": nexts[what],
    }


def marked_view(state: ChildState, destination: IpAddress) -> dict[str, Any]:
    """What becomes of packets to a destination that carry a child's mark."""
    tunnels = state.tunnels.values()
    up = any(ts.contains_address(destination) for tunnel in tunnels for ts in tunnel.pair.remote_ts)
    return {
        "connection": state.label,
        "mark": str(state.child.marks.outward),
        "disposition": "private" if up else "held" if state.trapped else "next policy",
    }


def connection_policy_view(state: ChildState, local: Selector, remote: Selector) -> dict[str, Any]:
    """In the form of the groups' rules."""
    number = remote.protocol or local.protocol
    return {
        "prefix": str(remote.network or "dynamic"),
        "protocol": PROTOCOL_NAMES.get(number, str(number)) if number else None,
        "port": remote.port or None,
        "group": "connection",
        "connection": state.label,
        "source": str(local.network or "dynamic"),
        "source_port": local.port or None,
        "mark": str(state.child.marks.outward) if state.child.marks.outward else None,
        "action": "tunnel" if state.tunnels else "hold" if state.trapped else "next policy",
    }
