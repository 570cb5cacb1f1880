"""Reads W&B's offline run files: a 7-byte header, then LevelDB log blocks of protobuf records."""

import json
import struct
import time
from pathlib import Path
from typing import Any

from wandb.proto.wandb_internal_pb2 import Record

SECONDS = 30  # W&B's service writes the end of a run after `finish` has returned, late on a busy machine
HEADER, BLOCK = 7, 32 * 1024
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def finished(path: Path) -> list[Record]:
    """All records of a `.wandb` file, once its run has ended."""
    for _ in range(10 * SECONDS):
        found = records(path)
        if any(record.HasField("exit") for record in found):
            break
        time.sleep(0.1)
    return found


def records(path: Path) -> list[Record]:
    """All records of a `.wandb` file, as far as it is written."""
    data = path.read_bytes()
    assert data[:4] == b":W&B"
    found, parts, at = [], b"", HEADER
    while at + 7 <= len(data):
        left = BLOCK - at % BLOCK
        if left < 7:  # a block's tail too short for a record header is padding
            at += left
            continue
        _, size, kind = struct.unpack("<IHB", data[at : at + 7])
        parts += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (FULL, LAST):
            record = Record()
            record.ParseFromString(parts)
            found.append(record)
            parts = b""
    return found


def config(found: list[Record]) -> dict[str, Any]:
    """The run's configuration as it was at the end."""
    values: dict[str, Any] = {}
    for record in found:
        updates = [*record.run.config.update, *record.config.update]
        values |= {item.key or item.nested_key[0]: json.loads(item.value_json) for item in updates}
    return values


def history(found: list[Record]) -> dict[str, list[Any]]:
    """Everything that was logged, by key."""
    values: dict[str, list[Any]] = {}
    for record in found:
        for item in record.history.item:
            values.setdefault(item.key or "/".join(item.nested_key), []).append(json.loads(item.value_json))
    return values


def logged(found: list[Record]) -> list[set[str]]:
    """The keys of each `log`."""
    return [{item.key or "/".join(item.nested_key) for item in r.history.item} for r in found if r.HasField("history")]


def exit_code(found: list[Record]) -> int:
    """How the run ended."""
    (code,) = [record.exit.exit_code for record in found if record.HasField("exit")]
    return code
