"""`oepy pki`: a small site's certificates, from the CA to the list, also as OpenSSL sees them."""

from __future__ import annotations

import json
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import pkcs12

from oepy.cli import main
from oepy.errors import UsageError
from oepy.pki import PEM, Authority
from oepy.x509.certificates import from_pem
from oepy.x509.issuing import Places, read_request, subject
from tests.fakes.certificates import Holder

Run = Callable[..., Result]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """`oepy …` in an empty directory; `fails` is what the error must say."""
    monkeypatch.chdir(tmp_path)

    def command(*words: str, fails: str = "", code: int | None = None) -> Result:
        result = CliRunner().invoke(main, ["pki", *words])
        assert (result.exit_code != 0) is bool(fails or code), result.output
        assert fails in result.output
        return result

    return command


def key(name: str, kind: str = "ecdsa-p256") -> str:
    result = CliRunner().invoke(main, ["key", "generate", "--type", kind, name])
    assert result.exit_code == 0, result.output
    return name


def openssl(*words: str) -> str:
    result = subprocess.run(["openssl", *words], capture_output=True, text=True, check=False, timeout=30)
    return result.stdout + result.stderr


def output(result: Result) -> Any:
    return json.loads(result.stdout)


@pytest.mark.parametrize("kind", ["ecdsa-p256", "ecdsa-p384", "rsa-2048", "ed25519", "ed448"])
def test_from_the_ca_to_the_list(run: Run, tmp_path: Path, kind: str) -> None:
    """Made, asked for, issued, accepted by us and by OpenSSL, revoked, refused by both."""
    run(
        "ca",
        "--dir",
        "ca",
        "--dn",
        "C=CH, O=Acme, CN=Acme CA",
        "--type",
        kind,
        "--crl-uri",
        "http://a.example/l",
    )
    assert stat.S_IMODE((tmp_path / "ca" / "ca.key").stat().st_mode) == 0o600
    names = (
        "--san",
        "gw.acme.example",
        "--san",
        "192.0.2.1",
        "--san",
        "2001:db8::1",
        "--san",
        "gw@acme.example",
    )
    run("request", "--key", key("gw.key", kind), "--dn", "C=CH, O=Acme, CN=gw", *names, "-o", "gw.req")
    told = run("issue", "--dir", "ca", "--request", "gw.req", "-o", "gw.pem").output
    assert "C=CH, O=Acme, CN=gw" in told
    for identity in ("gw.acme.example", "192.0.2.1", "2001:db8::1", "gw@acme.example", "C=CH, O=acme, CN=GW"):
        run("verify", "--ca", "ca/ca.pem", "--id", identity, "--crl", "ca/ca.crl", "gw.pem")
    run("verify", "--ca", "ca/ca.pem", "--id", "other.example", "gw.pem", fails="it speaks for", code=1)
    check = (
        "verify",
        "-CAfile",
        "ca/ca.pem",
        "-CRLfile",
        "ca/ca.crl",
        "-crl_check",
        "-x509_strict",
        "gw.pem",
    )
    assert "gw.pem: OK" in openssl(*check)
    assert "http://a.example/l" in openssl("x509", "-in", "gw.pem", "-noout", "-text")
    run("revoke", "--dir", "ca", "gw.pem", "--reason", "keyCompromise")
    assert "revoked" in openssl(*check)
    run("verify", "--ca", "ca/ca.pem", "--crl", "ca/ca.crl", "gw.pem", fails="was revoked", code=1)
    (listed,) = output(run("list", "--dir", "ca", "--json"))
    assert (listed["state"], listed["reason"]) == ("revoked", "keyCompromise")
    assert set(listed["names"]) >= {"gw.acme.example", "192.0.2.1", "2001:db8::1", "gw@acme.example"}
    run("revoke", "--dir", "ca", "gw.pem", fails="revoked already")


