"""The `oepy` command: every subcommand lives in a module of its own and is imported only when it is called,
so that `oepy --help` starts at once.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

import click

from oepy import __version__
from oepy.errors import ConfigError, OepyError

# command → (module, attribute, short help). The help stands here so that `--help` imports nothing.
COMMANDS: dict[str, tuple[str, str, str]] = {
    "run": ("oepy.cli.run", "run", "The daemon, in the foreground."),
    "status": ("oepy.cli.show", "status", "The daemon at a glance."),
    "peers": ("oepy.cli.show", "peers", "What is known of each destination."),
    "sas": ("oepy.cli.show", "sas", "Installed SAs with bytes, packets, age and rekey time."),
    "policies": ("oepy.cli.show", "policies", "The policies in force."),
    "events": ("oepy.cli.show", "events", "What happened, newest last."),
    "explain": (
        "oepy.cli.show",
        "explain",
        "Why traffic to a destination is clear, private, held or blocked.",
    ),
    "initiate": ("oepy.cli.control", "initiate", "Bring a tunnel up now."),
    "terminate": ("oepy.cli.control", "terminate", "Take a tunnel down."),
    "rekey": ("oepy.cli.control", "rekey", "Negotiate new keys for a tunnel now."),
    "flush": ("oepy.cli.control", "flush", "Forget what was decided."),
    "connection": ("oepy.cli.connection", "connection", "Conventional connections: list, up, down, load."),
    "sa": ("oepy.cli.manual", "sa", "SAs keyed by hand."),
    "policy": ("oepy.cli.manual", "policy", "Policies made by hand."),
    "convert": ("oepy.cli.convert", "convert", "Other systems' configuration to oepy's."),
    "guard": (
        "oepy.cli.guard",
        "guard",
        "The rules that keep private destinations blocked without a daemon.",
    ),
    "doctor": ("oepy.cli.doctor", "doctor", "Check this host, each finding with its mend."),
    "key": ("oepy.cli.key", "key", "Make, show and change host keys."),
    "pki": ("oepy.cli.pki", "pki", "Certificates for a small site: CA, issue, revoke, verify."),
    "zone": ("oepy.cli.zone", "zone", "Zone files with key records."),
    "dns": ("oepy.cli.dns", "dns", "Validated lookups, peers' keys, and publishing one's own."),
    "lab": ("oepy.cli.lab", "lab", "The lab that `make demo` uses."),
    "bench": ("oepy.cli.bench", "bench", "The benchmarks."),
}


class LazyGroup(click.Group):
    """Knows its commands by name, imports the one that is called, and prints our errors in one line."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, attribute, _ = COMMANDS[cmd_name]
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, entry[2]) for name, entry in COMMANDS.items()])

    def main(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().main(*args, **kwargs)
        except ConfigError as error:
            for problem in error.problems:
                click.echo(f"oepy: {error.source}: {problem}", err=True)
            sys.exit(error.exit_status)
        except OepyError as error:
            click.echo(f"oepy: {error}", err=True)
            sys.exit(error.exit_status)


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "-c",
    "--config",
    "config_path",
    default=None,
    metavar="FILE",
    help="Configuration file (default: /etc/oepy/oepy.yaml).",
)
@click.version_option(__version__, prog_name="oepy")
@click.pass_context
def main(ctx: click.Context, config_path: str | None) -> None:
    """Opportunistic encryption for IP: keys from DNSSEC, IKEv2, ESP, and no arrangement beforehand."""
    ctx.obj = config_path
