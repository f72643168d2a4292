"""A mark in a folder that is being filled, so that a download that broke off is never taken for a checkpoint."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_lite.errors import CheckpointError, OutputError

MARK = "download-unfinished"


@contextmanager
def unfinished(folder: Path, command: str) -> Iterator[None]:
    """The folder is marked until all is done, through interruptions too. Only one process at a time may fill it."""
    mark = folder / MARK
    try:
        folder.mkdir(parents=True, exist_ok=True)
        content = mark.open("a", encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{mark} cannot be written: {error.strerror or error}; choose another folder") from None
    with content:
        try:
            fcntl.flock(content, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OutputError(f"another process is filling {folder}; wait until it is done, or choose another folder") from None
        except OSError:
            pass  # a file system without locks
        content.truncate(0)
        print(command, file=content, flush=True)
        yield
        mark.unlink()


def refuse_unfinished(folder: Path) -> None:
    """Raises CheckpointError where the folder, or the one around a step, is being filled or was left so."""
    for place in (folder, folder.parent):
        if (place / MARK).is_file():
            command = (place / MARK).read_text(encoding="utf-8", errors="replace").strip()
            raise CheckpointError(f"the download into {place} is not finished: run the same command again ({command}); nothing was loaded")
