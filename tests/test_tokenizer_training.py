"""tools/train_tokenizer.py writes tokenizers of the 20B tokenizer's form."""

import json
from pathlib import Path

import pytest

from megatron_lite.config.sections import TokenizerSection
from megatron_lite.data.tokenizer import load_tokenizer
from tools.train_tokenizer import main


@pytest.fixture
def stories(tmp_path: Path) -> list[str]:
    (tmp_path / "stories.jsonl").write_text("".join(json.dumps({"text": "Once upon a time there was a fox. " * n}) + "\n" for n in range(1, 6)))
    (tmp_path / "tale.txt").write_text("The fox said: “Good day!”\n" * 5)
    return [str(tmp_path / "stories.jsonl"), str(tmp_path / "tale.txt")]


def test_a_trained_tokenizer_has_the_size_asked_for_and_loses_no_text(stories: list[str], tmp_path: Path) -> None:
    assert main([*stories, "--vocab-size", "290", "--output", str(tmp_path / "tokenizer.json")]) == 0
    trained = load_tokenizer(TokenizerSection.model_validate({"tokenizer_type": "HFTokenizer", "vocab_file": tmp_path / "tokenizer.json"}))
    assert (trained.vocab_size, trained.eod, trained.encode("<|padding|>")) == (290, 0, [1])
    assert trained.decode(trained.encode("Un œuf: 日本 🙂\n\n  x")) == "Un œuf: 日本 🙂\n\n  x"
    assert len(trained.encode("Once upon a time")) < len("Once upon a time")


def test_training_twice_gives_the_same_file(stories: list[str], tmp_path: Path) -> None:
    for name in ("first.json", "second.json"):
        main([*stories, "--vocab-size", "290", "--output", str(tmp_path / name)])
    assert (tmp_path / "first.json").read_bytes() == (tmp_path / "second.json").read_bytes()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["nowhere.txt"], "nowhere.txt cannot be read: No such file or directory"),
        (["titles.jsonl"], 'titles.jsonl line 2 has no "text" that is a string'),
        (["latin.txt"], "latin.txt is not UTF-8; save the file as UTF-8"),
        (["titles.jsonl", "--vocab-size", "100"], "--vocab-size 100 is too small; the 256 bytes and <|endoftext|> and <|padding|> take 258"),
        (["titles.jsonl", "--output", "missing/tokenizer.json"], "there is no folder missing; create it or choose another output"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str], sentence: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("titles.jsonl").write_text('{"text": "a"}\n{"title": "b"}\n')
    Path("latin.txt").write_bytes("café".encode("latin-1"))
    assert main(words) == 2
    printed = capsys.readouterr().err
    assert sentence in printed
    assert "Traceback" not in printed
