"""Fetches files from the web: what was fetched stays when the line breaks, and a file appears under its name only when it is whole and is the right one."""

import hashlib
import os
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

from megatron_lite.errors import DataError, OutputError
from megatron_lite.log import logger

CHUNK = 1 << 20  # bytes
PATIENCE = 30.0  # seconds without a byte
TRIES = 5
PAUSE = 1.0  # seconds after the first failure; doubled after each further one
LOOPBACK = {"localhost", "127.0.0.1", "::1"}

Progress = Callable[[int], object]
"""Told how many more bytes are there; fewer than none when a start was in vain."""


@dataclass(frozen=True)
class RemoteFile:
    """A file by its name inside a folder, the places where it is offered, and what it must be. `size` None: as large as the server says."""

    name: str
    urls: tuple[str, ...]
    sha256: str
    size: int | None = None


class _BrokenError(Exception):
    """A transfer that failed in a way that may not last."""


class _RefusedError(Exception):
    """An answer that asking again will not change."""


def fetch_all(files: Sequence[RemoteFile], folder: Path, progress: Progress = lambda count: None) -> list[Path]:
    """Fetches those of the files that are not there yet, and returns the paths of all. Raises DataError or OutputError at the first that cannot be had."""
    paths = [safe_path(folder, file.name) for file in files]
    _check_space(folder, [(file, path) for file, path in zip(files, paths, strict=True) if not path.exists()])
    return [fetch(file, folder, progress) for file in files]


def fetch(file: RemoteFile, folder: Path, progress: Progress = lambda count: None) -> Path:
    """The path of the file in the folder, fetched if it is not there. What is there already is checked, and never replaced."""
    path = safe_path(folder, file.name)
    if path.exists():
        if (found := sha256_of(path)) != file.sha256:
            raise DataError(f"{path} is there, but is another file (sha256 {found[:12]}…, expected {file.sha256[:12]}…); move it away to fetch the right one")
        progress(path.stat().st_size)
        return path
    part = _part(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _fill(part, file, progress)
        _check(part, file)
        part.replace(path)
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror or error}; choose another folder or free some space") from None
    return path


def safe_path(folder: Path, name: str) -> Path:
    """Where a file of this name belongs; raises DataError for a name that leads out of the folder."""
    pure = PurePosixPath(name)
    path = folder / name
    if not name or pure.is_absolute() or "\\" in name or ".." in pure.parts or not path.resolve().is_relative_to(folder.resolve()):
        raise DataError(f"the file name {name!r} leads out of {folder}; nothing was fetched")
    return path


def sha256_of(path: Path) -> str:
    """The checksum of a file's content, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as content:
        while chunk := content.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _fill(part: Path, file: RemoteFile, progress: Progress) -> None:
    """Completes the partial file from the first place that has it."""
    progress(_size(part))
    reasons: list[str] = []
    for url in file.urls:
        try:
            return _insist(part, url, file, progress)
        except (_BrokenError, _RefusedError) as error:
            reasons.append(f"{url}: {error}")
            logger.warning(f"{file.name} cannot be fetched from {url} ({error})")
    kept = f"; {part} keeps what has arrived" if _size(part) else ""
    raise DataError(f"{file.name} cannot be fetched ({'; '.join(reasons)}); try again later, or bring the file from another machine{kept}")


def _insist(part: Path, url: str, file: RemoteFile, progress: Progress) -> None:
    """Goes on where the line breaks, until it breaks several times without a byte in between."""
    failures = 0
    while True:
        before = _size(part)
        try:
            return _continue(part, url, file, progress)
        except _BrokenError:
            failures = 1 if _size(part) > before else failures + 1
            if failures == TRIES:
                raise
            time.sleep(PAUSE * 2 ** (failures - 1))


def _continue(part: Path, url: str, file: RemoteFile, progress: Progress) -> None:
    """Asks for the bytes that are missing and appends them."""
    have = _size(part)
    if have and have == file.size:
        return
    if urlsplit(url).scheme != "https" and urlsplit(url).hostname not in LOOPBACK:
        raise _RefusedError("only https is trusted")
    headers = {"User-Agent": "deepy"} | ({"Range": f"bytes={have}-"} if have else {})
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=PATIENCE) as answer:
            if have and not _goes_on(answer, have):
                progress(-have)
                part.unlink()
            _append(part, answer, file, progress)
    except urllib.error.HTTPError as error:
        if error.code == 416 and have:  # nothing is missing, or what was begun is another file: the checksum will tell
            return
        kind = _BrokenError if error.code >= 500 or error.code in (408, 429) else _RefusedError
        raise kind(f"HTTP {error.code} {error.reason}") from None
    except (urllib.error.URLError, HTTPException, TimeoutError, ConnectionError) as error:
        raise _broken(error) from None


def _goes_on(answer: HTTPResponse, have: int) -> bool:
    """Whether the server sends what comes after `have` bytes, rather than everything again."""
    return answer.status == 206 and (answer.headers.get("Content-Range") or "").startswith(f"bytes {have}-")


def _append(part: Path, answer: HTTPResponse, file: RemoteFile, progress: Progress) -> None:
    announced = answer.headers.get("Content-Length")
    left = int(announced) if announced else None
    with part.open("ab") as output:
        for chunk in _chunks(answer):
            output.write(chunk)
            progress(len(chunk))
            left = left - len(chunk) if left is not None else None
            if file.size is not None and output.tell() > file.size:
                raise _RefusedError(f"it sends more than the {file.size:,} bytes that the file has")
        output.flush()
        os.fsync(output.fileno())
    if left:
        raise _BrokenError(f"the connection ended {left:,} bytes too early")


def _chunks(answer: HTTPResponse) -> Iterator[bytes]:
    """What arrives; an OSError here is the line's, not the disk's."""
    while True:
        try:
            chunk = answer.read(CHUNK)
        except (OSError, HTTPException) as error:
            raise _broken(error) from None
        if not chunk:
            return
        yield chunk


def _broken(error: Exception) -> _BrokenError:
    return _BrokenError(str(getattr(error, "reason", error)) or type(error).__name__)


def _check(part: Path, file: RemoteFile) -> None:
    found = sha256_of(part)
    if found != file.sha256:
        part.unlink()
        raise DataError(f"what arrived as {file.name} is another file (sha256 {found[:12]}…, expected {file.sha256[:12]}…); it was deleted, try again")


def _check_space(folder: Path, missing: Sequence[tuple[RemoteFile, Path]]) -> None:
    needed = sum((file.size or 0) - _size(_part(path)) for file, path in missing)
    there = next(place for place in (folder, *folder.resolve().parents) if place.exists())
    free = shutil.disk_usage(there).free
    if needed > free:
        raise OutputError(f"{len(missing)} files take {needed / 1e9:.2f} GB; {there} has {free / 1e9:.2f} GB free; choose another folder or free some space")


def _part(path: Path) -> Path:
    return path.with_name(path.name + ".part")


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
