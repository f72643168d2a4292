"""Texts become a data set of tokens, and one of labels beside it where not everything is learned."""

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from megatron_lite.data.documents import Record, TextFile
from megatron_lite.data.forms import Form, Segment, Template, Text, form_of, key_of, plainly
from megatron_lite.data.index_writer import label_writer, token_writer
from megatron_lite.data.indexed import MASKED
from megatron_lite.data.tokenizer import Tokenizer, beginning_of
from megatron_lite.errors import DataError
from megatron_lite.log import logger
from megatron_lite.progress import progress

TOGETHER = 2_000_000
"""Characters that are encoded in one call, on all cores."""


@dataclass(frozen=True)
class Recipe:
    """How texts become tokens. Without keys, the first record of every file decides what is read."""

    tokenizer: Tokenizer
    keys: tuple[str, ...] = ()
    append_eod: bool = True
    template: Template = plainly


@dataclass(frozen=True)
class Entry:
    """What becomes one sequence, and whether its document ends with it."""

    form: Form
    segments: tuple[Segment, ...]
    ends: bool = True


@dataclass(frozen=True)
class Written:
    """A finished data set; `labels` lie beside it if not everything is learned. Texts that were empty are left out."""

    prefix: Path
    labels: Path | None
    documents: int
    tokens: int
    learned: int
    empty: int


def preprocess(files: Sequence[TextFile], prefix: Path, recipe: Recipe) -> list[Written]:
    """Writes PREFIX_KEY_document for every key, once all texts have been read. Raises DataError where there is nothing to write."""
    started = time.monotonic()
    total = sum(file.bytes for file in files)
    outputs: dict[str, _Output] = {}
    with ExitStack() as stack:
        advance = None
        for entries in _batches(chain.from_iterable(entries_of(file, recipe) for file in files)):
            for entry in entries:
                if entry.form.key not in outputs:
                    outputs[entry.form.key] = stack.enter_context(_Output(prefix, entry.form, recipe))
            count = _encode(entries, outputs, recipe.tokenizer)
            if advance is None:  # the first texts tell how many tokens there will be, more or less
                expected = count * total / max(1, sum(file.position for file in files))
                advance = stack.enter_context(progress("tokenizing", round(expected), unit="tokens"))
            advance(count)
        _check(files, outputs, recipe.keys)
        written = [output.finish() for output in outputs.values()]
    for dataset in written:
        rate = dataset.tokens / max(time.monotonic() - started, 1e-3)
        learned = f", {dataset.learned:,} of them learned" if dataset.labels else ""
        logger.info(f"{dataset.prefix}: {dataset.documents:,} documents, {dataset.tokens:,} tokens{learned}, {rate:,.0f} tokens/s")
        if dataset.empty:
            logger.info(f"{dataset.prefix}: {dataset.empty:,} empty texts left out")
    return written


def _check(files: Sequence[TextFile], outputs: "dict[str, _Output]", keys: Sequence[str]) -> None:
    missing = [key for key in keys or outputs or ("text",) if key not in outputs or not outputs[key].tokens]
    if missing:
        names = ", ".join(str(file.path) for file in files)
        raise DataError(f'{names}: no document with a token under "{missing[0]}" in {sum(file.bytes for file in files):,} bytes; nothing was written')
    for output in outputs.values():
        output.check(files)


def entries_of(file: TextFile, recipe: Recipe) -> Iterator[Entry]:
    """What a file will be in the data set."""
    if file.is_plain:
        form = Text("text")
        return (Entry(form, (Segment(piece.text),), piece.ends) for piece in file.pieces())
    return _recorded(file.records(), recipe)


def _recorded(records: Iterator[Record], recipe: Recipe) -> Iterator[Entry]:
    forms: list[Form] = []
    for record in records:
        if not forms:
            forms = [form_of(record, key, recipe.template) for key in recipe.keys or (key_of(record),)]
        yield from (Entry(form, tuple(form.segments(record))) for form in forms)