def test_a_ca_below_a_ca(run: Run) -> None:
    """The chain travels with the certificate; the length that the root allows is kept to."""
    run("ca", "--dir", "root", "--dn", "CN=Root", "--path-length", "1")
    run("ca", "--dir", "branch", "--dn", "CN=Branch", "--above", "root", "--path-length", "0")
    run("issue", "--dir", "branch", "--key", key("gw.key"), "--san", "gw.example", "-o", "gw.pem")
    assert [one["subject"] for one in output(run("show", "--json", "gw.pem"))] == ["gw.example", "CN=Branch"]
    shown = run("verify", "--ca", "root/ca.pem", "gw.pem").output
    assert "gw.example <- CN=Branch <- CN=Root" in shown
    run("ca", "--dir", "leaf", "--dn", "CN=Too deep", "--above", "branch")
    run("issue", "--dir", "leaf", "--key", "gw.key", "--san", "gw.example", "-o", "deep.pem")
    run("verify", "--ca", "root/ca.pem", "deep.pem", fails="path length", code=1)


def test_an_encrypted_ca(run: Run, tmp_path: Path) -> None:
    (tmp_path / "ca").mkdir()
    (tmp_path / "ca" / "ca.key.passphrase").touch(0o600)
    (tmp_path / "ca" / "ca.key.passphrase").write_text("correct horse\n")
    run("ca", "--dir", "ca", "--dn", "CN=Acme CA", "--encrypt")
    assert b"ENCRYPTED" in (tmp_path / "ca" / "ca.key").read_bytes()
    run("issue", "--dir", "ca", "--key", key("gw.key"), "--san", "gw.example", "-o", "gw.pem")
    (tmp_path / "ca" / "ca.key.passphrase").unlink()
    run("issue", "--dir", "ca", "--key", "gw.key", "--san", "gw.example", fails="there is no passphrase")


def test_certificate_and_key_in_one_file(run: Run, tmp_path: Path) -> None:
    run("ca", "--dir", "ca", "--dn", "CN=Acme CA")
    run("issue", "--dir", "ca", "--key", key("gw.key"), "--san", "gw.example", "-o", "gw.pem")
    (tmp_path / "pass").touch(0o600)
    (tmp_path / "pass").write_text("open sesame\n")
    words = ("p12", "--cert", "gw.pem", "--ca", "ca/ca.pem", "--passphrase-file", "pass", "-o", "gw.p12")
    run(*words, "--key", "gw.key")
    assert stat.S_IMODE((tmp_path / "gw.p12").stat().st_mode) == 0o600
    found = pkcs12.load_pkcs12((tmp_path / "gw.p12").read_bytes(), b"open sesame")
    assert found.cert is not None
    assert found.cert.certificate == from_pem((tmp_path / "gw.pem").read_bytes(), "")[0]
    assert len(found.additional_certs) == 1
    run(*words, "--key", "gw.key", fails="exists")
    run(*words, "--key", key("other.key"), fails="is not of the key")


