"""`oepy lab run` as `make demo` runs it: exit status, report, capture, and nothing left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from oepy.lab.namespaces import namespaces_here

pytestmark = pytest.mark.root


@pytest.mark.long
@pytest.mark.timeout(300)
def test_the_whole_demo(tmp_path: Path) -> None:
    """All rows and the 30 s leak test as expected; the report says the same; no namespace remains."""
    before = namespaces_here()
    report, capture = tmp_path / "demo.json", tmp_path / "demo.pcap"
    done = subprocess.run(
        [sys.executable, "-m", "oepy", "lab", "run", "--report", str(report), "--capture", str(capture)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    result = json.loads(report.read_text())
    assert result["as_expected"]
    assert len(result["rows"]) == 24
    assert result["private"]["clear_packets"] == 0
    assert capture.stat().st_size > 10_000
    assert namespaces_here() == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.timeout(600)  # once the lab took three minutes to come up, beside two emulated machines
def test_an_interrupted_demo_cleans_up(number: int, tmp_path: Path) -> None:
    """Ctrl-C or SIGTERM in the middle: namespaces, processes and temporary files go."""
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    process = subprocess.Popen(
        [sys.executable, "-m", "oepy", "lab", "run"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        start_new_session=True,
    )
    try:
        assert process.stdout is not None
        told = []
        for line in process.stdout:
            told.append(line)
            if line.startswith("alpha"):
                break
        mine = [name for name in namespaces_here() if f"-{process.pid:x}-" in name]
        assert len(mine) >= 8, told
        os.killpg(process.pid, number)
        process.stdout.close()
        assert process.wait(30) != 0
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(60)
    deadline = time.monotonic() + 5
    while set(mine) & set(namespaces_here()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not set(mine) & set(namespaces_here())
    assert list(tmp_path.iterdir()) == []
