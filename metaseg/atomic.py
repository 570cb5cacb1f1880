"""What comes into being whole: a process may be killed, a disk full, and others want the same, while it is written."""

import glob
import json
import os
import shutil
import sys
import uuid
from collections.abc import Callable, Iterator
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


def write_json(path: Path, value: object) -> None:
    """Write a file of JSON, for people to read too, that comes into being whole."""
    with written_whole(path) as partial:
        partial.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@contextmanager
def folder_whole(folder: Path, does: str, is_there: Callable[[Path], bool]) -> Iterator[Path | None]:
    """An empty folder beside `folder`, that becomes `folder` when the block ends, or is gone if that is by an error.

    Of several processes one has it, and the others wait. What killed ones left is removed first; it is called
    .NAME.ID.partial.

    Args:
        folder: that is wanted.
        does: what the process does to it, for those that wait.
        is_there: whether it is what is wanted; asked once no other process can be making it.

    Returns:
        None if it is there by now.
    """
    partial = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}.partial")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with alone(folder, does) as locked:
        if is_there(folder):
            yield None
            return
        if locked:
            for leftover in folder.parent.glob(f".{glob.escape(folder.name)}.{32 * '[0-9a-f]'}.partial"):
                shutil.rmtree(leftover, ignore_errors=True)
        try:
            partial.mkdir()
            yield partial
            partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


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
