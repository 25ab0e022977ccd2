"""OpenBSD's ipsec.conf(5): the rules that key by hand (esp, ah) and the flows.

Theory of operation. The text becomes tokens, line by line; macros are put in as tokens where they are used, and
included files where they stand. A rule is what stands up to the end of its line; lists in it give one rule for each
combination. An `esp` or `ah` rule is one SA, and its `A:B` forms the one of the other direction as well. A `flow`
is one policy, or one each way where no direction is given; which SA it wants follows from its peer.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import ip_address, ip_network
from itertools import product
from typing import Protocol

from oepy.convert.drafts import MAX_TOKEN, MAX_TOKENS, Draft, Findings, Json, Place, Refused, policy_key
from oepy.errors import OepyError

MAX_DEPTH = 16  # of includes, and of macros in macros
MAX_MACROS = 10_000
MAX_COMBINATIONS = 10_000  # of the lists of one rule
_TOKEN = re.compile(
    r'"(?P<quoted>[^"\n]*)"|(?P<open>")|(?P<joined>\\\n)|(?P<newline>\n)|(?P<comment>#[^\n]*)'
    r'|(?P<mark>[{},=!()])|(?P<macro>\$\w+)|(?P<word>[^\s"{},=!()#$\\]+)|(?P<odd>[$\\])'
)

RULES = frozenset(("flow", "esp", "ah", "ipcomp", "ipip", "tcpmd5", "ike", "bundle"))


class Files(Protocol):
    """What a configuration names. Both raise OepyError; relative names belong to the directory of `file`."""

    def include(self, name: str, file: str) -> tuple[str, bytes]:
        """Path and content of an included file."""

    def key(self, name: str, file: str) -> bytes:
        """The content of a key file, which only its owner may read."""


class Budget:
    """Words and macros that all files together may still use."""

    def __init__(self) -> None:
        self._left = MAX_TOKENS

    def spend(self, place: Place) -> None:
        self._left -= 1
        if self._left < 0:
            raise _At(place, f"more than {MAX_TOKENS} words")


@dataclass(frozen=True, slots=True)
class Token:
    text: str
    place: Place
    kind: str = "word"  # word, quoted, mark, newline, or undefined (a macro)

    def shown(self) -> str:
        """For an error: never what may be a key."""
        if self.kind == "quoted" or re.search(r"[0-9a-fA-F]{16}", self.text):
            return "a string"
        return "the end of the line" if self.kind == "newline" else repr(self.text[:40])


def tokens(
    text: str, place: Place, macros: dict[str, str], budget: Budget, depth: int = 0
) -> Iterator[Token]:
    """Raises Refused with the line. Inside of a macro `place` stays the one where it is used."""
    line, at = place.line, 0
    for match in _TOKEN.finditer(text):
        if depth == 0:
            line += text.count("\n", at, match.start())
            at = match.start()
        here = Place(place.file, line)
        budget.spend(here)
        kind, word = match.lastgroup or "", match[0]
        if kind == "quoted":
            word = match["quoted"]
        if kind in ("open", "odd"):
            what = (
                'a string has no end in its line; close it with "'
                if kind == "open"
                else f"{word!r} alone means nothing"
            )
            raise _At(here, what)
        if len(word) > MAX_TOKEN:
            raise _At(here, f"a word of {len(word)} characters; the longest may have {MAX_TOKEN}")
        if kind == "macro":
            if word[1:] not in macros:
                yield Token(word, here, "undefined")
                continue
            if depth >= MAX_DEPTH:
                raise _At(here, f"macros are more than {MAX_DEPTH} deep in each other")
            yield from tokens(macros[word[1:]], here, macros, budget, depth + 1)
        elif kind not in ("comment", "joined"):
            yield Token(word, here, kind)


class _At(Refused):
    """With the place at which it is wrong."""

    def __init__(self, place: Place, text: str) -> None:
        super().__init__(text)
        self.place = place


class _Line:
    """The tokens of one rule, taken one after the other."""

    def __init__(self, line: list[Token]) -> None:
        self._tokens = [token for token in line if token.kind != "newline"]
        self._next = 0
        self.place = line[0].place

    def peek(self) -> str:
        """The next word, "" where there is none."""
        return self._tokens[self._next].text if self._next < len(self._tokens) else ""

    def take(self, what: str) -> str:
        if self._next >= len(self._tokens):
            raise Refused(f"{what} is missing")
        self._next += 1
        return self._tokens[self._next - 1].text

    def accept(self, *words: str) -> str:
        """The next word where it is one of these, else ""."""
        if (
            self._next < len(self._tokens)
            and self._tokens[self._next].kind != "quoted"
            and self.peek() in words
        ):
            return self.take("")
        return ""

    def take_list(self, what: str) -> list[str]:
        """One word, or `{ a, b }`."""
        if not self.accept("{"):
            return [self.take(what)]
        found: list[str] = []
        while not self.accept("}"):
            if not self.accept(","):
                found.append(self.take("the end } of the list"))
        if not found:
            raise Refused(f"the list of {what} is empty")
        return found

    def unexpected(self) -> Refused:
        return Refused(f"{self._tokens[self._next].shown()} is not known here, or not in oepy")

    @property
    def more(self) -> bool:
        return self._next < len(self._tokens)


class Reader:
    """Reads one file with its includes; `settle` makes policies of the flows when all SAs are known."""

    def __init__(self, found: Findings, files: Files) -> None:
        self._found = found
        self._files = files
        self._macros: dict[str, str] = {}
        self._flows: list[_Flow] = []
        self._budget = Budget()

    def read(self, text: str, file: str, depth: int = 0) -> None:
        line: list[Token] = []
        braces = 0
        try:
            for token in tokens(text + "\n", Place(file, 1), self._macros, self._budget):
                line.append(token)
                braces += (token.text == "{") - (token.text == "}") if token.kind == "mark" else 0
                if token.kind == "newline" and braces <= 0:
                    self._statement(line, depth)
                    line, braces = [], 0
        except _At as error:
            # Behind this the tokens are not what they seem
            self._found.problem(error.place, f"{error}; the file is not read beyond this")
            return
        if braces > 0:
            self._found.problem(line[0].place, "the list { has no end }")

    def _statement(self, line: list[Token], depth: int) -> None:
        words = [token for token in line if token.kind != "newline"]
        if not words:
            return
        first = words[0]
        for word in words:
            if word.kind == "undefined":
                self._found.problem(word.place, f"macro {word.text[:40]} is not defined above")
                return
        if len(words) > 1 and (words[1].text, words[1].kind) == ("=", "mark"):
            self._found.attempt(first.place, lambda: self._define(words))
        elif first.text == "include" and first.kind == "word":
            self._found.attempt(first.place, lambda: self._include(words, depth))
        elif first.text in RULES and first.kind == "word":
            self._found.attempt(first.place, lambda: self._rule(_Line(line)))
        else:
            known = ", ".join(sorted(RULES))
            self._found.problem(
                first.place, f"{first.shown()} begins no rule; known are {known}, include and NAME ="
            )

    def _define(self, words: list[Token]) -> None:
        name = words[0].text
        if not re.fullmatch(r"[A-Za-z]\w{0,63}", name) or name in RULES:
            raise Refused(f"{words[0].shown()} cannot be the name of a macro")
        if len(words) < 3:
            raise Refused(f"macro {name} has no value")
        if len(self._macros) >= MAX_MACROS:
            raise Refused(f"more than {MAX_MACROS} macros")
        value = " ".join(token.text for token in words[2:])
        if len(value) > MAX_TOKEN:
            raise Refused(f"macro {name} has {len(value)} characters; the longest may have {MAX_TOKEN}")
        self._macros[name] = value

    def _include(self, words: list[Token], depth: int) -> None:
        if len(words) != 2:
            raise Refused('write include "FILE"')
        if depth >= MAX_DEPTH:
            raise Refused(f"includes are more than {MAX_DEPTH} deep in each other")
        try:
            path, content = self._files.include(words[1].text, words[0].place.file)
            text = content.decode("utf-8")
        except OepyError as error:
            raise Refused(str(error)) from None
        except UnicodeDecodeError:
            raise Refused("the included file is no text in UTF-8") from None
        self.read(text, path, depth + 1)

    def _rule(self, line: _Line) -> None:
        kind = line.take("a rule")
        if kind in ("esp", "ah"):
            self._security_association(kind, line)
        elif kind == "flow":
            self._flow(line)
        elif kind == "ike":
            raise Refused("ike rules are no manual keying; write a connection in oepy.yaml for it")
        else:
            raise Refused(f"{kind} rules are not in oepy; it has esp and ah")

    # ---- SAs -----------------------------------------------------------------------------------------------

    def _security_association(self, protocol: str, line: _Line) -> None:
        mode = line.accept("tunnel", "transport") or "tunnel"
        ends = _from_to(line, ports=False)
        spis: list[str] = []
        names: dict[str, str] = {}
        keys: dict[str, list[str]] = {}
        while line.more:
            if line.accept("spi"):
                spis = line.take("the SPI").split(":")
            elif word := line.accept("auth", "enc"):
                names[word] = line.take(f"the algorithm behind {word}")
            elif word := line.accept("authkey", "enckey"):
                keys[word] = self._keys(line, word)
            else:
                raise line.unexpected()
        if not spis or len(spis) > 2:
            raise Refused("spi is missing; write spi 0x1001, or spi 0x1001:0x1002 for both directions")
        for name, values in keys.items():
            if len(values) != len(spis):
                raise Refused(
                    f"{name} has {len(values)} keys for {len(spis)} SPIs; write one for each, with a colon"
                )
        if len(ends) > 1 and len(spis) == 2:
            raise Refused("lists of addresses with two SPIs; write one rule for each pair")
        for source, destination in ends:
            for turn, spi in enumerate(spis):
                src, dst = (source, destination) if turn == 0 else (destination, source)
                mapping: Json = {
                    "src": _host(src.network),
                    "dst": _host(dst.network),
                    "protocol": protocol,
                    "spi": spi,
                    "mode": mode,
                }
                _algorithms(mapping, names, {name: values[turn] for name, values in keys.items()})
                self._add_sa(mapping, line.place)

    def _add_sa(self, mapping: Json, place: Place) -> None:
        text = str(mapping["spi"])
        if not re.fullmatch(r"0x[0-9a-fA-F]{1,8}|\d{1,10}", text):
            raise Refused("the SPI is no number")
        key = (mapping["dst"], mapping["protocol"], int(text, 0) if text.startswith("0x") else int(text))
        if key in self._found.sas:
            other = self._found.sas[key].place
            raise Refused(f"SPI {text} to {mapping['dst']} is used in {other} already; take another")
        self._found.sas[key] = Draft(place, mapping)

    def _keys(self, line: _Line, what: str) -> list[str]:
        """One or two keys as 0x…, from the rule or from files of hexadecimal digits."""
        if not line.accept("file"):
            return [_hex(text, what) for text in line.take(f"the key behind {what}").split(":")]
        found = []
        for name in line.take(f"the file behind {what}").split(":"):
            try:
                content = self._files.key(name, line.place.file)
            except OepyError as error:
                raise Refused(str(error)) from None
            found.append(_hex(content.decode("ascii", "replace").strip(), f"file {name[:200]!r}"))
        return found

    # ---- flows ---------------------------------------------------------------------------------------------

    def _flow(self, line: _Line) -> None:
        protocol = line.accept("esp", "ah", "ipcomp", "ipip") or "esp"
        if protocol not in ("esp", "ah"):
            raise Refused(f"{protocol} flows are not in oepy; it has esp and ah")
        direction = line.accept("in", "out")
        upper = ""
        ends: list[tuple[_End, _End]] = []
        settings: dict[str, str] = {}
        while line.more:
            if line.accept("proto"):
                upper = line.take("the protocol behind proto")
            elif line.peek() in ("from", "to"):
                ends = _from_to(line, ports=True)
            elif word := line.accept("local", "peer", "type"):
                settings[word] = line.take(f"what follows {word}")
            else:
                raise line.unexpected()
        if not ends:
            raise Refused("from and to are missing")
        kind = settings.get("type", "")
        if kind == "acquire":
            raise Refused("type acquire asks IKE for keys, which is no manual keying; write require or use")
        if kind not in ("", "use", "require", "dontacq", "bypass", "deny"):
            raise Refused(f"type {kind[:40]!r} is not known; write use, require, bypass or deny")
        for source, destination in ends:
            flow = _Flow(line.place, protocol, direction or "out", upper, source, destination, settings)
            self._flows.append(flow)
            if not direction:
                self._flows.append(flow.reversed())

    def settle(self) -> None:
        """Flows to policies. The SAs of all files must have been read."""
        for flow in self._flows:
            self._found.attempt(flow.place, lambda flow=flow: self._policy(flow))  # type: ignore[misc]

    def _policy(self, flow: _Flow) -> None:
        mapping: Json = {
            "direction": flow.direction,
            "src": flow.source.network,
            "dst": flow.destination.network,
            "protocol": _UPPER.get(flow.upper, flow.upper) or "any",
        }
        for name, end in (("sport", flow.source), ("dport", flow.destination)):
            if end.port:
                mapping[name] = end.port
        kind = flow.settings.get("type", "")
        if kind in ("bypass", "deny"):
            mapping["action"] = {"bypass": "bypass", "deny": "block"}[kind]
        else:
            # By default what comes in may come in the clear, too
            level = {"": "require" if flow.direction == "out" else "use", "dontacq": "require"}.get(
                kind, kind
            )
            mapping["action"] = "ipsec"
            mapping["templates"] = [self._template(flow, level)]
        self._add_policy(mapping, flow.place)
        transport = any(item["mode"] == "transport" for item in mapping.get("templates", ()))
        if flow.direction == "in" and not transport:
            self._add_policy({**mapping, "direction": "fwd"}, flow.place)

    def _add_policy(self, mapping: Json, place: Place) -> None:
        key = policy_key(mapping)
        if key in self._found.policies:
            raise Refused(
                f"the same flow stands in {self._found.policies[key].place} already; keep one of both"
            )
        self._found.policies[key] = Draft(place, mapping)

    def _template(self, flow: _Flow, level: str) -> Json:
        """By the SAs of this protocol that go to the peer (or, inward, come from it)."""
        outward = flow.direction == "out"
        peer = flow.settings.get("peer") or _single(flow.destination if outward else flow.source)
        if not peer:
            raise Refused("peer is missing: the far end is a network, and its gateway must be named")
        peer, local = _host(peer), flow.settings.get("local")
        near, far = ("src", "dst") if outward else ("dst", "src")
        fitting = {
            (draft.mapping["mode"], draft.mapping["src"], draft.mapping["dst"])
            for draft in self._found.sas.values()
            if (draft.mapping["protocol"], draft.mapping[far]) == (flow.protocol, peer)
            and (local is None or draft.mapping[near] == _host(local))
        }
        way = "to" if outward else "from"
        if not fitting:
            raise Refused(
                f"no {flow.protocol} rule gives this flow an SA {way} peer {peer}; one from IKE is no manual keying"
            )
        if len(fitting) > 1:
            raise Refused(
                f"several {flow.protocol} rules give an SA {way} peer {peer}; name one end with `local`"
            )
        ((mode, src, dst),) = fitting
        ends = {"src": src, "dst": dst} if mode == "tunnel" else {}
        return {"protocol": flow.protocol, "mode": mode, **ends, "level": level}


# ---- pieces ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _End:
    network: str
    port: str = ""


@dataclass(frozen=True, slots=True)
class _Flow:
    place: Place
    protocol: str
    direction: str
    upper: str
    source: _End
    destination: _End
    settings: dict[str, str]

    def reversed(self) -> _Flow:
        way = "in" if self.direction == "out" else "out"
        return _Flow(self.place, self.protocol, way, self.upper, self.destination, self.source, self.settings)


_UPPER = {"icmp6": "ipv6-icmp", "ipv6-icmp": "ipv6-icmp"}
_MACS = {
    "hmac-sha1": "sha1",
    "hmac-sha2-256": "sha256",
    "hmac-sha2-384": "sha384",
    "hmac-sha2-512": "sha512",
    "hmac-md5": "md5",
    "hmac-ripemd160": "ripemd160",
}
_AES = {16: "aes128", 24: "aes192", 32: "aes256"}
_CIPHERS: dict[str, dict[int, str]] = {
    "aes": _AES,
    **{f"aes-{bits}": {bits // 8: f"aes{bits}"} for bits in (128, 192, 256)},
    "aesctr": {20: "aes128ctr", 28: "aes192ctr", 36: "aes256ctr"},
    **{f"aes-{bits}-ctr": {bits // 8 + 4: f"aes{bits}ctr"} for bits in (128, 192, 256)},
    "3des": {24: "3des"},
    "3des-cbc": {24: "3des"},
}
_AEADS: dict[str, dict[int, str]] = {
    **{f"aes-{bits}-gcm": {bits // 8 + 4: f"aes{bits}gcm16"} for bits in (128, 192, 256)},
    "chacha20-poly1305": {36: "chacha20poly1305"},
}


def _algorithms(mapping: Json, names: dict[str, str], keys: dict[str, str]) -> None:
    """By ipsec.conf(5)'s defaults: HMAC-SHA2-256, and AES for ESP."""
    protocol = mapping["protocol"]
    cipher = names.get("enc", "aes")
    if protocol == "ah" and ("enc" in names or "enckey" in keys):
        raise Refused("AH does not encrypt; remove enc and enckey")
    if protocol == "esp" and cipher in _AEADS:
        if "auth" in names or "authkey" in keys:
            raise Refused(f"{cipher} authenticates by itself; remove auth and authkey")
        mapping["aead"], mapping["aead_key"] = _sized(cipher, _AEADS[cipher], keys)
        return
    if protocol == "esp" and cipher == "null":
        mapping["encryption"] = "null"
    elif protocol == "esp":
        if cipher not in _CIPHERS:
            known = ", ".join((*_CIPHERS, *_AEADS, "null"))
            raise Refused(f"enc {cipher[:40]!r} is not in oepy; known are {known}")
        mapping["encryption"], mapping["encryption_key"] = _sized(cipher, _CIPHERS[cipher], keys)
    mac = names.get("auth", "hmac-sha2-256")
    if mac not in _MACS:
        raise Refused(f"auth {mac[:40]!r} is not in oepy; known are {', '.join(_MACS)}")
    mapping["integrity"] = _MACS[mac]
    if "authkey" not in keys:
        raise Refused(f"authkey is missing: {mac} needs a key")
    mapping["integrity_key"] = keys["authkey"]


