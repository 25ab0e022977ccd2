"""`oepy doctor`: checks this host, each finding with its mend."""

from __future__ import annotations

import sys

import click

from oepy.cli.output import json_option, print_json

_MARK = {"good": ("ok", "green"), "warning": ("!!", "yellow"), "bad": ("XX", "red")}


@click.command()
@json_option
@click.pass_context
def doctor(ctx: click.Context, as_json: bool) -> None:
    """Check this host: TUN, packet queue, ports, resolver and DNSSEC, own published records, guard.

    Ends with 0 when nothing is bad. Changes nothing.
    """
    from oepy import config as configuration
    from oepy.daemon.doctor import examine

    findings = examine(configuration.load(ctx.obj))
    if as_json:
        print_json([finding.as_dict() for finding in findings])
    else:
        for finding in findings:
            mark, colour = _MARK[finding.verdict]
            mend = f"\n       mend: {finding.mend}" if finding.mend else ""
            click.echo(f"{click.style(mark, fg=colour, bold=True)}  {finding.subject}: {finding.text}{mend}")
    sys.exit(1 if any(finding.verdict == "bad" for finding in findings) else 0)
