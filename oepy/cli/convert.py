"""`oepy convert`: other systems' configuration to oepy's."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from oepy.cli.output import print_json


@click.command()
@click.argument("files", nargs=-1, required=True, metavar="FILE...")
@click.option(
    "--from",
    "kind",
    type=click.Choice(["auto", "setkey", "ipsec.conf"]),
    default="auto",
    show_default=True,
    help="What the files are: KAME's or ipsec-tools' setkey, or OpenBSD's ipsec.conf.",
)
@click.option(
    "--keys-dir",
    metavar="DIR",
    help="Write each key into a file of its own there (0600) instead of into the output.",
)
@click.option(
    "--allow-weak",
    is_flag=True,
    help="Take weak algorithms over, with `allow_weak: true`, and say so on stderr.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON: sas and policies without keys, and notes.")
def convert(files: tuple[str, ...], kind: str, keys_dir: str | None, allow_weak: bool, as_json: bool) -> None:
    """Print the `manual:` configuration that does what FILE... (`-`: stdin) do.

    Several files are read as if they were one. What oepy cannot express is an error with its file and line; all of
    them are listed, and nothing is printed then (exit status 2). Without --keys-dir the output holds the keys: keep
    it at mode 0600.

    \b
    Examples:
      oepy convert /etc/ipsec-tools.conf --keys-dir /etc/oepy/keys > /etc/oepy/oepy.yaml
      oepy convert --from ipsec.conf /etc/ipsec.conf --json
      umask 077; oepy convert setkey.conf > manual.yaml && oepy sa load manual.yaml
    """
    from oepy.cli.files import ConvertFiles, KeyKeeper
    from oepy.convert.render import render
    from oepy.convert.run import convert as run
    from oepy.errors import ConfigError, UsageError
    from oepy.manual.presenting import policy_mapping, sa_view

    reader = ConvertFiles()
    sources = [(name if name != "-" else "stdin", reader.text(name)) for name in files]
    done = run(sources, None if kind == "auto" else kind, reader, allow_weak=allow_weak)
    for note in done.notes:
        click.echo(f"oepy: note: {note}", err=True)
    if done.problems:
        for problem in done.problems:
            click.echo(f"oepy: {problem}", err=True)
        sys.exit(UsageError.exit_status)
    if not done.manual:
        raise ConfigError(", ".join(files), ["leaves no SA and no policy; there is nothing to convert"])
    if as_json:
        print_json(
            {
                "sas": [sa_view(sa) for _, sa in done.sas],
                "policies": [policy_mapping(policy) for _, policy in done.policies],
                "notes": done.notes,
            }
        )
        return
    keeper = KeyKeeper(Path(keys_dir)) if keys_dir else None
    text = render(done, ", ".join(name for name, _ in sources), keeper.keep if keeper else lambda *_: None)
    if keeper is not None:
        keeper.write()
    click.echo(text, nl=False)
