"""`oepy pki`: certificates for a small site."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from pathlib import Path

    from oepy.pki import Authority
    from oepy.x509.certificates import Certificate

DEFAULT_DIRECTORY = "/var/lib/oepy/ca"
# The same as keys.KINDS and issuing.REASONS, spelled out so that --help needs no cryptography.
KINDS = ("ed25519", "ed448", "ecdsa-p256", "ecdsa-p384", "rsa-2048", "rsa-3072", "rsa-4096")
REASONS = ("unspecified", "keyCompromise", "affiliationChanged", "superseded", "cessationOfOperation")
_in_directory = click.option(
    "--dir", "directory", default=DEFAULT_DIRECTORY, show_default=True, help="Directory of the CA."
)
_as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@click.group()
def pki() -> None:
    """A certificate authority for a small site: make it, issue, revoke, and look.

    \b
    oepy pki ca --dn "C=CH, O=Acme, CN=Acme CA" --crl-uri http://pki.acme.example/ca.crl
    oepy key generate ./gw.key
    oepy pki request --key ./gw.key --dn "C=CH, O=Acme, CN=gw" --san gw.acme.example -o gw.req
    oepy pki issue --request gw.req -o gw.pem
    oepy pki verify --ca /var/lib/oepy/ca/ca.pem --id gw.acme.example gw.pem
    """


@pki.command()
@_in_directory
@click.option("--dn", required=True, metavar="NAME", help="Its name, as C=CH, O=Acme, CN=Acme CA.")
@click.option(
    "--type", "kind", type=click.Choice(KINDS), default="ecdsa-p256", show_default=True, help="Kind of key."
)
@click.option(
    "--days", type=click.IntRange(1, 36500), default=3650, show_default=True, help="How long it holds."
)
@click.option("--path-length", type=click.IntRange(0, 6), help="How many CAs may be below it. Default: any.")
@click.option("--above", metavar="DIR", help="Directory of the CA that signs it. Default: it is a root.")
@click.option(
    "--crl-uri", multiple=True, metavar="URL", help="Where its list will be; goes into what it issues."
)
@click.option("--ocsp-uri", multiple=True, metavar="URL", help="Where its OCSP responder is.")
@click.option("--encrypt", is_flag=True, help="Encrypt the key by the passphrase in DIR/ca.key.passphrase.")
@_as_json
def ca(
    *,
    directory: str,
    dn: str,
    kind: str,
    days: int,
    path_length: int | None,
    above: str | None,
    crl_uri: tuple[str, ...],
    ocsp_uri: tuple[str, ...],
    encrypt: bool,
    as_json: bool,
) -> None:
    """Make a CA: its key (0600), its certificate and an empty list, in a directory of its own.

    \b
    oepy pki ca --dn "C=CH, O=Acme, CN=Acme CA"
    oepy pki ca --dir ./branch --dn "O=Acme, CN=Branch CA" --above /var/lib/oepy/ca --path-length 0
    """
    from oepy.x509.issuing import Places

    made = _authority(directory).make(
        *(dn, kind),
        days=days,
        path_length=path_length,
        places=Places(crl_uri, ocsp_uri),
        above=_authority(above) if above else None,
        encrypt=encrypt,
    )
    _tell(made, as_json, f"{directory}/ca.pem")


@pki.command()
@click.option(
    "--key", "key_file", required=True, metavar="FILE", help="The private key, of `oepy key generate`."
)
@click.option("--dn", default="", metavar="NAME", help="The subject, as C=CH, O=Acme, CN=gw.")
@click.option(
    "--san", multiple=True, metavar="NAME|ADDRESS|E-MAIL", help="An alternative name; may be repeated."
)
@click.option("-o", "--output", metavar="FILE", help="Default: standard output.")
def request(*, key_file: str, dn: str, san: tuple[str, ...], output: str | None) -> None:
    """Make a request for a certificate, which any CA takes. The private key stays where it is.

    \b
    oepy pki request --key ./gw.key --dn "O=Acme, CN=gw" --san gw.acme.example --san 192.0.2.1 -o gw.req
    """
    from oepy.keys import HostKey
    from oepy.pki import PEM
    from oepy.x509.issuing import make_request

    _put(output, make_request(dn, san, HostKey.load(key_file)).public_bytes(PEM))


@pki.command()
@_in_directory
@click.option("--request", "request_file", metavar="FILE", help="A request, of `oepy pki request` or others.")
@click.option("--key", "key_file", metavar="FILE", help="Instead of a request: the private key on this host.")
@click.option("--dn", default="", metavar="NAME", help="The subject; instead of the request's.")
@click.option(
    "--san", multiple=True, metavar="NAME|ADDRESS|E-MAIL", help="Alternative names; instead of the request's."
)
@click.option(
    "--days", type=click.IntRange(1, 3650), default=365, show_default=True, help="How long it holds."
)
@click.option("-o", "--output", metavar="FILE", help="Default: standard output.")
@_as_json
def issue(
    *,
    directory: str,
    request_file: str | None,
    key_file: str | None,
    dn: str,
    san: tuple[str, ...],
    days: int,
    output: str | None,
    as_json: bool,
) -> None:
    """Issue a certificate. What goes into it is shown; check a stranger's request before.

    The output has the certificate first, then the CAs between it and the root: what `certs` in a
    connection wants.

    \b
    oepy pki issue --request gw.req -o gw.pem
    oepy pki issue --key ./gw.key --dn "O=Acme, CN=gw" --san gw.acme.example -o gw.pem
    """
    from pathlib import Path

    from oepy.errors import UsageError
    from oepy.keys import HostKey
    from oepy.pki import PEM
    from oepy.x509.issuing import Subject, read_request, subject

    if (request_file is None) == (key_file is None):
        raise UsageError("what is the certificate for?", "give either --request or --key")
    if request_file is not None:
        wanted = read_request(_read(Path(request_file)), request_file)
        asked = subject(dn, san, wanted.key) if dn or san else wanted
        wanted = Subject(asked.name if dn else wanted.name, asked.names if san else wanted.names, wanted.key)
    else:
        assert key_file is not None
        wanted = subject(dn, san, HostKey.load(key_file).private.public_key())
    chain = _authority(directory).issue(wanted, days)
    _put(output, b"".join(one.public_bytes(PEM) for one in chain))
    _tell(chain[0], as_json, output or "")


@pki.command()
@_in_directory
@click.option("--reason", type=click.Choice(REASONS), default="unspecified", show_default=True)
@click.option(
    "--days", type=click.IntRange(1, 365), default=7, show_default=True, help="How long the list holds."
)
@_as_json
@click.argument("which", metavar="FILE|SERIAL")
def revoke(*, directory: str, reason: str, days: int, as_json: bool, which: str) -> None:
    """Revoke a certificate, and sign a new list (DIR/ca.crl), which you then put where peers look.

    \b
    oepy pki revoke gw.pem --reason keyCompromise
    oepy pki revoke 4f2a…              # a serial number of `oepy pki list`
    """
    from pathlib import Path

    from oepy.errors import UsageError
    from oepy.x509.certificates import load

    authority = _authority(directory)
    if Path(which).exists():
        serial = load(which)[0].serial_number
    else:
        try:
            serial = int(which, 16)
        except ValueError:
            raise UsageError(f"{which} is no file and no serial number", "see `oepy pki list`") from None
    gone = authority.revoke(serial, reason)
    authority.sign_list(days)
    if as_json:
        _json(
            {
                "serial": f"{serial:x}",
                "subject": gone.subject,
                "reason": reason,
                "crl": str(authority.crl_file),
            }
        )
    else:
        click.echo(f"revoked: {gone.subject} ({serial:x}); the list is {authority.crl_file}")


@pki.command()
@_in_directory
@click.option(
    "--days", type=click.IntRange(1, 365), default=7, show_default=True, help="How long the list holds."
)
@_as_json
def crl(*, directory: str, days: int, as_json: bool) -> None:
    """Sign the list anew (DIR/ca.crl), before the old one's time is over: say daily, by a timer.

    \b
    oepy pki crl --days 7
    """
    authority = _authority(directory)
    made = authority.sign_list(days)
    assert made.next_update_utc is not None
    until = made.next_update_utc
    if as_json:
        _json({"crl": str(authority.crl_file), "entries": len(made), "until": until.timestamp()})
    else:
        click.echo(f"{authority.crl_file}: {len(made)} revoked, holds until {until:%Y-%m-%d %H:%M} UTC")


@pki.command(name="list")
@_in_directory
@click.option(
    "--soon",
    type=click.IntRange(0, 3650),
    metavar="DAYS",
    help="Only good ones that end within so many days.",
)
@_as_json
def list_(*, directory: str, soon: int | None, as_json: bool) -> None:
    """What was issued here.

    \b
    oepy pki list
    oepy pki list --soon 30 --json
    """
    from oepy.cli.output import print_table

    now = time.time()
    found = _authority(directory).issued()
    if soon is not None:
        found = [one for one in found if one.state(now) == "good" and one.not_after < now + soon * 86400]
    if as_json:
        _json(
            [
                {
                    "serial": f"{one.serial:x}",
                    "subject": one.subject,
                    "names": list(one.names),
                    "not_after": one.not_after,
                    "state": one.state(now),
                    "revoked": one.revoked or None,
                    "reason": one.reason or None,
                }
                for one in found
            ]
        )
        return
    print_table(
        ("SERIAL", "SUBJECT", "NAMES", "UNTIL", "STATE"),
        [
            (
                f"{one.serial:x}",
                one.subject,
                ", ".join(name for name in one.names if name != one.subject),
                f"{datetime.fromtimestamp(one.not_after, UTC):%Y-%m-%d}",
                one.state(now),
            )
            for one in found
        ],
        "nothing was issued here",
    )


@pki.command()
@_as_json
@click.argument("files", nargs=-1, required=True, metavar="FILE...")
def show(*, as_json: bool, files: tuple[str, ...]) -> None:
    """Show certificates: whom they speak for, until when, and who says whether they are revoked.

    \b
    oepy pki show gw.pem
    """
    from oepy.x509.certificates import load

    described = [_describe(one) | {"file": file} for file in files for one in load(file)]
    if as_json:
        _json(described)
        return
    for number, one in enumerate(described):
        if number:
            click.echo()
        for name, value in one.items():
            text = ", ".join(value) if isinstance(value, list) else value
            if name in ("not_before", "not_after"):
                text = f"{datetime.fromtimestamp(value, UTC):%Y-%m-%d %H:%M} UTC"
            click.echo(f"{name:>11}  {text}")


@pki.command()
@click.option(
    "--ca",
    "authorities",
    multiple=True,
    required=True,
    metavar="FILE",
    help="Whom to trust; may be repeated.",
)
@click.option("--id", "identity", metavar="IDENTITY", help="Whom it must speak for. Default: its first name.")
@click.option(
    "--crl", "lists", multiple=True, metavar="FILE", help="A list of a CA of the path; may be repeated."
)
@_as_json
@click.argument("file")
def verify(
    *, authorities: tuple[str, ...], identity: str | None, lists: tuple[str, ...], as_json: bool, file: str
) -> None:
    """Say whether a peer with the certificates in FILE would be accepted, and why not. Nothing is fetched.

    Exit status 1 where it would not.

    \b
    oepy pki verify --ca ca.pem --id gw.acme.example gw.pem
    oepy pki verify --ca ca.pem --crl ca.crl gw.pem
    """
    import sys

    from oepy.errors import UsageError
    from oepy.model import PeerIdentity
    from oepy.x509.certificates import load, subject_of, to_der
    from oepy.x509.identity import identities_of
    from oepy.x509.path import PathError
    from oepy.x509.trust import Trust, accept

    chain = load(file)
    try:
        wanted = PeerIdentity.parse(identity) if identity else next(iter(identities_of(chain[0])), None)
    except (ValueError, UnicodeEncodeError) as error:
        raise UsageError(f"--id: {error}") from None
    if wanted is None:
        raise UsageError(f"{file} speaks for nobody", "a certificate needs a subject or an alternative name")
    trust = Trust.of([one for name in authorities for one in load(name)])
    now = time.time()
    try:
        path = accept(trust, [to_der(one) for one in chain], wanted, now)
        _check_lists(path, lists, now)
        reason = ""
        shown = [subject_of(one) for one in path.certificates]
    except PathError as error:
        reason, shown = str(error), []
    if as_json:
        _json({"accepted": not reason, "id": str(wanted), "reason": reason or None, "path": shown})
    elif reason:
        click.echo(f"{file} as {wanted}: refused: {reason}")
    else:
        click.echo(f"{file} as {wanted}: accepted: {' <- '.join(shown)}")
    sys.exit(1 if reason else 0)


def _check_lists(path: Any, lists: tuple[str, ...], now: float) -> None:
    """Raises PathError where a list names a certificate of the path, or is itself unusable."""
    from pathlib import Path

    from oepy.x509.crl import read_crl
    from oepy.x509.path import PathError
    from oepy.x509.revocation import Standing, Unusable

    for name in lists:
        data, used, reason = _read(Path(name)), False, ""
        for certificate, issuer in path.issued():
            try:
                status = read_crl(data, issuer, now).status(certificate, now)
            except Unusable as error:
                reason = str(error)
                continue
            used = True
            if status.standing is Standing.REVOKED:
                raise PathError(status.text)
        if not used:
            raise PathError(f"{name}: {reason}")


@pki.command()
@click.option(
    "--cert", "certificate_file", required=True, metavar="FILE", help="The certificate, with those above it."
)
@click.option("--key", "key_file", required=True, metavar="FILE", help="Its private key.")
@click.option(
    "--ca", "authorities", multiple=True, metavar="FILE", help="CAs to put in too; may be repeated."
)
@click.option("--passphrase-file", required=True, metavar="FILE", help="The passphrase (mode 0600).")
@click.option("--name", default="oepy", show_default=True, help="What devices show for it.")
@click.option(
    "-o", "--output", required=True, metavar="FILE", help="Written with mode 0600, never over another."
)
def p12(
    *,
    certificate_file: str,
    key_file: str,
    authorities: tuple[str, ...],
    passphrase_file: str,
    name: str,
    output: str,
) -> None:
    """Put certificate and key into one encrypted file (PKCS#12) for phones and other systems.

    \b
    oepy pki p12 --cert phone.pem --key phone.key --ca ca.pem --passphrase-file pass -o phone.p12
    """
    from pathlib import Path

    from cryptography.hazmat.primitives.serialization import BestAvailableEncryption
    from cryptography.hazmat.primitives.serialization.pkcs12 import serialize_key_and_certificates

    from oepy.errors import KeyFormatError
    from oepy.keys import HostKey, to_public_key
    from oepy.privatefile import read_private_file, write_private_file
    from oepy.x509.certificates import load

    key = HostKey.load(key_file)
    chain = load(certificate_file)
    if to_public_key(chain[0].public_key()) != key.public:
        raise KeyFormatError(f"{certificate_file} is not of the key in {key_file}")
    passphrase = read_private_file(Path(passphrase_file)).rstrip(b"\r\n")
    if not passphrase:
        raise KeyFormatError(f"{passphrase_file} is empty")
    others = list(dict.fromkeys([*chain[1:], *(one for file in authorities for one in load(file))]))
    packed = serialize_key_and_certificates(
        name.encode(), key.private, chain[0], others, BestAvailableEncryption(passphrase)
    )
    write_private_file(Path(output), packed)
    click.echo(f"{output}: the key and {len(others) + 1} certificates")


# ---- parts -------------------------------------------------------------------------------------------------


def _authority(directory: str) -> Authority:
    from pathlib import Path

    from oepy.pki import Authority

    return Authority(Path(directory), time.time)


def _read(path: Path) -> bytes:
    from oepy.errors import UsageError
    from oepy.x509.crl import MAX_CRL

    try:
        with path.open("rb") as stream:
            return stream.read(MAX_CRL + 1)
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from None


def _put(output: str | None, data: bytes) -> None:
    from pathlib import Path

    from oepy.pki import write_public_file

    if output is None:
        click.echo(data.decode("ascii"), nl=False)
    else:
        write_public_file(Path(output), data)


def _describe(certificate: Certificate) -> dict[str, Any]:
    from oepy.keys import describe, fingerprint, to_public_key
    from oepy.x509.certificates import subject_of
    from oepy.x509.identity import identities_of
    from oepy.x509.revocation import crl_urls, ocsp_urls

    key = to_public_key(certificate.public_key())
    return {
        "subject": subject_of(certificate),
        "speaks_for": [str(identity) for identity in identities_of(certificate)],
        "issuer": _issuer(certificate),
        "serial": f"{certificate.serial_number:x}",
        "not_before": certificate.not_valid_before_utc.timestamp(),
        "not_after": certificate.not_valid_after_utc.timestamp(),
        "key": describe(key),
        "fingerprint": fingerprint(key),
        "crl": list(crl_urls(certificate)),
        "ocsp": list(ocsp_urls(certificate)),
    }


def _issuer(certificate: Certificate) -> str:
    from oepy import dn

    return dn.to_text(certificate.issuer.public_bytes())


def _tell(certificate: Certificate, as_json: bool, file: str) -> None:
    """On standard error where standard output holds the certificate itself."""
    described = _describe(certificate) | {"file": file or None}
    if as_json and file:
        _json(described)
        return
    until = datetime.fromtimestamp(described["not_after"], UTC)
    speaks = ", ".join(described["speaks_for"])
    text = f"{file or 'issued'}: {described['subject']}; speaks for {speaks}; until {until:%Y-%m-%d}"
    click.echo(text, err=not file)


def _json(value: Any) -> None:
    from oepy.cli.output import print_json

    print_json(value)
