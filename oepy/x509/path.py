"""From a peer's certificate to a trust anchor: path validation (RFC 5280 §6) with IKE's profile (RFC 4945 §5).

A policy of our own, for cryptography's verifier is that of the Web PKI: it takes no Ed25519 and wants a DNS name.
What is not understood and marked critical ends the path. Bounded in depth, in certificates looked at and in
signatures checked, whatever a peer sends.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from ipaddress import ip_network
from urllib.parse import urlsplit

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, ExtensionOID, NameOID

from oepy import dn
from oepy.x509.certificates import MAX_FROM_PEER, Certificate, alternative_names, find_extension, subject_of

MAX_DEPTH = 6  # certificates between the peer's and the anchor's
MAX_CHECKS = 32  # signatures of one path search
MAX_COMPARISONS = 50_000  # of names with name constraints, in one path search; some 0.1 s
MIN_RSA_BITS = 2048
MAX_RSA_BITS = 8192  # a check takes 0.3 ms
MAX_RSA_EXPONENT = 1 << 32
IPSEC_IKE = x509.ObjectIdentifier("1.3.6.1.5.5.7.3.17")  # RFC 4945 §5.1.3.12
_PURPOSES = frozenset(
    (
        IPSEC_IKE,
        ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE,
        ExtendedKeyUsageOID.SERVER_AUTH,  # what public CAs issue
        ExtendedKeyUsageOID.CLIENT_AUTH,
        x509.ObjectIdentifier(
            "1.3.6.1.5.5.7.3.5"
        ),  # ipsecEndSystem, ipsecTunnel, ipsecUser: RFC 4945 deprecates
        x509.ObjectIdentifier("1.3.6.1.5.5.7.3.6"),  # them, and lets them count
        x509.ObjectIdentifier("1.3.6.1.5.5.7.3.7"),
    )
)
_UNDERSTOOD = frozenset(
    (
        ExtensionOID.BASIC_CONSTRAINTS,
        ExtensionOID.KEY_USAGE,
        ExtensionOID.EXTENDED_KEY_USAGE,
        ExtensionOID.SUBJECT_ALTERNATIVE_NAME,
        ExtensionOID.NAME_CONSTRAINTS,
        ExtensionOID.SUBJECT_KEY_IDENTIFIER,
        ExtensionOID.AUTHORITY_KEY_IDENTIFIER,
        ExtensionOID.CRL_DISTRIBUTION_POINTS,
        ExtensionOID.AUTHORITY_INFORMATION_ACCESS,
        ExtensionOID.CERTIFICATE_POLICIES,  # any policy is wanted here, so that they constrain nothing
    )
)


class PathError(Exception):
    """No path: the text says at which certificate and why, and holds nothing but what certificates say."""


@dataclass(frozen=True, slots=True)
class Path:
    """From the peer's certificate (first) to the trust anchor (last)."""

    certificates: tuple[Certificate, ...]

    @property
    def leaf(self) -> Certificate:
        return self.certificates[0]

    @property
    def anchor(self) -> Certificate:
        return self.certificates[-1]

    def issued(self) -> Iterable[tuple[Certificate, Certificate]]:
        """(certificate, its issuer), from the leaf on."""
        return zip(self.certificates, self.certificates[1:], strict=False)


