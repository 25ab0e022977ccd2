"""Names and numbers of transforms (RFC 7296 §3.3.2, IANA registry), proposals in strongSwan's spelling, and
the choice between two proposals.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from oepy.errors import UsageError
from oepy.ike.payload_sa import (
    PROTOCOL_AH,
    PROTOCOL_ESP,
    PROTOCOL_IKE,
    Proposal,
    Transform,
    TransformType,
)
from oepy.model import EspSuite

ENCR_NULL = 11
ENCR_AES_CBC = 12
ENCR_AES_GCM_16 = 20
ENCR_CHACHA20_POLY1305 = 28
AEADS = frozenset((ENCR_AES_GCM_16, ENCR_CHACHA20_POLY1305))

PRF_HMAC_SHA2_256 = 5
PRF_HMAC_SHA2_384 = 6
PRF_HMAC_SHA2_512 = 7

INTEG_SHA2_256_128 = 12
INTEG_SHA2_384_192 = 13
INTEG_SHA2_512_256 = 14

ECP_256 = 19
ECP_384 = 20
CURVE25519 = 31

ENCRYPTIONS: dict[str, Transform] = {
    "aes128gcm16": Transform(TransformType.ENCR, ENCR_AES_GCM_16, 128),
    "aes192gcm16": Transform(TransformType.ENCR, ENCR_AES_GCM_16, 192),
    "aes256gcm16": Transform(TransformType.ENCR, ENCR_AES_GCM_16, 256),
    "chacha20poly1305": Transform(TransformType.ENCR, ENCR_CHACHA20_POLY1305),
    "aes128": Transform(TransformType.ENCR, ENCR_AES_CBC, 128),
    "aes192": Transform(TransformType.ENCR, ENCR_AES_CBC, 192),
    "aes256": Transform(TransformType.ENCR, ENCR_AES_CBC, 256),
    "null": Transform(TransformType.ENCR, ENCR_NULL),
}
INTEGRITIES = {
    "sha256": Transform(TransformType.INTEG, INTEG_SHA2_256_128),
    "sha384": Transform(TransformType.INTEG, INTEG_SHA2_384_192),
    "sha512": Transform(TransformType.INTEG, INTEG_SHA2_512_256),
}
PRFS = {
    "prfsha256": Transform(TransformType.PRF, PRF_HMAC_SHA2_256),
    "prfsha384": Transform(TransformType.PRF, PRF_HMAC_SHA2_384),
    "prfsha512": Transform(TransformType.PRF, PRF_HMAC_SHA2_512),
}
GROUPS = {
    "x25519": Transform(TransformType.KE, CURVE25519),
    "ecp256": Transform(TransformType.KE, ECP_256),
    "ecp384": Transform(TransformType.KE, ECP_384),
}
KEMS = {"mlkem768": 36, "mlkem1024": 37}  # draft-ietf-ipsecme-ikev2-mlkem; as additional key exchanges only
ADDITIONAL_TYPES = tuple(
    TransformType(kind) for kind in range(TransformType.ADDKE1, TransformType.ADDKE7 + 1)
)
ADDITIONAL = {
    f"ke{number}_{name}": Transform(kind, method)
    for number, kind in enumerate(ADDITIONAL_TYPES, 1)
    for name, method in ({name: group.id for name, group in GROUPS.items()} | KEMS | {"none": 0}).items()
}
_ALIASES = {
    "curve25519": "x25519",
    "aes128gcm128": "aes128gcm16",
    "aes256gcm128": "aes256gcm16",
    "aes128gcm": "aes128gcm16",
    "aes256gcm": "aes256gcm16",
    "sha2_256": "sha256",
    "sha2_384": "sha384",
    "sha2_512": "sha512",
}
ESN_NO = Transform(TransformType.ESN, 0)
ESN_YES = Transform(TransformType.ESN, 1)

_NAMES = {
    (t.type, t.id, t.key_length): name
    for table in (ENCRYPTIONS, INTEGRITIES, PRFS, GROUPS, ADDITIONAL)
    for name, t in table.items()
}


def transform_name(transform: Transform) -> str:
    known = _NAMES.get((transform.type, transform.id, transform.key_length))
    return known or f"{transform.type}:{transform.id}/{transform.key_length}"


Offer = dict[TransformType, tuple[Transform, ...]]
"""One proposal of ours: of each transform type the acceptable ones, best first. A type that is missing must
be missing or NONE in the peer's too."""


