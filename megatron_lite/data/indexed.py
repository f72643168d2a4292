"""Data sets of token sequences on disk, in NeoX's formats: a .bin of tokens back to back and an .idx that says where each sequence lies."""

import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_lite.errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")  # magic, version, number format, sequences, length of the document index
LEGACY_MAGIC = b"TNTIDX\x00\x00"  # data_impl "cached" and "lazy" of older releases
LEGACY_HEADER = struct.Struct("<8sQQQQQQ")  # magic, version, number format, its bytes, sequences, sizes, length of the document index
VERSION = 1
CODES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}  # 6 and 7 are floating point: no tokens

MASKED = -100
"""In a data set of labels: no loss on this token."""


@dataclass(frozen=True)
class _Index:
    """What an .idx says. `pointers` count bytes of the .bin in one format and tokens in the other: `unit` of them are a token."""

    dtype: np.dtype
    sizes: NDArray[np.integer]
    pointers: NDArray[np.int64]
    documents: NDArray[np.int64]
    unit: int


class IndexedDataset:
    """The sequences of PREFIX.bin and PREFIX.idx, mapped: only the tokens that are asked for are ever in memory."""

    def __init__(self, prefix: Path) -> None:
        self.prefix = _without_suffix(prefix)
        index_file, data_file = files_of(self.prefix)
        for file in (index_file, data_file):
            if not file.is_file():
                raise DataError(f"{file} does not exist; a data set is a pair PREFIX.bin and PREFIX.idx, made by tools/preprocess_data.py")
        index = _read_index(index_file)
        self._pointers, self._unit = index.pointers, index.unit
        self.sizes, self.dtype, self.documents = index.sizes, index.dtype, index.documents
        self._check_data(index_file, data_file)
        self.tokens = np.memmap(data_file, dtype=self.dtype, mode="r")

    def _check_data(self, index_file: Path, data_file: Path) -> None:
        if not len(self):
            raise DataError(f"{index_file} holds no document; look at what it was made from and make it again")
        needed = self._begin(len(self) - 1) + int(self.sizes[-1])
        found = data_file.stat().st_size
        if found != needed * self.dtype.itemsize:
            raise DataError(
                f"{data_file} has {found:,} bytes, but {index_file.name} needs {needed * self.dtype.itemsize:,} "
                f"({len(self):,} sequences, {needed:,} tokens of {self.dtype.itemsize} bytes); one of the two is cut short or belongs to another data set"
            )
        if not needed:
            raise DataError(f"{data_file} holds no token; look at what it was made from and make it again")

    def __len__(self) -> int:
        return len(self.sizes)

    def _begin(self, number: int) -> int:
        return int(self._pointers[number]) // self._unit

    def read(self, number: int, start: int = 0, stop: int | None = None) -> NDArray[np.integer]:
        """Tokens start..stop of a sequence, a view of the file."""
        begin, size = self._begin(number), int(self.sizes[number])
        return self.tokens[begin + start : begin + (size if stop is None else min(stop, size))]


@dataclass(frozen=True)
class Corpus:
    """A data set, and its labels where they are not simply its tokens."""

    tokens: IndexedDataset
    labels: IndexedDataset | None = None

    def __post_init__(self) -> None:
        if self.labels is None:
            return
        ours, theirs = self.tokens.sizes, self.labels.sizes
        if len(ours) != len(theirs):
            raise DataError(f"{self.labels.prefix} labels {len(theirs):,} sequences, but {self.tokens.prefix} has {len(ours):,}; they do not belong together")
        different = np.flatnonzero(ours != theirs)
        if len(different):
            number = int(different[0])
            raise DataError(
                f"{self.labels.prefix} has {theirs[number]:,} labels for sequence {number} of {self.tokens.prefix}, which has {ours[number]:,} tokens; "
                "they do not belong together"
            )


def files_of(prefix: Path) -> tuple[Path, Path]:
    """The .idx and the .bin of a data set."""
    return prefix.with_name(prefix.name + ".idx"), prefix.with_name(prefix.name + ".bin")


def _without_suffix(prefix: Path) -> Path:
    return prefix.with_suffix("") if prefix.suffix in (".bin", ".idx") else prefix


def _read_index(path: Path) -> _Index:
    with path.open("rb") as file:
        start = file.read(LEGACY_HEADER.size)
    if start.startswith(MAGIC) and len(start) >= HEADER.size:
        return _read_mapped(path, HEADER.unpack_from(start))
    if start.startswith(LEGACY_MAGIC) and len(start) == LEGACY_HEADER.size:
        return _read_legacy(path, LEGACY_HEADER.unpack(start))
    raise DataError(f"{path} is no index of a data set: it begins with {start[:9]!r}; GPT-NeoX's begin with {MAGIC!r} or {LEGACY_MAGIC!r}")


def _read_mapped(path: Path, header: tuple[bytes, int, int, int, int]) -> _Index:
    _, version, code, count, documents = header
    dtype = _token_dtype(path, version, code)
    sizes, pointers, ends = _arrays(path, HEADER.size, [("<i4", count), ("<i8", count), ("<i8", documents)])
    return _Index(dtype, sizes, pointers, ends, unit=dtype.itemsize)


def _read_legacy(path: Path, header: tuple[bytes, int, int, int, int, int, int]) -> _Index:
    _, version, code, _, count, dims, documents = header
    dtype = _token_dtype(path, version, code)
    if dims != count:
        raise DataError(f"{path} describes {count:,} arrays with {dims:,} dimensions; sequences of tokens have one each")
    _, pointers, sizes, ends = _arrays(path, LEGACY_HEADER.size, [("<i8", count + 1), ("<i8", count + 1), ("<i8", dims), ("<i8", documents)])
    return _Index(dtype, sizes, pointers[:-1], ends, unit=1)


def _token_dtype(path: Path, version: int, code: int) -> np.dtype:
    if version != VERSION:
        raise DataError(f"{path} has version {version} of its format; only version {VERSION} is known")
    if code not in CODES:
        raise DataError(f"{path} holds numbers of the format {code}, which are no tokens; the formats of tokens are {', '.join(map(str, CODES))}")
    return np.dtype(CODES[code])


def _arrays(path: Path, offset: int, parts: list[tuple[str, int]]) -> list[np.ndarray]:
    """The arrays that fill a file from `offset` to its end, mapped; they need not be aligned."""
    needed = offset + sum(np.dtype(dtype).itemsize * count for dtype, count in parts)
    found = path.stat().st_size
    if found != needed:
        raise DataError(f"{path} has {found:,} bytes, but its header announces {needed:,}; it is cut short or damaged: copy or make it again")
    content = np.memmap(path, mode="r")
    arrays = []
    for dtype, count in parts:
        arrays.append(np.frombuffer(content, dtype, count, offset))
        offset += arrays[-1].nbytes
    return arrays
