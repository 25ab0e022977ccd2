"""/etc/oepy/oepy.yaml: read, checked, and turned into plain frozen values.

All mistakes are listed at once, each with its line, its path and the mend. pydantic stands at the edge only.
"""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from oepy import included
from oepy.configfile import DEFAULT_PATH, DEFAULT_SOCKET, RESOLV_CONF, system_resolvers
from oepy.connections.model import EMPTY, ConnectionSet
from oepy.connections.reading import SECTIONS, Files, bounds_and_pools, read_connections
from oepy.connections.vouching import MAX_CERTIFIED_PEERS, Wanted, add_vouching
from oepy.connections.vouching import Files as VouchingFiles
from oepy.errors import ConfigError, UsageError
from oepy.included import Memory, Part
from oepy.interfaces import PolicyRule
from oepy.manual.checks import read_manual
from oepy.manual.model import NOTHING, ManualSet
from oepy.manual.pairing import userland_problems
from oepy.manual.reading import KeyFiles, Problem, inline_keys
from oepy.model import IpAddress, PeerIdentity, PolicyGroup, PublicKey
from oepy.policy import NO_PREFIXES, PROTOCOL_NUMBERS, PrefixSet, parse_prefix
from oepy.privatefile import MAX_KEY_FILE, read_private_file
from oepy.resolvers import Resolver, check_all, parse_resolver

DEFAULT_KEY = Path("/var/lib/oepy/host.key")
# libyaml's where PyYAML has it: thousands of connections are read in a tenth of the time
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
PREFIX_EXAMPLE = "203.0.113.0/24 or 2001:db8::/32"
MAX_CONFIG_BYTES = 16 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Config:
    """A configuration without mistakes."""

    source: str
    identity: str | None
    key: Path
    resolvers: tuple[Resolver, ...]
    tls_cert_bundle: Path | None
    trust_anchors: tuple[Path, ...]
    negative_trust_anchors: tuple[str, ...]
    auto_trust_anchors: Path | None
    sha1: bool
    insecure_keys: bool
    relay: tuple[IpAddress, int] | None  # loopback address and port
    trusted_names: tuple[str, ...]
    rules: tuple[PolicyRule, ...]
    default_group: PolicyGroup
    after_failed_ike_blocks: bool
    datapath: str
    trap: str
    device: str
    socket: Path
    key_log: Path | None
    manual: ManualSet = NOTHING
    connections: ConnectionSet = EMPTY
    certified_peers: PrefixSet = NO_PREFIXES  # who may have a certificate instead of a key in the DNS


def _rule_network(text: str) -> Iterator[tuple[int, int, str]]:
    """(protocol, port, network text) of one group line: `NET`, `udp/123`, or `tcp/22 NET`."""
    words = text.split()
    if not words or len(words) > 2:
        raise ValueError(f"{text!r}: write a prefix, `udp/123`, or `tcp/22 198.51.100.0/24`")
    head = words[0]
    protocol = port = 0
    name, slash, rest = head.partition("/")
    if name.lower() in PROTOCOL_NUMBERS:
        protocol = PROTOCOL_NUMBERS[name.lower()]
        if slash:
            if not rest.isdigit() or not 0 < int(rest) < 65536:
                raise ValueError(f"{head!r}: the port must be 1 to 65535")
            port = int(rest)
        if len(words) == 1:
            yield protocol, port, "0.0.0.0/0"
            yield protocol, port, "::/0"
            return
        yield protocol, port, words[1]
        return
    if len(words) == 2:
        raise ValueError(f"{text!r}: {head!r} is no protocol; known are {', '.join(PROTOCOL_NUMBERS)}")
    yield 0, 0, head


def parse_rule(text: object, group: PolicyGroup) -> list[PolicyRule]:
    """The rules of one line of a group. Raises ValueError with the mend."""
    rules = []
    for protocol, port, network in _rule_network(str(text)):
        net = parse_prefix(network, PREFIX_EXAMPLE)
        rules.append(PolicyRule(group, net, protocol, port))
    return rules


