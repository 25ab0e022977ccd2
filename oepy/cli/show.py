"""Commands that look: status, peers, sas, policies, events, explain."""

from __future__ import annotations

import json
import sys
from datetime import datetime
from ipaddress import ip_address
from typing import Any

import click

from oepy.cli.output import (
    client,
    coloured,
    json_option,
    milliseconds,
    print_json,
    print_table,
    seconds,
    size,
)
from oepy.control import protocol
from oepy.errors import DaemonUnreachable, UsageError


@click.command()
@json_option
@click.pass_context
def status(ctx: click.Context, as_json: bool) -> None:
    """The daemon at a glance: datapath, trap, own records, counts and the last alerts."""
    data = client(ctx).get(protocol.STATUS)
    if as_json:
        print_json(data)
        return
    click.echo(f"oepy {data['version']}, pid {data['pid']}, up {seconds(data['uptime'])}")
    if data["key_log"]:
        click.secho(f"KEY LOG IS ON: secrets are written to {data['key_log']}", fg="red", bold=True)
    mode = f" by {data['datapath_mode']}" if data["datapath_mode"] else ""
    click.echo(f"datapath   {data['datapath']}{mode} ({data['datapath_reason']})")
    click.echo(f"trap       {data['trap']} ({data['trap_reason']})")
    click.echo(f"host key   {data['key']['type']} {data['key']['fingerprint']} ({data['key']['file']})")
    for record in data["own_records"]:
        reason = f" ({record['reason']})" if record["reason"] else ""
        click.echo(f"own record {record['subject']}: {record['state']}{reason}")
    for state in data["resolver_states"]:
        click.echo(f"resolver   {_resolver_line(state)}")
    states = ", ".join(f"{count} {coloured(name)}" for name, count in data["destinations"].items())
    click.echo(
        f"now        {states or 'no destinations yet'}; {data['sas']} SAs; {data['held']} packets held"
    )
    if data["connections"]:
        children = ", ".join(f"{count} {name}" for name, count in sorted(data["connections"].items()))
        click.echo(f"connections {children}")
    if any(data["manual"].values()):
        click.echo(f"by hand    {data['manual']['sas']} SAs, {data['manual']['policies']} policies")
    for alert in data["alerts"]:
        click.secho(_event_line(alert), fg="red")


def _resolver_line(state: dict[str, Any]) -> str:
    """One line of `status`."""
    text = f"{state['resolver']}: {state['state']}, {state['replies']} of {state['questions']} questions answered"
    if state["round_trip"] is not None:
        text += f", {state['round_trip']:.1f} ms"
    if state["reason"]:
        text += f" ({state['reason']}, for {seconds(state['since'])})"
    return text


@click.command()
@json_option
@click.pass_context
def peers(ctx: click.Context, as_json: bool) -> None:
    """What is known of each destination."""
    data = client(ctx).get(protocol.PEERS)
    if as_json:
        print_json(data)
        return
    print_table(
        ["destination", "is", "group", "auth", "for", "expires", "held", "why"],
        [
            [
                row["destination"],
                row["disposition"],
                row["group"],
                row["authenticated"],
                seconds(row["since"]),
                seconds(row["expires_in"]),
                row["held_packets"],
                row["reason"],
            ]
            for row in data
        ],
        "no destination has been talked to yet",
    )


@click.command()
@json_option
@click.pass_context
def sas(ctx: click.Context, as_json: bool) -> None:
    """Installed SAs with bytes, packets, age and rekey time."""
    data = client(ctx).get(protocol.SAS)
    if as_json:
        print_json(data)
        return
    print_table(
        ["peer", "spi in", "spi out", "algorithm", "auth", "local", "remote", "in", "out", "age", "rekey in"],
        [
            [
                row["peer"],
                row["spi_in"],
                row["spi_out"],
                row["algorithm"],
                row["authenticated"],
                row["local_ts"],
                row["remote_ts"],
                f"{size(row['bytes_in'])}/{row['packets_in']}",
                f"{size(row['bytes_out'])}/{row['packets_out']}",
                seconds(row["established"]),
                seconds(row["rekey_in"]),
            ]
            for row in data
        ],
        "no SA is installed",
    )


@click.command()
@json_option
@click.pass_context
def policies(ctx: click.Context, as_json: bool) -> None:
    """The policies in force, in the order in which they match."""
    data = client(ctx).get(protocol.POLICIES)
    if as_json:
        print_json(data)
        return
    print_table(
        ["prefix", "protocol", "port", "group"],
        [[row["prefix"], row["protocol"], row["port"], _group_text(row)] for row in data],
        "no policy",
    )


