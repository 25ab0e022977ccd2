"""`oepy connection`: conventional connections, as `swanctl --list-conns`, `--initiate` and so on."""

from __future__ import annotations

import sys
from typing import Any

import click

from oepy.cli.output import client, json_option, print_json, print_table, seconds
from oepy.control import protocol

_TIMEOUT = click.option("--timeout", default=15.0, show_default=True, help="Seconds to wait for the outcome.")


@click.group()
def connection() -> None:
    """Conventional connections of the configuration.

    NAME is a child as `office/net`, the child alone, or a connection with all of its children.
    """


@connection.command("list")
@click.argument("name", required=False)
@json_option
@click.pass_context
def list_command(ctx: click.Context, name: str | None, as_json: bool) -> None:
    """All children with their states, or those of NAME."""
    data = client(ctx).get(protocol.CONNECTIONS)
    if name is not None:
        data = [row for row in data if name in (row["name"], row["child"], row["connection"])]
    if as_json:
        print_json(data)
    else:
        print_table(
            ["name", "state", "for", "remote", "auth", "local", "remote ts", "peers", "held", "why"],
            [_row(row) for row in data],
            "no connection is configured" if name is None else f"no connection {name}",
        )
    sys.exit(1 if name is not None and not data else 0)


def _row(row: dict[str, Any]) -> list[object]:
    return [
        row["name"],
        row["state"],
        seconds(row["since"]),
        row["remote_addrs"],
        row["remote_auth"],
        row["local_ts"],
        row["remote_ts"],
        len({sa["peer"] for sa in row["sas"]}),
        row["held_packets"],
        row["reason"],
    ]


@connection.command()
@click.argument("name")
@_TIMEOUT
@json_option
@click.pass_context
def up(ctx: click.Context, name: str, timeout: float, as_json: bool) -> None:
    """Bring NAME up. Ends with 0 when all of it is up."""
    data = _change(ctx, "up", name, timeout)
    _tell(data, as_json)
    sys.exit(0 if all(child["state"] == "up" for child in data["children"]) else 1)


@connection.command()
@click.argument("name")
@_TIMEOUT
@json_option
@click.pass_context
def down(ctx: click.Context, name: str, timeout: float, as_json: bool) -> None:
    """Take NAME down. What start_action trap holds comes up again with the next packet."""
    data = _change(ctx, "down", name, timeout)
    _tell(data, as_json)
    sys.exit(0 if not any(child["sas"] for child in data["children"]) else 1)


@connection.command()
@json_option
@click.pass_context
def load(ctx: click.Context, as_json: bool) -> None:
    """Read the configuration again; only what differs takes effect, and mistakes change nothing."""
    data = _change(ctx, "load", "", 15.0)
    if as_json:
        print_json(data)
    else:
        click.echo(f"{data['connections']} connections are configured")


def _change(ctx: click.Context, operation: str, name: str, timeout: float) -> Any:
    body = {"operation": operation, "name": name, "timeout": timeout}
    return client(ctx).post(protocol.CONNECTIONS, body, timeout=timeout + 10)


def _tell(data: Any, as_json: bool) -> None:
    if as_json:
        print_json(data)
        return
    for child in data["children"]:
        reason = f": {child['reason']}" if child["reason"] and child["state"] != "up" else ""
        click.echo(f"{child['name']} is {child['state']}{reason}")
