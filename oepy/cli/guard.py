"""`oepy guard`: the rules that a stopped oepy leaves, so that private destinations stay blocked."""

from __future__ import annotations

import json

import click

_JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")


@click.group()
def guard() -> None:
    """The rules that keep private destinations blocked without a daemon."""


@guard.command()
@_JSON
@click.pass_context
def status(ctx: click.Context, as_json: bool) -> None:
    """Whether the guard stands. Exit status 1 where it does not."""
    from oepy.trap.guard import guard_status

    standing = guard_status()
    if as_json:
        click.echo(json.dumps({"guard": standing}))
    elif standing:
        click.echo("The guard stands: private and block prefixes are shut (nft list table inet oepy_guard).")
    else:
        click.echo("There is no guard.")
    ctx.exit(0 if standing else 1)


@guard.command()
@_JSON
@click.pass_context
def remove(ctx: click.Context, as_json: bool) -> None:
    """Remove the guard: private and block prefixes are in the clear from then on. Exit status 1 where there
    was none."""
    from oepy.trap.guard import remove_guard

    removed = remove_guard()
    if as_json:
        click.echo(json.dumps({"removed": removed}))
    else:
        click.echo("The guard is removed." if removed else "There was no guard.")
    ctx.exit(0 if removed else 1)
