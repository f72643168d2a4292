"""Conversations by the template of a tokenizer: what the assistant adds is learned, whatever the template writes around it."""

from collections.abc import Sequence

import pytest

from megatron_lite.data.documents import Record
from megatron_lite.data.forms import Conversation, Segment, templated
from megatron_lite.errors import DataError

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'user' %}[INST] {{ message.content }} [/INST]"
    "{% else %} {{ message.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
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
