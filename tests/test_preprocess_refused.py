"""What cannot become a data set is refused in a sentence with the file, the line and the numbers, and leaves nothing behind."""

import gzip
from collections.abc import Sequence
from pathlib import Path

import pytest

from megatron_lite.data.documents import TextFile
from megatron_lite.data.preprocess import Recipe, preprocess
from megatron_lite.errors import DataError
from tests.texts import lines, made, place


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.jsonl", "", 'a.jsonl: no document with a token under "text" in 0 bytes; nothing was written'),
        ("a.txt", "", 'a.txt: no document with a token under "text" in 0 bytes'),
        ("a.jsonl", lines({"text": ""}, {"text": ""}), 'a.jsonl: no document with a token under "text" in 26 bytes'),
        ("a.jsonl", lines({"text": "one"}, {"txt": "two"}), 'a.jsonl line 2 has no "text" that is a text; it has txt'),
        ("a.jsonl", lines({"text": 5}), 'a.jsonl line 1 has no "text" that is a text; it has text'),
        ("a.jsonl", lines({"content": "one"}), 'a.jsonl line 1 has none of the keys "text", "messages", or "prompt" and "completion"; it has content'),
        ("a.jsonl", lines({"prompt": "one", "completion": "two"}, {"prompt": "one"}), 'a.jsonl line 2 has no "completion" that is a text; it has prompt'),
        ("a.jsonl", lines({"messages": []}), 'a.jsonl line 1 has no list of messages under "messages"; each must be {"role": "...", "content": "..."}'),
        ("a.jsonl", lines({"messages": [{"role": "user"}]}), "a.jsonl line 1 has no list of messages"),
        ("a.jsonl", '{"text": "one"\n', "a.jsonl line 1 is no JSON: Expecting ',' delimiter"),
        ("a.jsonl", '"one"\n', 'a.jsonl line 1 holds no object; every line must hold one JSON object such as {"text": "..."}'),
        ("a.jsonl", b'{"text": "\xe9"}\n', "a.jsonl line 1 is no JSON: 'utf-8' codec can't decode byte 0xe9"),
        ("a.jsonl", '{"text": "\\ud83d"}\n', 'a.jsonl line 1: "text" holds half of a surrogate pair at character 1, which is no text'),
        ("a.txt", b"one\xe9", "a.txt is not UTF-8 (after byte 0 of the file); save it as UTF-8"),
        ("a.jsonl.gz", b"not compressed", "a.jsonl.gz cannot be read (Not a gzipped file"),
        ("a.txt.gz", gzip.compress(b"x" * 100, mtime=0)[:-9], "a.txt.gz cannot be read (Compressed file ended before"),
        ("a.csv", "one", "a.csv is of an unknown kind; texts are read from JSON lines (.jsonl, .json, .ndjson) and plain text (.txt, .text, .md), compressed"),
    ],
)
def test_what_cannot_be_used_gets_a_sentence_and_leaves_nothing(tmp_path: Path, name: str, content: str | bytes, sentence: str) -> None:
    path = place(tmp_path / name, content)
    with pytest.raises(DataError) as error:
        made(path)
    assert sentence in str(error.value)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [(("text", "title"), 'line 1 has no "title" that is a text; it has text'), (("body",), 'line 1 has no "body" that is a text; it has text')],
)
def test_keys_that_are_asked_for_must_be_there(tmp_path: Path, keys: tuple[str, ...], sentence: str) -> None:
    with pytest.raises(DataError) as error:
        made(place(tmp_path / "a.jsonl", lines({"text": "one"})), keys=keys)
    assert sentence in str(error.value)


def test_a_key_cannot_be_a_text_here_and_a_conversation_there(tmp_path: Path) -> None:
    first = place(tmp_path / "a.jsonl", lines({"messages": "one"}))
    second = place(tmp_path / "b.jsonl", lines({"messages": [{"role": "user", "content": "two"}]}))
    with pytest.raises(DataError, match=r'"messages" is a text in one file and a conversation in another; prepare them one by one'):
        made(first, second)


def test_a_missing_file_is_named_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a.jsonl does not exist; name a file of texts"):
        made(tmp_path / "a.jsonl")


class Ninety:
    """A tokenizer whose ids go beyond its own size."""

    vocab_size = 50
    eod = 0

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return [90] * len(text)

    def decode(self, tokens: Sequence[int]) -> str:
        return "?" * len(tokens)

    def encode_batch(self, texts: Sequence[str], *, add_special_tokens: bool = True) -> list[list[int]]:
        return [self.encode(text) for text in texts]


def test_ids_beyond_the_vocabulary_are_refused(tmp_path: Path) -> None:
    path = place(tmp_path / "a.jsonl", lines({"text": "one"}))
    with pytest.raises(DataError, match=r"document 1 of .*mine_text_document has the token id 90, but the vocabulary ends at 49"):
        preprocess([TextFile(path)], tmp_path / "mine", Recipe(Ninety()))
    assert list(tmp_path.iterdir()) == [path]