def _rule_text(value: object) -> str:
    parse_rule(value, PolicyGroup.CLEAR)
    return str(value)


def _prefix_text(value: object) -> str:
    return str(parse_prefix(str(value), PREFIX_EXAMPLE))


def _zone(value: object) -> str:
    """A zone's name, absolute. Raises ValueError."""
    import dns.exception
    import dns.name

    try:
        return str(dns.name.from_text(str(value)))
    except (dns.exception.DNSException, UnicodeError):
        raise ValueError(f"{value!r} is no zone; write it like broken.example") from None


def _relay(value: object) -> str:
    """Raises ValueError."""
    host, _, port = str(value).partition("@")
    address = parse_resolver(host).address
    if not address.is_loopback:
        raise ValueError(f"{address} is not on loopback, and would serve strangers; write 127.0.0.54")
    if port and not (port.isdigit() and 0 < int(port) < 65536):
        raise ValueError(f"{port!r} is no port; write it like 127.0.0.54@53")
    return str(value)


_Relay = Annotated[str, BeforeValidator(_relay)]
_Zone = Annotated[str, BeforeValidator(_zone)]
_Resolver = Annotated[str, BeforeValidator(lambda value: str(parse_resolver(value)))]
_Rule = Annotated[str, BeforeValidator(_rule_text)]
_Prefix = Annotated[str, BeforeValidator(_prefix_text)]
_GroupName = Literal["clear", "clear-or-private", "private-or-clear", "private", "block"]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=False)


class _Identity(_Section):
    id: str | None = None
    key: Path = DEFAULT_KEY
    certs: list[str] = []


class _Dns(_Section):
    resolvers: list[_Resolver] | None = None
    tls_cert_bundle: Path | None = None
    trust_anchors: list[Path] = []
    negative_trust_anchors: list[_Zone] = []
    auto_trust_anchors: Path | None = None
    sha1: bool = False
    insecure_keys: Literal["ignore", "use"] = "ignore"
    relay: _Relay | None = None
    trusted_names: list[_Zone] = []


class _Certificates(_Section):
    cacerts: Annotated[list[str], Field(min_length=1)]
    peers: Annotated[list[_Prefix], Field(min_length=1, max_length=MAX_CERTIFIED_PEERS)]
    revocation: Literal["strict", "ifuri", "relaxed"] = "ifuri"


class _Policy(_Section):
    default: _GroupName = "private-or-clear"
    groups: dict[_GroupName, list[_Rule] | None] = {}
    after_failed_ike: Literal["clear", "block"] = "clear"
    certificates: _Certificates | None = None


class _Control(_Section):
    socket: Path = DEFAULT_SOCKET
    dashboard: None = None


class _Debug(_Section):
    key_log: Path | None = None


class _File(_Section):
    identity: _Identity = Field(default_factory=_Identity)
    dns: _Dns = Field(default_factory=_Dns)
    policy: _Policy = Field(default_factory=_Policy)
    datapath: Literal["auto", "xfrm", "tun", "none"] = "auto"
    trap: Literal["auto", "nfqueue", "acquire", "none"] = "auto"
    device: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,15}$")] = "oe0"
    control: _Control = Field(default_factory=_Control)
    debug: _Debug = Field(default_factory=_Debug)
    manual: Any = None  # read by manual/reading.py
    include: list[str] = []
    connections: Any = None  # these four are read by connections/reading.py
    authorities: Any = None
    secrets: Any = None
    pools: Any = None


_MENDS = {
    ("control", "dashboard"): "this version has no dashboard; set it to null or remove the line",
}


def load(path: Path | str | None = None, memory: Memory | None = None) -> Config:
    """Read and check a file, and those that it includes; the default path may be missing, which means all defaults.
    What `memory` knows and is the same is not read again. Raises ConfigError with every mistake."""
    text, file = _text_of(path)
    return parse(text, file, memory)


