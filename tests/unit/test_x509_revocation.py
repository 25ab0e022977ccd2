"""Revocation lists and OCSP responses: right ones, and wrong in every way; what is asked of whom, and when not."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.x509 import ocsp
from cryptography.x509.oid import ExtendedKeyUsageOID
from hypothesis import given
from hypothesis import strategies as st

from oepy.connections.model import Authority
from oepy.daemon import crlreader
from oepy.daemon.crlreader import read_long_crl
from oepy.daemon.revocation import CHECK_SECONDS, RETRY_SECONDS, Fetch, FetchFailed, Revocation
from oepy.x509.certificates import Certificate
from oepy.x509.crl import MAX_CRL, Crl, read_crl
from oepy.x509.path import Path
from oepy.x509.revocation import Standing, Unusable, crl_urls, is_signed_by, ocsp_urls, read_ocsp
from tests.fakes.certificates import (
    NOW,
    Holder,
    ocsp_response,
    points,
    responder,
    revocation_list,
    usage,
)
from tests.fakes.clock import run_virtual

LIST, ASK = "http://ca.example/crl", "http://ca.example/ocsp"
ROOT = Holder("Root")
GOOD = Holder("good", ROOT, ca=False, extensions=[points(LIST)])
BAD = Holder("bad", ROOT, ca=False, extensions=[points(LIST)])
ASKED = Holder("asked", ROOT, ca=False, extensions=[responder(ASK), points(LIST)])
ALONE = Holder("alone", ROOT, ca=False)


# ---- lists --------------------------------------------------------------------------------------------------


def standing(crl: Crl, holder: Holder, now: float = NOW) -> Standing:
    return crl.status(holder.certificate, now).standing


def test_a_list_tells_good_from_revoked() -> None:
    crl = read_crl(revocation_list(ROOT, BAD, ASKED), ROOT.certificate, NOW)
    assert standing(crl, GOOD) is Standing.GOOD
    assert standing(crl, BAD) is standing(crl, ASKED) is Standing.REVOKED
    assert "CN=bad was revoked 2026-09-" in crl.status(BAD.certificate, NOW).text
    assert Crl.unpack(crl.pack(), ROOT.certificate) == crl
    with pytest.raises(Unusable, match="out of date"):
        crl.status(GOOD.certificate, NOW + 2 * 86400)


def test_pem_is_read_too_and_eddsa_signs() -> None:
    root = Holder("Root", key=ed25519.Ed25519PrivateKey.generate())
    der = revocation_list(root, BAD)
    pem = x509.load_der_x509_crl(der).public_bytes(serialization.Encoding.PEM)
    assert read_crl(pem, root.certificate, NOW) == read_crl(der, root.certificate, NOW)


_DELTA = (x509.DeltaCRLIndicator(1), True)


def _point(**more: bool) -> tuple[x509.ExtensionType, bool]:
    names = (
        "only_contains_user_certs",
        "only_contains_ca_certs",
        "indirect_crl",
        "only_contains_attribute_certs",
    )
    fields = dict.fromkeys(names, False) | more
    return x509.IssuingDistributionPoint(
        full_name=None if more else [x509.UniformResourceIdentifier("http://other.example/crl")],
        relative_name=None,
        only_some_reasons=None,
        **fields,
    ), True


@pytest.mark.parametrize(
    ("data", "issuer", "why"),
    [
        (b"", ROOT, "cannot be read"),
        (b"-----BEGIN X509 CRL-----\n", ROOT, "cannot be read"),
        (bytes(MAX_CRL + 1), ROOT, "over the limit"),
        (revocation_list(ROOT, start=-3, end=-1), ROOT, "out of date"),
        (revocation_list(ROOT, start=1, end=2), ROOT, "from the future"),
        (revocation_list(Holder("Other")), ROOT, "another CA's list"),
        (revocation_list(ROOT, key=ec.generate_private_key(ec.SECP256R1())), ROOT, "not signed by CN=Root"),
        (revocation_list(ROOT, extensions=[_DELTA]), ROOT, "not understood"),
        (revocation_list(ROOT, extensions=[_point(indirect_crl=True)]), ROOT, "of other issuers"),
    ],
)
def test_lists_that_say_nothing(data: bytes, issuer: Holder, why: str) -> None:
    with pytest.raises(Unusable, match=why):
        read_crl(data, issuer.certificate, NOW)


def test_signatures_over_sha1_count_for_nothing() -> None:
    with pytest.raises(Unusable, match="can be forged"):
        is_signed_by(ROOT.certificate.public_key(), b"", b"", hashes.SHA1())


def test_a_ca_whose_key_may_not_sign_lists() -> None:
    root = Holder("Root", extensions=[(usage(key_cert_sign=True), True)])
    with pytest.raises(Unusable, match="may not sign lists"):
        read_crl(revocation_list(root), root.certificate, NOW)


@pytest.mark.parametrize(
    ("extension", "why"),
    [
        (_point(only_contains_ca_certs=True), "other kinds"),
        (_point(), "another distribution point"),
    ],
)
def test_lists_for_other_certificates(extension: tuple[x509.ExtensionType, bool], why: str) -> None:
    crl = read_crl(revocation_list(ROOT, extensions=[extension]), ROOT.certificate, NOW)
    with pytest.raises(Unusable, match=why):
        crl.status(GOOD.certificate, NOW)


@given(st.binary(max_size=200))
def test_no_bytes_do_harm(data: bytes) -> None:
    with pytest.raises(Unusable):
        read_crl(data, ROOT.certificate, NOW)
    with pytest.raises(Unusable):
        read_ocsp(data, GOOD.certificate, ROOT.certificate, NOW)


_WHOLE, _ANSWER = revocation_list(ROOT, BAD), ocsp_response(ASKED, ROOT)


@given(st.integers(0, len(_WHOLE) - 1), st.integers(1, 255))
def test_no_bent_list_says_that_all_is_well(at: int, change: int) -> None:
    """One byte of a list that revokes is changed: it still revokes, or says nothing."""
    data = bytearray(_WHOLE)
    data[at] ^= change
    try:
        found = read_crl(bytes(data), ROOT.certificate, NOW).status(BAD.certificate, NOW)
    except Unusable:
        return
    assert found.standing is Standing.REVOKED


# ---- OCSP ---------------------------------------------------------------------------------------------------

_SIGNING = (x509.ExtendedKeyUsage([ExtendedKeyUsageOID.OCSP_SIGNING]), False)
DELEGATE = Holder("Responder", ROOT, ca=False, extensions=[_SIGNING])


FOREIGN = Holder("Responder", Holder("Root"), ca=False, extensions=[_SIGNING])
FORMER = Holder("Responder", ROOT, ca=False, start=-3, end=-1, extensions=[_SIGNING])


def test_responses_of_the_ca_and_of_its_responder() -> None:
    revoked = ocsp.OCSPCertStatus.REVOKED
    for more in ({}, {"named": False}, {"signer": DELEGATE}, {"signer": DELEGATE, "named": False}):
        found = read_ocsp(ocsp_response(ASKED, ROOT, **more), ASKED.certificate, ROOT.certificate, NOW)
        assert found.standing is Standing.GOOD
        found = read_ocsp(
            ocsp_response(ASKED, ROOT, revoked, **more), ASKED.certificate, ROOT.certificate, NOW
        )
        assert found.standing is Standing.REVOKED
        assert "CN=asked was revoked" in found.text


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "cannot be read"),
        (bytes(70_000), "over the limit"),
        (ocsp_response(GOOD, ROOT), "about another certificate"),
        (ocsp_response(ASKED, Holder("Root")), "about another certificate"),
        (ocsp_response(ASKED, ROOT, ocsp.OCSPCertStatus.UNKNOWN), "does not know"),
        (ocsp_response(ASKED, ROOT, start=-3, end=-1), "out of date"),
        (ocsp_response(ASKED, ROOT, start=-2, end=None), "out of date"),
        (ocsp_response(ASKED, ROOT, start=1, end=2), "from the future"),
        (ocsp_response(ASKED, ROOT, signer=Holder("Root"), attach=False), "not signed by CN=Root"),
        (ocsp_response(ASKED, ROOT, signer=GOOD), "not for OCSP"),
        (ocsp_response(ASKED, ROOT, signer=FOREIGN), "not by CN=Root"),
        (ocsp_response(ASKED, ROOT, signer=FORMER), "expired"),
        (
            ocsp.OCSPResponseBuilder.build_unsuccessful(ocsp.OCSPResponseStatus.TRY_LATER).public_bytes(
                serialization.Encoding.DER
            ),
            "TRY_LATER",
        ),
    ],
)
def test_responses_that_say_nothing(data: bytes, why: str) -> None:
    with pytest.raises(Unusable, match=why):
        read_ocsp(data, ASKED.certificate, ROOT.certificate, NOW)


@given(st.integers(0, len(_ANSWER) - 1), st.integers(1, 255))
def test_no_bent_response_says_anything_else(at: int, change: int) -> None:
    data = bytearray(_ANSWER)
    data[at] ^= change
    try:
        found = read_ocsp(bytes(data), ASKED.certificate, ROOT.certificate, NOW)
    except Unusable:
        return
    assert found.standing is Standing.GOOD


def test_only_what_can_be_fetched_is() -> None:
    """No files of this host, no https, nothing overlong."""
    urls = ["file:///etc/passwd", "https://ca.example/x", "http://", "ftp://a/b", "http://a/" + "x" * 2000]
    holder = Holder("h", ROOT, ca=False, extensions=[points(*urls, LIST), responder(*urls, ASK)])
    assert crl_urls(holder.certificate) == (LIST,)
    assert ocsp_urls(holder.certificate) == (ASK,)
    assert (
        len(
            crl_urls(
                Holder(
                    "h", ROOT, ca=False, extensions=[points(*(f"{LIST}{n}" for n in range(99)))]
                ).certificate
            )
        )
        == 4
    )


# ---- who is asked -------------------------------------------------------------------------------------------


@dataclass
class Web:
    """What URLs lead to; an exception is raised, a number is waited for."""

    pages: dict[str, bytes | float | Exception] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    now: float = NOW

    async def fetch(self, wanted: Fetch) -> bytes:
        self.asked.append(wanted.url)
        page = self.pages.get(wanted.url, FetchFailed("the server answers 404"))
        if isinstance(page, float):
            await asyncio.sleep(page)
            return b""
        if isinstance(page, Exception):
            raise page
        return page

    def made(self) -> Revocation:
        return Revocation(self.fetch, read_long_crl, lambda: self.now)


def path(*holders: Holder) -> Path:
    return Path(tuple(one.certificate for one in holders))


async def objection(
    web: Web, what: Revocation, holder: Holder, policy: str = "strict", *responses: bytes
) -> str:
    return await what.objection(path(holder, ROOT), policy, responses)


def check(make: Callable[[Web, Revocation], object]) -> None:
    async def main() -> None:
        web = Web()
        await make(web, web.made())  # type: ignore[misc]

    run_virtual(main())


def test_a_list_is_fetched_once() -> None:
    async def run(web: Web, what: Revocation) -> None:
        web.pages[LIST] = revocation_list(ROOT, BAD)
        assert await asyncio.gather(*(objection(web, what, one) for one in (GOOD, GOOD, ALONE))) == [
            "",
            "",
            "nobody could say whether CN=alone is revoked: its CA names neither a responder nor a list",
        ]
        assert "CN=bad was revoked" in await objection(web, what, BAD, "relaxed")
        assert web.asked == [LIST]
        web.now += 2 * 86400
        web.pages[LIST] = FetchFailed("gone")
        assert "gone" in await objection(web, what, GOOD)

    check(run)


def test_what_holds_is_used_while_its_server_is_away() -> None:
    async def run(web: Web, what: Revocation) -> None:
        web.pages[LIST] = revocation_list(ROOT, end=9)
        assert await objection(web, what, GOOD) == ""
        web.pages[LIST] = FetchFailed("away")
        web.now += 3 * 86400
        assert await objection(web, what, Holder("new", ROOT, ca=False, extensions=[points(LIST)])) == ""
        assert web.asked == [LIST, LIST]

    check(run)


@pytest.mark.parametrize(
    ("holder", "policy", "refused"),
    [
        (GOOD, "strict", True),
        (GOOD, "ifuri", True),
        (GOOD, "relaxed", False),
        (ALONE, "strict", True),
        (ALONE, "ifuri", False),
        (ALONE, "relaxed", False),
    ],
)
def test_policies_when_nobody_answers(holder: Holder, policy: str, refused: bool) -> None:
    async def run(web: Web, what: Revocation) -> None:
        assert bool(await objection(web, what, holder, policy)) is refused

    check(run)


def test_ocsp_comes_first_then_the_list() -> None:
    async def run(web: Web, what: Revocation) -> None:
        web.pages[ASK] = ocsp_response(ASKED, ROOT)
        assert await objection(web, what, ASKED) == ""
        assert web.asked == [ASK]
        other = web.made()
        web.pages = {ASK: b"nonsense", LIST: revocation_list(ROOT, ASKED)}
        assert "revoked" in await objection(web, other, ASKED)
        assert web.asked == [ASK, ASK, LIST]

    check(run)


def test_a_peers_own_response_spares_the_question() -> None:
    """RFC 4806: what it sends counts as if it were asked for; what is somebody else's, or stale, does not."""

    async def run(web: Web, what: Revocation) -> None:
        assert await objection(web, what, ASKED, "strict", ocsp_response(ASKED, ROOT)) == ""
        assert web.asked == []
        other = web.made()
        bad = (ocsp_response(GOOD, ROOT), ocsp_response(ASKED, ROOT, start=-3, end=-2))
        assert "nobody could say" in await objection(web, other, ASKED, "strict", *bad)

    check(run)


