"""`python -m tests.fuzz.seeds`: write the corpus's first files, made from real messages (`seed-…`)."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import struct

import dns.rdata
import dns.rdatatype

from oepy import dn
from oepy.datapath.esp.aggfrag import Packer, offload_block
from oepy.datapath.esp.offload import GSO_TCP4, GSO_TCP6, GSO_UDP, NEEDS_CHECKSUM, Offload
from oepy.datapath.xfrm import plan
from oepy.dns.message import build_query
from oepy.dns.records import IpsecKey, OeText, build_ipseckey, build_oe_text
from oepy.ike.header import PayloadType, parse_header
from oepy.ike.key_exchange import generate
from oepy.ike.message import open_sealed
from oepy.ike.notify import NotifyType
from oepy.ike.payloads import build_chain, build_ke, notify, parse_chain
from oepy.keys import to_public_key
from oepy.model import EspSuite
from oepy.netlink import frame
from oepy.trap import netlink
from oepy.x509.certificates import to_der
from oepy.xfrm import pieces, requests, values
from tests.fakes.datapath import ipv4_packet, ipv6_packet, pairs
from tests.fakes.manual import section
from tests.fakes.network_card import cut, with_checksums
from tests.fakes.xfrm import acquire_body, expire_body, mapping_body, policy_expire_body
from tests.fuzz.harnesses import QUESTION, SCENES, X509_SITE, X509_WORDS, Scene
from tests.sim.ike_net import rsa_key, two_hosts

_BOTH = ((0, 0), (1, 1), (0, 2), (1, 3), (4, 4), (2, 1))
CORPUS = pathlib.Path(__file__).parent / "corpus"


def seeds() -> dict[str, list[bytes]]:
    made: dict[str, list[bytes]] = {
        name: [] for name in ("ike", "ike_sealed", "records", "dns_reply", "dns_chain", "esp")
    }
    scene = Scene("established", seed=2)
    datagrams = [data for *_, data in scene.net.carried]
    for state in range(len(SCENES)):
        made["ike"] += [bytes((state, 0)) + data for data in datagrams[:2]]
        made["ike"] += [bytes((state, 1)) + data[16:] for data in datagrams[2:]]
    host, peer = scene.session(scene.host), scene.session(scene.peer)
    assert host is not None
    assert peer is not None
    for data in datagrams[2:]:
        header = parse_header(data)
        encrypted = parse_chain(data, header.next_payload, 28).encrypted
        assert encrypted is not None
        plain = open_sealed(data, encrypted, (host if header.is_response else peer).unprotect)  # type: ignore[arg-type]
        assert isinstance(plain, bytes)
        for state in range(len(SCENES) - 2):
            response = int(header.is_response)
            made["ike_sealed"].append(bytes((state, 0, response, encrypted.first_inner)) + plain)
            made["ike_sealed"].append(bytes((state, 1, response, encrypted.first_inner)) + plain)
    for exchange, first, plain in ((2, 42, "0000000801000000"), (2, 42, "0000000c0304000100001001")):
        made["ike_sealed"] += [bytes((s, exchange, 0, first)) + bytes.fromhex(plain) for s in range(4)]
    shares = [
        build_chain([(PayloadType.KE, build_ke(36, generate("mlkem768", bytes).public)), *more])
        for more in ((), (notify(NotifyType.ADDITIONAL_KEY_EXCHANGE, bytes(16)),))
    ]
    for first, plain in shares:
        for state in range(4, 8):
            made["ike_sealed"] += [bytes((state, exchange, 0, first)) + plain for exchange in (4, 5)]
    moves = [
        [notify(NotifyType.UPDATE_SA_ADDRESSES), notify(NotifyType.NO_NATS_ALLOWED, bytes(12))],
        [notify(NotifyType.COOKIE2, bytes(8)), notify(NotifyType.ADDITIONAL_IP4_ADDRESS, bytes(4))],
        [notify(NotifyType.NAT_DETECTION_SOURCE_IP, bytes(20)), notify(NotifyType.NO_ADDITIONAL_ADDRESSES)],
    ]
    for payloads in moves:
        first, plain = build_chain(payloads)
        made["ike_sealed"] += [bytes((state, 2, 0, first)) + plain for state in range(2, 8)]
    made["ike_session"] = [bytes((hybrid, a, 8 + b, 7, 15, 23, 31)) for hybrid in (0, 1) for a, b in _BOTH]
    _records(made)
    _streams_and_anchors(made)
    _configurations(made)
    for packet in (ipv4_packet("192.0.2.2", "192.0.2.1"), ipv6_packet("2001:db8::2", "2001:db8::1")):
        version = 4 if packet[0] >> 4 == 4 else 41
        made["esp"] += [b"\0" + b"\0\0\x10\1\0\0\0\1" + packet, b"\1" + packet + bytes((0, version))]
        made["esp"].append(b"\2" + packet)
        made.setdefault("trap", []).append(b"\2" + packet)
        body = netlink.attribute(1, bytes(7)) + netlink.attribute(10, packet)
        made["trap"] += [b"\1" + body, b"\0" + netlink.message(0x300, 0, body)]
    _esp(made["esp"])
    _xfrm(made)
    _certificates(made)
    return made


def _certificates(made: dict[str, list[bytes]]) -> None:
    """Chains that hold and that do not, what their CA says, names."""
    der = {name: to_der(holder.certificate) for name, holder in X509_SITE.items()}
    chains = (
        ("leaf", "middle"),
        ("leaf",),
        ("middle", "leaf"),
        ("stranger", "root"),
        ("revoked", "leaf", "root"),
    )
    made["certificates"] = [
        b"\0" + b"".join(len(der[name]).to_bytes(2, "big") + der[name] for name in chain) for chain in chains
    ]
    made["certificates"] += [b"\1" + X509_WORDS["crl"], b"\2" + X509_WORDS["ocsp"]]
    names = ("C=CH, O=Acme, CN=gw", "E=a@b.example,DC=example", "2.5.4.99=\\,x")
    made["certificates"] += [b"\3" + dn.parse(text) for text in names]
    made["certificates"] += [b"\3" + text.encode() for text in names]


def _esp(made: list[bytes]) -> None:
    """AGGFRAG payloads with and without fragments and offload blocks; super-packets and their segments."""
    small, long = ipv4_packet("192.0.2.2", "192.0.2.1"), ipv4_packet("192.0.2.2", "192.0.2.1", bytes(200))
    packer = Packer(100)
    payloads = [*packer.add(memoryview(small)), *packer.add(memoryview(long)), packer.rest()]
    stream = b"".join(
        bytes((number, 4 + sum(map(len, parts)))) + head + b"".join(parts)
        for number, (head, parts) in enumerate(payloads)
    )
    made += [b"\3\0" + stream, b"\3\xff" + stream]
    for version, gso in ((4, GSO_TCP4), (6, GSO_TCP6)):
        start = 20 if version == 4 else 40
        make, ends = (ipv4_packet, ("192.0.2.2", "192.0.2.1"))
        if version == 6:
            make, ends = ipv6_packet, ("2001:db8::2", "2001:db8::1")
        header = bytes(8) + b"\x50\x10" + bytes(6)
        packet = with_checksums(make(*ends, header + bytes(120), 6))
        offload = Offload(NEEDS_CHECKSUM, gso, start + 20, 50, start, 16)
        made.append(b"\4" + offload.pack() + packet)
        pieces = cut(packet, offload)
        made += [
            b"\5" + first + b"".join(bytes((len(piece),)) + piece for piece in pieces)
            for first in (b"\0", b"\xff")
        ]
        block = offload_block(packet, offload)
        assert block is not None
        made.append(b"\3\0\0" + bytes((8 + len(packet),)) + bytes(4) + block + packet)
    datagrams = [
        with_checksums(ipv4_packet("192.0.2.2", "192.0.2.1", struct.pack("!HH", 28, 0) + bytes(20)))
    ] * 3
    made.append(b"\5\0" + b"".join(bytes((len(piece),)) + piece for piece in datagrams))
    made.append(b"\4" + Offload(1, GSO_UDP, 28, 8, 20, 6).pack() + datagrams[0])


def _xfrm(made: dict[str, list[bytes]]) -> None:
    """What the kernel sends of two pairs, and of those that it sends alone."""
    (one, _), (other, _) = pairs(), pairs("2001:db8::1", "2001:db8::2", suite=EspSuite("aes256", "sha512"))
    for pair in (one, dataclasses.replace(other, encap=False, protocol="esp")):
        inbound, outbound = plan.sas(pair, 0x6F000001, plan.BY_DEVICE)
        policies = [
            *plan.inward_policies(pair, 1, plan.BY_DEVICE),
            *plan.outward_policies(pair, 1, plan.BY_MARK),
        ]
        asked = [requests.new_sa(inbound), requests.new_sa(outbound), *map(requests.new_policy, policies)]
        asked += [requests.delete_sa(inbound.id), requests.delete_policy(policies[0].id)]
        bodies = [(request.kind, request.body) for request in asked]
        bodies.append((pieces.MSG_EXPIRE, expire_body(inbound, True)))
        bodies.append((pieces.MSG_POLEXPIRE, policy_expire_body(policies[-1], False)))
        ends = inbound.source, inbound.destination
        acquire = values.Acquire(*ends, values.ESP, policies[0].selector, policies[0], 7)
        bodies.append((pieces.MSG_ACQUIRE, acquire_body(acquire)))
        bodies.append(
            (pieces.MSG_MAPPING, mapping_body(values.Mapping(inbound.id, 1, ends[0], ends[1], 1, 2)))
        )
        made.setdefault("xfrm", []).extend(bytes((kind,)) + body for kind, body in bodies)
        made["xfrm"].append(b"\0" + b"".join(frame(*request) for request in asked[:3]))


def _streams_and_anchors(made: dict[str, list[bytes]]) -> None:
    """Answers to the three questions in order, out of order, in pieces and short; files of trust anchors."""
    reply = build_query(QUESTION, 0)[2:]
    reply = bytes((reply[0] | 0x80,)) + reply[1:]
    answers = [
        (len(reply) + 2).to_bytes(2, "big") + number.to_bytes(2, "big") + reply
        for number in range(0x1234, 0x1238)
    ]
    in_order, backwards = b"".join(answers), b"".join(answers[::-1])
    made["dns_stream"] = [b"\xff" + in_order, b"\0" + in_order, b"\6" + backwards, b"\x40" + answers[1][:20]]
    made["dns_stream"] += [b"\1\0\0\0\1x" + answers[2], b"\2\xff\xff" + bytes(40)]
    zone = ";zone example. checked 20270115080000 due 20270116080000\n"
    key = "example. IN DNSKEY 257 3 15 l02Woi0iS8Aa25FQkUd9RMzZHJpBoRQwAQEX1SxZJA4= "
    times = "since 20270115080000"
    lines = [f"{key};MISSING {times}\n", f";{key};ADDPEND {times} until 20270214080000\n"]
    lines += [f";{key};REVOKED {times} until 20270214080000\n", f";{key};REMOVED {times}\n", "; a comment\n"]
    made["anchor_file"] = [b"\1", b"\0" + zone.encode(), *(b"\1" + (zone + line).encode() for line in lines)]


def _records(made: dict[str, list[bytes]]) -> None:
    a, b = two_hosts()
    for key in (a.public[0], b.public[0], to_public_key(rsa_key().public_key())):
        for gateway in (None, a.at.address):
            rdata = build_ipseckey(IpsecKey(10, key.algorithm, gateway, key.data))
            made["records"].append(b"\0" + rdata)
            answer = b"\xc0\x0c\x00\x2d\x00\x01\0\0\x0e\x10" + len(rdata).to_bytes(2, "big") + rdata
            made["dns_reply"].append(b"\1\0\1\0\0\0\0" + answer)
    text = OeText(10, a.at.address, to_public_key(rsa_key().public_key()))
    made["records"] += [b"\1" + b"".join(build_oe_text(text)), b"\2192.0.2.1 AQPBroken"]
    for kind, words in (
        ("NSEC", "a.example. A NS SOA RRSIG NSEC"),
        ("NSEC3", "1 1 10 aabb 2t7b4g4vsa5smi47k61mv5bv1a22bojr A RRSIG"),
        ("DS", "12345 13 2 " + "ab" * 32),
        ("DNSKEY", "257 3 15 " + "q" * 43 + "="),
        ("CNAME", "1.0-25.2.0.192.in-addr.arpa."),
        ("SOA", "a. b. 1 2 3 4 5"),
    ):
        wire = dns.rdata.from_text("IN", kind, words).to_wire() or b""
        number = int(dns.rdatatype.RdataType.make(kind)).to_bytes(2, "big")
        answer = b"\xc0\x0c" + number + b"\x00\x01\0\0\x0e\x10" + len(wire).to_bytes(2, "big") + wire
        made["dns_reply"].append(b"\1\0\0\0\1\0\0" + answer)
    for question in range(8):
        made["dns_chain"] += [
            bytes((question,)),
            bytes((question, 0, 0, 1, 0, 2, 2, 3, 0)),
            bytes((question, 0, 6, 0, 1, 1, 3, 5, 1, 3, 4, 3, 0)),
        ]


def _configurations(made: dict[str, list[bytes]]) -> None:
    a, b, key, short = "192.0.2.1", "2001:db8::2", "0x" + "ab" * 32, "0x" + "cd" * 16
    sa = f"add {a} 192.0.2.2 esp 0x1001 -m tunnel -u 7 -r 4 -lh 9 -E aes-cbc {key} -A hmac-sha256 {key};"
    template = f"esp/tunnel/{a}-192.0.2.2/unique:7"
    policy = f"spdadd 10.0.0.0/8[any] 192.0.2.2[80] tcp -P in prio high - 5 ipsec {template};"
    all_icmp = "::/0 ::/0 icmp6 -P out"
    setkey = [
        f"flush; spdflush; # all\n{sa}\n{policy}",
        f'add {b} {b} ah 300 -A hmac-sha2-512 "0123456789";',
        f"{sa} delete {a} 192.0.2.2 esp 4097; deleteall {a} {b} ah;",
        f"spdadd {all_icmp} none; spdupdate {all_icmp} discard; spddelete {all_icmp};",
        f"add {a}[4500] {a}[4500] esp-udp 999 -E null -A hmac-sha384 {key};",
        "dump; get; exit;",
    ]
    esp = f"esp transport from {a} to 192.0.2.2 spi 0x1001:0x1002 auth hmac-sha2-256 enc aes authkey {key}:{key} "
    openbsd = [
        f'gw = "192.0.2.2"\n{esp}\\\n enckey {short}:{short}\nflow esp from {a} to $gw\n',
        "flow from { 10.1.0.0/16, 10.2.0.0/16 } to any type bypass\n",
        'include "i"\n',
        f"ah from {b} to {b} spi 300 authkey file k\n",
        "flow in proto tcp from any port 80 to 10.0.0.0/8 local 192.0.2.1 peer 192.0.2.2 type use\n",
        'a = "$b"\nb = "$a"\nflow from $a to any\nike esp from any to any\n',
    ]
    made["setkey"] = [text.encode() for text in setkey]
    made["ipsec_conf"] = [text.encode() for text in openbsd]
    whole = section("192.0.2.1", "192.0.2.2")
    sections: list[object] = [
        whole,
        {"sas": [{**whole["sas"][0], "spi": 1}]},
        {
            "policies": [
                {
                    "direction": "out",
                    "src": "::/0",
                    "dst": b,
                    "protocol": "tcp",
                    "dport": 80,
                    "action": "block",
                }
            ]
        },
        {"sas": [{**whole["sas"][0], "lifetime": {"soft_bytes": 1}, "esn": True, "replay_window": 64}]},
        {"sas": whole["sas"], "policies": [{**whole["policies"][0], "priority": 5}, *whole["policies"]]},
        {"sas": [{**whole["sas"][0], "encryption_key_file": "k", "encryption_key": None}]},
    ]
    made["manual_section"] = [json.dumps(item).encode() for item in sections]
    made["connections"] = [json.dumps(item).encode() for item in connection_sections()]


def connection_sections() -> list[dict[str, object]]:
    """With every key that there is, and some mistakes."""
    child = {
        "local_ts": ["10.1.0.0/16", "dynamic[tcp/80]"],
        "remote_ts": "2001:db8::/32[udp]",
        "esp_proposals": ["aes256gcm16-x25519", "default"],
        "start_action": "trap|start",
        "close_action": "restart",
        "dpd_action": "clear",
        "rekey_time": "1h",
        "life_time": 4000,
        "rekey_bytes": 1000,
        "inactivity": "5m",
        "mark_in": 42,
        "mark_out": "0x2a/0xff",
        "set_mark_in": "%same",
        "set_mark_out": "7/0x0f",
        "priority": 7,
        "copy_df": True,
        "copy_ecn": False,
        "copy_dscp": "out",
        "updown": ["/bin/true", "x"],
    }
    site = {
        "local_addrs": ["192.0.2.1"],
        "remote_addrs": ["gw.example", "192.0.2.0/24", "2001:db8::1"],
        "local": {"auth": "psk", "id": "a.example"},
        "remote": {"auth": "psk", "id": "*.example"},
        "children": {"net": child, "ah": {"ah_proposals": ["sha256-ecp256-esn"]}},
    }
    keys = {
        "remote_addrs": "%any",
        "local": {"auth": "null"},
        "remote": {"auth": "pubkey", "id": "gw.example", "pubkeys": ["peer"]},
        "children": {"net": {}},
        "rekey_time": 0,
        "reauth_time": "3h",
        "over_time": "5m",
        "unique": "never",
        "encap": True,
        "mobike": False,
        "childless": "force",
        "ppk_id": "moon",
        "ppk_required": True,
        "keyingtries": 3,
    }
    client = {**site, "remote_addrs": ["192.0.2.9"], "vips": ["0.0.0.0", "::"], "children": {"n": {}}}
    pools = {"four": {"addrs": "10.3.0.0-10.3.0.9", "dns": ["10.0.0.1"], "domain": ["corp.example"]}}
    psk = {"type": "ike", "id": ["a.example", "*.example"], "secret_file": "psk"}
    return [
        {"connections": {"site": site}, "secrets": [psk]},
        {"connections": {"keys": keys}, "secrets": [{"type": "ppk", "id": "moon", "secret_file": "other"}]},
        {"connections": {"client": client, "hub": {**site, "pools": ["four"]}}, "pools": pools},
        {"secrets": [{"secret_file": "psk"}, {"id": "gw.example", "secret_file": "other"}]},
        {"secrets": [{**psk, "secret_file": "bad"}, {"secret": "x"}, {"type": "eap"}, 7]},
        {"connections": {"manual": site, "x y": {}, "z": {**site, "chidlren": 1, "version": 1}}},
        {"connections": {"site": {**site, "pools": ["none"], "vips": ["10.0.0.1", "10.0.0.2"]}}},
        {"connections": {"hub": {**keys, "remote": {"auth": "eap"}}}, "pools": {"p": {"addrs": "x"}}},
    ]


def main() -> None:
    for target, files in seeds().items():
        directory = CORPUS / target
        directory.mkdir(parents=True, exist_ok=True)
        for number, data in enumerate(dict.fromkeys(files)):
            (directory / f"seed-{number:02}").write_bytes(data)


if __name__ == "__main__":
    main()