@dataclass(frozen=True, slots=True)
class IkeSuite:
    """The transforms of an IKE SA, by strongSwan's names; `integrity` is "" with an AEAD."""

    encryption: str
    integrity: str
    prf: str
    group: str
    additional: tuple[str, ...] = ()  # key exchanges after the first, by the names of key_exchange.generate

    def __str__(self) -> str:
        parts = (self.encryption, self.integrity, self.prf, self.group)
        more = (f"ke{number}_{name}" for number, name in enumerate(self.additional, 1))
        return "-".join(part for part in (*parts, *more) if part)


def _split(text: str) -> list[str]:
    return [_ALIASES.get(part, part) for part in text.strip().lower().split("-")]


def parse_ike_proposal(text: str) -> Offer:
    """`aes256gcm16-prfsha384-x25519-ke1_mlkem768` as in swanctl.conf; several of a kind are alternatives, best
    first; `ke1_none` beside another makes that additional key exchange a wish. Without a PRF, that of the integrity
    algorithms (or all, for an AEAD). Raises UsageError."""
    encryption, integrity, prfs, groups = [], [], [], []
    additional: dict[TransformType, list[Transform]] = {}
    for part in _split(text):
        if part in ADDITIONAL:
            additional.setdefault(TransformType(ADDITIONAL[part].type), []).append(ADDITIONAL[part])
        elif part in ENCRYPTIONS and part != "null":
            encryption.append(ENCRYPTIONS[part])
        elif part in INTEGRITIES:
            integrity.append(INTEGRITIES[part])
        elif part in PRFS:
            prfs.append(PRFS[part])
        elif part in GROUPS:
            groups.append(GROUPS[part])
        else:
            raise UsageError(f"IKE proposal {text!r}: {part!r} is no algorithm known here")
    aeads = [transform for transform in encryption if transform.id in AEADS]
    if not encryption or not groups:
        raise UsageError(f"IKE proposal {text!r} needs an encryption algorithm and a key exchange")
    if aeads and (len(aeads) != len(encryption) or integrity):
        raise UsageError(f"IKE proposal {text!r}: an AEAD goes without integrity and without other ciphers")
    if not aeads and not integrity:
        raise UsageError(
            f"IKE proposal {text!r}: {transform_name(encryption[0])} needs an integrity algorithm"
        )
    if not prfs:
        prfs = [PRFS["prf" + transform_name(t)] for t in integrity] or list(PRFS.values())
    offer: Offer = {TransformType.ENCR: tuple(encryption), TransformType.PRF: tuple(prfs)}
    if integrity:
        offer[TransformType.INTEG] = tuple(integrity)
    offer[TransformType.KE] = tuple(groups)
    for kind in sorted(additional):  # NONE last, whatever the order
        offer[kind] = tuple(sorted(additional[kind], key=lambda transform: not transform.id))
    return offer


def parse_ah_proposal(text: str) -> Offer:
    """`sha256-x25519-esn-noesn`: an offer without encryption, which makes it AH's (RFC 4302). Raises UsageError."""
    integrity, groups, esn = [], [], []
    for part in _split(text):
        if part in INTEGRITIES:
            integrity.append(INTEGRITIES[part])
        elif part in GROUPS:
            groups.append(GROUPS[part])
        elif part in ("esn", "noesn"):
            esn.append(ESN_YES if part == "esn" else ESN_NO)
        else:
            what = "AH does not encrypt" if part in ENCRYPTIONS else f"{part!r} is no algorithm known here"
            raise UsageError(f"AH proposal {text!r}: {what}")
    if not integrity:
        raise UsageError(f"AH proposal {text!r} names no integrity algorithm")
    offer: Offer = {TransformType.INTEG: tuple(integrity)}
    if groups:
        offer[TransformType.KE] = tuple(groups)
    offer[TransformType.ESN] = tuple(esn) or (ESN_YES, ESN_NO)
    return offer


