"""A tar.zstd on the web, unpacked while it arrives: only plain files, only inside the folder, each under its name when it is whole."""

import io
import shutil
import tarfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import BinaryIO, cast

from megatron_lite.data import transfer
from megatron_lite.data.download import Progress, RemoteFile, fetch, part_of, refuse_another, safe_path, size_on_disk
from megatron_lite.data.transfer import CHUNK, TRIES, BrokenError, NothingMissingError, RefusedError, chunks, opened
from megatron_lite.errors import DataError, OutputError

LARGEST_WINDOW = 1 << 31  # of zstd --long, in bytes


@dataclass(frozen=True)
class Archive:
    """A tar.zstd whose files are part of a release: `pattern` finds all `count` of them, which take `unpacked` bytes."""

    file: RemoteFile
    pattern: str
    count: int
    unpacked: int

    def is_unpacked(self, folder: Path) -> bool:
        return len(list(folder.glob(self.pattern))) == self.count

    def is_kept(self, folder: Path) -> bool:
        """Whether it lies in the folder itself, or some of it."""
        path = folder / self.file.name
        return path.exists() or part_of(path).exists()


def unpack(archive: Archive, folder: Path, progress: Progress = lambda count: None, *, keep: bool = False) -> None:
    """Writes the archive's files into the folder. It is not stored itself, unless it is to be kept or lies there already."""
    zstandard = zstandard_package()
    if keep or archive.is_kept(folder):
        source: BinaryIO = fetch(archive.file, folder, progress).open("rb")
    else:
        source = cast(BinaryIO, io.BufferedReader(_Arriving(_arriving(archive.file, progress)), CHUNK))
    try:
        plain = zstandard.ZstdDecompressor(max_window_size=LARGEST_WINDOW).stream_reader(source, read_across_frames=True)
        with source, tarfile.open(fileobj=cast(BinaryIO, plain), mode="r|", bufsize=CHUNK) as members:
            _write_all(members, archive, folder)
    except (tarfile.TarError, zstandard.ZstdError) as error:
        raise DataError(f"{archive.file.name} is no whole tar.zstd ({error}); try again, or take another place with --base-url") from None
    except OSError as error:
        raise OutputError(f"{folder} cannot be written: {error.strerror or error}; choose another folder or free some space") from None
    if not archive.is_unpacked(folder):
        found = len(list(folder.glob(archive.pattern)))
        raise DataError(f"{archive.file.name} has filled {folder} with {found} files {archive.pattern}, not {archive.count}; is it the right archive?")


def zstandard_package() -> ModuleType:
    try:
        import zstandard
    except ImportError:
        raise DataError("GPT-J's release is a tar.zstd, and zstandard is not installed; run: pip install zstandard, or take hub:EleutherAI/gpt-j-6b") from None
    return zstandard


def _write_all(members: tarfile.TarFile, archive: Archive, folder: Path) -> None:
    room = archive.unpacked + archive.unpacked // 8
    for member in members:
        if member.isdir():
            continue
        if not member.isreg():
            raise DataError(f"{archive.file.name} holds {member.name!r}, which is a link or a device and no plain file; it was not written")
        path = safe_path(folder, member.name)
        room -= member.size
        if room < 0:
            raise DataError(f"{archive.file.name} holds more than the {archive.unpacked:,} bytes that were expected; {member.name} was not written")
        if not path.exists():
            _write(members, member, path)
        elif path.stat().st_size != member.size:
            raise DataError(f"{path} is there, but has {path.stat().st_size:,} bytes, not {member.size:,}; move it away to fetch the right one")


def _write(members: tarfile.TarFile, member: tarfile.TarInfo, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = members.extractfile(member)
    assert content is not None  # of a plain file there is
    with content, part_of(path).open("wb") as output:
        shutil.copyfileobj(content, output, CHUNK)
    if size_on_disk(part_of(path)) != member.size:
        raise DataError(f"the archive ends within {member.name}; try again")
    part_of(path).replace(path)


class _Arriving(io.RawIOBase):
    """Pieces that arrive, as a file to read."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self.pieces, self.rest = pieces, memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        if not self.rest:
            self.rest = memoryview(next(self.pieces, b""))
        count = min(len(buffer), len(self.rest))
        buffer[:count], self.rest = self.rest[:count], self.rest[count:]
        return count


def _arriving(file: RemoteFile, progress: Progress) -> Iterator[bytes]:
    """The file's bytes from the first place that has it, taken up again where the line breaks."""
    reasons: list[str] = []
    for url in file.urls:
        count = failures = 0
        while failures < TRIES:
            try:
                for piece in _after(url, file, count):
                    count, failures = count + len(piece), 0
                    progress(len(piece))
                    yield piece
                return
            except NothingMissingError:
                return
            except (BrokenError, RefusedError) as error:
                failures = TRIES if isinstance(error, RefusedError) else failures + 1
                if failures == TRIES:
                    reasons.append(f"{url}: {error}")
                else:
                    time.sleep(transfer.PAUSE * 2 ** (failures - 1))
        if count:
            break  # what another place would send need not go on where this one broke off
    raise DataError(f"{file.name} cannot be fetched ({'; '.join(reasons)}); try again later: the files that are written stay")


def _after(url: str, file: RemoteFile, start: int) -> Iterator[bytes]:
    """What comes after the first bytes; a server that cannot resume sends those too, and they are passed over."""
    with opened(url, start=start) as answer:
        refuse_another(answer, file, start)
        passed = start if answer.status == 206 else 0
        for chunk in chunks(answer):
            fresh = chunk[max(0, start - passed) :]
            passed += len(chunk)
            if fresh:
                yield fresh
