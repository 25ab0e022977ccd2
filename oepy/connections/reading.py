"""The sections `connections:` and `secrets:`, with swanctl.conf's names. Nothing is raised: every mistake is a
`Problem` with its path and its mend; what this version cannot do is one, by its name. No text holds a secret."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import urlsplit

from oepy.connections.fields import (
    Fields,
    Path,
    Problem,
    Refused,
    action,
    command,
    duration,
    flag,
    identity,
    mark,
    number,
    one_of,
    pattern,
    place,
    selector,
    start_action,
    text_of,
)
from oepy.connections.model import (
    ANY,
    Action,
    Authority,
    Child,
    Connection,
    ConnectionSet,
    IdPattern,
    Life,
    LocalAuth,
    NamedPpk,
    Place,
    RemoteAuth,
    Selector,
    SharedSecret,
)
from oepy.connections.reading_clients import check_vips, missing_pools, ppk_name, read_pools, virtual_address
from oepy.errors import OepyError
from oepy.model import (
    MAX_PRIORITY,
    NOT_COPIED,
    XFRM_IF_ID,
    Copied,
    IdType,
    Marks,
    PeerIdentity,
    PublicKey,
    Secret,
)

SECTIONS = ("connections", "secrets", "pools", "authorities")
MAX_CONNECTIONS = 20_000
MAX_CHILDREN = 32
MAX_SECRETS = 20_000
MAX_TFC_PADDING = 65_535
MAX_AUTHORITIES = 1024
MIN_SECRET = 1
RESERVED = ("manual",)  # what `sas` calls SAs keyed by hand
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}\Z")


@dataclass(frozen=True, slots=True)
class Files:
    """What reading needs of the rest: each raises OepyError. `proposal_ike` and `proposal_esp` check one text."""

    private: Callable[[str], bytes]  # content of a file that only its owner may read
    public: Callable[[str], PublicKey]
    own_key: Callable[[str], str]  # where the file of a private key is; it can be used
    certificates: Callable[[str], str]  # where a file of certificates is; they go into `read`
    proves: Callable[
        [str, str], bool
    ]  # whether the first certificate of a file is of that private key's file
    identities: Callable[[str], list[PeerIdentity]]  # of the first certificate of a file
    read: dict[str, Any]  # certificates by file
    proposal_ike: Callable[[str], object]
    proposal_esp: Callable[[str], object]
    proposal_ah: Callable[[str], object]


# What swanctl.conf has and this version has not, with what to do about it. Lifted one by one.
NOT_YET_AUTH = {"eap": "EAP"}
_NOT_YET_CONNECTION = {
    "aggressive": "it is IKEv1's",
    "dpd_timeout": "it is IKEv1's; IKEv2 gives up after its retransmissions (20 s)",
    "if_id_in": "write it for each child",
    "if_id_out": "write it for each child",
    "local_port": "IKE speaks from ports 500 and 4500",
    "mediation": "",
    "pull": "",
    "remote_port": "IKE speaks to ports 500 and 4500",
}
_NOT_YET_CHILD = {
    "hw_offload": "",
    "interface": "",
    "ipcomp": "",
    "label": "",
    "mark_in_sa": "mark_in is for policies alone",
    "policies": "",
    "replay_window": "",
    "sha256_96": "",
}
_NOT_YET_SIDE = {
    "ca_id": "",
    "cert_policy": "",
    "eap_id": "",
    "groups": "",
}


# ---- sections ----------------------------------------------------------------------------------------------


def read_connections(
    data: Mapping[str, object], files: Files, at: tuple[int, str] = (0, "")
) -> tuple[ConnectionSet, list[Problem]]:
    """Of one file the SECTIONS. `at`: where the file stands among others, as Order begins."""
    connections = data.get("connections")
    problems: list[Problem] = []
    found: list[Connection] = []
    address_pools = read_pools(data.get("pools"), problems)
    if connections is not None and not isinstance(connections, dict):
        problems.append(Problem(("connections",), "a mapping is expected: names with their settings"))
    for name, value in list((connections if isinstance(connections, dict) else {}).items())[:MAX_CONNECTIONS]:
        path = ("connections", str(name)[:64])
        if not _NAME.match(str(name)) or name in RESERVED:
            problems.append(
                Problem(path, "a name has letters, digits, `_`, `-` and `.`, 64 at most, and is not `manual`")
            )
            continue
        before = len(problems)
        connection = _connection(str(name), value, path, problems, files)
        if len(problems) == before:
            found.append(replace(connection, order=(*at, len(found))))
    if isinstance(connections, dict) and len(connections) > MAX_CONNECTIONS:
        problems.append(_too_many(len(connections)))
    shared, ppks = _secrets(data.get("secrets"), problems, files, at)
    known = _authorities(data.get("authorities"), problems, files)
    return ConnectionSet(tuple(found), shared, known, dict(files.read), address_pools, ppks), problems


def _too_many(count: int) -> Problem:
    return Problem(("connections",), f"{count} connections; at most {MAX_CONNECTIONS}")


def bounds_and_pools(whole: ConnectionSet) -> Iterator[Problem]:
    """What shows only when all files are read."""
    if len(whole.connections) > MAX_CONNECTIONS:
        yield _too_many(len(whole.connections))
    if len(whole.secrets) > MAX_SECRETS:
        yield Problem(("secrets",), f"{len(whole.secrets)} secrets; at most {MAX_SECRETS}")
    yield from missing_pools(whole)


def _connection(name: str, value: object, path: Path, problems: list[Problem], files: Files) -> Connection:
    fields = Fields(value, path, problems)
    _version(fields)
    reauth = fields.take("reauth_time", 0.0, duration)
    rekey = fields.take("rekey_time", 0.0 if reauth else 4 * 3600.0, duration)
    over = fields.take("over_time", max(rekey, reauth) / 10 or 1440.0, duration)
    made = Connection(
        name=name,
        local=_local(fields.take_raw("local"), (*path, "local"), problems, files),
        remote=_remote(fields.take_raw("remote"), (*path, "remote"), problems, files),
        children=_children(fields.take_raw("children"), (*path, "children"), problems, files),
        local_addrs=fields.take_list("local_addrs", (Place(),), place) or (Place(),),
        remote_addrs=fields.take_list("remote_addrs", (Place(),), place) or (Place(),),
        proposals=fields.take_list("proposals", (), _checked(files.proposal_ike)),
        rekey_time=rekey,
        over_time=over,
        rand_time=fields.take("rand_time", over, duration),
        unique=fields.take("unique", "no", one_of("no", "replace", "keep", "never")),
        encap=fields.take("encap", False, flag),
        dpd_delay=fields.take("dpd_delay", 30.0, duration),
        keyingtries=fields.take("keyingtries", 0, number),
        send_cert=fields.take("send_cert", "ifasked", one_of("always", "ifasked", "never")),
        send_certreq=fields.take("send_certreq", True, flag),
        reauth_time=reauth,
        mobike=fields.take("mobike", True, flag),
        fragmentation=fields.take("fragmentation", "yes", one_of("yes", "accept", "no")),
        childless=fields.take("childless", "allow", one_of("allow", "prefer", "force", "never")),
        ppk_id=fields.take("ppk_id", "", ppk_name),
        ppk_required=fields.take("ppk_required", False, flag),
        vips=fields.take_list("vips", (), virtual_address),
        pools=fields.take_list("pools", (), text_of),
    )
    fields.finish(_NOT_YET_CONNECTION)
    _cross_check(made, fields)
    return made


def _version(fields: Fields) -> None:
    def convert(value: object) -> int:
        wanted = number(value)
        if wanted == 1:
            raise Refused("IKEv1 is not in this version; the peer should speak IKEv2 (version: 2)")
        if wanted not in (0, 2):
            raise Refused(f"{wanted}: 2 is the version of IKE that is spoken")
        return 2

    fields.take("version", 2, convert)


def _checked(check: Callable[[str], object]) -> Callable[[object], str]:
    def convert(value: object) -> str:
        text = text_of(value)
        if text.lower() == "default":
            return ""
        check(text)
        return text

    return convert


def _auth(fields: Fields) -> str:
    def convert(value: object) -> str:
        word = text_of(value).lower()
        family = word.partition("-")[0]
        if family in NOT_YET_AUTH:
            raise Refused(
                f"{NOT_YET_AUTH[family]} is not in this version; use x509, pubkey with raw keys, or psk"
            )
        if word not in ("psk", "pubkey", "x509", "null"):
            raise Refused(f"{word[:40]!r}: psk, pubkey, x509 or null")
        return word

    return fields.take("auth", "pubkey", convert)


def _local(value: object, path: Path, problems: list[Problem], files: Files) -> LocalAuth:
    fields = Fields(value, path, problems)

    def key_file(name: object) -> str:
        return files.own_key(text_of(name))

    made = LocalAuth(
        _auth(fields),
        fields.take("id", None, identity),
        fields.take("key", "", key_file),
        fields.take_list("certs", (), lambda name: files.certificates(text_of(name))),
    )
    if made.auth == "pubkey" and made.certs:
        made = replace(
            made, auth="x509"
        )  # as swanctl.conf has it: what a key is proven by follows from what is there
    if made.key and made.auth not in ("pubkey", "x509"):
        fields.wrong("a key is for `auth: pubkey` and `auth: x509`", "key")
    if made.auth == "null" and made.id is not None:
        fields.wrong("whoever authenticates with null has no identity (RFC 7619); remove it", "id")
    if made.certs and made.auth != "x509":
        fields.wrong("certificates are for `auth: x509`", "certs")
    if made.auth == "x509":
        made = _own_certificate(made, fields, files)
    fields.finish(_NOT_YET_SIDE | {"pubkeys": "name the file of the own private key: `key: own.pem`"})
    return made


def _own_certificate(made: LocalAuth, fields: Fields, files: Files) -> LocalAuth:
    """With the identity that it speaks for, and only if the key is the certificate's."""
    if not made.certs:
        fields.wrong("`auth: x509` needs the own certificate: `certs: [own.pem]`", "certs")
        return made
    if not made.key:
        fields.wrong("`auth: x509` needs the certificate's private key: `key: own.key`", "key")
    elif not files.proves(made.certs[0], made.key):
        fields.wrong("the first certificate is of another key than the one that `key` names", "certs", 0)
    speaks = files.identities(made.certs[0])
    if made.id is None:
        # swanctl.conf: the subject; of a certificate without one the first alternative name
        named = [one for one in speaks if one.type is IdType.DER_ASN1_DN] or speaks
        return replace(made, id=named[0] if named else None)
    if not any(made.id.same_as(one) for one in speaks):
        names = "; ".join(str(one) for one in speaks[:8]) or "nobody"
        fields.wrong(f"the certificate does not speak for {made.id}, but for: {names}", "id")
    return made