def protocol_of(transforms: Collection[int]) -> int:
    """IKE, ESP or AH, by the types of the transforms: only IKE has a PRF, and AH no encryption."""
    if TransformType.PRF in transforms:
        return PROTOCOL_IKE
    return PROTOCOL_ESP if TransformType.ENCR in transforms else PROTOCOL_AH


def parse_esp_proposal(text: str) -> Offer:
    """`aes256gcm16-x25519-esn-noesn`; both are offered unless `esn` or `noesn` is written. Groups are for
    CREATE_CHILD_SA; without one there is no forward secrecy beyond the IKE SA's. Raises UsageError."""
    encryption, integrity, groups, esn = [], [], [], []
    for part in _split(text):
        if part in ENCRYPTIONS:
            encryption.append(ENCRYPTIONS[part])
        elif part in INTEGRITIES:
            integrity.append(INTEGRITIES[part])
        elif part in GROUPS:
            groups.append(GROUPS[part])
        elif part in ("esn", "noesn"):
            esn.append(ESN_YES if part == "esn" else ESN_NO)
        elif part not in PRFS:
            raise UsageError(f"ESP proposal {text!r}: {part!r} is no algorithm known here")
    aeads = [transform for transform in encryption if transform.id in AEADS]
    if not encryption:
        raise UsageError(f"ESP proposal {text!r} names no encryption algorithm")
    if aeads and (len(aeads) != len(encryption) or integrity):
        raise UsageError(f"ESP proposal {text!r}: an AEAD goes without integrity and without other ciphers")
    if not aeads and not integrity:
        raise UsageError(
            f"ESP proposal {text!r}: {transform_name(encryption[0])} needs an integrity algorithm"
        )
    offer: Offer = {TransformType.ENCR: tuple(encryption)}
    if integrity:
        offer[TransformType.INTEG] = tuple(integrity)
    if groups:
        offer[TransformType.KE] = tuple(groups)
    offer[TransformType.ESN] = tuple(esn) or (ESN_YES, ESN_NO)
    return offer


def has_additional(offer: Offer) -> bool:
    """Whether it asks for additional key exchanges, which take IKE_INTERMEDIATE (RFC 9370 §2.2.1)."""
    return any(kind in offer for kind in ADDITIONAL_TYPES)


def without_additional(offers: Sequence[Offer]) -> tuple[Offer, ...]:
    """For a peer that has no IKE_INTERMEDIATE: offers that demand an additional key exchange fall away."""
    return tuple(
        {kind: transforms for kind, transforms in offer.items() if kind not in ADDITIONAL_TYPES}
        for offer in offers
        if all(not offer[kind][-1].id for kind in ADDITIONAL_TYPES if kind in offer)
    )


def without_groups(offer: Offer) -> Offer:
    return {kind: transforms for kind, transforms in offer.items() if kind is not TransformType.KE}


def to_proposals(offers: Sequence[Offer], spi: bytes) -> tuple[Proposal, ...]:
    return tuple(
        Proposal(number, protocol_of(offer), spi, tuple(t for kind in offer.values() for t in kind))
        for number, offer in enumerate(offers, 1)
    )


@dataclass(frozen=True, slots=True)
class Chosen:
    """The responder's choice: the peer's proposal that was taken, and one transform a type."""

    number: int
    spi: bytes
    offer_index: int
    transforms: dict[int, Transform]

    def proposal(self, spi: bytes) -> Proposal:
        return Proposal(self.number, protocol_of(self.transforms), spi, tuple(self.transforms.values()))


def choose(offers: Sequence[Offer], peer: tuple[Proposal, ...], *, prefer_group: int = 0) -> Chosen | None:
    """The best of ours that the peer proposes too. `prefer_group`: among the acceptable key exchanges take
    this one if it is proposed, for it is the one whose share the peer already sent."""
    for index, offer in enumerate(offers):
        for proposal in peer:
            if proposal.protocol != protocol_of(offer):
                continue
            transforms = _match(offer, proposal, prefer_group)
            if transforms is not None:
                return Chosen(proposal.number, proposal.spi, index, transforms)
    return None


