"""What a refusal of the kernel becomes for the user, and the framing's own words."""

from __future__ import annotations

import errno
import struct
from ipaddress import ip_address, ip_network

import pytest

from oepy.errors import ParseError
from oepy.model import Secret
from oepy.netlink import HEADER, NLM_F_ACK_TLVS, NLM_F_CAPPED, NLMSG_ERROR, attribute, frame, parse_frames
from oepy.xfrm import requests
from oepy.xfrm import values as v
from oepy.xfrm.requests import Request
from oepy.xfrm.socket import Refused, explained

KEYED = v.Sa(
    ip_address("2001:db8::1"),
    ip_address("2001:db8::2"),
    0x1001,
    encryption=v.Algorithm("cbc(aes)", Secret(b"e" * 16)),
    integrity=v.Algorithm("hmac(sha256)", Secret(b"i" * 32), 128),
)
POLICY = v.Policy(v.PolicyDirection.OUT, v.Selector(ip_network("10.0.0.0/8"), ip_network("10.1.0.0/16")))


@pytest.mark.parametrize(
    ("request_", "number", "words"),
    [
        (requests.new_sa(KEYED), errno.EPERM, "run as root"),
        (requests.new_sa(KEYED), errno.EEXIST, "ESP SA 0x00001001 to 2001:db8::2: there is one already"),
        (requests.new_sa(KEYED), errno.ENOSYS, "modprobe -a esp6 cbc sha256_generic"),
        (requests.new_sa(KEYED), errno.EPROTONOSUPPORT, "this kernel lacks it"),
        (requests.new_sa(KEYED), errno.EINVAL, "Invalid argument"),
        (requests.delete_sa(v.SaId(ip_address("10.0.0.1"), 7, v.AH)), errno.ESRCH, "AH SA 0x00000007"),
        (requests.new_policy(POLICY), errno.EEXIST, "`out` policy 10.0.0.0/8 → 10.1.0.0/16"),
        (requests.delete_policy(POLICY.id), errno.ENOENT, "there is none"),
        (requests.new_policy(POLICY), errno.ENOBUFS, "out of memory"),
        (requests.new_policy(POLICY), errno.EPROTONOSUPPORT, "xfrm_user"),
        (requests.sad_info(), errno.EPERM, "run as root"),
    ],
)
def test_refusals_name_the_thing_and_the_mend(request_: Request, number: int, words: str) -> None:
    """And never a key."""
    error = explained(Refused(request_, number, "Requested AEAD algorithm not found"))
    assert words in str(error)
    assert "eeee" not in str(error)
    assert "6565" not in str(error)


def _refusal(quoted: bytes, flags: int, words: bytes) -> bytes:
    body = struct.pack("=i", -errno.ENOSYS) + quoted + attribute(1, words)
    return HEADER.pack(HEADER.size + len(body), NLMSG_ERROR, flags, 9, 0) + body


def test_the_kernels_own_words_are_found() -> None:
    """NETLINK_EXT_ACK: behind the quoted request, or behind its header alone."""
    request = frame(0x10, 0, b"x" * 24, 9)
    for quoted, flags in (
        (request, NLM_F_ACK_TLVS),
        (request[: HEADER.size], NLM_F_ACK_TLVS | NLM_F_CAPPED),
    ):
        (found,) = parse_frames(_refusal(quoted, flags, b"no such algorithm\0"))
        assert (found.error, found.reason, found.sequence) == (errno.ENOSYS, "no such algorithm", 9)
    (plain,) = parse_frames(_refusal(request, 0, b""))
    assert plain.reason == ""
    with pytest.raises(ParseError):
        list(parse_frames(_refusal(request[:8], NLM_F_ACK_TLVS, b"")))


def test_words_are_bounded() -> None:
    """Whatever the kernel says, it does not fill a log."""
    (found,) = parse_frames(_refusal(frame(0x10, 0, b"")[:16], NLM_F_ACK_TLVS | NLM_F_CAPPED, b"w" * 4000))
    assert len(found.reason) == 200
