"""What a checkpoint folder must hold: every file's size and checksum, written last. A folder without a manifest was never finished."""

import json
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_lite.errors import CheckpointError
from megatron_lite.whole import sync, whole_file

NAME = "manifest.json"
CHUNK = 1 << 24


@dataclass(frozen=True)
class Entry:
    bytes: int
    crc32: str


def entry_of(path: Path) -> Entry:
    checksum = 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            checksum = zlib.crc32(chunk, checksum)
    return Entry(path.stat().st_size, f"{checksum:08x}")


def write_entries(entries: Mapping[str, Entry], path: Path) -> None:
    """A file of entries that appears whole or not at all."""
    with whole_file(path) as file:
        json.dump({name: asdict(entry) for name, entry in entries.items()}, file, indent=1)
    sync(path.parent)


def read_entries(path: Path) -> dict[str, Entry]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {name: Entry(int(entry["bytes"]), str(entry["crc32"])) for name, entry in found.items()}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); load another step with iteration=N") from None


def check_sizes(folder: Path) -> dict[str, Entry]:
    """The entries of a folder, after a look at the size of every file. Empty where another program wrote the folder."""
    if not (folder / NAME).exists():
        return {}
    entries = read_entries(folder / NAME)
    for name, entry in entries.items():
        path = folder / name
        size = path.stat().st_size if path.exists() else None
        if size != entry.bytes:
            found = "is missing" if size is None else f"has {size:,} bytes instead of {entry.bytes:,}"
            raise CheckpointError(f"{path} {found}; the checkpoint is damaged: load another step with iteration=N")
    return entries


def check_content(path: Path, entries: Mapping[str, Entry]) -> None:
    """Raises CheckpointError where a file is not what was written."""
    wanted = entries.get(path.name)
    if wanted is not None and entry_of(path) != wanted:
        raise CheckpointError(f"{path} is damaged: its checksum is {entry_of(path).crc32}, written was {wanted.crc32}; load another step with iteration=N")