def _remote(value: object, path: Path, problems: list[Problem], files: Files) -> RemoteAuth:
    fields = Fields(value, path, problems)
    made = RemoteAuth(
        _auth(fields),
        fields.take("id", IdPattern(ANY), pattern),
        fields.take_list("pubkeys", (), lambda name: files.public(text_of(name))),
        fields.take_list("cacerts", (), lambda name: files.certificates(text_of(name))),
        fields.take_list("certs", (), lambda name: files.certificates(text_of(name))),
        fields.take("revocation", "relaxed", one_of("strict", "ifuri", "relaxed")),
    )
    certified = bool(made.cacerts or made.certs)
    if made.auth == "pubkey" and certified and not made.pubkeys:
        made = replace(made, auth="x509")
    if made.auth == "pubkey" and not made.pubkeys:
        fields.wrong("`auth: pubkey` needs the peer's keys: `pubkeys: [peer.pem]`")
    if made.auth != "pubkey" and made.pubkeys:
        fields.wrong("keys are for `auth: pubkey`", "pubkeys")
    if made.auth == "x509" and not certified:
        fields.wrong(
            "`auth: x509` needs whom to trust: `cacerts: [ca.pem]`, or the peer's certificate: `certs: [peer.pem]`"
        )
    if made.auth != "x509" and made.revocation != "relaxed":
        fields.wrong("revocation is for `auth: x509`", "revocation")
    if made.certs and made.revocation != "relaxed":
        fields.wrong(
            "a certificate that is configured itself is not asked about; remove it here to revoke it", "certs"
        )
    if made.auth != "x509" and certified:
        fields.wrong("certificates are for `auth: x509`", "cacerts" if made.cacerts else "certs")
    fields.finish(_NOT_YET_SIDE)
    return made


