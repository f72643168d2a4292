"""Text files that are there whole, or as they were before, whenever the machine goes down."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO


@contextmanager
def whole_file(path: Path, *, errors: str = "strict") -> Iterator[TextIO]:
    """A draft beside `path` that takes its place at the end, on the disk by then. Raises OSError; what cannot be finished is not left behind."""
    draft = path.with_name(f"{path.name}.partial")
    try:
        with draft.open("w", encoding="utf-8", errors=errors) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # else a name may be on the disk before its content is
        draft.replace(path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