def load_manual(path: Path | str | None = None) -> ManualSet:
    """The `manual:` section alone, whatever else the file holds. Raises ConfigError with every mistake in it."""
    text, file = _text_of(path)
    data, lines, problems = _compose(text, file)
    manual, wrong = _read_manual(text, data, file, lines)
    problems += wrong
    if problems:
        raise ConfigError(file, sorted(problems, key=_line_of))
    return manual


def _text_of(path: Path | str | None) -> tuple[str, str]:
    """Text and name of a file."""
    explicit = path is not None
    file = Path(path) if path is not None else DEFAULT_PATH
    try:
        if file.exists() and file.stat().st_size > MAX_CONFIG_BYTES:
            raise ConfigError(str(file), [f"larger than {MAX_CONFIG_BYTES} bytes; this is no configuration"])
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        if explicit:
            raise ConfigError(str(file), ["no such file; give an existing one with -c FILE"]) from None
        text = ""
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(str(file), [f"cannot be read: {error}"]) from None
    return text, str(file)


def parse(text: str, source: str = "oepy.yaml", memory: Memory | None = None) -> Config:
    """Check the text of a configuration. Raises ConfigError with every mistake."""
    data, lines, problems = _compose(text, source)
    problems += _cross_checks(data, lines)
    manual, wrong = _read_manual(text, data, source, lines)
    problems += wrong
    connections, mistakes = _all_connections(data, source, lines, memory or Memory())
    problems += mistakes
    model = None
    try:
        model = _File.model_validate(data)
    except ValidationError as error:
        problems += [_explain(item, lines) for item in error.errors()]
    if model is not None and model.datapath == "tun" and not wrong:
        problems += [_manual_problem(problem, lines) for problem in userland_problems(manual)]
    if model is None or problems:
        raise ConfigError(source, sorted(problems, key=_line_of))
    resolvers = model.dns.resolvers
    found = tuple(map(Resolver, system_resolvers()) if resolvers is None else map(parse_resolver, resolvers))
    if not found:
        line = lines.get(("dns", "resolvers"), lines.get(("dns",), 1))
        mend = f"none is named here nor in {RESOLV_CONF}; name at least one address"
        raise ConfigError(source, [f"line {line}: dns.resolvers: {mend}"])
    place = _relay_place(model.dns.relay)
    if place is not None and place in [(resolver.address, resolver.port) for resolver in found]:
        line = lines.get(("dns", "relay"), 1)
        mend = f"{model.dns.relay} is one of the resolvers; name those to ask in dns.resolvers, else it asks itself"
        raise ConfigError(source, [f"line {line}: dns.relay: {mend}"])
    if model.identity.certs or model.policy.certificates is not None:
        connections, missing = _with_vouching(model, source, connections)
        if missing:
            placed = [_placed(problem.path, problem.text, lines) for problem in missing]
            raise ConfigError(source, sorted(placed, key=_line_of))
    return _build(model, source, found, manual, connections)


def _with_vouching(
    model: _File, source: str, connections: ConnectionSet
) -> tuple[ConnectionSet, list[Problem]]:
    from oepy.keys import HostKey, to_public_key
    from oepy.x509.certificates import Certificate
    from oepy.x509.certificates import load as load_certificates
    from oepy.x509.identity import identities_of

    def certificates(name: str) -> tuple[str, tuple[Certificate, ...]]:
        file = str(Path(source).parent / name)
        return file, load_certificates(file)

    asked = model.policy.certificates
    return add_vouching(
        connections,
        Wanted(
            PeerIdentity.parse(model.identity.id) if model.identity.id else None,
            model.identity.certs,
            asked.cacerts if asked is not None else (),
            asked.revocation if asked is not None else "relaxed",
        ),
        VouchingFiles(
            certificates,
            lambda: HostKey.load(model.identity.key).public,
            lambda certificate: to_public_key(certificate.public_key()),
            identities_of,
        ),
    )


