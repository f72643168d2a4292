"""Writes NeoX's .bin and .idx: under temporary names, and renamed when they are whole, so that a name always stands for a complete data set."""

import os
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from megatron_lite.data.indexed import CODES, HEADER, MAGIC, MASKED, VERSION, files_of
from megatron_lite.errors import DataError, OutputError

LONGEST = 2**31 - 1  # tokens of a sequence: the index counts them in 32 bits
SMALL_VOCABULARY = 65500  # NeoX's own bound for 16 bits a token


class IndexWriter:
    """Collects sequences of tokens, each of them from `least` up to, and without, `vocab_size`."""

    def __init__(self, prefix: Path, *, dtype: str, vocab_size: int, least: int = 0) -> None:
        self.prefix = prefix
        self.token_count = 0
        self._dtype, self._vocab_size, self._least = np.dtype(dtype), vocab_size, least
        self._sizes = array("i")
        self._documents = array("q", [0])
        self._index_file, self._data_file = files_of(prefix)
        self._drafts = [file.with_name(f".{file.name}.{os.getpid()}.tmp") for file in (self._index_file, self._data_file)]
        with self._reported():
            prefix.parent.mkdir(parents=True, exist_ok=True)
            self._file: BinaryIO = self._drafts[1].open("wb")

    @property
    def document_count(self) -> int:
        return len(self._documents) - 1

    def add_sequence(self, tokens: Sequence[int] | NDArray[np.integer]) -> None:
        numbers = np.asarray(tokens, dtype=np.int64)
        where = f"document {self.document_count + 1:,} of {self.prefix}"
        if len(numbers) > LONGEST:
            raise DataError(f"{where} has {len(numbers):,} tokens; an index can count {LONGEST:,}: split the document")
        if len(numbers) and not self._least <= numbers.min() <= numbers.max() < self._vocab_size:
            wrong = numbers.max() if numbers.max() >= self._vocab_size else numbers.min()
            raise DataError(f"{where} has the token id {wrong}, but the vocabulary ends at {self._vocab_size - 1}; the tokenizer does not fit its own size")
        with self._reported():
            self._file.write(numbers.astype(self._dtype).data)
        self._sizes.append(len(numbers))
        self.token_count += len(numbers)

    def end_document(self) -> None:
        """What was added since the last call is a document; if it is nothing, it is none."""
        if self._documents[-1] < len(self._sizes):
            self._documents.append(len(self._sizes))

    def finish(self) -> None:
        """Gives the files their names. The index goes first and comes last: there is never one beside another's tokens."""
        with self._reported():
            self._write_index()
            _flush(self._file)
            self._file.close()
            self._index_file.unlink(missing_ok=True)
            self._drafts[1].replace(self._data_file)
            self._drafts[0].replace(self._index_file)

    def _write_index(self) -> None:
        sizes = np.array(self._sizes, dtype="<i4")
        size = self._dtype.itemsize
        pointers = np.cumsum(sizes, dtype="<i8") * size - sizes * np.int64(size)
        code = next(code for code, name in CODES.items() if np.dtype(name) == self._dtype)
        with self._drafts[0].open("wb") as file:
            file.write(HEADER.pack(MAGIC, VERSION, code, len(sizes), len(self._documents)))
            for part in (sizes, pointers, np.array(self._documents, dtype="<i8")):
                file.write(part.data)
            _flush(file)

    @contextmanager
    def _reported(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OutputError(
                f"the data set {self.prefix} cannot be written: {error.strerror}; nothing of it was kept: free some space or choose another place"
            ) from error

    def discard(self) -> None:
        """Leaves nothing behind but what has been finished."""
        with suppress(OSError):  # a full disk refuses what is still to be flushed; the drafts go anyway
            self._file.close()
        for draft in self._drafts:
            draft.unlink(missing_ok=True)

    def __enter__(self) -> "IndexWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.discard()


def _flush(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def token_writer(prefix: Path, *, vocab_size: int) -> IndexWriter:
    """Writes tokens, in 16 bits where the vocabulary allows."""
    return IndexWriter(prefix, dtype="<u2" if vocab_size < SMALL_VOCABULARY else "<i4", vocab_size=vocab_size)


def label_writer(prefix: Path, *, vocab_size: int) -> IndexWriter:
    """Writes labels: the token where there is loss, MASKED where there is none."""
    return IndexWriter(prefix, dtype="<i4", vocab_size=vocab_size, least=MASKED)
