"""`oepy key`: make, show and change host keys."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from oepy.dns.records import Gateway
    from oepy.model import PublicKey

DEFAULT_PATH = "/var/lib/oepy/host.key"
# The same as keys.KINDS, spelled out so that --help needs no cryptography.
KINDS = ("ed25519", "ed448", "ecdsa-p256", "ecdsa-p384", "rsa-2048", "rsa-3072", "rsa-4096")


@click.group()
def key() -> None:
    """Make and show host keys.

    \b
    oepy key generate
    oepy key show --owner 192.0.2.10
    """


@key.command()
@click.option(
    "--type", "kind", type=click.Choice(KINDS), default="ed25519", show_default=True, help="Kind of key."
)
@click.option(
    "--encrypt",
    is_flag=True,
    help="Encrypt it by the passphrase in PATH.passphrase, or systemd's credential.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the public half as JSON.")
@click.argument("path", default=DEFAULT_PATH)
def generate(*, kind: str, encrypt: bool, as_json: bool, path: str) -> None:
    """Make a private key in PATH (mode 0600, never overwriting) and print its IPSECKEY record.

    With --encrypt the key is useless without its passphrase, which is read from PATH.passphrase
    (mode 0600; a link to another disk will do) or from systemd's credential `oepy-passphrase`.

    \b
    oepy key generate
    oepy key generate --type rsa-3072 ./alpha.key
    oepy key generate --encrypt ./alpha.key
    """
    from pathlib import Path

    from oepy.errors import UsageError
    from oepy.keys import HostKey, read_passphrase

    passphrase = read_passphrase(Path(path)) if encrypt else None
    made = HostKey.generate(kind)
    try:
        Path(path).parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot make {Path(path).parent}: {error.strerror}") from None
    made.save(path, passphrase)
    record = _describe(made.public, None, None, 10) | {"path": path}
    if as_json:
        click.echo(json.dumps(record, indent=2))
    else:
        click.echo(f"{path}: {record['type']}, fingerprint {record['fingerprint']}")
        click.echo(record["ipseckey"])


@key.command()
@click.option(
    "--format",
    "form",
    type=click.Choice(["ipseckey", "txt", "pem", "json"]),
    default="ipseckey",
    show_default=True,
    help="How to print the public key; txt (RFC 4322) needs an RSA key.",
)
@click.option("--json", "as_json", is_flag=True, help="The same as --format json.")
@click.option(
    "--owner", metavar="NAME|ADDRESS", help="Owner of the record; an address means its reverse name."
)
@click.option(
    "--gateway",
    metavar="none|ADDRESS|NAME",
    help="Gateway in the record. Default: the owner's address, else none (the host itself).",
)
@click.option("--precedence", type=click.IntRange(0, 255), default=10, show_default=True)
@click.argument("path", default=DEFAULT_PATH)
def show(
    *, form: str, as_json: bool, owner: str | None, gateway: str | None, precedence: int, path: str
) -> None:
    """Print the public half of the key in PATH.

    \b
    oepy key show --owner 192.0.2.10
    oepy key show --format txt --owner 192.0.2.10 ./rsa.key
    oepy key show --format pem ./alpha.key > alpha.pub
    """
    from oepy.errors import KeyFormatError, UsageError
    from oepy.keys import HostKey, describe, public_pem

    public = HostKey.load(path).public
    record = _describe(public, owner, gateway, precedence) | {"path": path}
    if as_json or form == "json":
        click.echo(json.dumps(record, indent=2))
    elif form == "pem":
        click.echo(public_pem(public), nl=False)
    elif form == "ipseckey":
        click.echo(record["ipseckey"])
    elif record["type"][:3] != "RSA":
        raise KeyFormatError(f"the TXT form needs an RSA key, {path} is {describe(public)}")
    elif "txt" not in record:
        raise UsageError("the TXT form needs a gateway", "give --owner or --gateway")
    else:
        click.echo(record["txt"])


def _describe(public: PublicKey, owner: str | None, gateway: str | None, precedence: int) -> dict[str, Any]:
    from oepy.dns.records import IpsecKey, OeText, build_oe_text, text_rdata
    from oepy.keys import describe, encode, fingerprint
    from oepy.model import KeyAlgorithm

    owner_text, own_gateway = _owner(owner)
    chosen: Gateway = own_gateway if gateway is None else _gateway(gateway)
    ipseckey = IpsecKey(precedence, int(public.algorithm), chosen, public.data)
    record: dict[str, Any] = {
        "type": describe(public),
        "algorithm": int(public.algorithm),
        "public_key": encode(public),
        "fingerprint": fingerprint(public),
        "owner": owner_text,
        "ipseckey": f"{owner_text} IN IPSECKEY {ipseckey.to_text()}",
    }
    # RFC 4322's TXT has no "none": it is the owner's address, or @ its name.
    text_gateway = chosen or own_gateway or (_gateway(owner) if owner else None)
    if public.algorithm is KeyAlgorithm.RSA and text_gateway is not None:
        strings = build_oe_text(OeText(precedence, text_gateway, public))
        record["txt"] = f"{owner_text} IN TXT {text_rdata(strings)}"
    return record


def _owner(owner: str | None) -> tuple[str, Gateway]:
    from ipaddress import ip_address

    from oepy.dns.zonemap import reverse_name

    if owner is None:
        return "@", None
    try:
        address = ip_address(owner)
    except ValueError:
        return str(_gateway(owner)), None
    return str(reverse_name(address)), address


def _gateway(text: str) -> Gateway:
    from ipaddress import ip_address

    import dns.exception
    import dns.name

    from oepy.errors import UsageError

    if text in ("none", "."):
        return None
    try:
        return ip_address(text)
    except ValueError:
        pass
    try:
        return dns.name.from_text(text, dns.name.root)
    except (dns.exception.DNSException, ValueError):
        raise UsageError(f"{text!r} is neither an address nor a domain name") from None


def _add_roll_over() -> None:
    from oepy.cli.rotate import list_keys, rotate

    key.add_command(list_keys)
    key.add_command(rotate)


_add_roll_over()
