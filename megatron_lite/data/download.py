"""Fetches files from the web: what was fetched stays when the line breaks, and a file appears under its name only when it is whole and is the right one."""

import hashlib
import os
import shutil
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from http.client import HTTPResponse
from pathlib import Path, PurePosixPath

from megatron_lite.data.parallel import in_parallel
from megatron_lite.data.transfer import BrokenError, NothingMissingError, RefusedError, announced, chunks, insist, opened
from megatron_lite.errors import DataError, OutputError
from megatron_lite.log import logger

Progress = Callable[[int], object]
"""Told how many more bytes are there; fewer than none when a start was in vain."""

ANOTHER = "{} is there, but is another file ({}); move it away to fetch the right one"


@dataclass(frozen=True)
class RemoteFile:
    """A file by its name inside a folder, the places where it is offered, and what it must be. None: nobody said. It has `least` bytes or more."""

    name: str
    urls: tuple[str, ...]
    sha256: str | None = None
    size: int | None = None
    least: int = 0

    @property
    def about(self) -> int:
        return self.least if self.size is None else self.size


class _StoppedError(Exception):
    """Ends the transfers that still run when one has failed, or the user has seen enough."""


def fetch_all(files: Sequence[RemoteFile], folder: Path, progress: Progress = lambda count: None, *, parallel: int = 1) -> list[Path]:
    """Fetches those of the files that are not there yet, the last one when all others are there. Returns the paths of all.

    Raises DataError or OutputError at the first that cannot be had.
    """
    paths = [safe_path(folder, file.name) for file in files]
    check_space(folder, [file for file, path in zip(files, paths, strict=True) if not path.exists()])
    heard, stopped = threading.Lock(), threading.Event()

    def listen(count: int) -> None:
        if stopped.is_set():
            raise _StoppedError
        with heard:
            progress(count)

    in_parallel(lambda file: fetch(file, folder, listen), files[:-1], parallel, stopped)
    in_parallel(lambda file: fetch(file, folder, listen), files[-1:], 1, stopped)
    return paths


def fetch(file: RemoteFile, folder: Path, progress: Progress = lambda count: None) -> Path:
    """The path of the file in the folder, fetched if it is not there. What is there already is checked, and never replaced."""
    path = safe_path(folder, file.name)
    if path.exists():
        if difference := _difference(path, file):
            raise DataError(ANOTHER.format(path, difference))
        progress(path.stat().st_size)
        return path
    part = part_of(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _fill(part, file, progress)
        if difference := _difference(part, file):
            part.unlink()
            raise DataError(f"what arrived as {file.name} is another file ({difference}); it was deleted, try again")
        part.replace(path)
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror or error}; choose another folder or free some space") from None
    return path


def safe_path(folder: Path, name: str) -> Path:
    """Where a file of this name belongs; raises DataError for a name that leads out of the folder."""
    pure = PurePosixPath(name)
    path = folder / name
    odd = not name.isprintable() or "\\" in name or pure.is_absolute() or ".." in pure.parts
    if not name or odd or path.resolve() == folder.resolve() or not path.resolve().is_relative_to(folder.resolve()):
        raise DataError(f"the file name {name!r} leads out of {folder}; nothing was fetched")
    return path


def sha256_of(path: Path) -> str:
    """The checksum of a file's content, in hexadecimal."""
    with path.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def size_difference(path: Path, file: RemoteFile) -> str:
    """How many bytes the file that lies there has, and the one that was meant, where they differ."""
    size = path.stat().st_size
    differs = (file.size is not None and size != file.size) or size < file.least
    return f"{size:,} bytes, expected {'' if file.size is not None else 'at least '}{file.about:,}" if differs else ""


def _difference(path: Path, file: RemoteFile) -> str:
    """How the file that lies there differs from the one that was meant; nothing if it does not."""
    if difference := size_difference(path, file):
        return difference
    if file.sha256 and (found := sha256_of(path)) != file.sha256:
        return f"sha256 {found[:12]}…, expected {file.sha256[:12]}…"
    return ""


def _fill(part: Path, file: RemoteFile, progress: Progress) -> None:
    """Completes the partial file from the first place that has it."""
    progress(size_on_disk(part))
    reasons: list[str] = []
    for url in file.urls:
        try:
            insist(lambda url=url: _continue(part, url, file, progress), lambda: size_on_disk(part))
            return
        except (BrokenError, RefusedError) as error:
            reasons.append(f"{url}: {error}")
            logger.warning(f"{file.name} cannot be fetched from {url} ({error})")
    kept = f"; {part} keeps what has arrived" if size_on_disk(part) else ""
    raise DataError(f"{file.name} cannot be fetched ({'; '.join(reasons)}); try again later, or bring the file from another machine{kept}")


def _continue(part: Path, url: str, file: RemoteFile, progress: Progress) -> None:
    """Asks for the bytes that are missing and appends them."""
    have = size_on_disk(part)
    if have and have == file.size:
        return
    try:
        with opened(url, start=have) as answer:
            if have and answer.status != 206:
                _drop(part, progress)
            refuse_another(answer, file, have)
            _append(part, answer, file, progress)
    except NothingMissingError as error:
        if have != (file.size or error.total):
            _drop(part, progress)
            raise BrokenError(f"{part.name} was longer than the file, and is fetched anew") from None


def refuse_another(answer: HTTPResponse, file: RemoteFile, have: int) -> None:
    """Raises RefusedError where the answer cannot be the rest of the file, before any of it is kept."""
    start = have if answer.status == 206 else 0
    if answer.status == 206 and not (answer.headers.get("Content-Range") or "").startswith(f"bytes {have}-"):
        raise RefusedError(f"it sends another part than was asked for ({answer.headers.get('Content-Range')})")
    if (length := announced(answer)) is None:
        if file.size is None and file.sha256 is None and not answer.chunked:
            raise RefusedError("it does not say how many bytes the file has, so that nobody could tell whether all have arrived")
    elif (file.size is not None and start + length != file.size) or start + length < file.least:
        raise RefusedError(f"it announces {start + length:,} bytes, and the file has {'' if file.size else 'at least '}{file.about:,}")
    if file.sha256 is None and answer.headers.get_content_type() == "text/html":
        raise RefusedError("it answers with a web page")


def _append(part: Path, answer: HTTPResponse, file: RemoteFile, progress: Progress) -> None:
    with part.open("ab") as output:
        for chunk in chunks(answer):
            if file.size is not None and output.tell() + len(chunk) > file.size:
                raise RefusedError(f"it sends more than the {file.size:,} bytes that the file has")
            output.write(chunk)
            progress(len(chunk))
        output.flush()
        os.fsync(output.fileno())


def _drop(part: Path, progress: Progress) -> None:
    progress(-size_on_disk(part))
    part.unlink()


def check_space(folder: Path, missing: Sequence[RemoteFile]) -> None:
    """Raises OutputError where the missing files are larger than the room that is free for them."""
    needed = sum(file.about - size_on_disk(part_of(folder / file.name)) for file in missing)
    place = existing(folder)
    free = shutil.disk_usage(place).free
    if needed > free:
        raise OutputError(f"{len(missing)} files take {needed / 1e9:.2f} GB; {place} has {free / 1e9:.2f} GB free; choose another folder or free some space")


def existing(folder: Path) -> Path:
    """The folder, or what there is of its parents."""
    return next(place for place in (folder, *folder.resolve().parents) if place.exists())


def part_of(path: Path) -> Path:
    """Where a file lies until it is whole."""
    return path.with_name(path.name + ".part")


def size_on_disk(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
