"""KAME's and ipsec-tools' setkey(8) files.

Theory of operation. A file is a list of commands that end in `;` and change the state of the SAD and SPD one after
the other. What they leave is converted: delete and flush take away what stood before them. What only asks (get,
dump) has nothing to convert, and what oepy has not (IPComp, TCP-MD5 …) is an error of its line.

An inbound policy covers forwarded packets as well there; here `fwd` is a direction of its own, so each inbound
policy that can be about forwarded packets is written twice.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import ip_address, ip_network

from oepy.convert.drafts import MAX_TOKEN, MAX_TOKENS, Draft, Findings, Json, Place, Refused, policy_key
from oepy.manual.presenting import template_from_text

MAX_WORDS = 256  # of one command
_TOKEN = re.compile(r'"(?P<quoted>[^"]*)"|(?P<open>")|(?P<end>;)|(?P<comment>#[^\n]*)|(?P<word>[^\s;"#]+)')

_STATE = frozenset(("add", "update", "delete", "deleteall", "flush"))
_POLICY_STATE = frozenset(("spdadd", "spdupdate", "spddelete", "spdflush"))
_QUESTIONS = frozenset(("get", "dump", "spddump"))
_ENDS = frozenset(("exit", "quit", "bye"))
COMMANDS = _STATE | _POLICY_STATE | _QUESTIONS | _ENDS


@dataclass(frozen=True, slots=True)
class Token:
    text: str
    line: int
    quoted: bool = False

    def shown(self) -> str:
        """For an error: never what may be a key."""
        if self.quoted or (self.text[:2].lower() == "0x" and len(self.text) > 10):
            return "a key"
        return repr(self.text[:40])


def tokens(text: str) -> Iterator[Token]:
    """`;` is a token of its own. Raises Refused for a string without end, or beyond the bounds."""
    line, at = 1, 0
    for count, match in enumerate(_TOKEN.finditer(text)):
        if count >= MAX_TOKENS:
            raise Refused(f"more than {MAX_TOKENS} words")
        line += text.count("\n", at, match.start())
        at = match.start()
        if match["open"]:
            raise Refused(f'line {line}: a string begins here and has no end; close it with "')
        if match["comment"] is not None:
            continue
        word = match["quoted"] if match["quoted"] is not None else match[0]
        if len(word) > MAX_TOKEN:
            raise Refused(f"line {line}: a word of {len(word)} characters; the longest may have {MAX_TOKEN}")
        yield Token(word, line, match["quoted"] is not None)


class _Words:
    """The words of one command behind its name, taken one after the other."""

    def __init__(self, words: list[Token]) -> None:
        self._words = words
        self._next = 0

    def peek(self) -> Token | None:
        return self._words[self._next] if self._next < len(self._words) else None

    def take(self, what: str) -> Token:
        token = self.peek()
        if token is None:
            raise Refused(f"{what} is missing")
        self._next += 1
        return token

    def take_plain(self, what: str) -> str:
        token = self.take(what)
        if token.quoted:
            raise Refused(f"{what} is missing; there is a string in its place")
        return token.text

    def rest(self) -> list[Token]:
        rest = self._words[self._next :]
        self._next = len(self._words)
        return rest

    def end(self) -> None:
        token = self.peek()
        if token is not None:
            raise Refused(f"{token.shown()} has no place here")

    def skip_family_options(self) -> None:
        """-4, -6 and -n say how names are looked up; oepy takes addresses only."""
        while (token := self.peek()) is not None and re.fullmatch(r"-[46n]+", token.text):
            self._next += 1


def read_setkey(text: str, file: str, found: Findings) -> None:
    """Carry out the commands of one file on what `found` holds."""
    found.in_order = True
    _Reader(file, found).read(text)


class _Reader:
    def __init__(self, file: str, found: Findings) -> None:
        self._file = file
        self._found = found

    def read(self, text: str) -> None:
        command: list[Token] = []
        try:
            for token in tokens(text):
                if token.text == ";" and not token.quoted:
                    if not self._run(command):
                        return
                    command = []
                elif len(command) >= MAX_WORDS:
                    raise Refused(
                        f"line {token.line}: a command of more than {MAX_WORDS} words; is a `;` missing?"
                    )
                else:
                    command.append(token)
        except Refused as error:
            line = re.match(r"line (\d+): ", str(error))
            number = int(line[1]) if line else 1
            self._found.problem(Place(self._file, number), str(error).removeprefix(line[0] if line else ""))
            return
        if command:
            self._problem(command, "the command has no end; close it with `;`")

    def _problem(self, command: list[Token], text: str) -> None:
        self._found.problem(Place(self._file, command[0].line), text)

    def _run(self, command: list[Token]) -> bool:
        """False where the file ends here by its own word."""
        if not command:
            return True
        name, words = command[0].text, _Words(command[1:])
        if name in _ENDS and not command[0].quoted:
            return False
        if command[0].quoted or name not in COMMANDS:
            self._problem(
                command,
                f"{command[0].shown()} is no command of setkey; known are {', '.join(sorted(COMMANDS))}",
            )
            return True
        if name in _QUESTIONS:
            self._problem(command, f"`{name}` only asks, there is nothing to convert; remove the line")
            return True
        place = Place(self._file, command[0].line)
        self._found.attempt(place, lambda: self._change(name, words, place))
        return True

    def _change(self, name: str, words: _Words, place: Place) -> None:
        match name:
            case "add" | "update":
                self._add(words, place)
            case "delete" | "deleteall":
                self._delete(words, every_spi=name == "deleteall")
            case "flush":
                protocol = None if words.peek() is None else _protocol(words)[0]
                words.end()
                for key in [key for key in self._found.sas if protocol in (None, key[1])]:
                    del self._found.sas[key]
            case "spdflush":
                words.end()
                self._found.policies.clear()
            case "spddelete":
                self._policy_delete(words)
            case _:
                self._policy_add(words, place, update=name == "spdupdate")

    # ---- SAs -----------------------------------------------------------------------------------------------

    def _add(self, words: _Words, place: Place) -> None:
        words.skip_family_options()
        src, sport = _host(words, "the source address")
        dst, dport = _host(words, "the destination address")
        protocol, in_udp = _protocol(words)
        mapping: Json = {"src": src, "dst": dst, "protocol": protocol, "spi": words.take_plain("the SPI")}
        if in_udp:
            mapping["encap"] = {"sport": sport or "4500", "dport": dport or "4500"}
        elif sport or dport:
            raise Refused("ports belong to protocol esp-udp only")
        while words.peek() is not None:
            self._extension(words, mapping, place)
        if protocol == "esp" and not {"integrity", "aead"} & mapping.keys():
            raise Refused(
                "ESP without integrity is not in oepy (RFC 8221 §4); add -A hmac-sha2-256 and a key"
            )
        key = (dst, protocol, _number(str(mapping["spi"]), "the SPI"))
        if key in self._found.sas:
            raise Refused(f"the SA {protocol} {mapping['spi']} to {dst} is there already; delete it before")
        self._found.sas[key] = Draft(place, mapping)

    def _extension(self, words: _Words, mapping: Json, place: Place) -> None:
        option = words.take_plain("an option")
        limits: dict[str, str] = {
            "-ls": "soft_seconds",
            "-lh": "hard_seconds",
            "-bs": "soft_bytes",
            "-bh": "hard_bytes",
        }
        if option in limits:
            mapping.setdefault("lifetime", {})[limits[option]] = words.take_plain(
                f"the number behind {option}"
            )
        elif option == "-m":
            mode = words.take_plain("the mode behind -m")
            if mode not in ("tunnel", "transport", "any"):
                raise Refused(f"mode {mode[:40]!r} is not in oepy; write tunnel or transport")
            mapping["mode"] = mode
        elif option == "-u":
            mapping["reqid"] = words.take_plain("the number behind -u")
        elif option == "-r":
            # The manual counts bytes of the window's bit field
            size = _number(words.take_plain("the size behind -r"), "the size behind -r")
            mapping["replay_window"] = str(8 * size)
        elif option == "-esn":
            mapping["esn"] = "true"
        elif option == "-f":
            flag = words.take_plain("the option behind -f")
            if flag not in ("seq-pad", "nocyclic-seq"):  # both are what RFC 4303 demands
                raise Refused(f"-f {flag[:40]} is not in oepy, which pads by RFC 4303 §2.4; remove it")
        elif option == "-E":
            _encryption(words, mapping)
        elif option == "-A":
            self._integrity(words, mapping, place)
        elif option in ("-C", "-R"):
            raise Refused("compression (IPComp) is not in oepy; remove it")
        else:
            raise Refused(f"option {Token(option, 0).shown()} is not in oepy; remove it")

    def _integrity(self, words: _Words, mapping: Json, place: Place) -> None:
        name = words.take_plain("the algorithm behind -A")
        if name == "null":
            _optional_key(words)
            return
        if name not in _MACS:
            raise Refused(
                f"authentication algorithm {name[:40]!r} is not in oepy; known are {', '.join(_MACS)}"
            )
        mapping["integrity"], mapping["integrity_key"] = _MACS[name], _key(words, name)
        if _MACS[name] == "sha256":
            self._found.note(
                place,
                f"{name} is taken with the 128-bit ICV of RFC 4868; for a peer that setkey has set up on Linux, "
                "which cuts it to 96 bits, write `integrity: sha256_96`",
            )

    def _delete(self, words: _Words, *, every_spi: bool) -> None:
        words.skip_family_options()
        src, _ = _host(words, "the source address")
        dst, _ = _host(words, "the destination address")
        protocol, _ = _protocol(words)
        spi = None if every_spi else _number(words.take_plain("the SPI"), "the SPI")
        words.end()
        gone = [
            key
            for key, draft in self._found.sas.items()
            if (draft.mapping["src"], *key[:2]) == (src, dst, protocol) and spi in (None, key[2])
        ]
        if not every_spi and not gone:
            raise Refused("deletes an SA that no line before has added; remove the line")
        for key in gone:
            del self._found.sas[key]

    # ---- policies ------------------------------------------------------------------------------------------

    def _policy_add(self, words: _Words, place: Place, *, update: bool) -> None:
        mapping, rest = _policy_head(words)
        rank, rest = _priority(rest)
        if not rest:
            raise Refused("what to do is missing; write discard, none, or ipsec with templates")
        action, templates = rest[0].text, rest[1:]
        if action == "ipsec":
            mapping["action"] = "ipsec"
            mapping["templates"] = [_template(token.text, mapping) for token in templates]
        elif action in ("discard", "none"):
            if templates:
                raise Refused(f"{templates[0].shown()} has no place behind {action}")
            mapping["action"] = {"discard": "block", "none": "bypass"}[action]
        else:
            raise Refused(f"{rest[0].shown()} is not in oepy; write discard, none, or ipsec with templates")
        same = self._found.policies.get(policy_key(mapping))
        if same is not None and not update and not same.made:
            raise Refused(
                "a policy with this direction and selector is there already; delete it before, or spdupdate"
            )
        self._found.policies.pop(policy_key(mapping), None)
        self._found.policies[policy_key(mapping)] = Draft(place, mapping, rank)
        self._forwarded(mapping, place, rank)

    def _forwarded(self, mapping: Json, place: Place, rank: int) -> None:
        """The `fwd` twin of an inbound policy, unless one was written."""
        in_transport = any(item["mode"] == "transport" for item in mapping.get("templates", ()))
        twin = {**mapping, "direction": "fwd"}
        there = self._found.policies.get(policy_key(twin))
        if mapping["direction"] == "in" and not in_transport and (there is None or there.made):
            self._found.policies[policy_key(twin)] = Draft(place, twin, rank, made=True)

    def _policy_delete(self, words: _Words) -> None:
        mapping, rest = _policy_head(words)
        if rest:
            raise Refused(f"{rest[0].shown()} has no place behind the direction")
        if self._found.policies.pop(policy_key(mapping), None) is None:
            raise Refused("deletes a policy that no line before has added; remove the line")
        twin = policy_key({**mapping, "direction": "fwd"})
        if mapping["direction"] == "in" and twin in self._found.policies and self._found.policies[twin].made:
            del self._found.policies[twin]


def settle_modes(found: Findings) -> None:
    """An SA without a mode, or of mode any, serves what its policies demand: tunnel where one of them has a tunnel
    between its ends, else transport."""
    tunnels = {
        (template["protocol"], template.get("src"), template.get("dst"))
        for draft in found.policies.values()
        for template in draft.mapping.get("templates", ())
        if template["mode"] == "tunnel"
    }
    for draft in found.sas.values():
        if draft.mapping.get("mode", "any") == "any":
            ends = (draft.mapping["protocol"], draft.mapping["src"], draft.mapping["dst"])
            draft.mapping["mode"] = "tunnel" if ends in tunnels else "transport"


# ---- pieces ------------------------------------------------------------------------------------------------

_AES = {16: "aes128", 24: "aes192", 32: "aes256"}
_GCM = {20: "aes128gcm16", 28: "aes192gcm16", 36: "aes256gcm16"}
_CIPHERS = {
    "rijndael-cbc": _AES,
    "aes-cbc": _AES,
    "aes-ctr": {20: "aes128ctr", 28: "aes192ctr", 36: "aes256ctr"},
    "3des-cbc": {24: "3des"},
    "aes-gcm-16": _GCM,
    "aes-gcm": _GCM,
    "chacha20-poly1305": {36: "chacha20poly1305"},
}
_AEAD_NAMES = frozenset(("aes-gcm-16", "aes-gcm", "chacha20-poly1305"))
_MACS = {
    **dict.fromkeys(("hmac-sha256", "hmac-sha2-256"), "sha256"),
    **dict.fromkeys(("hmac-sha384", "hmac-sha2-384"), "sha384"),
    **dict.fromkeys(("hmac-sha512", "hmac-sha2-512"), "sha512"),
    "hmac-sha1": "sha1",
    "aes-xcbc-mac": "aesxcbc",
}
_LEVELS = {"high": 0x4000_0000, "def": 0, "low": -0x4000_0000}  # ipsec_set_policy(3): higher comes first


def _encryption(words: _Words, mapping: Json) -> None:
    name = words.take_plain("the algorithm behind -E")
    if name == "null":
        _optional_key(words)
        mapping["encryption"] = "null"
        return
    if name not in _CIPHERS:
        raise Refused(
            f"encryption algorithm {name[:40]!r} is not in oepy; known are null, {', '.join(_CIPHERS)}"
        )
    key = _key(words, name)
    lengths, length = _CIPHERS[name], (len(key) - 2) // 2
    if length not in lengths:
        wanted = ", ".join(str(8 * item) for item in lengths)
        raise Refused(f"{name} wants a key of {wanted} bits, this one has {8 * length}")
    kind = "aead" if name in _AEAD_NAMES else "encryption"
    mapping[kind], mapping[f"{kind}_key"] = lengths[length], key


def _key(words: _Words, name: str) -> str:
    """As 0x…; a string is its characters."""
    token = words.take(f"the key of {name}")
    if token.quoted:
        return "0x" + token.text.encode("utf-8", "surrogateescape").hex()
    digits = token.text[2:]
    if token.text[:2].lower() != "0x" or not digits or len(digits) % 2 or re.search(r"[^0-9a-fA-F]", digits):
        raise Refused(f'the key of {name} is neither 0x and an even number of digits nor a string in " "')
    return "0x" + digits


def _optional_key(words: _Words) -> None:
    token = words.peek()
    if token is not None and (token.quoted or not token.text.startswith("-")):
        words.take("the key")


def _number(text: str, what: str) -> int:
    if not re.fullmatch(r"0[xX][0-9a-fA-F]{1,16}|[0-9]{1,20}", text):
        raise Refused(f"{what} is no number")
    return int(text, 16 if text[:2].lower() == "0x" else 10)


def _protocol(words: _Words) -> tuple[str, bool]:
    """esp or ah, and whether in UDP."""
    name = words.take_plain("the protocol")
    if name in ("esp", "ah"):
        return name, False
    if name == "esp-udp":
        return "esp", True
    if name in ("ipcomp", "tcp", "esp-old", "ah-old"):
        raise Refused(f"protocol {name} is not in oepy; it has esp and ah")
    raise Refused(f"{Token(name, 0).shown()} is no protocol; write esp, ah or esp-udp")


_PLACE = re.compile(r"(?P<address>[^\[\]/]+)(/(?P<length>\d{1,3}))?(\[(?P<port>[^\[\]]*)\])?")


def _split(words: _Words, what: str) -> tuple[str, str | None, str | None]:
    """Address, prefix length and port of ADDRESS[/LENGTH][[PORT]]; the bracket may stand apart."""
    text = words.take_plain(what)
    following = words.peek()
    if following is not None and following.text.startswith("[") and not following.quoted:
        text += words.take_plain(what)
    match = _PLACE.fullmatch(text)
    if match is None:
        raise Refused(f"{what} {text[:80]!r} is not like 192.0.2.1, 192.0.2.0/24 or 192.0.2.1/32[80]")
    return match["address"], match["length"], match["port"]


def _address(text: str, what: str) -> str:
    try:
        return str(ip_address(text))
    except ValueError:
        raise Refused(
            f"{what} {text[:80]!r} is no address; names are not looked up, write the address"
        ) from None


def _host(words: _Words, what: str) -> tuple[str, str | None]:
    address, length, port = _split(words, what)
    if length is not None:
        raise Refused(f"{what} is a prefix; an SA has single addresses")
    return _address(address, what), None if port in (None, "any") else _port(port)


def _port(text: str | None) -> str:
    if text is None or not text.isascii() or not text.isdecimal():
        raise Refused(f"port {str(text)[:40]!r} is no number; names are not looked up, write the number")
    return text


def _policy_head(words: _Words) -> tuple[Json, list[Token]]:
    """Selector and direction, and what follows."""
    words.skip_family_options()
    if (first := words.peek()) is not None and first.text == "tagged":
        raise Refused("selectors by packet filter tags are not in oepy; write addresses")
    mapping: Json = {"direction": ""}
    for name, port_name, what in (("src", "sport", "the source"), ("dst", "dport", "the destination")):
        address, length, port = _split(words, what)
        address = _address(address, what)
        network = f"{address}/{length}" if length is not None else address
        try:
            mapping[name] = str(ip_network(network, strict=False))
        except ValueError:
            raise Refused(f"{what} {network!r} is no prefix") from None
        if port not in (None, "any", "0"):
            mapping[port_name] = _port(port)
    mapping["protocol"] = _upper_protocol(words)
    if words.take_plain("-P and the direction") != "-P":
        raise Refused("-P with the direction must follow the protocol")
    direction = words.take_plain("the direction behind -P")
    if direction not in ("in", "out", "fwd"):
        raise Refused(f"direction {direction[:40]!r} is not one of in, out, fwd")
    mapping["direction"] = direction
    return mapping, words.rest()


_UPPER = {
    "any": "any",
    "tcp": "tcp",
    "udp": "udp",
    "icmp": "icmp",
    "icmp6": "ipv6-icmp",
    "gre": "gre",
    "sctp": "sctp",
    "ip4": "4",
}


def _upper_protocol(words: _Words) -> str:
    name = words.take_plain("the protocol")
    following = words.peek()
    if name in _UPPER or (name.isascii() and name.isdecimal() and len(name) <= 3):
        if following is not None and re.fullmatch(r"\d+,\d+|0x[0-9a-fA-F]+", following.text):
            raise Refused(
                f"selectors by {name} type or key ({following.text[:20]}) are not in oepy; remove them"
            )
        return _UPPER.get(name, name)
    raise Refused(
        f"protocol {name[:40]!r} is not known; write any, {', '.join(list(_UPPER)[1:])} or a number"
    )


def _priority(rest: list[Token]) -> tuple[int, list[Token]]:
    """`prio 5`, `prio high`, `prio low + 5` before the action."""
    if not rest or rest[0].text not in ("prio", "priority"):
        return 0, rest
    spec: list[str] = []
    for token in rest[1:]:
        if token.text in ("ipsec", "discard", "none", "bypass", "entrust"):
            break
        spec.append(token.text)
    match = re.fullmatch(r"(?:(high|def|low)(?:([+-])(\d{1,10}))?|(-?\d{1,10}))", "".join(spec))
    if match is None:
        raise Refused(f"priority {' '.join(spec)[:40]!r} is not like `prio 5` or `prio high - 5`")
    if match[4] is not None:
        return int(match[4]), rest[1 + len(spec) :]
    offset = int(f"{match[2] or '+'}{match[3] or 0}")
    return _LEVELS[match[1]] + offset, rest[1 + len(spec) :]


def _template(text: str, mapping: Json) -> Json:
    if "[" in text:
        raise Refused("ports in a template are not in oepy; the SA's esp-udp has them")
    try:
        template = template_from_text(text)
    except ValueError as error:
        raise Refused(str(error)) from None
    if template["protocol"] not in ("esp", "ah"):
        raise Refused(f"protocol {template['protocol'][:40]} is not in oepy; it has esp and ah")
    for name in ("src", "dst"):
        if name in template:
            template[name] = _address(template[name], f"the template's {name}")
    if template["mode"] == "transport":  # the packet's own addresses
        template.pop("src", None)
        template.pop("dst", None)
    return template