def _sized(cipher: str, lengths: dict[int, str], keys: dict[str, str]) -> tuple[str, str]:
    if "enckey" not in keys:
        raise Refused(f"enckey is missing: {cipher} needs a key")
    length = (len(keys["enckey"]) - 2) // 2
    if length not in lengths:
        wanted = ", ".join(str(8 * item) for item in lengths)
        raise Refused(f"enc {cipher} wants a key of {wanted} bits, this one has {8 * length}")
    return lengths[length], keys["enckey"]


def _hex(text: str, what: str) -> str:
    digits = text[2:] if text[:2].lower() == "0x" else text
    if not digits or len(digits) % 2 or re.search(r"[^0-9a-fA-F]", digits):
        raise Refused(f"the key of {what} is no even number of hexadecimal digits")
    return "0x" + digits


def _from_to(line: _Line, *, ports: bool) -> list[tuple[_End, _End]]:
    """`from A [port P] to B [port P]`, in either order, with lists: every combination."""
    sides: dict[str, list[_End]] = {}
    for _ in range(2):
        word = line.accept("from", "to")
        if not word or word in sides:
            raise Refused("from and to must stand together, each once")
        networks = line.take_list(f"addresses behind {word}")
        if line.peek() == "(":
            raise Refused("addresses before NAT in ( ) are for IKE; remove them")
        port = ""
        if ports and line.accept("port"):
            port = line.take("the port")
            if not port.isascii() or not port.isdecimal():
                raise Refused(f"port {port[:40]!r} is no number; names are not looked up, write the number")
        sides[word] = [_End(network, port) for network in networks]
    if len(sides["from"]) * len(sides["to"]) > MAX_COMBINATIONS:
        raise Refused(f"the lists give more than {MAX_COMBINATIONS} rules")
    pairs = [
        pair
        for source, destination in product(sides["from"], sides["to"])
        for pair in _prefixes(source, destination)
    ]
    if not pairs:
        raise Refused("from and to are of two families")
    return pairs


