"""Texts as people keep them: JSON lines or plain text, compressed or not, read from front to end without ever holding a whole file."""

import bz2
import gzip
import io
import json
import lzma
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, TypeVar, cast

from megatron_lite.errors import DataError

if TYPE_CHECKING:
    from zstandard import ZstdDecompressionObj

T = TypeVar("T", str, bytes)

JSON_LINES = (".jsonl", ".json", ".ndjson")
PLAIN = (".txt", ".text", ".md")
SEPARATOR = "<|endoftext|>"
"""Ends a document in a plain text file, as in TinyStories."""

PIECE = 1 << 14
"""Characters of a long text that are encoded at once, at least: it is cut where the next paragraph begins."""

# Both parts of a text that is cut before line breaks, between visible characters, get the tokens that they have in the whole.
CUTS = (re.compile(r"(?<=\S)\n\n+(?=\S)"), re.compile(r"(?<=\S)\n(?=\S)"), re.compile(r"(?<=\S) (?=\S)"))


@dataclass(frozen=True)
class Record:
    """One JSON object, and where it was found."""

    fields: dict[str, object]
    where: str


@dataclass(frozen=True)
class Piece:
    """A part of a plain text file, and whether its document ends here."""

    text: str
    ends: bool


class TextFile:
    """A file of texts, of the kind that its name says."""

    def __init__(self, path: Path) -> None:
        self.path = path
        kind = kind_of(path)
        if kind is None:
            raise DataError(
                f"{path} is of an unknown kind; texts are read from JSON lines ({', '.join(JSON_LINES)}) and plain text ({', '.join(PLAIN)}), "
                f"compressed or not ({', '.join(filter(None, OPENERS))}): name the file so"
            )
        if not path.is_file():
            raise DataError(f"{path} does not exist; name a file of texts")
        self.is_plain = kind in PLAIN
        self._decompress = OPENERS.get(path.suffix, OPENERS[""])
        self.bytes = path.stat().st_size
        self.position = 0
        """Bytes of the file, as it lies on the disk, that have been read."""

    def records(self) -> Iterator[Record]:
        """The objects of a file of JSON lines; blank lines are passed over."""
        with self.path.open("rb") as raw:
            stream = self._decompress(raw)
            number = 0
            while line := self._read(stream.readline):
                number += 1
                self.position = raw.tell()
                if line.strip():
                    where = f"{self.path} line {number}"
                    yield Record(_parsed(line, where), where)

    def pieces(self) -> Iterator[Piece]:
        """The text of a plain file. A long one comes in pieces, which become sequences of their own: they can be split and shuffled."""
        with self.path.open("rb") as raw:
            stream = io.TextIOWrapper(self._decompress(raw), encoding="utf-8-sig")
            waiting = ""
            while added := self._read(lambda: stream.read(PIECE)):
                self.position = raw.tell()
                waiting += added
                while SEPARATOR in waiting or len(waiting) >= 2 * PIECE:
                    piece, waiting = _first_piece(waiting)
                    yield piece
            yield Piece(waiting, ends=True)

    def _read(self, read: Callable[[], T]) -> T:
        try:
            return read()
        except UnicodeDecodeError as error:
            raise DataError(f"{self.path} is not UTF-8 (after byte {self.position:,} of the file); save it as UTF-8") from error
        except Exception as error:  # every compression has errors of its own
            raise DataError(f"{self.path} cannot be read ({error}); it is damaged, or not what its name says") from error


def kind_of(path: Path) -> str | None:
    """The suffix that says what is in a file, below that of its compression; None if it is none of a text."""
    kind = Path(path.stem if path.suffix in OPENERS else path.name).suffix.lower()
    return kind if kind in (*JSON_LINES, *PLAIN) else None


def cut(text: str, start: int) -> int:
    """Where a piece of a text that begins at `start` may end."""
    if len(text) - start < 2 * PIECE:
        return len(text)
    found = (pattern.search(text, start + PIECE, start + 2 * PIECE) for pattern in CUTS)
    return next((match.start() for match in found if match), start + PIECE)


def _first_piece(waiting: str) -> tuple[Piece, str]:
    if SEPARATOR in waiting:
        text, _, rest = waiting.partition(SEPARATOR)
        return Piece(text.rstrip("\n"), ends=True), rest.lstrip("\n")
    end = cut(waiting, 0)
    return Piece(waiting[:end], ends=False), waiting[end:]


def _parsed(line: bytes, where: str) -> dict[str, object]:
    try:
        fields = json.loads(line)
    except ValueError as error:  # bytes that are no UTF-8 as well
        raise DataError(f"{where} is no JSON: {error}; every line must hold one whole JSON object, in UTF-8") from error
    if not isinstance(fields, dict):
        raise DataError(f'{where} holds no object; every line must hold one JSON object such as {{"text": "..."}}')
    return fields


def _zstandard(raw: BinaryIO) -> BinaryIO:
    try:
        import zstandard
    except ImportError as error:
        raise DataError(f"{raw.name} is compressed with zstandard, which is not installed; run: pip install zstandard") from error
    return cast(BinaryIO, io.BufferedReader(_Frames(raw, zstandard.ZstdDecompressor().decompressobj)))


class _Frames(io.RawIOBase):
    """Frame after frame. Raises EOFError where the file ends within one, which zstandard's own reader takes for the end of the text."""

    def __init__(self, raw: BinaryIO, begin: "Callable[[], ZstdDecompressionObj]") -> None:
        self._raw, self._begin = raw, begin
        self._frame: ZstdDecompressionObj | None = None
        self._text = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        while not self._text and (data := self._raw.read(PIECE)):
            self._text = memoryview(b"".join(self._parts(data)))
        if not self._text and self._frame and not self._frame.eof:
            raise EOFError("it ends before the end of what was compressed")
        count = min(len(buffer), len(self._text))
        buffer[:count], self._text = self._text[:count], self._text[count:]
        return count

    def _parts(self, data: bytes) -> Iterator[bytes]:
        while data:
            if self._frame is None or self._frame.eof:
                self._frame = self._begin()
            yield self._frame.decompress(data)
            data = self._frame.unused_data if self._frame.eof else b""


OPENERS: dict[str, Callable[[BinaryIO], BinaryIO]] = {
    "": lambda raw: raw,
    ".gz": lambda raw: cast(BinaryIO, gzip.GzipFile(fileobj=raw)),
    ".bz2": lambda raw: cast(BinaryIO, bz2.BZ2File(raw)),
    ".xz": lambda raw: cast(BinaryIO, lzma.LZMAFile(raw)),  # noqa: SIM115 (it closes nothing of its own)
    ".zst": _zstandard,
}
