"""Where what is made once is kept: unpacked archives, drawn images, the shipped initialisation."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """What the environment variable METASEG_CACHE names; ~/.cache/metaseg without it."""
    return Path(os.environ.get("METASEG_CACHE") or "~/.cache/metaseg").expanduser()
