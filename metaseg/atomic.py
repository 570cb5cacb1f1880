"""What comes into being whole: a process may be killed, a disk full, and others want the same, while it is written."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A path beside `path`, whose file becomes `path` when the block ends, or is gone if that is by an error.

    What a killed process leaves is called NAME.PID.partial.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def alone(folder: Path, does: str) -> Iterator[bool]:
    """Hold the lock of a folder that several processes may want to make; one that another has is waited for.

    Args:
        folder: whose lock, .NAME.lock, stays beside it.
        does: what the process with the lock does to it, for those that wait.

    Returns:
        False where the file system has no locks, and to rename the finished folder has to do.
    """
    lock = FileLock(folder.with_name(f".{folder.name}.lock"))
    with suppress(OSError, NotImplementedError):
        try:
            lock.acquire(timeout=0)
        except Timeout:
            sys.stderr.write(f"another process {does} {folder}: waiting for it\n")
            lock.acquire()
    try:
        yield lock.is_locked
    finally:
        lock.release()
