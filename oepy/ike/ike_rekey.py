"""Rekey of the IKE SA."""

from __future__ import annotations

from typing import TYPE_CHECKING

from oepy.ike.flow import OwnSteps

if TYPE_CHECKING:
    from oepy.ike.session import Session


def rekey_ike(session: Session) -> OwnSteps:
    return
    yield
