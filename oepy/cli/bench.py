"""`oepy bench NAME`: the benchmarks. Each is imported only when it is called."""

from __future__ import annotations

import click


@click.group()
def bench() -> None:
    """The benchmarks, each in network namespaces of its own (root)."""


@bench.command()
@click.option("--seconds", default=4.0, show_default=True, help="Measured time for each of the two sizes.")
@click.option("--entries", default=100_000, show_default=True, help="Decided destinations of the large run.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.pass_context
def trap(ctx: click.Context, seconds: float, entries: int, as_json: bool) -> None:
    """First packets trapped, decided and released a second, with few and with many entries already there.

    Exit status 1 where the rate with many is more than 20 % below the rate with few."""
    from oepy.bench.trap import render, run

    result = run(seconds=seconds, entries=entries)
    click.echo(render(result, as_json=as_json))
    ctx.exit(0 if result.flat else 1)
