"""Files that come into being whole: a process may be killed, and a disk be full, while one is written."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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
