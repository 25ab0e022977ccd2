"""CREATE_CHILD_SA."""

from __future__ import annotations

from typing import TYPE_CHECKING

from oepy.ike.flow import OwnSteps, PeerSteps
from oepy.ike.notify import NotifyType
from oepy.ike.payloads import notify

if TYPE_CHECKING:
    from oepy.ike.message import Message
    from oepy.ike.session import Session


def serve_create_child(session: Session, message: Message) -> PeerSteps:
    return [notify(NotifyType.NO_ADDITIONAL_SAS)]
    yield


def rekey_child(session: Session, spi_in: int) -> OwnSteps:
    return
    yield