def _children(value: object, path: Path, problems: list[Problem], files: Files) -> tuple[Child, ...]:
    if not isinstance(value, dict) or not value:
        problems.append(Problem(path, "a connection needs at least one child: `children: {net: {…}}`"))
        return ()
    if len(value) > MAX_CHILDREN:
        problems.append(Problem(path, f"{len(value)} children; at most {MAX_CHILDREN}"))
    found = []
    for name, child in list(value.items())[:MAX_CHILDREN]:
        if not _NAME.match(str(name)):
            problems.append(Problem((*path, str(name)[:64]), "a name has letters, digits, `_`, `-` and `.`"))
            continue
        found.append(_child(str(name), child, (*path, str(name)), problems, files))
    return tuple(found)


def _child(name: str, value: object, path: Path, problems: list[Problem], files: Files) -> Child:
    fields = Fields(value, path, problems)
    started = fields.take("start_action", frozenset({"none"}), start_action)
    made = Child(
        name=name,
        local_ts=fields.take_list("local_ts", (Selector(None),), selector),
        remote_ts=fields.take_list("remote_ts", (Selector(None),), selector),
        esp_proposals=fields.take_list("esp_proposals", (), _checked(files.proposal_esp)),
        ah_proposals=fields.take_list("ah_proposals", (), _checked(files.proposal_ah)),
        mode=fields.take("mode", "tunnel", one_of("tunnel", "transport")),
        trap="trap" in started,
        start="start" in started,
        close_action=fields.take("close_action", Action.NONE, action(clear="none", restart="start")),
        dpd_action=fields.take("dpd_action", Action.NONE, action(clear="none", restart="start")),
        life=_life(fields),
        inactivity=fields.take("inactivity", 0.0, duration),
        if_id_in=fields.take("if_id_in", 0, _interface_number),
        if_id_out=fields.take("if_id_out", 0, _interface_number),
        tfc_padding=fields.take("tfc_padding", 0, _tfc_padding),
        marks=_marks(fields),
        copied=_copied(fields),
        priority=fields.take("priority", 0, _priority),
        updown=fields.take("updown", (), command),
    )
    fields.finish(_NOT_YET_CHILD)
    if made.by_interface and (made.trap or made.mode == "transport"):
        text = "with if_id routes lead to the interface, and nothing is held: start, and tunnel mode"
        fields.wrong(text, "if_id_out" if made.if_id_out else "if_id_in")
    if made.copied != NOT_COPIED and made.mode == "transport":
        fields.wrong("copy_df, copy_ecn and copy_dscp are for tunnel mode, which has two headers", "mode")
    if "" in made.ah_proposals:
        fields.wrong("name the algorithms of AH, such as sha256-x25519", "ah_proposals")
    if not made.local_ts or not made.remote_ts:
        fields.wrong("local_ts and remote_ts need an entry each")
    return made


