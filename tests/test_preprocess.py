"""Texts become data sets: every kind of file, every form of record, the tokens where they belong; what cannot be used is refused in a sentence."""

import bz2
import gzip
import json
import lzma
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest

from megatron_lite.config.sections import TokenizerSection
from megatron_lite.data import documents
from megatron_lite.data.documents import TextFile, cut
from megatron_lite.data.indexed import MASKED, IndexedDataset
from megatron_lite.data.preprocess import Recipe, Written, preprocess
from megatron_lite.data.tokenizer import CharLevelTokenizer, load_tokenizer
from megatron_lite.errors import DataError

BYTES = CharLevelTokenizer()  # the bytes of UTF-8; 0 between documents
Write = Callable[[str, str | bytes], Path]


@pytest.fixture
def file(tmp_path: Path) -> Write:
    def write(name: str, content: str | bytes) -> Path:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


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


def test_every_json_line_is_a_document(file: Write) -> None:
    (written,) = made(file("a.jsonl", lines({"text": "one"}, {"text": "two", "meta": {}}) + "\n"), append_eod=True)
    assert written == Written(file("a.jsonl", "").with_name("mine_text_document"), None, documents=2, tokens=8, learned=8, empty=0)
    assert texts(written.prefix) == ["one|", "two|"]
    assert IndexedDataset(written.prefix).documents.tolist() == [0, 1, 2]


def test_without_append_eod_documents_run_into_each_other_as_in_neox(file: Write) -> None:
    (written,) = made(file("a.jsonl", lines({"text": "one"}, {"text": "two"})))
    assert texts(written.prefix) == ["one", "two"]


def test_an_end_that_is_there_is_not_doubled(file: Write) -> None:
    (written,) = made(file("a.jsonl", lines({"text": "one\0"})), append_eod=True)
    assert texts(written.prefix) == ["one|"]


