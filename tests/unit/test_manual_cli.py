"""`oepy sa` and `oepy policy` without a daemon, over a kernel in memory: arguments, keys, output, exit status."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from oepy.cli import main
from oepy.cli import manual as command
from oepy.datapath.xfrm.manual import ManualKernel
from tests.fakes.manual import key, section
from tests.fakes.manual_kernel import MemoryKernel

A, B = "192.0.2.1", "192.0.2.2"


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> MemoryKernel:
    made = MemoryKernel()

    @contextlib.contextmanager
    def kernel() -> Iterator[ManualKernel]:
        yield ManualKernel(made, lambda address: str(address) == A)

    monkeypatch.setattr(command, "_kernel", kernel)
    return made


@pytest.fixture(autouse=True)
def _config(tmp_path: Path) -> None:
    (tmp_path / "oepy.yaml").write_text(f"control: {{socket: {tmp_path / 'none'}}}\n")


def oepy(tmp_path: Path, *words: str, stdin: str = "") -> Result:
    return CliRunner().invoke(main, ["-c", str(tmp_path / "oepy.yaml"), *words], input=stdin)


def good(tmp_path: Path, *words: str, stdin: str = "") -> str:
    done = oepy(tmp_path, *words, stdin=stdin)
    assert done.exit_code == 0, done.output
    return done.output


def listed(tmp_path: Path, *words: str) -> Any:
    return json.loads(good(tmp_path, *words, "--json"))


KEYS = [
    "--encryption",
    "aes256",
    "--encryption-key",
    key(1),
    "--integrity",
    "sha256",
    "--integrity-key",
    key(2),
]


def test_a_session_of_commands(memory: MemoryKernel, tmp_path: Path) -> None:
    """Add, list, delete and flush; what they say names the kernel, and never a key."""
    said = good(tmp_path, "sa", "add", A, B, "esp", "0x1001", "--mode", "transport", *KEYS)
    assert said == f"esp SA 0x1001 to {B} is there (in the kernel, no daemon runs)\n"
    good(
        *(tmp_path, "sa", "add", B, A, "esp", "4098", "--mode", "transport", *KEYS, "--reqid", "5"),
        *("--replay-window", "32", "--lifetime", "hard_bytes=1000", "--lifetime", "soft_bytes=900"),
    )
    good(tmp_path, "policy", "add", "out", A, B, "--template", "esp/transport//require")
    good(tmp_path, "policy", "add", "in", B, A, "--template", "esp/transport//unique:5", "--priority", "7")
    first, second = listed(tmp_path, "sa", "list")
    assert (first["spi"], first["encryption_key_bits"], second["reqid"]) == ("0x00001001", 256, 5)
    assert second["lifetime"] == {"soft_bytes": 900, "hard_bytes": 1000}
    table = good(tmp_path, "sa", "list") + good(tmp_path, "policy", "list")
    assert "aes256-sha256" in table
    assert "esp/transport//require:5" in table
    assert key(1)[2:] not in table + json.dumps([first, second])
    assert listed(tmp_path, "policy", "list")[0]["priority"] == 7
    assert json.loads(good(tmp_path, "policy", "flush", "--json")) == {
        "done": "policy-flush",
        "by": "kernel",
        "sas": 2,
        "policies": 0,
        "removed": 2,
    }
    good(tmp_path, "sa", "delete", B, "esp", "0x1001")
    good(tmp_path, "sa", "flush")
    assert (memory.sas, memory.policies) == ({}, {})


def test_keys_from_files_and_stdin(memory: MemoryKernel, tmp_path: Path) -> None:
    """A file must be of mode 0600; `-` takes a line of stdin for each key, in the order of the algorithms."""
    file = tmp_path / "k"
    file.write_text(key(1)[2:] + "\n")
    words = ["sa", "add", A, B, "esp", "0x1001", "--encryption", "aes256", "--encryption-key-file", str(file)]
    words += ["--integrity", "sha256", "--integrity-key", "-"]
    file.chmod(0o644)
    done = oepy(tmp_path, *words, stdin=key(2))
    assert (done.exit_code, "chmod 600" in done.output) == (2, True)
    file.chmod(0o600)
    good(tmp_path, *words, stdin=key(2) + "\n")
    words = ["sa", "add", A, B, "esp", "0x1002", "--encryption", "aes256", "--encryption-key", "-"]
    good(tmp_path, *words, "--integrity", "sha256", "--integrity-key", "-", stdin=f"{key(1)}\n{key(2)}\n")
    with command._kernel() as kernel:
        one, two = kernel.current().sas
    assert one.encryption_key == two.encryption_key
    assert one.integrity_key == two.integrity_key
    assert "0x" + one.integrity_key.reveal().hex() == key(2)


@pytest.mark.parametrize(
    ("words", "status", "part"),
    [
        (["sa", "add", A, B, "esp", "0x10", *KEYS], 2, "reserved"),
        (
            ["sa", "add", A, B, "esp", "0x1001", "--encryption", "aes256", "--encryption-key", key(1, 9)],
            2,
            "9 bytes",
        ),
        (["sa", "add", A, B, "esp", "0x1001", *KEYS, "--encap", "4500"], 2, "SPORT,DPORT"),
        (["sa", "add", A, B, "esp", "0x1001", *KEYS, "--lifetime", "1"], 2, "hard_bytes"),
        (["sa", "add", A, B, "ipcomp", "0x1001"], 2, "Invalid value"),
        (
            ["sa", "add", A, B, "esp", "0x1001", "--aead", "aes256gcm16", "--aead-key", key(1, 36)],
            2,
            "RFC 8221",
        ),
        (["sa", "delete", B, "esp", "0x1001"], 1, "no manual esp SA"),
        (["policy", "add", "out", A, B], 2, "what is to be done"),
        (["policy", "add", "out", A, B, "--template", "esp/tunnel"], 2, "is not like"),
        (["policy", "add", "out", A, B, "--template", "esp/transport//require"], 2, "no SA is"),
        (["policy", "add", "out", A, B, "--action", "block", "--dport", "7"], 2, "a port needs"),
        (["policy", "delete", "out", A, B], 1, "no manual policy"),
    ],
)
def test_mistakes(memory: MemoryKernel, tmp_path: Path, words: list[str], status: int, part: str) -> None:
    """2 for wrong usage, 1 for what is not there; one line with the mend, nothing is changed."""
    done = oepy(tmp_path, *words)
    assert (done.exit_code, part in done.output) == (status, True), done.output
    assert key(1)[2:] not in done.output
    assert (memory.sas, memory.policies) == ({}, {})


def test_load_makes_the_kernel_as_the_file(memory: MemoryKernel, tmp_path: Path) -> None:
    """Other manual entries go, those that stay are not touched; with mistakes nothing changes."""
    good(tmp_path, "policy", "add", "out", A, "198.51.100.0/24", "--action", "block")
    file = tmp_path / "manual.yaml"
    file.touch(mode=0o600)
    file.write_text(json.dumps({"manual": section(A, B)}))
    assert "2 SAs and 2 policies" in good(tmp_path, "sa", "load", str(file))
    memory.history.clear()
    good(tmp_path, "sa", "load", str(file))
    assert memory.history == []
    file.write_text(json.dumps({"manual": {"sas": [{"spi": 1}]}}))
    done = oepy(tmp_path, "sa", "load", str(file))
    assert (done.exit_code, "line 1: manual.sas[0].src: is missing" in done.output) == (2, True)
    assert (len(memory.sas), len(memory.policies)) == (2, 2)


@pytest.mark.parametrize("words", [["sa"], ["sa", "add"], ["policy"], ["policy", "add"], ["convert"]])
def test_help_has_examples(words: list[str]) -> None:
    """Every command shows how it is used."""
    done = CliRunner().invoke(main, [*words, "--help"])
    assert done.exit_code == 0
    assert "Example" in done.output