def _batches(entries: Iterator[Entry]) -> Iterator[list[Entry]]:
    batch, letters = [], 0
    for entry in entries:
        batch.append(entry)
        letters += sum(len(segment.text) for segment in entry.segments)
        if letters >= TOGETHER or len(batch) >= TOGETHER // 100:
            yield batch
            batch, letters = [], 0
    if batch:
        yield batch


def _encode(entries: Sequence[Entry], outputs: "dict[str, _Output]", tokenizer: Tokenizer) -> int:
    """Tokens written."""
    encoded = iter(tokenizer.encode_batch([segment.text for entry in entries for segment in entry.segments], add_special_tokens=False))
    return sum(outputs[entry.form.key].add(entry, [next(encoded) for _ in entry.segments]) for entry in entries)


class _Output:
    """The data set of one key while it is written."""

    def __init__(self, prefix: Path, form: Form, recipe: Recipe) -> None:
        self._form, self._recipe = form, recipe
        size = recipe.tokenizer.vocab_size
        self._tokens = token_writer(data_set_of(prefix, form.key), vocab_size=size)
        self._labels = label_writer(data_set_of(prefix, f"{form.key}_label"), vocab_size=size) if form.masks else None
        self._learned = self._empty = 0
        self._teaches = False
        self._beginning, self._begins = beginning_of(recipe.tokenizer), True

    @property
    def tokens(self) -> int:
        return self._tokens.token_count

    def add(self, entry: Entry, encoded: list[list[int]]) -> int:
        if entry.form.masks != self._form.masks:
            raise DataError(f'"{self._form.key}" is a text in one file and a conversation in another; prepare them one by one')
        tokens, labels = self._learning(entry, encoded)
        self._learned += len(labels) - labels.count(MASKED)
        self._teaches = self._teaches or any(learned and text.strip() for text, learned, _ in entry.segments)
        for writer, numbers in ((self._tokens, tokens), (self._labels, labels)):
            if writer and numbers:
                writer.add_sequence(numbers)
            if writer and entry.ends:
                writer.end_document()
        self._empty += not tokens
        return len(tokens)

    def _learning(self, entry: Entry, encoded: list[list[int]]) -> tuple[list[int], list[int]]:
        """The tokens of an entry and its labels. A document begins once as the tokenizer's texts do, and one that shall end with eod does so once."""
        eod, tokens, labels, learned = self._recipe.tokenizer.eod, [], [], True
        for (_, learned, ends), part in zip(entry.segments, encoded, strict=True):
            whole = [*part, eod] if ends else part
            tokens += whole
            labels += whole if learned else [MASKED] * len(whole)
        if tokens and self._begins and tokens[: len(self._beginning)] != self._beginning:
            tokens = self._beginning + tokens
            labels = (self._beginning if entry.segments[0].learned else [MASKED] * len(self._beginning)) + labels
        self._begins = entry.ends or (self._begins and not tokens)
        if tokens and entry.ends and self._recipe.append_eod and tokens[-1] != eod:
            tokens.append(eod)
            labels.append(eod if learned else MASKED)
        return tokens, labels

    def check(self, files: Sequence[TextFile]) -> None:
        """Raises DataError where nothing is learned but, at most, that texts end."""
        if self._labels and not self._teaches:
            names = ", ".join(str(file.path) for file in files)
            raise DataError(f"{names}: there is nothing to learn in {self.tokens:,} tokens, because {self._form.lacks}; nothing was written")

    def finish(self) -> Written:
        for writer in filter(None, (self._tokens, self._labels)):
            writer.finish()
        labels = self._labels.prefix if self._labels else None
        return Written(self._tokens.prefix, labels, self._tokens.document_count, self.tokens, self._learned, self._empty)

    def __enter__(self) -> "_Output":
        return self

    def __exit__(self, *failure: object) -> None:
        for writer in filter(None, (self._tokens, self._labels)):
            writer.discard()


def data_set_of(prefix: Path, key: str) -> Path:
    """The prefix of the data set that a key gets."""
    return prefix.with_name(f"{prefix.name}_{key}_document")