def _match(offer: Offer, proposal: Proposal, prefer_group: int) -> dict[int, Transform] | None:
    proposed: dict[int, list[Transform]] = {}
    for transform in proposal.transforms:
        proposed.setdefault(transform.type, []).append(transform)
    for kind, transforms in proposed.items():
        if kind not in offer and all(transform.id for transform in transforms):
            return None  # the peer insists on something that we don't offer
    chosen: dict[int, Transform] = {}
    for kind, acceptable in offer.items():
        theirs = [transform for transform in proposed.get(kind, ()) if transform.usable]
        common = [transform for transform in acceptable if transform in theirs]
        if not common and kind == TransformType.ESN and not theirs and ESN_NO in acceptable:
            common = [ESN_NO]  # RFC 7296 §3.3.3: it should be there, some leave it out
        if not common and kind in ADDITIONAL_TYPES and not theirs and any(not t.id for t in acceptable):
            continue  # a wish (NONE is among ours) that the peer does not know
        if not common:
            return None
        chosen[kind] = next(
            (t for t in common if kind == TransformType.KE and t.id == prefer_group), common[0]
        )
    return chosen


def accepted(offers: Sequence[Offer], answer: tuple[Proposal, ...]) -> Chosen | None:
    """What the responder chose, if it is exactly one transform a type out of one proposal of ours."""
    if len(answer) != 1:
        return None
    proposal = answer[0]
    kinds = [
        transform.type for transform in proposal.transforms if transform.id or transform.type in (1, 2, 5)
    ]
    if len(kinds) != len(set(kinds)) or not 1 <= proposal.number <= len(offers):
        return None
    offer = offers[proposal.number - 1]
    transforms = _match(offer, proposal, 0)
    if transforms is None or proposal.protocol != protocol_of(offer):
        return None
    return Chosen(proposal.number, proposal.spi, proposal.number - 1, transforms)


def ike_suite(chosen: Chosen) -> IkeSuite:
    return _ike_suite(tuple(chosen.transforms.values()))


@functools.lru_cache(maxsize=64)
def _ike_suite(transforms: tuple[Transform, ...]) -> IkeSuite:
    names = {transform.type: transform_name(transform) for transform in transforms if transform.id}
    return IkeSuite(
        names[TransformType.ENCR],
        names.get(TransformType.INTEG, ""),
        names[TransformType.PRF],
        names[TransformType.KE],
        tuple(names[kind].partition("_")[2] for kind in ADDITIONAL_TYPES if kind in names),
    )


def esp_suite(chosen: Chosen) -> EspSuite:
    """ESP's, or AH's, which has no encryption."""
    return _esp_suite(tuple(chosen.transforms.values()))


@functools.lru_cache(maxsize=64)
def _esp_suite(transforms: tuple[Transform, ...]) -> EspSuite:
    by_type = {transform.type: transform for transform in transforms}
    encryption, integrity = by_type.get(TransformType.ENCR), by_type.get(TransformType.INTEG)
    return EspSuite(
        transform_name(encryption) if encryption else "",
        transform_name(integrity) if integrity else "",
        esn=by_type[TransformType.ESN] == ESN_YES,
    )


_AEADS = "aes256gcm16-chacha20poly1305-aes128gcm16-prfsha256-prfsha384-prfsha512-x25519-ecp256-ecp384"
DEFAULT_IKE = (
    # ML-KEM first; a peer that knows nothing of it takes the next one in the same exchange
    _AEADS + "-ke1_mlkem768",
    _AEADS,
    "aes256-aes128-sha256-sha384-sha512-prfsha256-prfsha384-prfsha512-x25519-ecp256-ecp384",
)
DEFAULT_ESP = (
    "aes256gcm16-chacha20poly1305-aes128gcm16-x25519-ecp256-ecp384-esn-noesn",
    "aes256-aes128-sha256-sha512-x25519-ecp256-ecp384-esn-noesn",
)
