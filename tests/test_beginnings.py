"""A tokenizer that puts <s> in front of what it encodes, as LLaMA's: it begins documents and prompts, and is nothing that is learned or scored inside."""

from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

import pytest

from megatron_lite.config.sections import TokenizerSection
from megatron_lite.data import documents
from megatron_lite.data.corpus import document_source
from megatron_lite.data.documents import TextFile
from megatron_lite.data.indexed import MASKED, IndexedDataset
from megatron_lite.data.preprocess import Recipe, preprocess
from megatron_lite.data.tokenizer import CharLevelTokenizer, Tokenizer, beginning_of, load_tokenizer
from megatron_lite.evaluation.adapter import HarnessModel
from megatron_lite.evaluation.work import Answer, Order, Scoring
from megatron_lite.inference.score import Score
from tests.texts import lines, place

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

WORDS = ["<unk>", "<s>", "</s>", "a", "b", "c", "d"]
UNKNOWN, BOS, EOD, A, B, C, D = range(len(WORDS))


@pytest.fixture
def llama(tmp_path: Path) -> Tokenizer:
    """A word a token, with <s> in front of every text."""
    from tokenizers import Tokenizer as Built
    from tokenizers import models, pre_tokenizers, processors

    built = Built(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    built.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    built.add_special_tokens(["<s>", "</s>"])
    built.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", BOS)])
    path = tmp_path / "tokenizer" / "tokenizer.json"
    path.parent.mkdir()
    built.save(str(path))
    return load_tokenizer(TokenizerSection.model_validate({"tokenizer_type": "HFTokenizer", "vocab_file": path}))


def sequences(prefix: Path | None) -> list[list[int]]:
    assert prefix is not None
    dataset = IndexedDataset(prefix)
    return [dataset.read(number).tolist() for number in range(len(dataset))]


def test_a_text_that_stands_alone_begins_with_its_special_token_unless_none_is_wanted(llama: Tokenizer) -> None:
    assert (beginning_of(llama), beginning_of(CharLevelTokenizer())) == ([BOS], [])
    assert (llama.encode("a b"), llama.encode("a b", add_special_tokens=False)) == ([BOS, A, B], [A, B])
    assert llama.encode_batch(["a", ""], add_special_tokens=False) == [[A], []]


def test_between_a_prompt_and_its_completion_there_is_no_beginning(llama: Tokenizer, tmp_path: Path) -> None:
    path = place(tmp_path / "a.jsonl", lines({"prompt": "a b", "completion": "c"}, {"prompt": "<s> a", "completion": "d"}))
    (written,) = preprocess([TextFile(path)], tmp_path / "mine", Recipe(llama))
    assert sequences(written.prefix) == [[BOS, A, B, C, EOD], [BOS, A, D, EOD]]
    assert sequences(written.labels) == [[MASKED, MASKED, MASKED, C, EOD], [MASKED, MASKED, D, EOD]]


@pytest.mark.parametrize("suffix", ["txt", "jsonl"])
def test_a_long_document_begins_once(llama: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str) -> None:
    monkeypatch.setattr(documents, "PIECE", 8)
    texts = ["a b c d " * 9 + "a", "b"]
    content = lines(*({"text": text} for text in texts)) if suffix == "jsonl" else "<|endoftext|>".join(texts)
    (written,) = preprocess([TextFile(place(tmp_path / f"a.{suffix}", content))], tmp_path / "mine", Recipe(llama))
    tokens = [token for sequence in sequences(written.prefix) for token in sequence]
    assert tokens == [BOS, *[A, B, C, D] * 9, A, EOD, BOS, B, EOD]
    assert written.documents == 2


def test_an_empty_text_stays_empty(llama: Tokenizer, tmp_path: Path) -> None:
    path = place(tmp_path / "a.jsonl", lines({"text": ""}, {"text": "a"}))
    (written,) = preprocess([TextFile(path)], tmp_path / "mine", Recipe(llama))
    assert (sequences(written.prefix), written.empty) == ([[BOS, A, EOD]], 1)


def test_tokens_that_were_kept_are_not_those_of_the_same_tokenizer_without_a_beginning(llama: Tokenizer, tmp_path: Path) -> None:
    plain = load_tokenizer(TokenizerSection.model_validate({"tokenizer_type": "HFTokenizer", "vocab_file": tmp_path / "tokenizer"}))
    vars(plain)["_inner"].post_processor = None
    path = place(tmp_path / "a.jsonl", lines({"text": "a b"}))
    kept = [document_source(path, tokenizer).tokens for tokenizer in (llama, plain, llama)]
    assert [dataset.read(0).tolist() for dataset in kept] == [[BOS, A, B, EOD], [A, B, EOD], [BOS, A, B, EOD]]


def asked(tokenizer: Tokenizer, kind: str, *arguments: tuple[str, ...]) -> list[tuple[list[int], list[int]]]:
    """Context and continuation of the requests that lm-eval's questions become."""
    pytest.importorskip("lm_eval")
    found: list[tuple[list[int], list[int]]] = []

    def give(order: Order) -> Answer:
        assert isinstance(order, Scoring)
        found.extend((list(request.context), list(request.continuation)) for request in order.requests)
        return [Score(0.0, True) for _ in order.requests]

    requests: Iterable[object] = [SimpleNamespace(args=each, task_name="t", doc_id=number) for number, each in enumerate(arguments)]
    getattr(HarnessModel(give, tokenizer, context=8, seed=0), kind)(cast("list[Instance]", list(requests)))
    return found


def test_a_score_counts_no_beginning(llama: Tokenizer) -> None:
    assert asked(llama, "loglikelihood", ("a", " b"), ("", "c d"), ("<s> a", " b")) == [([BOS, A], [B]), ([BOS], [C, D]), ([BOS, A], [B])]


def test_rolling_windows_begin_with_it_and_do_not_predict_it(llama: Tokenizer) -> None:
    assert asked(llama, "loglikelihood_rolling", ("a b c",)) == [([BOS], [A, B, C])]


def test_without_a_beginning_an_empty_context_is_the_end_of_a_document() -> None:
    assert asked(CharLevelTokenizer(), "loglikelihood", ("", "A")) == [([0], [65])]
