"""`oepy zone`: zone files with key records."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click


@click.group()
def zone() -> None:
    """Zone files with key records: make them from an inventory, check them."""


@zone.command()
@click.argument("inventory", type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    "directory",
    required=True,
    metavar="DIR",
    type=click.Path(path_type=Path, file_okay=False),
    help="Directory for the files db.ZONE.",
)
@click.option("--zone", "zones", multiple=True, help="Zone to write, besides those of the inventory.")
@click.option("--name-server", "servers", multiple=True, help="Name server, besides the inventory's.")
@click.option("--ttl", type=click.IntRange(0, 2**31 - 1), help="TTL where the inventory gives none.")
@click.option("--serial", type=click.IntRange(0, 2**32 - 1), help="SOA serial (default: the time).")
@click.option("--json", "as_json", is_flag=True, help="Print what was written as JSON.")
def generate(
    *,
    inventory: Path,
    directory: Path,
    zones: tuple[str, ...],
    servers: tuple[str, ...],
    ttl: int | None,
    serial: int | None,
    as_json: bool,
) -> None:
    """Write one zone file for each zone of INVENTORY (YAML, or CSV with the same column names).

    \b
    oepy zone generate hosts.yaml -o /etc/bind/oepy
    oepy zone generate fleet.csv -o out --zone 2.0.192.in-addr.arpa --name-server ns1.example
    """
    import time

    from oepy.dns.inventory import Inventory
    from oepy.dns.zonefile import generate as generate_zones

    source = Inventory(inventory)
    source.preset(zones, servers, ttl)
    number = serial if serial is not None else int(time.time())
    with click.progressbar(
        length=inventory.stat().st_size if inventory.is_file() else 0,
        label="hosts",
        file=sys.stderr,
        hidden=not sys.stderr.isatty(),
    ) as bar:
        result = generate_zones(source, directory, number, lambda done: bar.update(done - bar.pos))
    for warning in result.warnings:
        click.echo(f"oepy: {inventory}: {warning}", err=True)
    if as_json:
        record = {
            "files": [str(path) for path in result.files],
            "hosts": result.hosts,
            "records": result.records,
            "warnings": list(result.warnings),
        }
        click.echo(json.dumps(record, indent=2))
    else:
        click.echo(f"{result.hosts} hosts, {result.records} records in {len(result.files)} files:")
        for path in result.files:
            click.echo(str(path))


@zone.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
def check(file: Path, as_json: bool) -> None:
    """Check every key record of a zone FILE: does it parse, is its key usable?

    \b
    oepy zone check out/db.2.0.192.in-addr.arpa
    """
    from oepy.dns.zonecheck import check_file

    result = check_file(file)
    if as_json:
        record = {"file": str(file), "good": result.good, "problems": list(result.problems)}
        click.echo(json.dumps(record, indent=2))
    else:
        for problem in result.problems:
            click.echo(problem)
        click.echo(f"{file}: {result.good} usable key records, {len(result.problems)} not usable")
    if result.problems:
        sys.exit(1)
