"""`oepy run`: the daemon in the foreground."""

from __future__ import annotations

import os

import click

from oepy.errors import OepyError


@click.command()
@click.option("--check", is_flag=True, help="Only check the configuration.")
@click.option("-v", "--verbose", is_flag=True, help="Print every event, not only what needs an eye.")
@click.pass_context
def run(ctx: click.Context, check: bool, verbose: bool) -> None:
    """The daemon, in the foreground. SIGTERM stops it cleanly, SIGHUP reloads the configuration.

    A configuration with mistakes is refused, all of them listed; nothing is started then.

    \b
    Examples:
      oepy run
      oepy -c ./oepy.yaml run --check
    """
    from oepy import config as configuration
    from oepy.included import Memory

    files = Memory()
    config = configuration.load(ctx.obj, files)
    if check:
        click.echo(f"{config.source}: no mistakes")
        return
    if os.geteuid() != 0:
        raise OepyError("the daemon needs root", "packets, routes and ports below 1024 belong to root")
    from oepy.daemon.runtime import run_daemon

    run_daemon(config, ctx.obj, files, verbose)
