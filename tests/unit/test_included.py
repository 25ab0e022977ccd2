"""`include:`: files of connections beside the one, read again only where something is another."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from oepy import config
from oepy.errors import ConfigError
from oepy.included import Memory
from oepy.keys import HostKey, public_pem

MAIN = "dns: {resolvers: [192.0.2.53]}\ninclude: [conf.d/*.yaml]\n"
ONE = """\
connections:
  NAME:
    remote_addrs: [192.0.2.1]
    local: {auth: psk, id: a.example}
    remote: {auth: psk, id: NAME.example}
    children: {net: {remote_ts: [10.0.0.0/24]}}
secrets: [{type: ike, id: [NAME.example], secret_file: NAME.psk}]
"""


class Site:
    """A directory with a configuration, of files that are all old enough to be remembered."""

    def __init__(self, directory: Path) -> None:
        self.main = directory / "oepy.yaml"
        self.parts = directory / "conf.d"
        self.parts.mkdir()
        self.main.write_text(MAIN)
        self.now = 0.0
        self.memory = Memory(lambda: self.now)
        self.later()

    def later(self) -> None:
        newest = max((os.stat(file).st_ctime for file in self.parts.iterdir()), default=0.0)
        self.now = newest + 10.0

    def add(self, name: str, text: str = ONE) -> None:
        secret = self.parts / f"{name}.psk"
        secret.touch(mode=0o600)
        secret.write_text(f"the secret of {name}\n")
        (self.parts / f"{name}.yaml").write_text(text.replace("NAME", name))
        self.later()

    def load(self) -> config.Config:
        return config.load(self.main, self.memory)

    def mistakes(self) -> list[str]:
        with pytest.raises(ConfigError) as caught:
            self.load()
        return caught.value.problems


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


def test_files_are_joined_in_the_order_of_their_names(site):
    assert site.load().connections.connections == ()  # a pattern may match nothing
    for name in ("b", "a"):
        site.add(name)
    site.main.write_text(MAIN + ONE.replace("NAME", "m").replace("m.psk", "conf.d/a.psk"))
    found = site.load().connections
    assert [connection.name for connection in found.connections] == ["m", "a", "b"]
    assert [secret.secret.reveal() for secret in found.secrets][2] == b"the secret of b"


def test_what_is_the_same_is_not_read_again(site):
    site.add("a")
    site.add("b")
    first = site.load().connections.connections
    site.add("c")
    second = site.load().connections.connections
    assert second[:2] == first
    assert second[0] is first[0]
    assert second[1] is first[1]
    assert len(second) == 3


@pytest.mark.parametrize(
    ("changed", "old", "new"), [("a.yaml", "192.0.2.1", "192.0.2.2"), ("a.psk", "secret", "Secret")]
)
def test_a_change_of_the_file_or_of_what_it_names_is_seen(site, changed, old, new):
    site.add("a")
    before = site.load().connections
    file = site.parts / changed
    file.write_text(file.read_text().replace(old, new))
    site.later()
    after = site.load().connections
    assert after != before
    assert site.load().connections == after


def test_a_secret_that_others_may_read_is_noticed(site):
    site.add("a")
    site.load()
    (site.parts / "a.psk").chmod(0o644)
    assert any("chmod 600" in problem for problem in site.mistakes())


def test_a_file_that_was_just_changed_is_read_again(site):
    """It may change once more within one tick of the file system's clock, and keep its size."""
    site.add("a")
    site.now -= 9.5
    first = site.load().connections.connections
    assert site.load().connections.connections[0] is not first[0]


def test_a_file_that_is_gone_is_forgotten(site):
    site.add("a")
    site.load()
    (site.parts / "a.yaml").unlink()
    assert site.load().connections.connections == ()


def test_mistakes_name_their_file_and_line(site):
    site.add("a", ONE + "policy: {default: clear}\n")
    site.add("b", ONE.replace("remote_ts", "remote_tt"))
    site.add("c", "connections: [\n")
    a, b, c = (f"{site.parts}/{name}.yaml" for name in "abc")
    assert site.mistakes() == [
        f"{a}: line 8: policy: an included file has connections, secrets, pools and authorities alone",
        *(problem for problem in site.mistakes() if problem.startswith(f"{b}: line 6: ")),
        *(problem for problem in site.mistakes() if problem.startswith(f"{c}: line 2: not YAML")),
    ]
    assert len(site.mistakes()) == 3
    site.add("c")
    assert len(site.mistakes()) == 2  # as long as they are there


def test_one_name_twice_is_refused(site):
    site.add("a")
    (site.parts / "z.yaml").write_text(ONE.replace("NAME", "a"))
    site.main.write_text(MAIN + "pools: {p: {addrs: 10.3.0.0/24}}\n")
    (site.parts / "p.yaml").write_text("pools: {p: {addrs: 10.4.0.0/24}}\n")
    mistakes = site.mistakes()
    assert f"{site.parts}/z.yaml: connections.a: stands in {site.parts}/a.yaml too; keep one" in mistakes
    assert f"{site.parts}/p.yaml: pools.p: stands in the main file too; keep one" in mistakes


def test_a_pool_may_be_in_another_file_but_must_be_somewhere(site):
    site.add("a", ONE.replace("    children", "    pools: [p]\n    children"))
    assert ["there is no pool 'p'" in problem for problem in site.mistakes()] == [True]
    site.main.write_text(MAIN + "pools: {p: {addrs: 10.3.0.0/24}}\n")
    assert site.load().connections.pools[0].name == "p"


@pytest.mark.parametrize("pattern", ["conf.d/none.yaml", "", "a\0b", "conf.d/\n*"])
def test_patterns_that_name_nothing(site, pattern):
    site.main.write_text(MAIN.replace("conf.d/*.yaml", repr(pattern)[1:-1].join('""')))
    assert any("include" in problem for problem in site.mistakes())


def test_a_raw_key_that_is_another(site):
    text = ONE.replace("psk, id: a.example", "'null'").replace("psk, id", "pubkey, pubkeys: [peer.pem], id")
    keys = [HostKey.generate("ed25519").public for _ in range(2)]
    for key in keys:
        (site.parts / "peer.pem").write_text(public_pem(key))
        site.add("a", text)
        assert site.load().connections.connections[0].remote.pubkeys == (key,)
