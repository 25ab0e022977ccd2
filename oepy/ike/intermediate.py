"""IKE_INTERMEDIATE (RFC 9242): the additional key exchanges of RFC 9370 between IKE_SA_INIT and IKE_AUTH.

Each is protected by the keys so far, and its secret is mixed into the next ones. All of it is before anybody has
proved anything: so there are exactly as many as were agreed on, none waits for the daemon, and AUTH covers them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from oepy.ike.algorithms import KEMS
from oepy.ike.crypto import prf, skeyseed_rekey
from oepy.ike.events import FailureKind
from oepy.ike.flow import HandshakeFailed, PeerSteps, Send, Steps
from oepy.ike.handshake import GROUP_NAMES, use_keys
from oepy.ike.header import HEADER_SIZE, Exchange, Header, PayloadType, build_header
from oepy.ike.key_exchange import generate, respond
from oepy.ike.notify import ProtocolError, notify_name
from oepy.ike.payloads import KeyShareData, build_ke
from oepy.ike.rules import first_error

if TYPE_CHECKING:
    from oepy.ike.handshake import Handshake
    from oepy.ike.message import Message
    from oepy.ike.session import Session

_GENERIC = 4
METHOD_IDS = {name: number for number, name in GROUP_NAMES.items()} | KEMS


def read_share(message: Message, method: str) -> bytes:
    """The KE payload of an additional key exchange. Raises ProtocolError where it is of another method."""
    ke = message.must(PayloadType.KE, KeyShareData)
    if ke.group != METHOD_IDS[method]:
        raise ProtocolError(f"a key share of method {ke.group}, where {method} was agreed on")
    return ke.data


def note(session: Session, header: Header, first: int, plain: bytes) -> None:
    """IntAuth over a message, either side's: as if it were not fragmented, without IV, padding and ICV
    (RFC 9242 §3.3.2). With the keys that protect the message, so before they change."""
    handshake = session.handshake
    assert handshake is not None
    assert session.suite is not None
    key = handshake.sk_pi if header.from_initiator else handshake.sk_pr
    assert key is not None
    before = handshake.int_auth
    whole = Header(
        *(header.spi_i, header.spi_r, PayloadType.SK, header.version, header.exchange, header.flags),
        header.message_id,
    )
    inner = _GENERIC + len(plain)
    covered = build_header(whole, HEADER_SIZE + inner) + bytes((first, 0)) + inner.to_bytes(2, "big") + plain
    if header.from_initiator:
        handshake.int_auth = prf(session.suite.prf, key.reveal(), before[0] + covered), before[1]
    else:
        handshake.int_auth = before[0], prf(session.suite.prf, key.reveal(), before[1] + covered)


def mix(session: Session, handshake: Handshake, shared: bytes) -> None:
    """RFC 9370 §2.2.2."""
    assert session.suite is not None
    assert session.sk_d is not None
    handshake.additional.pop(0)
    skeyseed = skeyseed_rekey(session.suite, session.sk_d, shared, handshake.nonce_i, handshake.nonce_r)
    use_keys(session, handshake, session.suite, skeyseed)


def exchange_keys(session: Session, handshake: Handshake) -> Steps[None]:
    """The initiator's part."""
    while handshake.additional:
        method = handshake.additional[0]
        share = generate(method, session.context.random)
        payloads = [(PayloadType.KE, build_ke(METHOD_IDS[method], share.public))]
        answer: Message = yield Send(Exchange.IKE_INTERMEDIATE, payloads)
        error = first_error(answer.chain)
        if error is not None:
            text = f"the peer answers IKE_INTERMEDIATE with {notify_name(error.type)}"
            raise HandshakeFailed(FailureKind.REJECTED, text, error.type)
        mix(session, handshake, share.shared_secret(read_share(answer, method)))


def serve_intermediate(session: Session, message: Message) -> PeerSteps:
    """The responder's part; the session mixes the secret in when the answer is sent."""
    yield from ()  # a generator like the others, which asks nothing
    handshake = session.handshake
    assert handshake is not None
    method = handshake.additional[0]
    public, handshake.pending = respond(method, read_share(message, method), session.context.random)
    return [(PayloadType.KE, build_ke(METHOD_IDS[method], public))]


__all__ = ["METHOD_IDS", "exchange_keys", "mix", "note", "read_share", "serve_intermediate"]
