"""libunbound and delv as oracles: one question, one status, in the validator's words."""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path

from oepy.bench.unbound import BOGUS, FAILED, INSECURE, SECURE, Said, Unbound
from tests.differential.responder import HOST

__all__ = ["BOGUS", "FAILED", "INSECURE", "SECURE", "Said", "Unbound", "read_delv", "start_delv"]


def start_delv(port: int, anchors: list[str], name: str, kind: str) -> tuple[subprocess.Popen[str], Path]:
    """delv takes one anchored zone, of which it needs the name."""
    zone = anchors[0].split()[0]
    entries = []
    for line in anchors:
        owner, _, record, a, b, c, *data = line.split()
        word = "static-ds" if record == "DS" else "static-key"
        entries.append(f'{owner} {word} {a} {b} {c} "{"".join(data)}";')
    with tempfile.NamedTemporaryFile("w", prefix="oepy-delv-", delete=False) as file:
        file.write("trust-anchors {\n" + "\n".join(entries) + "\n};\n")
    command = ["delv", f"@{HOST}", "-p", str(port), "-a", file.name, f"+root={zone}", name, kind]
    return (
        subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT),
        Path(file.name),
    )


def read_delv(started: tuple[subprocess.Popen[str], Path]) -> Said:
    process, path = started
    try:
        text, _ = process.communicate(timeout=30)
    finally:
        if process.poll() is None:
            process.kill()
        path.unlink()
    return Said(_delv_status(text), " / ".join(text.strip().splitlines()[:4]), _delv_ttl(text))


def _delv_ttl(text: str) -> int:
    """The smallest of the records of an answer, as delv has capped it; -1 where there are none."""
    fields = [line.split() for line in text.splitlines() if line and not line.startswith(";")]
    return min((int(words[1]) for words in fields if len(words) > 3 and words[1].isdigit()), default=-1)


def _delv_status(text: str) -> str:
    """Each part of an alias chain has a line of its own; the weakest counts."""
    notes = [line for line in text.splitlines() if line.startswith("; ")]
    failed = "resolution failed" in text and "resolution failed: ncache" not in text  # which is a mere "none"
    if failed:
        # As far as delv tells: a proof or a signature that is wanted and not there.
        broken = ("broken trust chain", "insecurity proof failed", "no valid", "must be secure")
        return BOGUS if any(word in text for word in broken) else FAILED
    if any(line.startswith(("; unsigned answer", "; negative response, unsigned")) for line in notes):
        return INSECURE
    if any("fully validated" in line for line in notes):
        return SECURE
    return FAILED
