"""Files of texts and what they become, written so that a test can be read."""

import json
from collections.abc import Mapping
from pathlib import Path

from megatron_lite.data.documents import TextFile
from megatron_lite.data.indexed import MASKED, IndexedDataset
from megatron_lite.data.preprocess import Recipe, Written, preprocess
from megatron_lite.data.tokenizer import CharLevelTokenizer

BYTES = CharLevelTokenizer()  # the bytes of UTF-8; 0 between documents


def place(path: Path, content: str | bytes) -> Path:
    """Writes a file."""
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def lines(*records: Mapping[str, object]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def made(*paths: Path, keys: tuple[str, ...] = (), append_eod: bool = False) -> list[Written]:
    return preprocess([TextFile(path) for path in paths], paths[0].parent / "mine", Recipe(BYTES, keys, append_eod))


MARKS = {MASKED: ".", 0: "|"}


def texts(prefix: Path | None) -> list[str]:
    """The sequences of a data set: the end of a document is a stroke, a masked label a dot."""
    assert prefix is not None
    dataset = IndexedDataset(prefix)
    return ["".join(MARKS.get(token) or chr(token) for token in dataset.read(number).tolist()) for number in range(len(dataset))]
