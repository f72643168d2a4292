"""A conversation on the terminal: the first process reads and writes, all of them compute."""

import sys
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from typing import TextIO

from megatron_lite.errors import DataError, FitError, UserError
from megatron_lite.inference.decoders import Completer
from megatron_lite.inference.request import Request, Sampling
from megatron_lite.run import Run

QUESTION = "Context prompt >>> "


def converse(run: Run, sampling: Sampling, load: Callable[[], Completer]) -> None:
    """Prompts until the end of input (Ctrl-D). What is wrong with one prompt is said and does not end the session."""
    prompts, number = Prompts(sys.stdin, run.config.generation.prompt_end), 0
    with closing(load()) as decoder:
        if run.mesh.is_writer:
            _say(f"A prompt ends with {prompts.end!r}; Ctrl-D quits.\n")
        while (text := run.mesh.share_from_writer(prompts.ask)) is not None:
            try:
                _answer(run, decoder, _request(run, number, text, sampling))
            except UserError as error:
                if isinstance(error, FitError) and run.mesh.layout.size > 1:
                    raise  # the other processes may have had memory enough, and wait for this one
                if run.mesh.is_writer:
                    _say(f"{error}\n")
            number += 1
        if run.mesh.is_writer:
            _say("\n")


@dataclass
class Prompts:
    """What is typed, cut at `end`; where `end` is empty, the end of input ends the one prompt."""

    source: TextIO
    end: str
    read: str = field(default="", init=False)

    def ask(self) -> str | None:
        """The next prompt, or None at the end of input."""
        _say(QUESTION)
        while not self.end or self.end not in self.read:
            line = self.source.readline()
            if not line:
                last, self.read = self.read, ""
                return last.strip() or None
            self.read += line
        prompt, _, self.read = self.read.partition(self.end)
        return prompt.strip()


def _request(run: Run, number: int, text: str, sampling: Sampling) -> Request:
    tokens = run.tokenizer.encode(text) or [run.tokenizer.eod]
    context = run.config.model.seq_length
    if len(tokens) >= context:
        raise DataError(f"that prompt has {len(tokens)} tokens; the model's context is {context} (seq_length), and one must be free for the answer")
    return Request(number, text, tuple(tokens), sampling)


def _answer(run: Run, decoder: Completer, request: Request) -> None:
    stream = Stream(request.sampling.stop)
    writer = run.mesh.is_writer

    def watch(row: int, tokens: list[int]) -> None:
        if writer:
            _say(stream.more(run.tokenizer.decode(tokens)))

    for completion in decoder.complete([request], watch=watch):
        if writer:
            _say(stream.rest(completion.text or completion.message or "") + "\n")


@dataclass
class Stream:
    """Text on its way to the terminal: only what can no longer change is let out."""

    stop: tuple[str, ...]
    said: str = ""

    def more(self, text: str) -> str:
        """What may be printed of the text so far: half of a character, a stop string, and what may become one, waits."""
        sure = text.rstrip("\ufffd")
        ends = [sure.index(stop) if stop in sure else len(sure) - _overlap(sure, stop) for stop in self.stop]
        return self._let_out(sure[: min(ends, default=len(sure))])

    def rest(self, text: str) -> str:
        """What is left to print of the final text."""
        return self._let_out(text)

    def _let_out(self, text: str) -> str:
        new = text[len(self.said) :] if text.startswith(self.said) else ""
        self.said += new
        return new


def _overlap(text: str, stop: str) -> int:
    """How many of the last characters could be the beginning of the stop string."""
    return next((size for size in range(min(len(stop), len(text)), 0, -1) if text.endswith(stop[:size])), 0)


def _say(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