@pytest.mark.parametrize(("suffix", "compress"), [(".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress)])
def test_compressed_files_are_read(file: Write, suffix: str, compress: Callable[[bytes], bytes]) -> None:
    content = lines({"text": "one"}).encode()
    (written,) = made(file(f"a.jsonl{suffix}", compress(content) + compress(content)), file(f"b.txt{suffix}", compress(b"two")))
    assert texts(written.prefix) == ["one", "one", "two"]


def test_zstandard_is_read_in_several_frames(file: Write) -> None:
    zstandard = pytest.importorskip("zstandard", reason="zstandard is optional")
    content = zstandard.compress(lines({"text": "one"}).encode())
    assert texts(made(file("a.jsonl.zst", content + content))[0].prefix) == ["one", "one"]


def test_without_zstandard_a_sentence_says_how_to_install_it(file: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(DataError, match=r"a.jsonl.zst is compressed with zstandard, which is not installed; run: pip install zstandard"):
        made(file("a.jsonl.zst", b""))


def test_files_of_several_kinds_make_one_data_set(file: Write) -> None:
    (written,) = made(file("a.jsonl", lines({"text": "one"})), file("b.txt", "two\n"), append_eod=True)
    assert texts(written.prefix) == ["one|", "two\n|"]


def test_a_text_file_is_one_document_or_several_between_separators(file: Write) -> None:
    path = file("a.txt", "\ufeffone\r\ntwo\n<|endoftext|>\n\nthree<|endoftext|>")
    assert texts(made(path, append_eod=True)[0].prefix) == ["one\ntwo|", "three|"]


def test_a_long_text_file_is_one_document_of_several_sequences(file: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "PIECE", 10)
    text = "First line.\nSecond line.\n\nNew paragraph, with words.\nAndnospacesatallinthisone"
    (written,) = made(file("a.txt", text), append_eod=True)
    parts = texts(written.prefix)
    assert parts == ["First line.", "\nSecond line.", "\n\nNew paragraph,", " with words.", "\nAndnospac", "esatallinthisone|"]
    assert IndexedDataset(written.prefix).documents.tolist() == [0, len(parts)]


@pytest.mark.parametrize("text", ["", "x", "x" * 1000, "a b " * 300, "a\n\n\n b\n" * 200, "word\nword\n\n" * 100])
def test_pieces_are_the_whole_text(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "PIECE", 16)
    pieces, start = [], 0
    while start < len(text):
        end = cut(text, start)
        pieces.append(text[start:end])
        start = end
    assert "".join(pieces) == text
    assert all(len(piece) <= 32 for piece in pieces)


@pytest.mark.parametrize("tokenizer", ["20B_tokenizer.json", "gpt2-tokenizer.json"])
@pytest.mark.parametrize("name", ["sotu.txt", "tinyshakespeare.txt"])
def test_pieces_have_the_tokens_of_the_whole_text(shared_data: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: str, name: str) -> None:
    monkeypatch.setattr(documents, "PIECE", 500)
    loaded = load_tokenizer(TokenizerSection.model_validate({"tokenizer_type": "HFTokenizer", "vocab_file": shared_data / "tokenizers" / tokenizer}))
    text = (shared_data / "corpora" / name).read_text(encoding="utf-8")[:60_000]
    pieces, start = [], 0
    while start < len(text):
        end = cut(text, start)
        pieces.append(text[start:end])
        start = end
    assert len(pieces) > 50
    assert [token for piece in loaded.encode_batch(pieces) for token in piece] == loaded.encode(text)


def test_a_long_json_text_is_one_sequence(file: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "PIECE", 10)
    text = "one two three four five six seven eight nine ten"
    assert texts(made(file("a.jsonl", lines({"text": text})), append_eod=True)[0].prefix) == [text + "|"]


def test_each_key_gets_a_data_set_of_its_own_text(file: Write) -> None:
    path = file("a.jsonl", lines({"text": "one", "title": "A"}, {"text": "two", "title": "B"}))
    first, second = made(path, keys=("text", "title"))
    assert [first.prefix.name, second.prefix.name] == ["mine_text_document", "mine_title_document"]
    assert [texts(first.prefix), texts(second.prefix)] == [["one", "two"], ["A", "B"]]


def test_empty_texts_are_left_out_and_counted(file: Write) -> None:
    (written,) = made(file("a.jsonl", lines({"text": "one"}, {"text": ""}, {"text": "two"})), append_eod=True)
    assert (written.documents, written.empty) == (2, 1)
    assert IndexedDataset(written.prefix).documents.tolist() == [0, 1, 2]


def test_a_completion_is_learned_and_its_prompt_is_not(file: Write) -> None:
    (written,) = made(file("a.jsonl", lines({"prompt": "2+2=", "completion": "4"}, {"prompt": "", "completion": "yes"})))
    assert texts(written.prefix) == ["2+2=4|", "yes|"]
    assert written.labels == written.prefix.with_name("mine_completion_label_document")
    assert texts(written.labels) == ["....4|", "yes|"]
    assert (written.tokens, written.learned) == (10, 6)


def test_in_a_conversation_what_the_assistant_says_is_learned(file: Write) -> None:
    chat = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    again = [*chat, {"role": "user", "content": "Bye"}, {"role": "assistant", "content": "Farewell"}]
    (written,) = made(file("a.jsonl", lines({"messages": chat}, {"messages": again})), append_eod=True)
    assert texts(written.prefix)[1] == "System: Be kind.\n\nUser: Hi\n\nAssistant: Hello|User: Bye\n\nAssistant: Farewell|"
    assert texts(written.labels)[0] == "." * len("System: Be kind.\n\nUser: Hi\n\nAssistant:") + " Hello|"
    assert texts(written.labels)[1].replace(".", "") == " Hello| Farewell|"


def test_conversations_in_the_spelling_of_sharegpt(file: Write) -> None:
    chat = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
    (written,) = made(file("a.jsonl", lines({"conversations": chat})))
    assert texts(written.prefix) == ["User: Hi\n\nAssistant: Hello|"]


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
        ("a.txt.gz", gzip.compress(b"x" * 100)[:-9], "a.txt.gz cannot be read (Compressed file ended before"),
        ("a.csv", "one", "a.csv is of an unknown kind; texts are read from JSON lines (.jsonl, .json, .ndjson) and plain text (.txt, .text, .md), compressed"),
    ],
)
def test_what_cannot_be_used_gets_a_sentence_and_leaves_nothing(file: Write, tmp_path: Path, name: str, content: str | bytes, sentence: str) -> None:
    path = file(name, content)
    with pytest.raises(DataError) as error:
        made(path)
    assert sentence in str(error.value)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [(("text", "title"), 'line 1 has no "title" that is a text; it has text'), (("body",), 'line 1 has no "body" that is a text; it has text')],
)
def test_keys_that_are_asked_for_must_be_there(file: Write, keys: tuple[str, ...], sentence: str) -> None:
    with pytest.raises(DataError) as error:
        made(file("a.jsonl", lines({"text": "one"})), keys=keys)
    assert sentence in str(error.value)


def test_a_key_cannot_be_a_text_here_and_a_conversation_there(file: Write) -> None:
    first = file("a.jsonl", lines({"messages": "one"}))
    second = file("b.jsonl", lines({"messages": [{"role": "user", "content": "two"}]}))
    with pytest.raises(DataError, match=r'"messages" is a text in one file and a conversation in another; prepare them one by one'):
        made(first, second)


def test_a_missing_file_is_named_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a.jsonl does not exist; name a file of texts"):
        made(tmp_path / "a.jsonl")


class Ninety:
    """A tokenizer whose ids go beyond its own size."""

    vocab_size = 50
    eod = 0

    def encode(self, text: str) -> list[int]:
        return [90] * len(text)

    def decode(self, tokens: Sequence[int]) -> str:
        return "?" * len(tokens)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]


def test_ids_beyond_the_vocabulary_are_refused(file: Write, tmp_path: Path) -> None:
    path = file("a.jsonl", lines({"text": "one"}))
    with pytest.raises(DataError, match=r"document 1 of .*mine_text_document has the token id 90, but the vocabulary ends at 49"):
        preprocess([TextFile(path)], tmp_path / "mine", Recipe(Ninety()))
    assert list(tmp_path.iterdir()) == [path]


def test_batches_make_no_difference(file: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    records = lines(*({"text": "word " * (number % 7)} for number in range(50)))
    (whole,) = made(file("a.jsonl", records), append_eod=True)
    before = whole.prefix.with_suffix(".bin").read_bytes()
    monkeypatch.setattr("megatron_lite.data.preprocess.TOGETHER", 100)
    (parts,) = made(file("a.jsonl", records), append_eod=True)
    assert parts.prefix.with_suffix(".bin").read_bytes() == before
