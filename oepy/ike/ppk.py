"""Post-quantum preshared keys (RFC 8784): a secret that both sides have beforehand goes into the keys of IKE_AUTH.

Announced by USE_PPK in IKE_SA_INIT, named by PPK_IDENTITY in IKE_AUTH. Where it is no must, NO_PPK_AUTH proves the
initiator to a responder that lacks it, and both go on with the keys that they have.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from oepy.ike.crypto import prf_plus, prf_size
from oepy.ike.events import FailureKind, NeedPpk
from oepy.ike.flow import HandshakeFailed, Questions
from oepy.ike.notify import NotifyType
from oepy.ike.payloads import AuthData, Payload, notify
from oepy.model import Secret

if TYPE_CHECKING:
    from oepy.ike.handshake import Handshake
    from oepy.ike.message import Message
    from oepy.ike.session import Session
    from oepy.ike.settings import Ppk
    from oepy.model import PeerIdentity

_PPK_ID_FIXED = b"\x02"  # RFC 8784 §5.1
MAX_PPK_ID = 256


@dataclass(frozen=True, slots=True)
class Keys:
    """What a PPK changes."""

    d: Secret
    pi: Secret
    pr: Secret

    @classmethod
    def of(cls, session: Session, handshake: Handshake) -> Keys:
        assert session.sk_d is not None
        assert handshake.sk_pi is not None
        assert handshake.sk_pr is not None
        return cls(session.sk_d, handshake.sk_pi, handshake.sk_pr)

    def use(self, session: Session, handshake: Handshake) -> None:
        session.sk_d, handshake.sk_pi, handshake.sk_pr = self.d, self.pi, self.pr


def mixed(session: Session, keys: Keys, secret: Secret) -> Keys:
    """RFC 8784 §3: prf+ with the PPK as its key, each as long as before."""
    assert session.suite is not None
    name = session.suite.prf
    one, two, three = (
        Secret(prf_plus(name, secret.reveal(), key.reveal(), prf_size(name)))
        for key in (keys.d, keys.pi, keys.pr)
    )
    return Keys(one, two, three)


def announcement(wanted: bool) -> list[Payload]:
    return [notify(NotifyType.USE_PPK)] if wanted else []


def check_announced(handshake: Handshake, ppk: Ppk | None) -> Ppk | None:
    """The initiator's, after IKE_SA_INIT: the one to use. Raises HandshakeFailed where it is a must."""
    if ppk is None or handshake.peer_ppk:
        return ppk
    if ppk.required:
        raise HandshakeFailed(
            FailureKind.REJECTED, "a PPK is required, and the peer does not know of RFC 8784"
        )
    return None


def identity_payloads(ppk: Ppk, without: AuthData | None) -> list[Payload]:
    """`without`: the proof by the keys without the PPK, where it is no must."""
    payloads = [notify(NotifyType.PPK_IDENTITY, _PPK_ID_FIXED + ppk.identity)]
    if without is not None:
        payloads.append(notify(NotifyType.NO_PPK_AUTH, without.data))
    return payloads


def confirm(session: Session, handshake: Handshake, ppk: Ppk, before: Keys, answer: Message) -> None:
    """The initiator's, with the answer to IKE_AUTH: the responder says whether it has used the PPK."""
    if answer.notify(NotifyType.PPK_IDENTITY) is not None:
        session.context.counters["ppk_used"] += 1
        return
    if ppk.required:
        text = "a PPK is required, and the peer has not used it"
        raise HandshakeFailed(FailureKind.PROOF_FAILED, text, 0, NotifyType.AUTHENTICATION_FAILED)
    before.use(session, handshake)


def serve(
    session: Session, handshake: Handshake, message: Message, identity: PeerIdentity
) -> Questions[tuple[AuthData, list[Payload]]]:
    """The responder's: which proof to verify, and what to answer; the keys are the ones that it is made with."""
    from oepy.ike.header import PayloadType

    auth = message.must(PayloadType.AUTH, AuthData)
    named = message.notify(NotifyType.PPK_IDENTITY)
    required = session.settings.ppk == "require"
    if not handshake.peer_ppk or named is None:
        if required:
            raise _refused("the peer uses no PPK, and one is required here")
        return auth, []
    secret = None
    if named.data[:1] == _PPK_ID_FIXED and len(named.data) <= 1 + MAX_PPK_ID:
        secret = yield NeedPpk(session.number, 0, named.data[1:], identity, session.remote)
    if isinstance(secret, Secret):
        mixed(session, Keys.of(session, handshake), secret).use(session, handshake)
        session.context.counters["ppk_used"] += 1
        return auth, [notify(NotifyType.PPK_IDENTITY)]
    without = message.notify(NotifyType.NO_PPK_AUTH)
    if required or without is None:
        raise _refused(f"no PPK is known by the name that {identity} gives")
    return AuthData(auth.method, without.data), []


def _refused(text: str) -> HandshakeFailed:
    kind = NotifyType.AUTHENTICATION_FAILED
    return HandshakeFailed(FailureKind.REFUSED, text, kind, kind)
