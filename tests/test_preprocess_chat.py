"""Conversations by the template of a tokenizer: what the assistant adds is learned, whatever the template writes around it."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from megatron_lite.config.sections import DataSection
from megatron_lite.data.corpus import open_corpus
from megatron_lite.data.documents import Record
from megatron_lite.data.forms import Conversation, Segment, templated
from megatron_lite.data.packing import Packing
from megatron_lite.data.sources import TrainingData, open_data
from megatron_lite.data.tokenizer import CharLevelTokenizer
from megatron_lite.errors import DataError

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'user' %}[INST] {{ message.content }} [/INST]"
    "{% else %} {{ message.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
NOBODY = 'no message of the role "assistant" (or "gpt") has any text'
CHAT = [("user", "Hi"), ("assistant", "Hello"), ("user", "Bye"), ("assistant", "Farewell")]


def segments(source: str, chat: Sequence[tuple[str, str]], **names: str) -> list[Segment]:
    record = Record({"messages": [{"role": role, "content": content} for role, content in chat]}, "a.jsonl line 1")
    return list(Conversation("messages", templated(source, names)).segments(record))


def test_the_segments_are_the_whole_text_of_the_template() -> None:
    whole = "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in CHAT)
    assert "".join(segment.text for segment in segments(CHATML, CHAT)) == whole


def test_answers_are_learned_with_what_ends_them() -> None:
    assert [segment.text for segment in segments(CHATML, CHAT) if segment.learned] == ["Hello<|im_end|>\n", "Farewell<|im_end|>\n"]


def test_a_template_may_know_the_tokenizers_tokens_and_need_no_invitation() -> None:
    found = segments(LLAMA, CHAT, bos_token="<s>", eos_token="</s>")
    assert "".join(segment.text for segment in found) == "<s>[INST] Hi [/INST] Hello</s>[INST] Bye [/INST] Farewell</s>"
    assert [segment.text for segment in found if segment.learned] == [" Hello</s>", " Farewell</s>"]


@pytest.mark.parametrize(
    ("record", "why"),
    [
        ({"messages": [{"role": "user", "content": "Hi"}, {"role": "bot", "content": "Hello"}]}, NOBODY),
        ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": ""}]}, NOBODY),
        ({"prompt": "Hi", "completion": "\n"}, "no completion has any text"),
    ],
)
def test_a_file_of_which_nothing_would_be_learned_is_refused_when_it_is_tokenized(tmp_path: Path, record: dict[str, object], why: str) -> None:
    path = tmp_path / "chat.jsonl"
    path.write_text(f"{json.dumps(record)}\n" * 3)
    for _ in range(2):  # nothing is left behind that would be found
        with pytest.raises(DataError) as error:
            open_corpus(path, CharLevelTokenizer())
        assert re.fullmatch(rf"{path}: there is nothing to learn in [1-9]\d* tokens, because {re.escape(why)}; nothing was written", str(error.value))


def test_labels_of_which_none_is_learned_are_refused_when_a_training_opens_them(tmp_path: Path) -> None:
    path = tmp_path / "chat.jsonl"
    chats = [[("user", "Hi")], [("user", "Hi")], [("user", "Hi"), ("assistant", "Hello")]]
    records = [{"messages": [{"role": role, "content": content} for role, content in chat]} for chat in chats]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))

    def opened(split: str) -> TrainingData:
        return open_data(DataSection.model_validate({"data_path": path, "split": split}), Packing(8, 0), CharLevelTokenizer(), vocab=512)

    sentence = r"chat\.jsonl-.*_messages_label_document has no label for any token of the 2 sequences to train on, so that nothing would be learned"
    with pytest.raises(DataError, match=sentence):
        opened("2,1")
    assert opened("3").source("train", 1) is not None


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("{% for message in messages %}", "the chat template is no Jinja: Unexpected end of template"),
        ("{{ messages[9].content.strip() }}", "a.jsonl line 1: the chat template fails: "),
        ("{{ raise_exception('roles must alternate') }}", "a.jsonl line 1: the chat template refuses the conversation: roles must alternate"),
        ("{{ messages | length }} {{ messages[-1].content }}", "a.jsonl line 1: the chat template rewrites what it wrote before when another message follows"),
        ("{{ ''.__class__.__mro__ }}", "a.jsonl line 1: the chat template fails: access to attribute '__class__' of 'str' object is unsafe"),
    ],
)
def test_a_template_that_cannot_serve_gets_a_sentence(source: str, sentence: str) -> None:
    with pytest.raises(DataError) as error:
        segments(source, CHAT)
    assert sentence in str(error.value)
