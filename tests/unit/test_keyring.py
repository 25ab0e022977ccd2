"""The files of a roll-over: each step may be done twice, and at every moment the key in use counts as published."""

from __future__ import annotations

import os
import stat

import pytest

from oepy.errors import KeyFormatError
from oepy.keyring import KeyRing, Rotation, Step
from oepy.keys import HostKey, fingerprint


@pytest.fixture
def ring(tmp_path):
    HostKey.generate("ed25519").save(tmp_path / "host.key")
    return KeyRing(tmp_path / "host.key")


def states(ring: KeyRing) -> list[str]:
    return [state for state, _, _ in ring.listed()]


def test_a_whole_roll_over(ring):
    (old,) = ring.published()
    rotation = ring.begin("ed25519")
    assert ring.rotation() == rotation
    current, new = ring.published()
    assert (current, fingerprint(new)) == (old, rotation.key)
    waiting = Rotation(Step.WAIT, rotation.key, 300, 1700000000.5)
    ring.note(waiting)
    assert ring.rotation() == waiting
    ring.note(Rotation(Step.SWITCH, rotation.key))
    ring.switch()
    assert states(ring) == ["current", "retired"]
    assert ring.published() == (new, old)  # the daemon may still prove the old one
    ring.note(Rotation(Step.WITHDRAW, rotation.key))
    assert ring.published() == (new,)
    assert set(ring.known()) == {old, new}
    ring.finish()
    assert (states(ring), ring.rotation()) == (["current"], None)
    assert os.listdir(ring.path.parent) == ["host.key"]


def test_every_step_may_be_done_twice(ring, monkeypatch):
    """A crash between any two file operations is mended by doing the step again."""
    (old,) = ring.published()
    first = ring.begin("ed25519")
    ring.state.unlink()  # the crash came before the state was written
    assert ring.begin("ed25519") == first
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(5, "crash")))
        with pytest.raises(KeyFormatError, match="crash"):
            ring.switch()
    assert HostKey.load(ring.path).public == old
    assert set(ring.published()) == set(ring.known())
    ring.switch()
    ring.switch()
    assert fingerprint(ring.published()[0]) == first.key
    assert HostKey.load(ring.retired).public == old
    ring.retired.unlink()
    ring.finish()
    ring.finish()
    assert ring.rotation() is None


def test_files_are_private_and_a_broken_state_is_named(ring):
    ring.begin("ed25519")
    for path in (ring.next, ring.state):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    for text in ("", "{", "[]", '{"step": "fly", "key": "", "cache_seconds": 0, "until": 0}'):
        ring.state.write_text(text)
        with pytest.raises(KeyFormatError, match="cannot be read"):
            ring.rotation()
    ring.state.unlink()
    ring.next.rename(ring.retired)
    with pytest.raises(KeyFormatError, match="older roll-over"):
        ring.begin("ed25519")
