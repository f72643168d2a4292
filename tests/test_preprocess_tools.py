"""The two commands that make data sets, as people call them."""

import gzip
import json
import shutil
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_lite.config.load import load_config
from megatron_lite.data import known_sets
from megatron_lite.data.indexed import IndexedDataset
from megatron_lite.data.known_sets import KNOWN, obtain
from megatron_lite.data.tokenizer import load_tokenizer
from megatron_lite.errors import DataError, OutputError
from megatron_lite.log import logger
from tests.disks import no_file_beyond
from tools import prepare_data, preprocess_data

ROOT = Path(__file__).resolve().parents[1]
TINY = [str(ROOT / "configs" / "tiny.yml")]


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "checkpoints").symlink_to(ROOT / "checkpoints")
    Path("a.jsonl").write_text(json.dumps({"text": "Once upon a time", "title": "A"}) + "\n")
    return tmp_path


@pytest.fixture(autouse=True)
def the_log_as_it_was() -> Iterator[None]:
    """The commands give the log their voice; other tests have their own."""
    handlers, level, propagate = logger.handlers[:], logger.level, logger.propagate
    yield
    logger.handlers[:], logger.level, logger.propagate = handlers, level, propagate


def test_texts_become_a_data_set_and_the_line_that_uses_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert preprocess_data.main([*TINY, "--input", "a.jsonl", "--output-prefix", "data/mine", "--append-eod"]) == 0
    assert capsys.readouterr().out == '"data-path": "data/mine_text_document",\n'
    tokenizer = load_tokenizer(load_config([Path(TINY[0])]).tokenizer)
    tokens = IndexedDataset(Path("data/mine_text_document")).read(0).tolist()
    assert tokenizer.decode(tokens[:-1]) == "Once upon a time"
    assert tokens[-1] == tokenizer.eod


def test_neoxs_flags_are_understood(capsys: pytest.CaptureFixture[str]) -> None:
    words = "--input a.jsonl --output-prefix mine --tokenizer-type HFTokenizer --vocab checkpoints/tiny/tokenizer.json --dataset-impl mmap --workers 2"
    assert preprocess_data.main([*words.split(), "--jsonl-keys", "text", "title", "--num-docs", "1", "--log-interval", "100"]) == 0
    assert capsys.readouterr().out == '"data-path": "mine_text_document",\n"data-path": "mine_title_document",\n'


def test_labels_get_the_line_that_uses_them(capsys: pytest.CaptureFixture[str]) -> None:
    Path("chat.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}) + "\n")
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    Path("tokenizer_config.json").write_text(json.dumps({"chat_template": template, "eos_token": {"content": "<|endoftext|>"}}))
    words = "-t CharLevelTokenizer --input chat.jsonl --output-prefix mine --chat-template tokenizer_config.json"
    assert preprocess_data.main(words.split()) == 0
    assert capsys.readouterr().out.splitlines() == [
        '"train-data-paths": ["mine_messages_document"],',
        '"train-label-data-paths": ["mine_messages_label_document"],',
    ]
    learned = [token for token in IndexedDataset(Path("mine_messages_label_document")).read(0).tolist() if token >= 0]
    assert bytes(learned) == b" Hello<|endoftext|>"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("--input a.jsonl", "no tokenizer: name a configuration file, or give --tokenizer-type and --vocab-file"),
        ("tiny.yml --input a.jsonl -t HFTokenizer", "--tokenizer-type and tiny.yml both name a tokenizer; keep one"),
        ("--input b.jsonl -t CharLevelTokenizer", "b.jsonl does not exist; name a file of texts"),
        ("--input a.jsonl -t HFTokenizer", "tokenizer_type HFTokenizer needs vocab_file"),
        ("--input a.jsonl -t CharLevelTokenizer --chat-template b.json", "b.json (--chat-template) cannot be read: [Errno 2] No such file"),
        ("--input a.jsonl -t CharLevelTokenizer --chat-template c.json", "c.json (--chat-template) holds no chat_template that is a text"),
    ],
)
def test_a_command_without_sense_ends_with_a_sentence_and_code_2(capsys: pytest.CaptureFixture[str], words: str, sentence: str) -> None:
    Path("c.json").write_text("{}")
    assert preprocess_data.main([*words.split(), "--output-prefix", "mine"]) == 2
    assert sentence in capsys.readouterr().err


def test_without_a_name_the_known_sets_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert prepare_data.main([]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in listed if " MB " in line] == ["enwik8", "enron", "tinyshakespeare", "tinystories", "wikitext-2", "wikitext-103"]
    assert "pile              data/pile: 00.jsonl.zst to 29.jsonl.zst" in listed


