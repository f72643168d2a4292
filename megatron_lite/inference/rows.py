"""One prompt being continued, token by token, until the model, a stop string or the limit ends it."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from megatron_lite.errors import CheckpointError
from megatron_lite.inference.request import Codec, Completion, Request

Watch = Callable[[int, list[int]], None]
"""Told the row and its tokens so far, after every token."""

NOT_STARTED = "WARNING: text generation did not start; "
NO_ROOM = NOT_STARTED + "the prompt fills the whole context"
ENDED_AT_ONCE = NOT_STARTED + "the model ended the text at once"
NO_TOKEN = -1


@dataclass
class Row:
    """One prompt being continued."""

    request: Request
    limit: int
    tokens: list[int] = field(default_factory=list)
    logits: list[list[float]] = field(default_factory=list)
    text: str | None = None
    finished: bool = False
    seconds: float | None = None

    @property
    def is_done(self) -> bool:
        return self.seconds is not None

    @property
    def has_ended(self) -> bool:
        return self.finished or len(self.tokens) >= self.limit


@dataclass(frozen=True)
class Scribe:
    """Takes down what the model says. `kind` is the precision it computes in, `suspect` tells the first layer that computes what is no number for a text."""

    tokenizer: Codec
    kind: str
    suspect: Callable[[list[int]], int | None]
    keep_logits: bool = False

    def take(self, row: Row, token: int) -> None:
        """Adds a token to the row, or ends it."""
        if token == NO_TOKEN:
            layer = self.suspect([*row.request.tokens, *row.tokens])
            where = "" if layer is None else f", first behind layer {layer}"
            raise CheckpointError(
                f"the logits of prompt {row.request.id + 1} are no numbers (NaN or infinite) after {len(row.tokens)} tokens{where}: the weights are damaged "
                f"(tools/inspect_checkpoint.py FOLDER --values counts NaN), or {self.kind} overflows (try precision=bfloat16 or fp32)"
            )
        if token == self.tokenizer.eod:
            row.finished = True
            return
        row.tokens.append(token)
        if stops := row.request.sampling.stop:
            end = self._end(row.tokens, max(map(len, stops)) + len(self.tokenizer.decode([token])))
            if any(stop in end for stop in stops):
                self._cut(row, stops)

    def _end(self, tokens: list[int], characters: int) -> str:
        """The end of a text, at least so many characters of it if it has them; a token may be part of a character, or have no text at all."""
        size = characters + 8
        while len(text := self.tokenizer.decode(tokens[-size:])) < characters + 3 and size < len(tokens):  # the first 3 may be pieces of one
            size *= 2
        return text

    def _cut(self, row: Row, stops: tuple[str, ...]) -> None:
        """Ends the row before the first stop string."""
        text = self.tokenizer.decode(row.tokens)
        found = [text.index(stop) for stop in stops if stop in text]
        if not found:
            return
        row.finished = True
        row.text = text[: min(found)]
        while row.tokens and len(self.tokenizer.decode(row.tokens[:-1])) >= len(row.text):
            row.tokens.pop()

    def completion(self, row: Row) -> Completion:
        text = (row.text if row.text is not None else self.tokenizer.decode(row.tokens)) if row.tokens else None
        message = None if row.tokens else ENDED_AT_ONCE if row.limit > 0 else NO_ROOM
        return Completion(row.request, text, len(row.tokens), row.finished, message, row.seconds or 0.0, row.logits if self.keep_logits else None)


def uniform_numbers(request: Request, count: int) -> np.ndarray:
    """What a prompt's tokens are drawn by: numbered by seed and prompt, not drawn in turn, so that the text is the same at every cut, batch and order."""
    return np.random.default_rng((request.sampling.seed % 2**64, request.id)).random(count)