def test_what_a_request_cannot_have(run: Run, tmp_path: Path) -> None:
    """It gives names and a key; what the certificate is good for, the CA says. A bent one is nobody's."""
    run("ca", "--dir", "ca", "--dn", "CN=Acme CA")
    run("request", "--key", key("gw.key"), "--dn", "CN=gw", "--san", "gw.example", "-o", "gw.req")
    request = x509.load_pem_x509_csr((tmp_path / "gw.req").read_bytes())
    builder = x509.CertificateSigningRequestBuilder().subject_name(request.subject)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    holder = Holder("x")
    (tmp_path / "ca.req").write_bytes(builder.sign(holder.key, hashes.SHA256()).public_bytes(PEM))
    run("issue", "--dir", "ca", "--request", "ca.req", "-o", "ca.pem")
    (made, *_) = from_pem((tmp_path / "ca.pem").read_bytes(), "")
    assert not made.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    der = bytearray(request.public_bytes(PEM.__class__.DER))
    der[-1] ^= 1
    bent = x509.load_der_x509_csr(bytes(der)).public_bytes(PEM)
    with pytest.raises(UsageError, match="not signed by its own key"):
        read_request(bent, "bent.req")
    (tmp_path / "none.req").write_text("nothing")
    run("issue", "--dir", "ca", "--request", "none.req", fails="holds no certificate request")


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("ca", "--dir", "ca", "--dn", "Acme"), "write it like CN=gw.example"),
        (("ca", "--dir", "ca", "--dn", "C=Switzerland"), "C=Switzerland"),
        (("issue", "--dir", "none", "--key", "gw.key", "--san", "gw.example"), "holds no CA"),
        (("issue", "--dir", "none"), "give either --request or --key"),
        (("issue", "--dir", "none", "--key", "gw.key"), "needs a name"),
        (("issue", "--dir", "none", "--key", "gw.key", "--san", "CN=a"), "give it with --dn"),
        (("revoke", "--dir", "none", "xyz"), "no file and no serial number"),
        (("revoke", "--dir", "none", "abc"), "make a CA"),
        (("show", "none.pem"), "No such file"),
        (("verify", "--ca", "none.pem", "none.pem"), "No such file"),
    ],
)
def test_mistakes_are_named(run: Run, words: tuple[str, ...], text: str) -> None:
    key("gw.key")
    run(*words, fails=text)


def test_a_second_ca_does_not_replace_the_first(run: Run, tmp_path: Path) -> None:
    run("ca", "--dir", "ca", "--dn", "CN=Acme CA")
    before = (tmp_path / "ca" / "ca.pem").read_bytes()
    run("ca", "--dir", "ca", "--dn", "CN=Other CA", fails="holds a CA already")
    assert (tmp_path / "ca" / "ca.pem").read_bytes() == before


def test_a_crash_while_the_index_is_written_loses_nothing(tmp_path: Path) -> None:
    """A last line without its end is dropped by the next deed; everything before it stays."""
    authority = Authority(tmp_path / "ca", lambda: 1_790_000_000.0)
    authority.make("CN=CA", "ed25519", days=10, path_length=None, places=Places())
    wanted = subject("CN=a", (), Holder("a").key.public_key())
    first = authority.issue(wanted, 5)[0]
    index = tmp_path / "ca" / "index"
    whole = index.read_bytes()
    index.write_bytes(whole + b'{"serial": "12')
    assert [one.serial for one in authority.issued()] == [first.serial_number]
    second = authority.issue(wanted, 5)[0]
    assert index.read_bytes().startswith(whole)
    assert [one.serial for one in authority.issued()] == [first.serial_number, second.serial_number]
    index.write_bytes(b"nonsense\n" + whole)
    with pytest.raises(UsageError, match="line 1 cannot be read"):
        authority.issued()


def test_certificates_end_with_their_ca_and_lists_forget_the_expired(tmp_path: Path) -> None:
    now = [1_790_000_000.0]
    authority = Authority(tmp_path / "ca", lambda: now[0])
    ca = authority.make("CN=CA", "ed25519", days=10, path_length=None, places=Places())
    made = authority.issue(subject("CN=a", (), Holder("a").key.public_key()), 100)[0]
    assert made.not_valid_after_utc == ca.not_valid_after_utc
    short = authority.issue(subject("CN=b", (), Holder("b").key.public_key()), 1)[0]
    authority.revoke(short.serial_number, "superseded")
    numbers = [authority.sign_list(1)]
    assert len(numbers[0]) == 1
    now[0] += 2 * 86400
    numbers.append(authority.sign_list(1))
    assert len(numbers[1]) == 0
    first, second = (
        one.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number for one in numbers
    )
    assert second > first
    now[0] += 20 * 86400
    with pytest.raises(UsageError, match="the CA has expired"):
        authority.issue(subject("CN=c", (), Holder("c").key.public_key()), 1)
