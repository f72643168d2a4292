"""Texts become data sets: every kind of file, every form of record, the tokens where they belong."""

import bz2
import gzip
import lzma
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_lite.config.sections import TokenizerSection
from megatron_lite.data import documents
from megatron_lite.data.documents import cut
from megatron_lite.data.indexed import IndexedDataset
from megatron_lite.data.preprocess import Written
from megatron_lite.data.tokenizer import load_tokenizer
from megatron_lite.errors import DataError
from tests.texts import lines, made, place, texts


def test_every_json_line_is_a_document(tmp_path: Path) -> None:
    (written,) = made(place(tmp_path / "a.jsonl", lines({"text": "one"}, {"text": "two", "meta": {}}) + "\n"), append_eod=True)
    assert written == Written(tmp_path / "mine_text_document", None, documents=2, tokens=8, learned=8, empty=0)
    assert texts(written.prefix) == ["one|", "two|"]
    assert IndexedDataset(written.prefix).documents.tolist() == [0, 1, 2]


def test_without_append_eod_documents_run_into_each_other_as_in_neox(tmp_path: Path) -> None:
    (written,) = made(place(tmp_path / "a.jsonl", lines({"text": "one"}, {"text": "two"})))
    assert texts(written.prefix) == ["one", "two"]


def test_an_end_that_is_there_is_not_doubled(tmp_path: Path) -> None:
    (written,) = made(place(tmp_path / "a.jsonl", lines({"text": "one\0"})), append_eod=True)
    assert texts(written.prefix) == ["one|"]


@pytest.mark.parametrize(("suffix", "compress"), [(".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress)])
def test_compressed_files_are_read(tmp_path: Path, suffix: str, compress: Callable[[bytes], bytes]) -> None:
    content = lines({"text": "one"}).encode()
    (written,) = made(place(tmp_path / f"a.jsonl{suffix}", compress(content) + compress(content)), place(tmp_path / f"b.txt{suffix}", compress(b"two")))
    assert texts(written.prefix) == ["one", "one", "two"]


def test_zstandard_is_read_in_several_frames(tmp_path: Path) -> None:
    zstandard = pytest.importorskip("zstandard", reason="zstandard is optional")
    content = zstandard.compress(lines({"text": "one"}).encode())
    assert texts(made(place(tmp_path / "a.jsonl.zst", content + content))[0].prefix) == ["one", "one"]


@pytest.mark.parametrize("frames", [0, 1])
def test_a_zstandard_file_that_is_cut_short_is_no_shorter_text(tmp_path: Path, frames: int) -> None:
    zstandard = pytest.importorskip("zstandard", reason="zstandard is optional")
    whole = zstandard.compress("".join(f"{number}\n" for number in range(300_000)).encode())
    with pytest.raises(DataError, match=r"a.txt.zst cannot be read \(it ends before the end of what was compressed\); it is damaged"):
        made(place(tmp_path / "a.txt.zst", frames * whole + whole[: len(whole) // 2]))


def test_without_zstandard_a_sentence_says_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(DataError, match=r"a.jsonl.zst is compressed with zstandard, which is not installed; run: pip install zstandard"):
        made(place(tmp_path / "a.jsonl.zst", b""))


def test_files_of_several_kinds_make_one_data_set(tmp_path: Path) -> None:
    (written,) = made(place(tmp_path / "a.jsonl", lines({"text": "one"})), place(tmp_path / "b.txt", "two\n"), append_eod=True)
    assert texts(written.prefix) == ["one|", "two\n|"]


def test_a_text_file_is_one_document_or_several_between_separators(tmp_path: Path) -> None:
    path = place(tmp_path / "a.txt", "\ufeffone\r\ntwo\n<|endoftext|>\n\nthree<|endoftext|>")
    assert texts(made(path, append_eod=True)[0].prefix) == ["one\ntwo|", "three|"]


def test_a_long_text_file_is_one_document_of_several_sequences(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "PIECE", 10)
    text = "First line.\nSecond line.\n\nNew paragraph, with words.\nAndnospacesatallinthisone"
    (written,) = made(place(tmp_path / "a.txt", text), append_eod=True)
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


def test_a_long_json_text_is_one_sequence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "PIECE", 10)
    text = "one two three four five six seven eight nine ten"
    assert texts(made(place(tmp_path / "a.jsonl", lines({"text": text})), append_eod=True)[0].prefix) == [text + "|"]


def test_each_key_gets_a_data_set_of_its_own_text(tmp_path: Path) -> None:
    path = place(tmp_path / "a.jsonl", lines({"text": "one", "title": "A"}, {"text": "two", "title": "B"}))
    first, second = made(path, keys=("text", "title"))
    assert [first.prefix.name, second.prefix.name] == ["mine_text_document", "mine_title_document"]
    assert [texts(first.prefix), texts(second.prefix)] == [["one", "two"], ["A", "B"]]


def test_empty_texts_are_left_out_and_counted(tmp_path: Path) -> None:
    (written,) = made(place(tmp_path / "a.jsonl", lines({"text": "one"}, {"text": ""}, {"text": "two"})), append_eod=True)
    assert (written.documents, written.empty) == (2, 1)
    assert IndexedDataset(written.prefix).documents.tolist() == [0, 1, 2]


def test_a_completion_is_learned_and_its_prompt_is_not(tmp_path: Path) -> None:
    (written,) = made(place(tmp_path / "a.jsonl", lines({"prompt": "2+2=", "completion": "4"}, {"prompt": "", "completion": "yes"})))
    assert texts(written.prefix) == ["2+2=4|", "yes|"]
    assert written.labels == written.prefix.with_name("mine_completion_label_document")
    assert texts(written.labels) == ["....4|", "yes|"]
    assert (written.tokens, written.learned) == (10, 6)


def test_in_a_conversation_what_the_assistant_says_is_learned(tmp_path: Path) -> None:
    chat = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    again = [*chat, {"role": "user", "content": "Bye"}, {"role": "assistant", "content": "Farewell"}]
    (written,) = made(place(tmp_path / "a.jsonl", lines({"messages": chat}, {"messages": again})), append_eod=True)
    assert texts(written.prefix)[1] == "System: Be kind.\n\nUser: Hi\n\nAssistant: Hello|User: Bye\n\nAssistant: Farewell|"
    assert texts(written.labels)[0] == "." * len("System: Be kind.\n\nUser: Hi\n\nAssistant:") + " Hello|"
    assert texts(written.labels)[1].replace(".", "") == " Hello| Farewell|"


def test_conversations_in_the_spelling_of_sharegpt(tmp_path: Path) -> None:
    chat = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
    (written,) = made(place(tmp_path / "a.jsonl", lines({"conversations": chat})))
    assert texts(written.prefix) == ["User: Hi\n\nAssistant: Hello|"]


def test_batches_make_no_difference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = lines(*({"text": "word " * (number % 7)} for number in range(50)))
    (whole,) = made(place(tmp_path / "a.jsonl", records), append_eod=True)
    before = whole.prefix.with_suffix(".bin").read_bytes()
    monkeypatch.setattr("megatron_lite.data.preprocess.TOGETHER", 100)
    (parts,) = made(place(tmp_path / "a.jsonl", records), append_eod=True)
    assert parts.prefix.with_suffix(".bin").read_bytes() == before
