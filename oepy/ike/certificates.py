"""Certificates in the handshake: what is sent, what is asked for, what came (RFC 7296 §3.6–3.7, RFC 4945 §3.3).
Only carried here: who is trusted, the daemon says (NeedPeerKey, NeedStatus)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from oepy.ike.events import NeedStatus, Refused
from oepy.ike.flow import Questions
from oepy.ike.header import PayloadType
from oepy.ike.payload_cert import CertData, CertEncoding, CertRequest, build_cert, build_certreq
from oepy.ike.payloads import Payload

if TYPE_CHECKING:
    from oepy.ike.message import Message
    from oepy.ike.session import Session
    from oepy.ike.settings import Certificates

MAX_NAMED = 8  # CAs that a request names; IKE_SA_INIT cannot be fragmented, and must not be an amplifier


def requests(certificates: Certificates) -> list[Payload]:
    """CERTREQ, where certificates are wanted. Of too many CAs none is named, which asks for whatever there is."""
    if not certificates.ask:
        return []
    named = certificates.authorities if len(certificates.authorities) <= MAX_NAMED else ()
    wanted = [CertRequest(CertEncoding.X509, named)]
    if certificates.ask_status:
        wanted.append(CertRequest(CertEncoding.OCSP))
    return [(PayloadType.CERTREQ, build_certreq(request)) for request in wanted]


def asked_for(message: Message) -> frozenset[int]:
    """Encodings that the peer wants; which CAs it names is no more than a hint."""
    found = message.chain.parsed.get(PayloadType.CERTREQ, ())
    return frozenset(item.encoding for item in found if isinstance(item, CertRequest))


def own_auth(wanted: str, asked: frozenset[int]) -> str:
    """`Initiate.own_auth`, when it is known what the peer asks for."""
    if wanted != "if-asked":
        return wanted
    return "pubkey" if CertEncoding.X509 in asked else "null"


def own(certificates: Certificates, asked: frozenset[int], *, unproven: bool = False) -> list[Payload]:
    """CERT, our own first (RFC 7296 §3.6), then those that lead to the root, then what a responder says of it.
    `unproven`: the peer proves nothing itself."""
    wanted = CertEncoding.X509 in asked or (unproven and certificates.send == "unproven")
    if certificates.send == "never" or not (wanted or certificates.send == "always"):
        return []
    shown = [CertData(CertEncoding.X509, data) for data in certificates.chain]
    if CertEncoding.OCSP in asked:
        shown += [CertData(CertEncoding.OCSP, data) for data in certificates.responses]
    return [(PayloadType.CERT, build_cert(item)) for item in shown]


def sent(message: Message, encoding: CertEncoding = CertEncoding.X509) -> tuple[bytes, ...]:
    found = message.chain.parsed.get(PayloadType.CERT, ())
    return tuple(item.data for item in found if isinstance(item, CertData) and item.encoding == encoding)


def check_status(session: Session, message: Message) -> Questions[str]:
    """Why the certificate that just proved the peer is not to be used any more; "" where nothing is against it.
    Asked only now, as the answer may need the network: strangers must not make us fetch."""
    if not session.certified:
        return ""
    assert session.identity is not None
    answer = yield NeedStatus(
        session.number, 0, session.identity, session.remote, sent(message, CertEncoding.OCSP)
    )
    if answer is True:
        return ""
    return answer.reason if isinstance(answer, Refused) else "nothing is known of its certificate's status"
