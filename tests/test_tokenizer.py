"""Every tokenizer_type of NeoX: the ids of the libraries, the token between documents, and sentences for what is missing."""

import json
import sys
from pathlib import Path
from typing import get_args

import pytest

from megatron_lite.config.sections import TokenizerSection
from megatron_lite.data.tokenizer import LOADERS, TiktokenTokenizer, Tokenizer, load_tokenizer
from megatron_lite.errors import TokenizerError

BUNDLED = Path(__file__).resolve().parents[1] / "checkpoints" / "tiny" / "tokenizer.json"
TEXTS = ["Once upon a time, there was a café.", "  spaces\n\nand\ttabs ", "日本語 🙂 ’quoted’", ""]


def tokenizer(kind: str, vocab_file: Path | str | None = None, merge_file: Path | None = None) -> Tokenizer:
    return load_tokenizer(TokenizerSection.model_validate({"tokenizer_type": kind, "vocab_file": vocab_file, "merge_file": merge_file}))


@pytest.fixture
def gpt2_files(tmp_path: Path) -> tuple[Path, Path]:
    """The bundled tokenizer in GPT-2's two files."""
    model = json.loads(BUNDLED.read_text())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{left} {right}\n" for left, right in model["merges"]))
    return tmp_path / "vocab.json", tmp_path / "merges.txt"


@pytest.fixture(scope="module")
def sentencepiece_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import sentencepiece

    folder = tmp_path_factory.mktemp("sentencepiece")
    sentences = iter(["the cat sat on the mat", "the dog ran after the cat", "a mat is no place for a dog"] * 20)
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=sentences, model_prefix=str(folder / "small"), vocab_size=24, minloglevel=2)
    return folder / "small.model"


def test_every_tokenizer_type_of_the_configuration_has_a_loader() -> None:
    assert set(get_args(TokenizerSection.model_fields["tokenizer_type"].annotation)) <= set(LOADERS)


def test_the_bundled_tokenizer_has_4096_entries_and_ends_documents_with_0() -> None:
    bundled = tokenizer("HFTokenizer", BUNDLED)
    assert (bundled.vocab_size, bundled.eod) == (4096, 0)
    assert bundled.encode("<|endoftext|><|padding|>") == [0, 1]


@pytest.mark.parametrize("text", TEXTS)
def test_bundled_text_comes_back_as_it_was(text: str) -> None:
    bundled = tokenizer("HFTokenizer", BUNDLED)
    assert bundled.decode(bundled.encode(text)) == text


def test_a_batch_is_its_texts_one_by_one() -> None:
    bundled = tokenizer("HFTokenizer", BUNDLED)
    assert bundled.encode_batch(TEXTS) == [bundled.encode(text) for text in TEXTS]


def test_a_folder_stands_for_the_tokenizer_json_in_it() -> None:
    assert tokenizer("HFTokenizer", BUNDLED.parent).encode(TEXTS[0]) == tokenizer("HFTokenizer", BUNDLED).encode(TEXTS[0])


def test_text_is_normalized_to_composed_characters_as_by_the_20b_tokenizer() -> None:
    bundled = tokenizer("HFTokenizer", BUNDLED)
    assert bundled.encode("cafe\u0301") == bundled.encode("caf\u00e9")


def test_vocabulary_and_merges_give_the_ids_of_the_same_tokenizer_as_json(gpt2_files: tuple[Path, Path]) -> None:
    pair, whole = tokenizer("GPT2BPETokenizer", *gpt2_files), tokenizer("HFTokenizer", BUNDLED)
    assert (pair.vocab_size, pair.eod) == (whole.vocab_size, whole.eod)
    assert pair.encode_batch([*TEXTS, "a<|endoftext|>b"]) == whole.encode_batch([*TEXTS, "a<|endoftext|>b"])
    assert [pair.decode(pair.encode(text)) for text in TEXTS] == TEXTS


def test_sentencepiece_models_end_documents_with_their_own_token(sentencepiece_model: Path) -> None:
    pieces = tokenizer("SPMTokenizer", sentencepiece_model)
    assert (pieces.vocab_size, pieces.eod) == (24, 2)
    text = "the cat ran after a dog"
    assert pieces.decode(pieces.encode(text)) == text
    assert pieces.encode_batch([text, "mat"]) == [pieces.encode(text), pieces.encode("mat")]


def test_characters_are_the_bytes_of_utf_8() -> None:
    characters = tokenizer("CharLevelTokenizer")
    assert (characters.vocab_size, characters.eod) == (512, 0)
    assert characters.encode("Aé\n") == [65, 195, 169, 10]
    assert characters.decode([65, 195, 169, 10, 511, 300]) == "Aé\n"
    assert characters.encode_batch(["A", ""]) == [[65], []]