def test_a_hanging_server_costs_its_own_peers_a_moment_and_nobody_else() -> None:
    """Others are answered meanwhile; the next one does not wait for it again; later it is tried again."""

    async def run(web: Web, what: Revocation) -> None:
        loop = asyncio.get_running_loop()
        hanging = "http://slow.example/crl"
        slow = Holder("slow", ROOT, ca=False, extensions=[points(hanging)])
        web.pages = {hanging: 1e6, LIST: revocation_list(ROOT)}
        begun = loop.time()
        waiting = asyncio.create_task(objection(web, what, slow))
        assert await objection(web, what, GOOD) == ""
        assert loop.time() - begun < 1
        assert "no answer within" in await waiting
        assert loop.time() - begun <= CHECK_SECONDS
        begun = loop.time()
        assert "not tried again yet" in await objection(web, what, slow)
        assert loop.time() == begun
        web.now += RETRY_SECONDS
        web.pages[hanging] = revocation_list(ROOT)
        assert await objection(web, what, slow) == ""

    check(run)


def test_many_hanging_servers_are_given_up_together() -> None:
    async def run(web: Web, what: Revocation) -> None:
        urls = [f"http://slow{number}.example/crl" for number in range(4)]
        web.pages = dict.fromkeys(urls, 1e6)
        holder = Holder("slow", ROOT, ca=False, extensions=[points(*urls)])
        begun = asyncio.get_running_loop().time()
        assert "took too long" in await objection(web, what, holder)
        assert asyncio.get_running_loop().time() - begun <= CHECK_SECONDS

    check(run)