def _compose(text: str, source: str) -> tuple[dict[str, Any], dict[tuple[str | int, ...], int], list[str]]:
    """The sections, the lines of all paths, and what is wrong with the form as such."""
    try:
        loader = _LOADER(text)
        node = loader.get_single_node()
        data = None if node is None else loader.construct_document(node)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}: " if mark else ""
        problem = getattr(error, "problem", None) or str(error)
        raise ConfigError(source, [f"{where}not YAML ({problem}); check indentation and quotes"]) from None
    if data is None:
        data = {}
    if not isinstance(data, dict):
        raise ConfigError(source, ["line 1: the file must be a mapping such as `policy: {…}`"])
    lines: dict[tuple[str | int, ...], int] = {}
    problems = list(_index_lines(node, (), lines)) if node is not None else []
    # An empty section (`dns:` with nothing under it) means its defaults.
    data = {key: value for key, value in data.items() if value is not None}
    return data, lines, problems


def _read_manual(
    text: str, data: dict[str, Any], source: str, lines: dict[tuple[str | int, ...], int]
) -> tuple[ManualSet, list[str]]:
    if data.get("manual") is None:
        return NOTHING, []
    # As texts: YAML would read a key such as 0x0012 as a number and lose its zeros
    section = yaml.load(text, Loader=yaml.BaseLoader)["manual"]  # noqa: S506 - makes texts, lists and mappings only
    manual, wrong = read_manual(section, _key_files(source))
    if Path(source).is_file() and Path(source).stat().st_mode & 0o077:
        wrong += [
            Problem(path, f"{source} can be read by others than its owner: chmod 600 it, or name a file")
            for path in inline_keys(section)
        ]
    return manual, [_manual_problem(problem, lines) for problem in wrong]


def _all_connections(
    data: dict[str, Any], source: str, lines: dict[tuple[str | int, ...], int], memory: Memory
) -> tuple[ConnectionSet, list[str]]:
    """Of the file and of those that it includes."""
    own, problems, _ = _read_connections(data, source, lines)
    patterns = data.get("include")
    texts = [text for text in patterns if isinstance(text, str)] if isinstance(patterns, list) else []
    files, wrong = included.find(texts, Path(source).parent)
    place = f"line {lines.get(('include',), 1)}: "
    problems += [place + problem for problem in wrong]
    whole, wrong = included.join(memory.main(own), memory.parts(files, _read_part))
    problems += wrong
    problems += [_placed(problem.path, problem.text, lines) for problem in bounds_and_pools(whole)]
    return whole, problems


def _read_part(source: str, pattern: int) -> Part:
    """`pattern`: the number of the one that found it."""
    try:
        text, _ = _text_of(source)
        data, lines, problems = _compose(text, source)
    except ConfigError as error:
        return Part(source, pattern, EMPTY, tuple(error.problems), ())
    for name in data:
        if name not in SECTIONS:
            known = f"an included file has {', '.join(SECTIONS[:-1])} and {SECTIONS[-1]} alone"
            problems.append(_placed((str(name),), known, lines))
    found, wrong, named = _read_connections(data, source, lines, (pattern, source))
    return Part(source, pattern, found, (*problems, *wrong), named)


def _read_connections(
    data: dict[str, Any],
    source: str,
    lines: dict[tuple[str | int, ...], int],
    stands: tuple[int, str] = (0, ""),
) -> tuple[ConnectionSet, list[str], tuple[str, ...]]:
    """Of one file, which stands there among others; and the files that it names."""
    if all(data.get(section) is None for section in SECTIONS):
        return EMPTY, [], ()
    from oepy.ike.algorithms import parse_ah_proposal, parse_esp_proposal, parse_ike_proposal
    from oepy.keys import HostKey, parse_public, to_public_key

    base = Path(source).parent
    read: dict[str, Any] = {}
    named: dict[str, None] = {}
    public_halves: dict[str, PublicKey] = {}

    def at(name: str) -> Path:
        named[str(base / name)] = None
        return base / name

    def public(name: str) -> PublicKey:
        try:
            return parse_public(at(name).read_bytes()[:MAX_KEY_FILE], name)
        except OSError as error:
            raise UsageError(
                f"{name}: {error.strerror}", "name a PEM file of the peer's public key"
            ) from None

    def own_key(name: str) -> str:
        file = at(name)
        public_halves[str(file)] = HostKey.load(file).public
        return str(file)

    def certificates(name: str) -> str:
        from oepy.x509.certificates import load

        file = str(at(name))
        if file not in read:
            read[file] = load(file)
        return file

    def identities(file: str) -> list[PeerIdentity]:
        from oepy.x509.identity import identities_of

        return identities_of(read[file][0])

    files = Files(
        private=lambda name: read_private_file(at(name), "put the secret there, mode 0600"),
        public=public,
        own_key=own_key,
        certificates=certificates,
        proves=lambda file, key: to_public_key(read[file][0].public_key()) == public_halves[key],
        identities=identities,
        read=read,
        proposal_ike=parse_ike_proposal,
        proposal_esp=parse_esp_proposal,
        proposal_ah=parse_ah_proposal,
    )
    found, wrong = read_connections(data, files, stands)
    return found, [_placed(problem.path, problem.text, lines) for problem in wrong], tuple(named)


