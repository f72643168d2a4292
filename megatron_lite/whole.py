"""Files that are there whole, or as they were before, whenever the machine goes down."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO


@contextmanager
def whole_file(path: Path, *, errors: str = "strict") -> Iterator[TextIO]:
    """A text file that takes the place of `path` at the end."""
    with draft_of(path) as draft, draft.open("w", encoding="utf-8", errors=errors) as file:
        yield file


@contextmanager
def draft_of(path: Path) -> Iterator[Path]:
    """A name beside `path` for a file that takes its place at the end, on the disk by then. Raises OSError; what cannot be finished is not left behind."""
    draft = path.with_name(f"{path.name}.partial")
    try:
        yield draft
        sync(draft)  # else a name may be on the disk before its content is
        draft.replace(path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


def sync(path: Path) -> None:
    """Waits until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
