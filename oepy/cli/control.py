"""Commands that act: initiate, terminate, rekey, flush."""

from __future__ import annotations

import sys

import click

from oepy.cli.output import client, coloured, json_option, print_json
from oepy.control import protocol


@click.command()
@click.argument("destination")
@click.option("--timeout", default=15.0, show_default=True, help="Seconds to wait for the outcome.")
@json_option
@click.pass_context
def initiate(ctx: click.Context, destination: str, timeout: float, as_json: bool) -> None:
    """Look up and negotiate with DESTINATION now. Ends with 0 when the tunnel is up."""
    data = client(ctx).post(
        protocol.INITIATE, {"destination": destination, "timeout": timeout}, timeout=timeout + 10
    )
    if as_json:
        print_json(data)
    else:
        click.echo(f"{data['destination']} is {coloured(data['disposition'])}: {data['reason']}")
    sys.exit(0 if data["disposition"] == "private" else 1)


@click.command()
@click.argument("destination")
@json_option
@click.pass_context
def terminate(ctx: click.Context, destination: str, as_json: bool) -> None:
    """Take the tunnel to DESTINATION down; the next packet is trapped again."""
    data = client(ctx).post(protocol.TERMINATE, {"destination": destination})
    if as_json:
        print_json(data)
    else:
        click.echo(f"{data['closed']} tunnels to {destination} closed")
    sys.exit(0 if data["closed"] else 1)


@click.command()
@click.argument("destination")
@click.option("--ike", is_flag=True, help="The keys of its IKE SA; the tunnel itself keeps its own.")
@json_option
@click.pass_context
def rekey(ctx: click.Context, destination: str, ike: bool, as_json: bool) -> None:
    """Negotiate new keys for the tunnel to DESTINATION now; traffic goes on meanwhile."""
    data = client(ctx).post(protocol.REKEY, {"destination": destination, "ike": ike})
    if as_json:
        print_json(data)
    else:
        what = "IKE SAs" if ike else "tunnels"
        click.echo(f"new keys are asked for in {data['rekeyed']} {what} to {destination}")
    sys.exit(0 if data["rekeyed"] else 1)


@click.command()
@click.argument("destination", required=False)
@click.option("--dns", "dns_too", is_flag=True, help="Forget the DNS answers of it too (of all: everything).")
@json_option
@click.pass_context
def flush(ctx: click.Context, destination: str | None, dns_too: bool, as_json: bool) -> None:
    """Forget what was decided (clear and blocked) of DESTINATION or of all; tunnels stay."""
    what = (destination or "all") if dns_too else None
    data = client(ctx).post(protocol.FLUSH, {"destination": destination, "dns": what})
    if as_json:
        print_json(data)
    else:
        click.echo(f"{data['forgotten']} decisions forgotten")