def _key_files(source: str) -> KeyFiles:
    def read(name: str) -> bytes:
        return read_private_file(Path(source).parent / name, "put the key there in hexadecimal, mode 0600")

    return read


def _manual_problem(problem: Problem, lines: dict[tuple[str | int, ...], int]) -> str:
    return _placed(("manual", *problem.path), problem.text, lines)


def _placed(path: tuple[str | int, ...], text: str, lines: dict[tuple[str | int, ...], int]) -> str:
    known = path
    while known not in lines and len(known) > 1:
        known = known[:-1]
    return f"line {lines.get(known, 1)}: {_dotted(path)}: {text}"


def _line_of(problem: str) -> int:
    words = problem.split(":", 1)[0].split()
    return int(words[1]) if len(words) == 2 and words[1].isdigit() else 0


def _index_lines(
    node: yaml.Node, path: tuple[str | int, ...], lines: dict[tuple[str | int, ...], int]
) -> Iterator[str]:
    """Fill `lines` with path → line number; yields a problem for each key that stands twice."""
    lines[path] = node.start_mark.line + 1
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            name = str(key.value)
            if name in seen:
                yield f"line {key.start_mark.line + 1}: {_dotted((*path, name))}: stands twice; keep one"
            seen.add(name)
            yield from _index_lines(value, (*path, name), lines)
            lines[(*path, name)] = key.start_mark.line + 1
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            yield from _index_lines(item, (*path, index), lines)


def _dotted(path: tuple[str | int, ...]) -> str:
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else (f".{part}" if text else part)
    return text or "file"


def _explain(item: Any, lines: dict[tuple[str | int, ...], int]) -> str:
    path = tuple(part for part in item["loc"] if part != "[key]")
    known = path
    while known and known not in lines:
        known = known[:-1]
    where = f"line {lines.get(known, 1)}: {_dotted(path)}: "
    if known in _MENDS and item["type"] != "extra_forbidden":
        return where + _MENDS[known]
    if item["type"] == "extra_forbidden":
        return where + "unknown key" + _suggest(path)
    if item["loc"] and item["loc"][-1] == "[key]":
        return where + f"unknown policy group; known are {', '.join(g.value for g in PolicyGroup)}"
    message = str(item["msg"]).removeprefix("Value error, ")
    return where + message[:1].lower() + message[1:]


def _suggest(path: tuple[str | int, ...]) -> str:
    model: Any = _File
    for part in path[:-1]:
        field = model.model_fields.get(part) if isinstance(part, str) else None
        model = getattr(field, "annotation", None)
        if not (isinstance(model, type) and issubclass(model, BaseModel)):
            return "; remove it"
    names = list(model.model_fields)
    close = difflib.get_close_matches(str(path[-1]), names, 1)
    return f"; did you mean {close[0]!r}?" if close else f"; known here are {', '.join(names)}"


