"""`oepy key list` and `oepy key rotate`: the keys of this host, and changing them without an outage."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from oepy.cli.publish import _finder, _own_task, _utc
from oepy.errors import DaemonUnreachable, OepyError, UsageError

if TYPE_CHECKING:
    import dns.name
    import dns.tsig

    from oepy.dns.primary import Server
    from oepy.dns.publishing import Published, Task, Verified
    from oepy.keyring import KeyRing, Rotation

POLL_SECONDS = 2.0
DAEMON_SECONDS = 10.0
SLACK_SECONDS = 2.0  # whole seconds in caches, and clocks

_resolver_options = (
    click.option("--resolver-port", type=click.IntRange(1, 65535), default=53, show_default=True),
    click.option("--resolver", "resolvers", multiple=True, metavar="ADDR", help="Resolver to ask."),
    click.option(
        "--trust-anchor", "trust_anchors", multiple=True, metavar="FILE", help="DS or DNSKEY records."
    ),
    click.option("--name", metavar="NAME", help="This host's name (default: identity.id, if it is one)."),
    click.option("--address", "addresses", multiple=True, metavar="ADDR", help="This host's address."),
    click.option("--json", "as_json", is_flag=True, help="Print one JSON object."),
)


def _options(command: Any) -> Any:
    for option in _resolver_options:
        command = option(command)
    return command


def _ring(config_path: str | None) -> KeyRing:
    from oepy.configfile import peek
    from oepy.keyring import KeyRing

    return KeyRing(Path(str(peek(config_path, "identity", "key") or "/var/lib/oepy/host.key")))


@click.command("list")
@_options
@click.option("--no-dns", is_flag=True, help="Do not look where they are published.")
@click.pass_context
def list_keys(ctx: click.Context, /, *, as_json: bool, no_dns: bool, **where: Any) -> None:
    """This host's keys, their state in a roll-over, and where they are published (securely).

    \b
    oepy key list
    """
    from oepy.cli.output import print_table
    from oepy.keys import describe, fingerprint

    ring = _ring(ctx.obj)
    places = {} if no_dns else asyncio.run(_published(ctx.obj, where))
    rotation: Rotation | None = ring.rotation()
    keys = [
        {
            "state": state,
            "file": str(path),
            "type": describe(public),
            "fingerprint": fingerprint(public),
            "published": None if no_dns else [name for name, found in places.items() if public in found],
        }
        for state, path, public in ring.listed()
    ]
    if as_json:
        step = None
        if rotation is not None:
            step = {"step": rotation.step.value, "key": rotation.key}
            step["until"] = _utc(rotation.until) if rotation.until else None  # type: ignore[assignment]
        click.echo(json.dumps({"keys": keys, "rotation": step}, indent=2))
        return
    columns = ("state", "type", "fingerprint", "published", "file")
    print_table(columns, [[row[column] or "-" for column in columns] for row in keys], "no keys")
    if rotation is not None:
        until = f" until {_utc(rotation.until)}" if rotation.until else ""
        click.echo(f"roll-over to {rotation.key}: step {rotation.step}{until}; `oepy key rotate` goes on")


async def _published(config_path: str | None, where: dict[str, Any]) -> dict[str, set[Any]]:
    """The secure keys by each subject that is this host."""
    from oepy.cli.dns import _validator
    from oepy.cli.publish import _is_address, _own_addresses
    from oepy.configfile import peek
    from oepy.dns.build import make_key_source
    from oepy.model import Secure

    identity = str(peek(config_path, "identity", "id") or "")
    subjects = [str(address) for address in _own_addresses(identity, where["addresses"])]
    name = where["name"] or (identity if "@" not in identity and not _is_address(identity) else "")
    source = make_key_source(
        _validator(config_path, where["resolvers"], where["resolver_port"], where["trust_anchors"], None)
    )
    found: dict[str, set[Any]] = {}
    for subject in (*([name] if name else []), *subjects):
        answer = await source.peer_keys(subject)
        found[subject] = {key.key for key in answer.keys} if isinstance(answer, Secure) else set()
    return found


@click.command()
@_options
@click.option(
    "--tsig-file", required=True, metavar="FILE", type=click.Path(path_type=Path), help="TSIG key, mode 0600."
)
@click.option("--server", metavar="ADDR", help="The primary server (default: SOA's MNAME).")
@click.option("--port", type=click.IntRange(1, 65535), default=53, show_default=True, help="Of --server.")
@click.option("--type", "kind", default="ed25519", show_default=True, help="Kind of the new key.")
@click.option("--ttl", type=click.IntRange(0, 2**31 - 1), help="TTL of the records (default: 3600).")
@click.option(
    "--timeout", type=click.IntRange(0), default=600, show_default=True, help="Seconds for all servers."
)
@click.option("--no-wait", is_flag=True, help="Stop where the caches must be waited for; run it again later.")
@click.pass_context
def rotate(ctx: click.Context, /, **options: Any) -> None:
    """Change this host's key without an outage, or go on with an interrupted change.

    The new key is published beside the present one; when all servers and caches have it, it comes into use, and the
    old one is withdrawn. Exit status: 0 when it is done, 1 where it must be run again.

    \b
    oepy key rotate --tsig-file /etc/oepy/tsig.key
    oepy key rotate --tsig-file /etc/oepy/tsig.key --no-wait    # from a timer
    """
    from oepy.dns.tsig import load_tsig

    kinds = ("ed25519", "ed448", "ecdsa-p256", "ecdsa-p384", "rsa-2048", "rsa-3072", "rsa-4096")
    if options["kind"] not in kinds:
        raise UsageError(f"no key type {options['kind']!r}", f"take one of {', '.join(kinds)}")
    rollover = _RollOver(ctx.obj, _ring(ctx.obj), load_tsig(options["tsig_file"]), options)
    done = asyncio.run(rollover.run())
    if options["as_json"]:
        click.echo(json.dumps(done, indent=2))
    if not done["done"]:
        sys.exit(1)


class _RollOver:
    """The steps of `keyring.Step`; each writes the next step's name when it is through."""

    def __init__(
        self, config_path: str | None, ring: KeyRing, key: dns.tsig.Key, options: dict[str, Any]
    ) -> None:
        self._config_path = config_path
        self._ring = ring
        self._key = key
        self._options = options
        self._finder = _finder(config_path, options)

    async def run(self) -> dict[str, Any]:
        from oepy.keyring import Step

        rotation = self._ring.rotation()
        if rotation is None:
            rotation = self._ring.begin(self._options["kind"])
            self._say(f"new key {rotation.key} in {self._ring.next}")
        if rotation.step is Step.PUBLISH:
            rotation = await self._publish(rotation)
        if rotation.step is Step.WAIT:
            left = rotation.until - time.time()
            if left > 0 and self._options["no_wait"]:
                self._say(f"caches may hold what was before until {_utc(rotation.until)}: run it again then")
                return {"done": False, "step": "wait", "key": rotation.key, "until": _utc(rotation.until)}
            rotation = await self._wait(rotation, left)
        if rotation.step is Step.SWITCH:
            rotation = await self._switch(rotation)
        await self._send(await self._task())
        self._ring.finish()
        self._say(f"the old key is withdrawn; {rotation.key} is in use")
        return {"done": True, "step": None, "key": rotation.key, "until": None}

    def _say(self, text: str) -> None:
        click.echo(text, err=self._options["as_json"])

    async def _publish(self, rotation: Rotation) -> Rotation:
        from oepy.dns.peers import MIN_TTL
        from oepy.keyring import Step

        task = await self._task()
        # What caches may hold is measured and kept before it is replaced: after a crash nobody could tell any more
        ahead = await self._send(task, dry_run=True)
        rotation = replace(rotation, cache_seconds=max(rotation.cache_seconds, ahead.cache_seconds))
        self._ring.note(rotation)
        await self._send(task)
        seen = await self._everywhere(task, validated=False)
        if not rotation.cache_seconds:  # published by somebody else: the worst is assumed
            rotation = replace(rotation, cache_seconds=seen.cache_seconds)
        until = time.time() + max(rotation.cache_seconds, MIN_TTL) + SLACK_SECONDS
        rotation = replace(rotation, step=Step.WAIT, until=until)
        self._ring.note(rotation)
        self._say(f"every server has it; caches have it by {_utc(until)}")
        return rotation

    async def _wait(self, rotation: Rotation, seconds: float) -> Rotation:
        from oepy.keyring import Step

        await asyncio.sleep(max(0.0, seconds))
        await self._everywhere(await self._task(), validated=True)
        rotation = replace(rotation, step=Step.SWITCH)
        self._ring.note(rotation)
        return rotation

    async def _switch(self, rotation: Rotation) -> Rotation:
        from oepy.keyring import Step

        self._ring.switch()
        await self._daemon_takes(rotation.key)
        self._say(f"{rotation.key} is in use")
        rotation = replace(rotation, step=Step.WITHDRAW)
        self._ring.note(rotation)
        return rotation

    async def _daemon_takes(self, key: str) -> None:
        """Have a running daemon load the new key. Raises OepyError where it does not: then the old one stays
        published, so that what it proves can be found."""
        from oepy.cli.output import socket_path
        from oepy.control import protocol
        from oepy.control.client import ControlClient

        client = ControlClient(socket_path(self._config_path))
        deadline = time.monotonic() + DAEMON_SECONDS
        asked = False
        with contextlib.suppress(DaemonUnreachable):  # it will load the new key when it starts
            while time.monotonic() < deadline:
                status = client.get(protocol.STATUS)
                if status["key"]["file"] != str(self._ring.path) or status["key"]["fingerprint"] == key:
                    return
                if not asked:
                    os.kill(int(status["pid"]), signal.SIGHUP)
                    asked = True
                await asyncio.sleep(0.2)
            raise OepyError(
                "the daemon still proves the old key (`oepy events` may say why)",
                "restart it, then run `oepy key rotate` again",
            )

    # ---- the zones ---------------------------------------------------------------------------------------

    async def _task(self) -> Task:
        options = self._options
        return await _own_task(
            self._config_path, self._finder, (), options["ttl"], options["name"], options["addresses"]
        )

    async def _send(self, task: Task, *, dry_run: bool = False) -> Published:
        from oepy.cli.dns import _address
        from oepy.dns.primary import Server
        from oepy.dns.publishing import Publisher
        from oepy.model import MARK_OWN

        async def connect(zone: dns.name.Name) -> Server:
            text = self._options["server"]
            if text is not None:
                return Server(_address(text), self._options["port"], self._key, MARK_OWN)
            addresses = await self._finder.addresses_of(await self._finder.primary_of(zone))
            return Server(addresses[0], self._options["port"], self._key, MARK_OWN)

        result = await Publisher(connect, dry_run=dry_run).run(task.chunks())
        if result.conflicts:
            raise OepyError(f"the keys cannot be published: {result.conflicts[0]}")
        return result

    async def _everywhere(self, task: Task, *, validated: bool) -> Verified:
        """Wait until every authoritative server (and the validator) has all keys. Raises OepyError."""
        from oepy.cli.dns import _validator
        from oepy.dns.publishing import Verifier

        options = self._options
        resolver = (options["resolvers"], options["resolver_port"], options["trust_anchors"])
        deadline = time.monotonic() + options["timeout"]
        while True:
            validator = _validator(self._config_path, *resolver, None) if validated else None
            seen = await Verifier(self._finder.authorities_of, validator).run(task.chunks())
            if seen.all_right:
                return seen
            if time.monotonic() >= deadline:
                wrong = [view for view in seen.views.values() if not view.is_right]
                what = "; ".join(f"{v.server}: {v.error or ', '.join(v.details)}" for v in wrong[:3])
                raise OepyError(
                    f"the keys are not everywhere ({what or 'no zone takes them'})",
                    "mend it, then run it again; the present key stays in use",
                )
            await asyncio.sleep(POLL_SECONDS)