@dataclass(slots=True)
class _Search:
    now: datetime
    anchors: Sequence[Certificate]
    others: Sequence[Certificate]
    checks: int = 0
    comparisons: int = 0
    reasons: list[str] = field(default_factory=list)

    def note(self, certificate: Certificate, reason: str) -> None:
        text = f"{subject_of(certificate)}: {reason}"
        if text not in self.reasons and len(self.reasons) < 8:
            self.reasons.append(text)

    def grow(self, path: tuple[Certificate, ...]) -> Path | None:
        last = path[-1]
        for anchor in self.anchors:
            if last == anchor:
                return Path(path)
            if anchor.subject == last.issuer and self._issued(last, anchor, path):
                return Path((*path, anchor))
        if len(path) > MAX_DEPTH:
            self.note(last, f"the path is longer than {MAX_DEPTH}")
            return None
        candidates = [issuer for issuer in (*self.anchors, *self.others) if issuer.subject == last.issuer]
        if not candidates:
            name = dn.to_text(last.issuer.public_bytes())
            self.note(last, f"no CA that is trusted or was sent is called {name!r}")
        for issuer in self.others:
            if issuer.subject != last.issuer or issuer in path or not self._issued(last, issuer, path):
                continue
            found = self.grow((*path, issuer))
            if found is not None:
                return found
        return None

    def _issued(self, certificate: Certificate, issuer: Certificate, path: tuple[Certificate, ...]) -> bool:
        """Whether `issuer`, which names itself so, signed it and may."""
        between = sum(not _self_issued(below) for below in path[1:])
        reason = _unfit_issuer(issuer, between) or out_of_time(issuer, self.now) or _unknown(issuer)
        if not reason:
            found = (self._constrained(issuer, below, leaf=below is path[0]) for below in path)
            reason = next(filter(None, found), "")
        if reason:
            self.note(issuer, reason)
            return False
        self.checks += 1
        if self.checks > MAX_CHECKS:
            raise PathError(f"more than {MAX_CHECKS} signatures would have to be checked")
        try:
            certificate.verify_directly_issued_by(issuer)
        except InvalidSignature:
            self.note(certificate, f"the signature is not by {subject_of(issuer)}")
            return False
        except (ValueError, TypeError, UnsupportedAlgorithm) as error:
            self.note(certificate, f"its signature cannot be checked ({error})")
            return False
        return True

    def _constrained(self, issuer: Certificate, below: Certificate, *, leaf: bool) -> str:
        """Why the issuer may not vouch for the names of a certificate below it. Nothing of either is proven yet."""
        constraints = find_extension(issuer, x509.NameConstraints)
        if constraints is None or (_self_issued(below) and not leaf):
            return ""
        names = _names_of(below)
        trees = (*(constraints.excluded_subtrees or ()), *(constraints.permitted_subtrees or ()))
        self.comparisons += len(names) * len(trees)
        if self.comparisons > MAX_COMPARISONS:
            raise PathError(f"more than {MAX_COMPARISONS} names would have to be compared")
        return next(filter(None, (_outside(constraints, name) for name in names)), "")


def validate(
    leaf: Certificate, others: Sequence[Certificate], anchors: Sequence[Certificate], now: float
) -> Path:
    """`others` are what the peer sent beside its own. `now` in seconds since 1970. Raises PathError."""
    moment = datetime.fromtimestamp(now, UTC)
    if not anchors:
        raise PathError("no CA is trusted")
    reason = _unfit_leaf(leaf) or out_of_time(leaf, moment) or _unknown(leaf)
    if reason:
        raise PathError(f"{subject_of(leaf)}: {reason}")
    search = _Search(moment, anchors, list(others)[: 4 * MAX_FROM_PEER])
    found = search.grow((leaf,))
    if found is None:
        text = (
            "; ".join(search.reasons) or f"no trusted CA is called {dn.to_text(leaf.issuer.public_bytes())!r}"
        )
        raise PathError(f"no path from {subject_of(leaf)} to a trusted CA: {text}")
    return found


def remaining(certificate: Certificate, now: float) -> float:
    """Seconds until it ends; negative where it has ended. `now` in seconds since 1970."""
    return certificate.not_valid_after_utc.timestamp() - now


def out_of_time(certificate: Certificate, now: datetime) -> str:
    if now < certificate.not_valid_before_utc:
        return f"not valid before {certificate.not_valid_before_utc:%Y-%m-%d %H:%M} UTC"
    if now > certificate.not_valid_after_utc:
        return f"expired {certificate.not_valid_after_utc:%Y-%m-%d %H:%M} UTC"
    return ""


def _unknown(certificate: Certificate) -> str:
    """RFC 5280 §4.2: a critical extension that is not understood."""
    for extension in certificate.extensions:
        if extension.critical and extension.oid not in _UNDERSTOOD:
            return f"the critical extension {extension.oid.dotted_string} is not understood"
    return ""


def _weak(certificate: Certificate) -> str:
    key = certificate.public_key()
    if isinstance(key, rsa.RSAPublicKey):
        if key.key_size > MAX_RSA_BITS or key.public_numbers().e > MAX_RSA_EXPONENT:
            return f"an RSA key of {key.key_size} bits costs too much"
        return "" if key.key_size >= MIN_RSA_BITS else f"an RSA key of {key.key_size} bits is too short"
    if isinstance(key, ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey | ed448.Ed448PublicKey):
        return ""
    return f"keys of the kind {type(key).__name__} are not used"


def _signed_weakly(certificate: Certificate) -> str:
    try:
        digest = certificate.signature_hash_algorithm
    except UnsupportedAlgorithm:
        return "its signature's algorithm is unknown"
    if digest is not None and digest.name in ("md5", "sha1"):
        return f"signed over {digest.name.upper()}, which can be forged"
    return ""


def _unfit_leaf(certificate: Certificate) -> str:
    usage = find_extension(certificate, x509.KeyUsage)
    if usage is not None and not (usage.digital_signature or usage.content_commitment):
        return "its key usage allows no signatures (RFC 4945 §5.1.3.2)"
    purposes = find_extension(certificate, x509.ExtendedKeyUsage)
    if purposes is not None and not _PURPOSES.intersection(purposes):
        return "its extended key usage does not include IKE (RFC 4945 §5.1.3.12)"
    return _weak(certificate) or _signed_weakly(certificate)