def _cross_checks(data: dict[str, Any], lines: dict[tuple[str | int, ...], int]) -> Iterator[str]:
    """Mistakes between values that are each well-formed. Works on the raw data, so that they are listed
    together with the others; what is malformed is reported elsewhere and passed over here."""
    owners: dict[PolicyRule, str] = {}
    for name, index, text in _group_lines(data):
        try:
            rules = parse_rule(text, PolicyGroup.CLEAR)  # one group for all: equal rules compare equal
        except ValueError:
            continue
        for rule in rules:
            if owners.setdefault(rule, name) != name:
                yield (
                    f"line {lines.get(('policy', 'groups', name, index), 1)}: policy.groups.{name}[{index}]: "
                    f"{text} stands in {owners[rule]} too; keep it in one group"
                )
    section = data["dns"] if isinstance(data.get("dns"), dict) else {}
    yield from _check_resolvers(section, lines)
    anchors = section.get("trust_anchors")
    for index, anchor in enumerate(anchors if isinstance(anchors, list) else []):
        if isinstance(anchor, str) and not Path(anchor).is_file():
            yield (
                f"line {lines.get(('dns', 'trust_anchors', index), 1)}: dns.trust_anchors[{index}]: "
                f"no file {anchor}; give a file of DS or DNSKEY records"
            )


def _check_resolvers(section: dict[str, Any], lines: dict[tuple[str | int, ...], int]) -> Iterator[str]:
    texts = section.get("resolvers")
    parsed = []
    for text in texts if isinstance(texts, list) else []:
        with contextlib.suppress(ValueError):  # said elsewhere
            parsed.append(parse_resolver(text))
    try:
        check_all(parsed)
    except ValueError as error:
        yield f"line {lines.get(('dns', 'resolvers'), 1)}: dns.resolvers: {error}"
    bundle = section.get("tls_cert_bundle")
    if isinstance(bundle, str) and not Path(bundle).is_file():
        yield (
            f"line {lines.get(('dns', 'tls_cert_bundle'), 1)}: dns.tls_cert_bundle: no file {bundle}; "
            "give a PEM file of certificates, or leave it out for the system's"
        )


def _group_lines(data: dict[str, Any]) -> Iterator[tuple[str, int, object]]:
    policy = data.get("policy")
    groups = policy.get("groups") if isinstance(policy, dict) else None
    for name, texts in groups.items() if isinstance(groups, dict) else ():
        for index, text in enumerate(texts if isinstance(texts, list) else []):
            yield str(name), index, text


def _relay_place(text: str | None) -> tuple[IpAddress, int] | None:
    if text is None:
        return None
    address, _, port = text.partition("@")
    return ip_address(address), int(port or 53)


def _build(
    model: _File,
    source: str,
    resolvers: tuple[Resolver, ...],
    manual: ManualSet,
    connections: ConnectionSet,
) -> Config:
    return Config(
        source=source,
        identity=model.identity.id,
        key=model.identity.key,
        resolvers=resolvers,
        tls_cert_bundle=model.dns.tls_cert_bundle,
        trust_anchors=tuple(model.dns.trust_anchors),
        negative_trust_anchors=tuple(model.dns.negative_trust_anchors),
        auto_trust_anchors=model.dns.auto_trust_anchors,
        sha1=model.dns.sha1,
        insecure_keys=model.dns.insecure_keys == "use",
        relay=_relay_place(model.dns.relay),
        trusted_names=tuple(model.dns.trusted_names),
        rules=tuple(
            rule
            for name, texts in model.policy.groups.items()
            for text in texts or []
            for rule in parse_rule(text, PolicyGroup(name))
        ),
        default_group=PolicyGroup(model.policy.default),
        after_failed_ike_blocks=model.policy.after_failed_ike == "block",
        datapath=model.datapath,
        trap=model.trap,
        device=model.device,
        socket=model.control.socket,
        key_log=model.debug.key_log,
        manual=manual,
        connections=connections,
        certified_peers=PrefixSet(
            parse_prefix(text, PREFIX_EXAMPLE)
            for text in (model.policy.certificates.peers if model.policy.certificates is not None else ())
        ),
    )
