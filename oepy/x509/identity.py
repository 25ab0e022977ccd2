"""Which IKE identities a certificate speaks for (RFC 4945 §3.1): its subject's DN, and its alternative names."""

from __future__ import annotations

from ipaddress import IPv4Network, IPv6Network

from cryptography import x509

from oepy import dn
from oepy.model import IdType, PeerIdentity
from oepy.x509.certificates import Certificate, alternative_names


def speaks_for(certificate: Certificate, identity: PeerIdentity) -> bool:
    """FQDN, e-mail and addresses must stand among the alternative names, exactly (no wildcards: RFC 4945 §3.1.2),
    letters of a domain in any case; a DN must be the subject, attribute by attribute."""
    if identity.type is IdType.DER_ASN1_DN:
        return dn.same(certificate.subject.public_bytes(), identity.data)
    names = alternative_names(certificate)
    if names is None:
        return False
    if identity.type is IdType.FQDN:
        wanted = str(identity).rstrip(".").lower()
        return any(name.rstrip(".").lower() == wanted for name in names.get_values_for_type(x509.DNSName))
    if identity.type is IdType.RFC822_ADDR:
        return any(_same_mailbox(name, str(identity)) for name in names.get_values_for_type(x509.RFC822Name))
    address = identity.as_address()
    return address is not None and address in names.get_values_for_type(x509.IPAddress)


def _same_mailbox(one: str, other: str) -> bool:
    """The domain's letters in any case, the local part as it is (RFC 5280 §7.5)."""
    local, at, domain = one.rpartition("@")
    return bool(at) and (local, domain.lower()) == (
        other.rpartition("@")[0],
        other.rpartition("@")[2].lower(),
    )


def of_general_name(name: x509.GeneralName) -> PeerIdentity | None:
    """By its kind, whatever it reads like: a dNSName `192.0.2.1` is no address. None for kinds that IKE lacks."""
    if isinstance(name, x509.DNSName):
        return PeerIdentity(IdType.FQDN, name.value.rstrip(".").lower().encode("utf-8"))
    if isinstance(name, x509.RFC822Name):
        return PeerIdentity(IdType.RFC822_ADDR, name.value.encode("utf-8"))
    if isinstance(name, x509.IPAddress) and not isinstance(name.value, IPv4Network | IPv6Network):
        return PeerIdentity.address(name.value)
    return None


def identities_of(certificate: Certificate) -> list[PeerIdentity]:
    """All that it speaks for, the alternative names first: for messages and defaults."""
    found = [
        identity
        for name in alternative_names(certificate) or ()
        if (identity := of_general_name(name)) is not None and identity.data
    ]
    if certificate.subject:
        found.append(PeerIdentity(IdType.DER_ASN1_DN, certificate.subject.public_bytes()))
    return found
