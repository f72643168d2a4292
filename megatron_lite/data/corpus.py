"""Data sets by the paths that people give: prefixes of .bin and .idx, or files of text, which are tokenized once and found ever after."""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_lite.data.documents import TextFile, kind_of
from megatron_lite.data.indexed import Corpus, IndexedDataset, files_of
from megatron_lite.data.once import one_at_a_time
from megatron_lite.data.preprocess import Entry, Recipe, data_set_of, entries_of, preprocess
from megatron_lite.data.tokenizer import Tokenizer, beginning_of
from megatron_lite.errors import DataError
from megatron_lite.log import logger

PROBE = 1 << 16
"""Characters at the beginning of a file by whose tokens a tokenizer is recognized."""


def open_corpus(path: Path, tokenizer: Tokenizer, *, labels: Path | None = None) -> Corpus:
    """The data set of a prefix, with the labels of another; or of a file of texts, with the labels that its records ask for."""
    if not _is_text(path):
        if not labels:
            _mention_labels(path)
        return Corpus(IndexedDataset(path), IndexedDataset(labels) if labels else None)
    if labels:
        raise DataError(f"{path} is a file of texts, so it has no labels in {labels}; its own records say what is learned: leave out the label path")
    return document_source(path, tokenizer)


def _mention_labels(prefix: Path) -> None:
    beside = prefix.with_name(prefix.name.removesuffix("_document") + "_label_document")
    if files_of(beside)[0].is_file():
        logger.warning(f"{prefix} is trained on as a whole, though labels lie beside it: for them, use train_data_paths and train_label_data_paths {beside}")


def _is_text(path: Path) -> bool:
    return kind_of(path) is not None and not files_of(path)[0].is_file()


def document_source(path: Path, tokenizer: Tokenizer) -> Corpus:
    """The tokens of a file of texts. They are kept beside it, or in the user's cache where that folder cannot be written."""
    file, recipe = TextFile(path), Recipe(tokenizer)
    probe = _first_entries(file, recipe)
    folders = [path.parent, Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "deepy"]
    copies = [_Copy(folder / f"{path.name}-{_fingerprint(path, probe, tokenizer)}", probe[0]) for folder in folders]
    for copy in copies:
        if copy.is_whole():
            return copy.open()
    copy = copies[0] if os.access(path.parent, os.W_OK) else copies[1]
    copy.base.parent.mkdir(parents=True, exist_ok=True)
    with one_at_a_time(copy.base.parent):
        if not copy.is_whole():
            logger.info(f"{path} is tokenized once; its tokens are kept in {copy.base.parent}")
            preprocess([file], copy.base, recipe)
    return copy.open()


@dataclass(frozen=True)
class _Copy:
    """Where the tokens of a file may be, and whether there are labels to them."""

    base: Path
    first: Entry

    @property
    def prefixes(self) -> list[Path]:
        key = self.first.form.key
        return [data_set_of(self.base, name) for name in ([key, f"{key}_label"] if self.first.form.masks else [key])]

    def is_whole(self) -> bool:
        return all(part.is_file() for prefix in self.prefixes for part in files_of(prefix))

    def open(self) -> Corpus:
        return Corpus(*(IndexedDataset(prefix) for prefix in self.prefixes))


def _first_entries(file: TextFile, recipe: Recipe) -> list[Entry]:
    entries, letters = [], 0
    for entry in entries_of(file, recipe):
        entries.append(entry)
        letters += sum(len(segment.text) for segment in entry.segments)
        if letters >= PROBE:
            break
    if not letters:
        raise DataError(f"{file.path} holds no text in {file.bytes:,} bytes")
    return entries


def _fingerprint(path: Path, probe: Sequence[Entry], tokenizer: Tokenizer) -> str:
    """Changes with the file, the tokenizer, and the way records are read."""
    state = path.stat()
    tokens = tokenizer.encode_batch([segment.text for entry in probe for segment in entry.segments], add_special_tokens=False)
    tokens[0] = beginning_of(tokenizer) + tokens[0]
    return hashlib.sha256(repr((state.st_size, state.st_mtime_ns, tokenizer.vocab_size, tokenizer.eod, tokens)).encode()).hexdigest()[:12]