def test_intermediate_certificates_are_asked_about_too() -> None:
    async def run(web: Web, what: Revocation) -> None:
        middle = Holder("Middle", ROOT, extensions=[points(LIST)])
        leaf = Holder("leaf", middle, ca=False, extensions=[points("http://ca.example/middle")])
        web.pages = {LIST: revocation_list(ROOT, middle), "http://ca.example/middle": revocation_list(middle)}
        assert "CN=Middle was revoked" in await what.objection(path(leaf, middle, ROOT), "relaxed", ())

    check(run)


def test_what_is_configured_of_a_ca_is_asked_first() -> None:
    async def run(web: Web, what: Revocation) -> None:
        own = "file:///etc/oepy/root.crl"

        def known(certificate: Certificate) -> Authority:
            return Authority("ca.pem", (own,)) if certificate == ROOT.certificate else Authority("")

        what.begin_anew(known)
        web.pages[own] = revocation_list(ROOT, ALONE)
        assert "CN=alone was revoked" in await objection(web, what, ALONE)
        assert web.asked == [own]

    check(run)


def test_long_lists_are_read_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a process of its own, with the same result and the same refusals."""
    monkeypatch.setattr(crlreader, "INLINE", 10)

    async def main() -> None:
        data = revocation_list(ROOT, BAD)
        assert await read_long_crl(data, ROOT.certificate, NOW) == read_crl(data, ROOT.certificate, NOW)
        for wrong, why in ((data[:-1], "cannot be read"), (revocation_list(Holder("Other")), "another CA's")):
            with pytest.raises(Unusable, match=why):
                await read_long_crl(wrong, ROOT.certificate, NOW)

    asyncio.run(main())
