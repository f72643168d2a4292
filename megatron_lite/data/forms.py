"""What a record asks a model to learn: a whole text, a completion behind its prompt, or one role's words in a conversation."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from megatron_lite.data.documents import Record, cut
from megatron_lite.errors import DataError

CONVERSATIONS = ("messages", "conversation", "conversations")
ASSISTANT = "assistant"
"""Whose words in a conversation are learned."""

ROLES = {"gpt": ASSISTANT, "human": "user"}


class Segment(NamedTuple):
    """Text that is encoded on its own; whether it is learned; whether the token between documents follows it."""

    text: str
    learned: bool = True
    ends: bool = False


class Form(Protocol):
    """Turns records into segments. `key` names the data set, `masks` says that some segments are not learned, `lacks` why none is if so."""

    @property
    def key(self) -> str: ...
    @property
    def masks(self) -> bool: ...
    @property
    def lacks(self) -> str: ...
    def segments(self, record: Record) -> Iterator[Segment]: ...


@dataclass(frozen=True)
class Text:
    """The text under one key, all of it learned."""

    key: str
    masks: bool = False
    lacks: str = "there is no text"

    def segments(self, record: Record) -> Iterator[Segment]:
        text, start = _text(record, self.key), 0
        while start < len(text):
            end = cut(text, start)
            yield Segment(text[start:end])
            start = end


@dataclass(frozen=True)
class Completion:
    """A prompt that is read and a completion that is learned, taken as they stand: a space between them belongs to one of the two."""

    key: str = "completion"
    masks: bool = True
    lacks: str = "no completion has any text"

    def segments(self, record: Record) -> Iterator[Segment]:
        yield Segment(_text(record, "prompt"), learned=False)
        yield Segment(_text(record, "completion"), ends=True)


class Message(NamedTuple):
    role: str
    content: str


Template = Callable[[Sequence[Message]], Iterator[Segment]]


@dataclass(frozen=True)
class Conversation:
    """A list of messages, written out by a template; what the assistant says is learned."""

    key: str
    template: Template
    masks: bool = True
    lacks: str = 'no message of the role "assistant" (or "gpt") has any text'

    def segments(self, record: Record) -> Iterator[Segment]:
        listed = record.fields.get(self.key)
        messages = [_message(entry) for entry in listed] if isinstance(listed, list) else []
        whole = [message for message in messages if message]
        if not whole or len(whole) < len(messages):
            raise DataError(f'{record.where} has no list of messages under "{self.key}"; each must be {{"role": "...", "content": "..."}}')
        try:
            yield from self.template(whole)
        except DataError as error:
            raise DataError(f"{record.where}: {error}") from error


def _message(entry: object) -> Message | None:
    """A message in OpenAI's spelling, {"role": "user", "content": ""}, or in ShareGPT's, {"from": "human", "value": ""}."""
    if not isinstance(entry, dict):
        return None
    role, content = entry.get("role", entry.get("from")), entry.get("content", entry.get("value"))
    return Message(ROLES.get(role, role), content) if isinstance(role, str) and isinstance(content, str) else None


def plainly(messages: Sequence[Message]) -> Iterator[Segment]:
    """User: question, blank line, Assistant: answer, the token between documents; and so on. No token is new, so any model can learn it."""
    for role, content in messages:
        title = f"{role.capitalize()}:"
        if role == ASSISTANT:
            yield Segment(title, learned=False)
            yield Segment(f" {content}", ends=True)
        else:
            yield Segment(f"{title} {content}\n\n", learned=False)


def templated(source: str, names: Mapping[str, str]) -> Template:
    """The Jinja template of a Hugging Face tokenizer, with the names of its tokens. What an answer adds to the invitation to answer is learned."""
    import jinja2
    import jinja2.sandbox

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = _refuse
    try:
        compiled = environment.from_string(source)
    except jinja2.TemplateError as error:
        raise DataError(f"the chat template is no Jinja: {error}") from error

    def written(messages: Sequence[Message], *, invite: bool) -> str:
        try:
            return compiled.render(messages=[message._asdict() for message in messages], add_generation_prompt=invite, **names)
        except jinja2.TemplateError as error:
            raise DataError(f"the chat template fails: {error}") from error

    def segments(messages: Sequence[Message]) -> Iterator[Segment]:
        before = ""
        for count, message in enumerate(messages):
            learned = message.role == ASSISTANT
            if learned:
                invitation = written(messages[:count], invite=True)
                yield Segment(_added(invitation, before), learned=False)
                before = invitation
            text = written(messages[: count + 1], invite=False)
            yield Segment(_added(text, before), learned)
            before = text

    return segments


def _added(text: str, before: str) -> str:
    if not text.startswith(before):
        raise DataError("the chat template rewrites what it wrote before when another message follows, so answers cannot be told apart; use another one")
    return text[len(before) :]


def _refuse(message: str) -> None:
    raise DataError(f"the chat template refuses the conversation: {message}")


def form_of(record: Record, key: str, template: Template) -> Form:
    """How the record under this key is to be read; the other records of its file are read the same way."""
    if key == Completion.key and "prompt" in record.fields:
        return Completion()
    return Conversation(key, template) if isinstance(record.fields.get(key), list) else Text(key)


def key_of(record: Record) -> str:
    """The key that a record is likely to be about."""
    for key in ("text", *CONVERSATIONS, Completion.key):
        if key in record.fields:
            return key
    raise DataError(
        f'{record.where} has none of the keys "text", "messages", or "prompt" and "completion"; it has {", ".join(record.fields) or "none"}: '
        "choose one or more with --jsonl-keys of tools/preprocess_data.py"
    )


def _text(record: Record, key: str) -> str:
    text = record.fields.get(key)
    if not isinstance(text, str):
        raise DataError(f'{record.where} has no "{key}" that is a text; it has {", ".join(record.fields) or "no key"}')
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise DataError(f'{record.where}: "{key}" holds half of a surrogate pair at character {error.start + 1}, which is no text') from error
    return text
