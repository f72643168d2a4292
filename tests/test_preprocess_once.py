"""A file of texts is a data set: tokenized once, by one process, and again only when the file or the tokenizer is another."""

import json
import logging
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from megatron_lite.data.corpus import document_source, open_corpus
from megatron_lite.data.index_writer import token_writer
from megatron_lite.data.indexed import MASKED, Corpus, files_of
from megatron_lite.data.packing import Packing
from megatron_lite.data.samples import Samples
from megatron_lite.data.tokenizer import CharLevelTokenizer
from megatron_lite.errors import DataError


class Upper(CharLevelTokenizer):
    """Another tokenizer of the same size."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return super().encode(text.upper())


@pytest.fixture
def stories(tmp_path: Path) -> Path:
    path = tmp_path / "stories.jsonl"
    path.write_text("".join(json.dumps({"text": f"story {number}"}) + "\n" for number in range(20)))
    return path


def text(corpus: Corpus, number: int) -> str:
    return bytes(corpus.tokens.read(number).tolist()).decode()


def test_a_file_of_texts_is_a_data_set_of_documents_with_ends(stories: Path) -> None:
    corpus = open_corpus(stories, CharLevelTokenizer())
    assert [text(corpus, number) for number in (0, 19)] == ["story 0\0", "story 19\0"]
    assert corpus.labels is None


def test_the_second_time_nothing_is_tokenized(stories: Path) -> None:
    first = files_of(document_source(stories, CharLevelTokenizer()).tokens.prefix)[1]
    before = first.stat()
    second = files_of(document_source(stories, CharLevelTokenizer()).tokens.prefix)[1]
    assert first == second
    assert (second.stat().st_ino, second.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_another_tokenizer_has_its_own_tokens(stories: Path) -> None:
    assert text(document_source(stories, CharLevelTokenizer()), 0) == "story 0\0"
    assert text(document_source(stories, Upper()), 0) == "STORY 0\0"
    assert text(document_source(stories, CharLevelTokenizer()), 0) == "story 0\0"


def test_a_file_that_changed_is_tokenized_again(stories: Path) -> None:
    document_source(stories, CharLevelTokenizer())
    stories.write_text(stories.read_text().replace("story 5", "tales 5"))
    os.utime(stories, ns=(1, 1))
    assert text(document_source(stories, CharLevelTokenizer()), 5) == "tales 5\0"


def test_tokens_that_lost_a_file_are_made_again(stories: Path) -> None:
    files_of(document_source(stories, CharLevelTokenizer()).tokens.prefix)[0].unlink()
    assert text(document_source(stories, CharLevelTokenizer()), 0) == "story 0\0"


def test_completions_bring_their_labels_along(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps({"prompt": "2+2=", "completion": "4"}) + "\n")
    corpus = open_corpus(path, CharLevelTokenizer())
    assert corpus.labels is not None
    assert corpus.labels.read(0).tolist() == [MASKED] * 4 + [ord("4"), 0]
    row = Samples(corpus, range(1), purpose="train", count=1, packing=Packing(8, 0, "unpacked")).row(0)
    assert row.labels.tolist() == [MASKED] * 4 + [ord("4"), 0] + [MASKED] * 3


def test_a_folder_that_is_read_only_sends_the_tokens_to_the_cache(stories: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    first = document_source(stories, CharLevelTokenizer()).tokens.prefix
    assert first.parent == tmp_path / "cache" / "deepy"
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["stories.jsonl"]
    assert document_source(stories, CharLevelTokenizer()).tokens.prefix == first


def tokens_of(path: Path) -> int:
    """The inode of the file with the tokens."""
    return files_of(document_source(path, CharLevelTokenizer()).tokens.prefix)[1].stat().st_ino


def test_of_several_processes_one_tokenizes(tmp_path: Path) -> None:
    path = tmp_path / "stories.jsonl"
    path.write_text("".join(json.dumps({"text": f"story {number} " * 20}) + "\n" for number in range(3000)))
    with ProcessPoolExecutor(4, mp_context=multiprocessing.get_context("fork")) as processes:
        assert len(set(processes.map(tokens_of, [path] * 4))) == 1


def test_labels_for_a_file_of_texts_are_refused(stories: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"stories.jsonl is a file of texts, so it has no labels in .*mine; its own records say what is learned"):
        open_corpus(stories, CharLevelTokenizer(), labels=tmp_path / "mine")


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").touch()
    with pytest.raises(DataError, match=r"a.txt holds no text in 0 bytes"):
        document_source(tmp_path / "a.txt", CharLevelTokenizer())


def test_a_prefix_with_the_name_of_a_text_file_is_still_a_prefix(tmp_path: Path) -> None:
    with token_writer(tmp_path / "mine.txt", vocab_size=10) as writer:
        writer.add_sequence([1, 2])
        writer.finish()
    assert open_corpus(tmp_path / "mine.txt", CharLevelTokenizer()).tokens.read(0).tolist() == [1, 2]


def test_labels_that_lie_beside_a_data_set_are_mentioned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(logging.getLogger("deepy"), "propagate", True)
    for name in ("mine_messages_document", "mine_messages_label_document"):
        with token_writer(tmp_path / name, vocab_size=10) as writer:
            writer.add_sequence([1, 2])
            writer.finish()
    open_corpus(tmp_path / "mine_messages_document", CharLevelTokenizer())
    assert "is trained on as a whole, though labels lie beside it: for them, use train_data_paths and train_label_data_paths" in caplog.text
    caplog.clear()
    assert open_corpus(tmp_path / "mine_messages_document", CharLevelTokenizer(), labels=tmp_path / "mine_messages_label_document").labels
    assert not caplog.text