def _group_text(row: dict[str, Any]) -> str:
    if row["group"] == "connection":
        mark = f", mark {row['mark']}" if row["mark"] else ""
        return f"connection {row['connection']}: {row['action']}, from {row['source']}{mark}"
    if row["group"] != "manual":
        return str(row["group"])
    return f"manual: {row['action']} {row['direction']}, from {row['source']}"


def _event_line(event: dict[str, Any]) -> str:
    when = datetime.fromtimestamp(event["time"]).strftime("%H:%M:%S.%f")[:-3]
    hidden = ("number", "time", "event", "alert")
    rest = " ".join(f"{k}={v}" for k, v in event.items() if k not in hidden and v not in ("", None))
    return f"{when} {'! ' if event.get('alert') else ''}{event['event']} {rest}"


@click.command()
@click.option("-f", "--follow", is_flag=True, help="Go on as things happen.")
@click.option("-n", "--limit", default=100, show_default=True, help="How many past events.")
@json_option
@click.pass_context
def events(ctx: click.Context, follow: bool, limit: int, as_json: bool) -> None:
    """What happened, newest last. With --json -f, one object a line."""
    if not follow:
        data = client(ctx).get(protocol.EVENTS, limit=str(limit))
        if as_json:
            print_json(data)
        for event in () if as_json else data:
            click.echo(_event_line(event))
        return
    try:
        for event in client(ctx).stream(protocol.EVENTS, follow="1", limit=str(limit)):
            click.echo(json.dumps(event) if as_json else _event_line(event))
            sys.stdout.flush()
    except KeyboardInterrupt:
        return


@click.command()
@click.argument("destination")
@json_option
@click.pass_context
def explain(ctx: click.Context, destination: str, as_json: bool) -> None:
    """Why traffic to DESTINATION is clear, private, held or blocked, and what happens next.

    Works without the daemon too: then it says what would happen.

    \b
    Examples:
      oepy explain 192.0.2.20
      oepy explain 2001:db8::20 --json
    """
    try:
        address = ip_address(destination)
    except ValueError:
        raise UsageError(f"{destination!r} is no IP address", "give one like 192.0.2.20") from None
    try:
        data = client(ctx).get(protocol.EXPLAIN, destination=str(address))
    except DaemonUnreachable:
        from oepy.daemon.forecast import explain_without_daemon

        data = explain_without_daemon(ctx.obj, address)
    if as_json:
        print_json(data)
        return
    for line in explain_lines(data):
        click.echo(line)


def explain_lines(data: dict[str, Any]) -> list[str]:
    """The story for people; the first line alone is the summary."""
    known = data["state"] != "new" or data["since"]
    summary = f"is {coloured(data['disposition'])}: " if known else "has not been talked to: "
    lines = [
        f"{data['destination']} {summary}{data['reason']}",
        f"  policy   group {data['group']}, by {data['prefix']}",
    ]
    if data.get("trap"):
        lines.append(f"  trap     {data['trap']}")
    for row in data.get("marked", ()):
        what = f"{coloured(row['disposition'])}, connection {row['connection']}"
        lines.append(f"  mark     packets with {row['mark']}: {what}")
    if data.get("dns"):
        dns = data["dns"]
        reason = f": {dns['reason']}" if dns["reason"] else ""
        lines.append(f"  dns      {dns['owner']} is {dns['status']}{reason}")
        cost = f"{milliseconds(dns['seconds'])}, {dns['questions']} questions"
        lines.append(f"           {cost}, TTL {seconds(dns['ttl'])}")
        for key in dns["keys"]:
            lines.append(
                f"           {key['record']} {key['precedence']} {key['algorithm']} gateway {key['gateway']} "
                f"{key['public_key'][:24]}…"
            )
        lines += [f"           note: {note}" for note in dns["notes"]]
    if data.get("ike"):
        ike = data["ike"]
        if ike["candidates"]:
            lines.append(f"  ike      gateways {', '.join(ike['candidates'])}; tried {ike['tried']}")
        if ike.get("state"):
            lines.append(f"           {ike['state']}, {ike.get('algorithms', '')}")
        if ike["last_error"]:
            lines.append(f"           last error: {ike['last_error']}")
    if data.get("sa"):
        sa = data["sa"]
        proof = (
            "keyed by hand" if sa["authenticated"] == "manual" else f"peer proved by {sa['authenticated']}"
        )
        lines.append(f"  sa       {sa['algorithm']} in {sa['spi_in']} out {sa['spi_out']}, {proof}")
        lines.append(
            f"           {sa['packets_in']} packets in, {sa['packets_out']} out, "
            f"age {seconds(sa['established'])}, rekey in {seconds(sa['rekey_in'])}"
        )
    lines.append(f"  next     {data['next']}")
    return lines
