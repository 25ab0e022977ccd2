"""Reading and writing files that hold secrets: only their owner may read them."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from oepy.errors import KeyFormatError

MAX_KEY_FILE = 64 * 1024


def read_private_file(path: Path, mend: str = "") -> bytes:
    """The whole of a regular file of mode 0600 or less; `mend` is what to do where it is missing. Raises
    KeyFormatError."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        raise KeyFormatError(f"{path} does not exist", mend) from None
    except OSError as error:
        raise KeyFormatError(f"cannot read {path}: {error.strerror}") from None
    except ValueError:
        raise KeyFormatError(f"{str(path)!r} is no file name") from None
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise KeyFormatError(f"{path} is not a regular file")
        if status.st_mode & 0o077:
            raise KeyFormatError(f"{path} can be read by others than its owner", f"chmod 600 {path}")
        if status.st_size > MAX_KEY_FILE:
            raise KeyFormatError(f"{path} is too long for a key file")
        return os.read(descriptor, MAX_KEY_FILE)
    finally:
        os.close(descriptor)


def write_private_file(path: Path, data: bytes) -> None:
    """A new file of mode 0600. Raises KeyFormatError where `path` exists or cannot be made."""
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(path, flags, 0o600)
    except FileExistsError:
        raise KeyFormatError(f"{path} exists", "a key is never overwritten: move it away first") from None
    except OSError as error:
        raise KeyFormatError(f"cannot write {path}: {error.strerror}") from None
    with os.fdopen(descriptor, "wb") as stream:
        stream.write(data)
