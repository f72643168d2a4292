"""What is asked of a model and what it answers."""

from dataclasses import dataclass
from typing import Protocol

Json = dict[str, object]


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen: greedy when temperature is 0; top_k and top_p are off at 0. `stop` are strings that end the text and are not part of it."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 0.0
    maximum_tokens: int = 64
    stop: tuple[str, ...] = ()
    seed: int = 1234


@dataclass(frozen=True)
class Request:
    """A prompt. `id` numbers prompts from 0 and, with the seed, decides the random draws, so that a text does not depend on its neighbours."""

    id: int
    text: str
    tokens: tuple[int, ...]
    sampling: Sampling


@dataclass(frozen=True)
class Completion:
    """What was generated for one prompt. `text` is None where nothing was, `finished` tells an end of text or stop string from the token limit."""

    request: Request
    text: str | None
    length: int
    finished: bool
    message: str | None
    duration_seconds: float
    logits: list[list[float]] | None = None

    def as_record(self) -> Json:
        """The JSON line that gpt-neox writes for a prompt."""
        record: Json = {
            "context": self.request.text,
            "text": self.text,
            "length": self.length,
            "finished": self.finished,
            "message": self.message,
            "duration_seconds": round(self.duration_seconds, 4),
        }
        return record if self.logits is None else {**record, "logits": self.logits}


class Codec(Protocol):
    """The part of a tokenizer that generation needs."""

    vocab_size: int
    eod: int

    def encode(self, text: str) -> list[int]: ...

    def decode(self, tokens: list[int]) -> str: ...
