"""Files of one JSON object per line: read with the numbers of their lines, written in whole lines."""

import errno
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from megatron_lite.errors import DataError, OutputError

CHUNK = 1 << 20  # bytes


def read_records(path: Path) -> Iterator[tuple[int, dict[str, object]]]:
    """Line number and object of every line of a file; blank lines are passed over."""
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield number, _record(line, f"{path} line {number}")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}; check the path and its permissions") from error


def _record(line: bytes, where: str) -> dict[str, object]:
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(f"{where} is not UTF-8 (byte {error.start + 1} of the line); save the file as UTF-8") from error
    except json.JSONDecodeError as error:
        raise DataError(f"{where} is not JSON: {error.msg} at column {error.colno}; every line must hold one whole JSON object") from error
    if not isinstance(record, dict):
        raise DataError(f'{where} holds {_kind(record)}; every line must hold one JSON object such as {{"text": "..."}}')
    return record


def _kind(value: object) -> str:
    return {list: "a list", str: "a string", bool: "a truth value", int: "a number", float: "a number"}.get(type(value), "null")


def check_writable(path: Path, *, source: Path | None = None) -> None:
    """Raises OutputError if RecordWriter(path) would fail, or would destroy the `source` of the run; changes nothing on the disk."""
    folder = path.parent
    if not folder.is_dir():
        raise OutputError(f"the output {path} cannot be written: there is no folder {folder}; create it or choose another output")
    if path.is_dir():
        raise OutputError(f"the output {path} cannot be written: it is a folder; name a file in it")
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise OutputError(f"the output {path} cannot be written: {'it' if path.exists() else f'the folder {folder}'} is read-only; choose another output")
    if source is not None and path.exists() and source.exists() and path.samefile(source):
        raise OutputError(f"the output {path} is also the input, which would be overwritten; choose another output")


def trim_cut_line(path: Path) -> None:
    """Cuts off the piece of a line that a killed RecordWriter may have left: SIGKILL can end even a single write half way."""
    if not path.is_file():
        return
    with path.open("rb+") as file:
        end = whole = file.seek(0, os.SEEK_END)
        newline = -1
        while whole and newline < 0:
            start = max(0, whole - CHUNK)
            file.seek(start)
            newline = file.read(whole - start).rfind(b"\n")
            whole = start + newline + 1  # no newline: look at what lies before start
        if whole < end:
            file.truncate(whole)


class RecordWriter:
    """Replaces a file by records. Each is one whole line, handed to the system in one piece as soon as it is written."""

    def __init__(self, path: Path) -> None:
        check_writable(path)
        self.path = path
        self.count = 0
        self._bytes = 0
        try:
            self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        except OSError as error:
            raise OutputError(f"the output {path} cannot be written: {error.strerror}; choose another output") from error

    def write(self, record: Mapping[str, object]) -> None:
        line = json.dumps(record, ensure_ascii=False).encode("utf-8") + b"\n"
        try:
            written = 0
            while written < len(line):  # a full disk takes part of a line before it refuses
                written += os.write(self._file, line[written:])
        except OSError as error:
            with suppress(OSError):  # pipes and devices cannot be cut
                os.ftruncate(self._file, self._bytes)
            raise self._failure(error) from error
        self._bytes += len(line)
        self.count += 1

    def _failure(self, error: OSError) -> OutputError:
        remedy = "free some space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "check the disk"
        return OutputError(f"{self.path}: {error.strerror}; {self.count} records are safe in it; {remedy} or choose another output")

    def __enter__(self) -> "RecordWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        os.close(self._file)
