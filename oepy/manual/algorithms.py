"""The algorithms of manual SAs by strongSwan's names, with the lengths of their keys.

Key lengths are in bytes as the key is written down: with the 4-byte salt or nonce of AEADs and counter mode at
the end (RFC 4106 §8.1, RFC 7634 §2.2, RFC 3686 §5.1).
"""

from __future__ import annotations

from dataclasses import dataclass

_STATIC_KEY = (
    "must not be used with keys that outlive a restart, which makes it repeat its nonces (RFC 8221 §5); "
    "take aes256 with sha256, or write `allow_weak: true` where every start has a key of its own"
)
_OLD = "is weak (RFC 8221 §5); take {}, or write `allow_weak: true` for a peer that knows nothing better"


@dataclass(frozen=True, slots=True)
class Algorithm:
    """`weak` says what is wrong with it, "" for nothing; `userland`: whether oepy's own ESP has it."""

    name: str
    key_length: int
    weak: str = ""
    userland: bool = True


def _table(*items: Algorithm) -> dict[str, Algorithm]:
    return {item.name: item for item in items}


CIPHERS = _table(
    Algorithm("aes128", 16),
    Algorithm("aes192", 24),
    Algorithm("aes256", 32),
    *(Algorithm(f"aes{bits}ctr", bits // 8 + 4, _STATIC_KEY) for bits in (128, 192, 256)),
    Algorithm("null", 0),
    Algorithm("3des", 24, _OLD.format("aes256"), userland=False),
)
AEADS = _table(
    *(Algorithm(f"aes{bits}gcm16", bits // 8 + 4, _STATIC_KEY) for bits in (128, 192, 256)),
    Algorithm("chacha20poly1305", 36, _STATIC_KEY),
)
MACS = _table(
    Algorithm("sha256", 32),
    Algorithm("sha384", 48),
    Algorithm("sha512", 64),
    Algorithm("sha256_96", 32, userland=False),  # the 96-bit ICV of Linux before RFC 4868
    Algorithm("aesxcbc", 16, userland=False),
    Algorithm("sha1", 20, _OLD.format("sha256"), userland=False),
)

_BROKEN = "is broken and not in oepy; take {}"
REFUSED = {
    **dict.fromkeys(("des", "blowfish", "cast128", "twofish", "camellia"), _BROKEN.format("aes256")),
    "twofish": "is not in oepy; take aes256",
    "camellia": "is not in oepy; take aes256",
    **dict.fromkeys(("md5", "ripemd160"), _BROKEN.format("sha256")),
}


def unknown(kind: str, name: str, table: dict[str, Algorithm]) -> str:
    """What to say of a name that is not in `table`."""
    if name in REFUSED:
        return f"{name} {REFUSED[name]}"
    if kind == "encryption" and name in AEADS:
        return f"{name} is an AEAD; write `aead: {name}` and `aead_key`, without integrity"
    return f"no {kind} algorithm {name!r}; known are {', '.join(table)}"