def _interface_number(value: object) -> int:
    text = text_of(value)
    try:
        found = int(text, 0)
    except ValueError:
        found = -1
    if not 0 <= found < 1 << 32 or found == XFRM_IF_ID:
        raise Refused(
            f"{text[:40]!r}: the if_id of an XFRM interface, as `ip link add … type xfrm if_id N` has it, "
            f"and not {XFRM_IF_ID}, which is oepy's own"
        )
    return found


def _marks(fields: Fields) -> Marks:
    inward, outward = (fields.take(name, None, mark) for name in ("mark_in", "mark_out"))
    return Marks(
        inward,
        outward,
        fields.take("set_mark_in", None, lambda value: mark(value, inward)),
        fields.take("set_mark_out", None, lambda value: mark(value, outward)),
    )


def _copied(fields: Fields) -> Copied:
    df, ecn = (fields.take(name, default, flag) for name, default in (("copy_df", False), ("copy_ecn", None)))
    dscp = fields.take("copy_dscp", "no", one_of("out", "in", "yes", "no"))
    return Copied(bool(df), ecn, dscp in ("out", "yes"), dscp in ("in", "yes"))


def _priority(value: object) -> int:
    wanted = number(value)
    if wanted > MAX_PRIORITY:
        raise Refused(f"{wanted}: 1 to {MAX_PRIORITY}, of which the lower comes first; 0 for by selectors")
    return wanted


