"""Files that are made once and found ever after, by however many processes: one makes them, the others wait and find them."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from megatron_lite.log import logger


@contextmanager
def one_at_a_time(folder: Path) -> Iterator[None]:
    """Holds the folder's lock. Where a file system cannot lock, several may make the same file: each writes it aside and renames it, so no harm is done."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            _lock(descriptor, folder)
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int, folder: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        logger.info(f"waiting for another process that prepares data in {folder}")
        fcntl.flock(descriptor, fcntl.LOCK_EX)


def save_array(path: Path, numbers: np.ndarray) -> None:
    """Writes an .npy under its name only when it is whole."""
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with draft.open("wb") as file:
            np.save(file, numbers)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