def _unfit_issuer(certificate: Certificate, below: int) -> str:
    """`below`: CAs between it and the leaf, without those that are self-issued (RFC 5280 §4.2.1.9)."""
    constraints = find_extension(certificate, x509.BasicConstraints)
    if constraints is None or not constraints.ca:
        return "it is no CA"
    if constraints.path_length is not None and below > constraints.path_length:
        return f"its path length is {constraints.path_length}"
    usage = find_extension(certificate, x509.KeyUsage)
    if usage is not None and not usage.key_cert_sign:
        return "its key usage allows no certificates"
    weak = _weak(certificate)
    if (
        weak or certificate.subject == certificate.issuer
    ):  # what signs an anchor is itself, and proves nothing
        return weak
    return _signed_weakly(certificate)


# ---- name constraints (RFC 5280 §4.2.1.10) ------------------------------------------------------------------


def _names_of(certificate: Certificate) -> list[x509.GeneralName]:
    """All that constraints may be about; of the subject also the e-mail addresses in it."""
    names: list[x509.GeneralName] = list(alternative_names(certificate) or ())
    if certificate.subject:
        names.append(x509.DirectoryName(certificate.subject))
        mails = certificate.subject.get_attributes_for_oid(NameOID.EMAIL_ADDRESS)
        names += [x509.RFC822Name(str(mail.value)) for mail in mails if str(mail.value).isascii()]
    return names


def _outside(constraints: x509.NameConstraints, name: x509.GeneralName) -> str:
    excluded = [tree for tree in constraints.excluded_subtrees or () if type(tree) is type(name)]
    permitted = [tree for tree in constraints.permitted_subtrees or () if type(tree) is type(name)]
    if (excluded or permitted) and not _comparable(name):
        return f"its name constraints cannot be applied to {_shown(name)}"
    if any(_within(name, tree) for tree in excluded):
        return f"its name constraints exclude {_shown(name)}"
    if permitted and not any(_within(name, tree) for tree in permitted):
        return f"its name constraints do not permit {_shown(name)}"
    return ""


def _self_issued(certificate: Certificate) -> bool:
    """RFC 5280 §3.2: a CA's new key signed by its old one, say; it is the same CA."""
    return certificate.subject == certificate.issuer


def _comparable(name: x509.GeneralName) -> bool:
    """Constraints of other kinds than these, and on URIs without a host, end the path (RFC 5280 §4.2.1.10)."""
    if isinstance(name, x509.UniformResourceIdentifier):
        return bool(_host(name.value))
    return isinstance(name, x509.DNSName | x509.RFC822Name | x509.IPAddress | x509.DirectoryName)


def _host(url: str) -> str:
    """A name; "" where there is none, or an address."""
    try:
        host = (urlsplit(url).hostname or "").rstrip(".")
    except ValueError:
        return ""
    return host if any(letter.isalpha() for letter in host) and ":" not in host else ""


def _within(name: x509.GeneralName, tree: x509.GeneralName) -> bool:
    """Both of one kind."""
    if isinstance(name, x509.DNSName) and isinstance(tree, x509.DNSName):
        wanted, found = tree.value.lower().rstrip("."), name.value.lower().rstrip(".")
        return not wanted or found.endswith(wanted if wanted[0] == "." else f".{wanted}") or found == wanted
    if isinstance(name, x509.UniformResourceIdentifier):
        wanted, found = str(tree.value).lower(), _host(name.value).lower()
        return found.endswith(wanted) if wanted[:1] == "." else found == wanted
    if isinstance(name, x509.RFC822Name) and isinstance(tree, x509.RFC822Name):
        return _mail_within(name.value, tree.value)
    if isinstance(name, x509.IPAddress) and isinstance(tree, x509.IPAddress):
        address, network = ip_network(name.value), ip_network(tree.value)
        return address.version == network.version and address.subnet_of(network)  # type: ignore[arg-type]
    if isinstance(name, x509.DirectoryName) and isinstance(tree, x509.DirectoryName):
        return dn.below(tree.value.public_bytes(), name.value.public_bytes())
    return False


def _mail_within(mail: str, tree: str) -> bool:
    domain = mail.rpartition("@")[2].lower()
    if "@" in tree:
        local, _, wanted = tree.rpartition("@")
        return mail.rpartition("@")[0] == local and domain == wanted.lower()
    if tree.startswith("."):
        return domain.endswith(tree.lower())
    return domain == tree.lower()


def _shown(name: x509.GeneralName) -> str:
    value = name.value
    return dn.to_text(value.public_bytes()) if isinstance(value, x509.Name) else dn.printable(str(value))


__all__ = ["Path", "PathError", "validate"]