def test_tiktoken_encodings_keep_their_ids_and_end_of_text() -> None:
    import tiktoken

    ranks = {bytes([byte]): byte for byte in range(256)} | {b"on": 256}
    encoding = tiktoken.Encoding("small", pat_str=r"\w+|\W", mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 257})
    small = TiktokenTokenizer(encoding)
    assert (small.vocab_size, small.eod) == (258, 257)
    assert small.encode("on<|endoftext|>é") == [256, 257, 195, 169]
    assert small.decode(small.encode_batch(["upon a time"])[0]) == "upon a time"


def test_the_20b_tokenizer_has_50277_entries_and_transformers_ids(shared_data: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    path = shared_data / "tokenizers" / "20B_tokenizer.json"
    ours, theirs = tokenizer("HFTokenizer", path), PreTrainedTokenizerFast(tokenizer_file=str(path))
    assert (ours.vocab_size, ours.eod) == (50277, 0)
    text = (shared_data / "corpora" / "tinyshakespeare.txt").read_text()[:50_000] + "        code"
    assert ours.encode(text) == theirs.encode(text)


def test_gpt2s_files_give_the_ids_of_gpt2s_tokenizer_json(shared_data: Path) -> None:
    folder = shared_data / "tokenizers"
    pair = tokenizer("GPT2BPETokenizer", folder / "gpt2-vocab.json", folder / "gpt2-merges.txt")
    whole = tokenizer("HFTokenizer", folder / "gpt2-tokenizer.json")
    assert (pair.vocab_size, pair.eod) == (whole.vocab_size, whole.eod) == (50257, 50256)
    lines = (shared_data / "corpora" / "botchan.txt").read_text().splitlines(keepends=True)[:500]
    assert pair.encode_batch(lines) == whole.encode_batch(lines)


def test_googles_sentencepiece_model_is_read(shared_data: Path) -> None:
    pieces = tokenizer("SPMTokenizer", shared_data / "sentencepiece" / "sentencepiece_test_model.model")
    assert (pieces.vocab_size, pieces.eod) == (1000, 2)
    assert pieces.encode_batch(["Hello world", "This is a test"]) == [[151, 88, 21, 887], [284, 47, 11, 4, 15, 400]]  # from its README


@pytest.mark.parametrize(
    ("kind", "vocab", "merges", "sentence"),
    [
        ("HFTokenizer", None, None, "tokenizer_type HFTokenizer needs vocab_file; add it to the YAML or write vocab_file=PATH on the command line"),
        ("GPT2BPETokenizer", "vocab.json", None, "tokenizer_type GPT2BPETokenizer needs merge_file; add it to the YAML"),
        ("HFTokenizer", "nowhere.json", None, "nowhere.json (vocab_file) does not exist; put the file of the HFTokenizer there or write vocab_file=PATH"),
        ("GPT2BPETokenizer", "vocab.json", "nowhere.txt", "nowhere.txt (merge_file) does not exist"),
        ("HFTokenizer", "merges.txt", None, "merges.txt (vocab_file) is no JSON of the tokenizers library, such as 20B_tokenizer.json: expected value"),
        ("HFTokenizer", "vocab.json", None, "vocab.json (vocab_file) is no JSON of the tokenizers library"),
        ("GPT2BPETokenizer", "merges.txt", "vocab.json", "merges.txt (vocab_file) and "),
        ("SPMTokenizer", "vocab.json", None, "vocab.json (vocab_file) is no sentencepiece model: "),
        ("TiktokenTokenizer", "gpt3", None, "vocab_file gpt3 is no encoding of tiktoken; use one of gpt2, "),
        ("TiktokenTokenizer", None, None, "vocab_file (not set) is no encoding of tiktoken"),
    ],
)
def test_a_missing_or_foreign_file_is_named_with_its_key(
    gpt2_files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, kind: str, vocab: str | None, merges: str | None, sentence: str
) -> None:
    monkeypatch.chdir(gpt2_files[0].parent)
    with pytest.raises(TokenizerError) as error:
        tokenizer(kind, vocab, Path(merges) if merges else None)
    assert sentence in str(error.value)


def test_a_tokenizer_without_an_end_of_document_is_refused(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models

    Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).save(str(tmp_path / "words.json"))
    with pytest.raises(TokenizerError, match=r"words.json \(vocab_file\) has no end-of-document token; it needs one of <\|endoftext\|>"):
        tokenizer("HFTokenizer", tmp_path / "words.json")


def test_without_tiktoken_the_sentence_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    with pytest.raises(TokenizerError, match="needs the tiktoken package, which is not installed; run: pip install tiktoken"):
        tokenizer("TiktokenTokenizer", "gpt2")


def test_without_a_network_tiktoken_needs_its_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    for name in ("HTTPS_PROXY", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with pytest.raises(TokenizerError, match=r"could not download it: .*; without a network, set TIKTOKEN_CACHE_DIR"):
        tokenizer("TiktokenTokenizer", "p50k_base")