def test_a_known_set_that_is_there_is_prepared(shared_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("data/tinyshakespeare").mkdir(parents=True)
    shutil.copy(shared_data / "corpora" / "tinyshakespeare.txt", "data/tinyshakespeare/input.txt")
    assert prepare_data.main(["tinyshakespeare", *TINY]) == 0
    assert capsys.readouterr().out == '"data-path": "data/tinyshakespeare/tinyshakespeare_text_document",\n'
    dataset = IndexedDataset(Path("data/tinyshakespeare/tinyshakespeare_text_document"))
    assert dataset.documents.tolist() == [0, len(dataset)]
    assert len(dataset) > 10


def test_another_file_under_the_name_is_refused_and_the_right_one_named(capsys: pytest.CaptureFixture[str]) -> None:
    Path("data/enwik8").mkdir(parents=True)
    Path("data/enwik8/enwik8.zip").write_bytes(b"another")
    assert prepare_data.main(["enwik8", *TINY]) == 2
    error = capsys.readouterr().err
    assert "data/enwik8/enwik8.zip is there, but is another file" in error
    assert "The files of enwik8 may also be brought from elsewhere and put into data/enwik8: enwik8.zip (https://mattmahoney.net/dc/enwik8.zip)" in error


def test_what_cannot_be_fetched_is_prepared_from_the_files_that_are_brought(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(DataError, match=r"pile_subset cannot be fetched: .*; if you have it, put 00.jsonl.zst into data/pile_subset and call this again"):
        obtain("pile_subset", Path("data"))
    Path("data/c4").mkdir(parents=True)
    Path("data/c4/c4-train.00000-of-01024.json.gz").write_bytes(gzip.compress(b'{"text": "one"}\n{"text": "two"}\n'))
    assert prepare_data.main(["c4", "-t", "CharLevelTokenizer"]) == 0
    assert capsys.readouterr().out == '"data-path": "data/c4/c4_text_document",\n'


def test_parts_of_an_archive_become_texts_of_their_own() -> None:
    folder = Path("data")
    folder.mkdir()
    with zipfile.ZipFile(folder / "wikitext-2-raw-v1.zip", "w") as archive:
        for part in ("train", "valid", "test"):
            archive.writestr(f"wikitext-2-raw/wiki.{part}.raw", f"{part} text")
    parts = KNOWN["wikitext-2"].unpack(folder)
    assert {part.name: part.texts[0].read_text() for part in parts} == {"train": "train text", "valid": "valid text", "test": "test text"}
    assert sorted(path.name for path in folder.iterdir()) == ["test.txt", "train.txt", "valid.txt", "wikitext-2-raw-v1.zip"]


def test_enrons_mails_become_records_without_their_headers() -> None:
    folder = Path("data")
    (folder / "maildir" / "a").mkdir(parents=True)
    (folder / "maildir" / "a" / "1.").write_bytes(b"From: a\r\nTo: b\r\n\r\nDear B,\r\n\r\nyes.\r\n")
    (folder / "maildir" / "a" / "2.").write_bytes(b"From: a\n\nCaf\xe9\n")
    with tarfile.open(folder / known_sets.ENRON.name, "w:gz") as archive:
        archive.add(folder / "maildir", "maildir")
    (part,) = KNOWN["enron"].unpack(folder)
    records = sorted((json.loads(line) for line in part.texts[0].read_text().splitlines()), key=lambda record: record["meta"]["file"])
    assert [record["text"] for record in records] == ["Dear B,\n\nyes.\n", "Café\n"]
    assert records[0]["meta"] == {"file": "maildir/a/1."}


@pytest.mark.parametrize("name", ["wikitext-2", "enron"])
def test_a_full_disk_keeps_nothing_of_what_could_not_be_unpacked(name: str) -> None:
    Path("data").mkdir()
    text = Path("data/text")
    text.write_bytes(b"\n\n" + bytes(100_000))
    archive = Path("data") / KNOWN[name].files[0].name
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) if name == "wikitext-2" else tarfile.open(archive, "w:gz") as packed:
        packed.write(text, "wikitext-2-raw/wiki.train.raw") if isinstance(packed, zipfile.ZipFile) else packed.add(text, "maildir/a/1.")
    with no_file_beyond(10_000), pytest.raises(OutputError, match=r"cannot be written: File too large; nothing of it was kept: free some space"):
        KNOWN[name].unpack(Path("data"))
    assert sorted(Path("data").iterdir()) == sorted([text, archive])