def _prefixes(source: _End, destination: _End) -> list[tuple[_End, _End]]:
    """`any` takes the family of the other side, and both families where that is any as well. Of lists only ends of
    one family belong together."""
    named = [_network(end.network)[1] for end in (source, destination) if end.network != "any"]
    if len(set(named)) > 1:
        return []
    found = []
    for version in named[:1] or (4, 6):
        everything = "0.0.0.0/0" if version == 4 else "::/0"
        first, second = (
            _End(everything if end.network == "any" else _network(end.network)[0], end.port)
            for end in (source, destination)
        )
        found.append((first, second))
    return found


def _network(text: str) -> tuple[str, int]:
    try:
        network = ip_network(text, strict=False)
    except ValueError:
        raise Refused(
            f"{text[:80]!r} is no address or prefix; names and interfaces are not looked up, write the address"
        ) from None
    return str(network), network.version


def _single(end: _End) -> str:
    network = ip_network(end.network)
    return str(network.network_address) if network.prefixlen == network.max_prefixlen else ""


def _host(text: str) -> str:
    address = text.removesuffix("/32") if ":" not in text else text.removesuffix("/128")
    try:
        return str(ip_address(address))
    except ValueError:
        raise Refused(
            f"{text[:80]!r} is no single address; names are not looked up, write the address"
        ) from None