def _tfc_padding(value: object) -> int:
    if value == "mtu":
        return MAX_TFC_PADDING
    size = number(value)
    if size > MAX_TFC_PADDING:
        raise Refused(f"{size}: at most {MAX_TFC_PADDING} bytes, or mtu")
    return size


def _life(fields: Fields) -> Life:
    life = Life()
    rekey = fields.take("rekey_time", life.rekey_time, duration)
    life = replace(life, rekey_time=rekey, life_time=rekey * 1.1, rand_time=rekey * 0.1)
    life = replace(
        life,
        life_time=fields.take("life_time", life.life_time, duration),
        rand_time=fields.take("rand_time", life.rand_time, duration),
        rekey_bytes=fields.take("rekey_bytes", 0, number),
        rekey_packets=fields.take("rekey_packets", 0, number),
    )
    life = replace(
        life,
        life_bytes=fields.take("life_bytes", life.rekey_bytes * 11 // 10, number),
        life_packets=fields.take("life_packets", life.rekey_packets * 11 // 10, number),
    )
    for soft, hard, name in (
        (life.rekey_time, life.life_time, "life_time"),
        (life.rekey_bytes, life.life_bytes, "life_bytes"),
        (life.rekey_packets, life.life_packets, "life_packets"),
    ):
        if hard and soft >= hard:
            fields.wrong(f"{name} {hard:g} must be larger than the rekey limit {soft:g}", name)
    return life


def _cross_check(connection: Connection, fields: Fields) -> None:
    if "psk" in (connection.local.auth, connection.remote.auth) and (
        connection.local.auth != connection.remote.auth
    ):
        fields.wrong("psk on one side alone is not in this version; use it on both")
    if connection.remote.auth == "null" and connection.local.auth == "null":
        fields.wrong("nobody would prove anything; use null on one side alone")
    check_vips(connection, fields)
    for child in connection.children:
        if (child.trap or child.start) and not connection.initiates:
            fields.wrong(
                "trap and start need an address or a name in remote_addrs to begin with",
                *("children", child.name, "start_action"),
            )
        if child.trap and any(selector.network is None for selector in child.remote_ts):
            single = [place.address for place in connection.remote_addrs]
            if connection.pools:
                fields.wrong(
                    "dynamic is an address out of the pools here, which is not known before the peer asks for it;"
                    " name the prefix",
                    *("children", child.name, "remote_ts"),
                )
            elif len(single) != 1 or single[0] is None:
                fields.wrong(
                    "dynamic with start_action trap needs one remote address; name the prefix",
                    *("children", child.name, "remote_ts"),
                )
        if child.mode == "transport" and any(
            selector.network is not None and selector.network.prefixlen != selector.network.max_prefixlen
            for selector in (*child.local_ts, *child.remote_ts)
        ):
            fields.wrong(
                "transport mode is between two hosts: single addresses or dynamic",
                *("children", child.name, "mode"),
            )


# ---- authorities ---------------------------------------------------------------------------------------------


def _authorities(value: object, problems: list[Problem], files: Files) -> tuple[Authority, ...]:
    if value is None:
        return ()
    if not isinstance(value, dict):
        problems.append(
            Problem(("authorities",), "a mapping is expected: `acme: {cacert: ca.pem, crl_uris: [http://…]}`")
        )
        return ()
    if len(value) > MAX_AUTHORITIES:
        problems.append(Problem(("authorities",), f"{len(value)} authorities; at most {MAX_AUTHORITIES}"))
    found = []
    for name, item in list(value.items())[:MAX_AUTHORITIES]:
        fields = Fields(item, ("authorities", str(name)[:64]), problems)
        made = Authority(
            fields.take("cacert", "", lambda file: files.certificates(text_of(file))),
            fields.take_list("crl_uris", (), _url("http", "ldap", "file")),
            fields.take_list("ocsp_uris", (), _url("http")),
        )
        fields.finish(
            {"cert_uri_base": "", "slot": "", "module": "", "file": "name it in cacert", "handle": ""}
        )
        if not made.cacert:
            fields.wrong("cacert is missing: the file of the CA's certificate", "cacert")
            continue
        found.append(made)
    return tuple(found)


def _url(*schemes: str) -> Callable[[object], str]:
    def convert(value: object) -> str:
        text = text_of(value)
        parts = urlsplit(text)
        wrong = parts.scheme not in schemes or not text.isascii() or not text.isprintable()
        if wrong or (parts.scheme == "file") != (not parts.hostname) or " " in text:
            raise Refused(f"{text[:80]!r}: an URL with {', '.join(f'{scheme}://' for scheme in schemes)}")
        return text

    return convert


# ---- secrets -----------------------------------------------------------------------------------------------


def _secrets(
    value: object, problems: list[Problem], files: Files, at: tuple[int, str]
) -> tuple[tuple[SharedSecret, ...], tuple[NamedPpk, ...]]:
    if value is None:
        return (), ()
    if not isinstance(value, list):
        problems.append(Problem(("secrets",), "a list is expected: `- {type: ike, id: […], secret_file: …}`"))
        return (), ()
    if len(value) > MAX_SECRETS:
        problems.append(Problem(("secrets",), f"{len(value)} secrets; at most {MAX_SECRETS}"))
    shared, ppks = [], []
    for index, item in enumerate(value[:MAX_SECRETS]):
        fields = Fields(item, ("secrets", index), problems)
        is_ppk = fields.take("type", "ike", one_of("ike", "ppk")) == "ppk"
        ids = () if is_ppk else fields.take_list("id", (), pattern)
        names = fields.take_list("id", (), ppk_name) if is_ppk else ()
        if is_ppk and not names:
            fields.wrong("a PPK has a name, by which both ends know it", "id")
        name = fields.take("secret_file", "", text_of)
        if not name:
            fields.wrong("secret_file is missing: a file of mode 0600 with the secret")
        else:
            try:
                secret = _secret(files.private(name))
                if is_ppk:
                    ppks.append(NamedPpk(names, secret))
                else:
                    shared.append(SharedSecret(ids, secret, (*at, index)))
            except (OepyError, Refused) as error:
                fields.wrong(str(error), "secret_file")
        fields.finish({"secret": "write it into a file of mode 0600 and name that in secret_file"})
    return tuple(shared), tuple(ppks)


def _secret(content: bytes) -> Secret:
    """As in swanctl.conf: text, `0x` and hexadecimal, or `0s` and base64; a final line end is none of it."""
    text = content.rstrip(b"\r\n")
    try:
        if text[:2] == b"0x":
            text = binascii.unhexlify(text[2:])
        elif text[:2] == b"0s":
            text = base64.b64decode(text[2:], validate=True)
    except (binascii.Error, ValueError):
        raise Refused("the secret after 0x or 0s is no hexadecimal or base64") from None
    if len(text) < MIN_SECRET:
        raise Refused("the file is empty")
    return Secret(text)


__all__ = ["SECTIONS", "Files", "Problem", "duration", "read_connections", "selector"]
