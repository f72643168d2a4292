"""Continuous batching: prompts of any length share every step, and a row that ends makes room for the next prompt at once. The device is always given the
next step before the tokens of the last one are looked at."""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from megatron_lite.errors import FitError
from megatron_lite.inference.paged import FreePages, pages_for
from megatron_lite.inference.request import Codec, Completion, Request
from megatron_lite.inference.rows import Row, Scribe, uniform_numbers
from megatron_lite.inference.sample import Rules
from megatron_lite.inference.segments import to_device
from megatron_lite.inference.step import Stepper

Watch = Callable[[int, list[int]], None]
"""Told the row and its tokens so far, after every token."""


@dataclass(eq=False)
class Served(Row):
    """A row with what it holds on the device. `begun` counts the tokens that the device was told to find."""

    index: int = 0
    pages: list[int] = field(default_factory=list)
    begun: int = 0

    @property
    def needs(self) -> int:
        """Pages for all it may come to hold: the last token is never read."""
        return pages_for(len(self.request.tokens) + self.limit - 1)

    @property
    def length(self) -> int:
        """Tokens that the model has seen when the steps that were begun are done."""
        return len(self.request.tokens) + self.begun - 1

    @cached_property
    def draws(self) -> np.ndarray:
        return uniform_numbers(self.request, self.limit) if self.request.sampling.temperature else np.zeros(self.limit)


@dataclass(frozen=True)
class Flight:
    """A step that the device works on: whose tokens these are, and when they are there."""

    rows: Sequence[Served]
    tokens: Tensor
    arrived: torch.cuda.Event | None

    def land(self) -> list[int]:
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.tokens.tolist()


class ContinuousDecoder:
    """Continues prompts with one model. Every rank calls it with the same requests and gets the same completions. `tokens` prompt tokens are read at once."""

    def __init__(self, stepper: Stepper, tokenizer: Codec, *, context: int, tokens: int) -> None:
        self.stepper = stepper
        self.scribe = Scribe(tokenizer, stepper.spec.dtype)
        self.context = context
        self.most_tokens = tokens
        self.device = stepper.stage.mesh.device
        self.most = len(stepper.slots.tokens)
        self.free = FreePages(stepper.pages)
        self.rows: list[Served] = []
        self.rules = Rules.of([], device=self.device)

    @torch.inference_mode()
    def complete(self, requests: Sequence[Request], *, watch: Watch | None = None) -> Iterator[Completion]:
        """Completions as they finish. Prompts must not be longer than the context. `watch` sees every row's tokens grow."""
        started = time.monotonic()
        limits = [min(request.sampling.maximum_tokens, self.context - len(request.tokens)) for request in requests]
        rows = [Served(request, limit, index=index) for index, (request, limit) in enumerate(zip(requests, limits, strict=True))]
        for row in self._serve(rows, watch):
            row.seconds = time.monotonic() - started
            yield self.scribe.completion(row)

    def _serve(self, rows: Sequence[Served], watch: Watch | None) -> Iterator[Row]:
        yield from (row for row in rows if row.limit <= 0)
        waiting = deque(row for row in rows if row.limit > 0)
        self._check(waiting)
        flights: deque[Flight] = deque()
        while waiting or self.rows or flights:
            if flight := self._admit(waiting):
                flights.append(flight)
            if self.rows:
                flights.append(self._step())
            while flights and (len(flights) > 1 or not self.rows):
                yield from self._land(flights.popleft(), watch)

    def _check(self, rows: Sequence[Served]) -> None:
        longest = max(rows, key=lambda row: row.needs, default=None)
        if longest is not None and longest.needs > self.free.count - 1:
            raise FitError(
                f"prompt {longest.request.id + 1} with its completion needs {longest.needs} pages of the cache, and {self.free.count - 1} fit in the memory "
                f"of {self.device}; use a smaller maximum_tokens, or spread the model over more GPUs"
            )

    def _admit(self, waiting: deque[Served]) -> Flight | None:
        """Reads the prompts for which there is room, if they are worth a pass."""
        room = self.most - len(self.rows)
        if room < min(len(waiting), max(1, self.most // 16)):
            return None
        coming: list[Served] = []
        tokens = pages = 0
        while waiting and len(coming) < room:
            row = waiting[0]
            tokens, pages = tokens + len(row.request.tokens), pages + row.needs
            if pages > len(self.free) or (coming and tokens > self.most_tokens):
                break
            coming.append(waiting.popleft())
        if not coming:
            return None
        for row in coming:
            row.pages = self.free.take(row.needs)
        rules = self._rules_of(coming)
        chosen = self.stepper.read([row.request.tokens for row in coming], [row.pages for row in coming], rules)
        for row in coming:
            row.begun = 1
        flight = self._watched(coming, chosen)
        self._settle([*self.rows, *coming], torch.cat([self.stepper.slots.tokens[: len(self.rows)], chosen]))
        return flight

    def _step(self) -> Flight:
        """One more token for every row."""
        rules = self.rules if self.rules.is_greedy else self.rules.at(self._draws(self.rows))
        chosen = self.stepper.advance(len(self.rows), rules)
        for row in self.rows:
            row.begun += 1
        flight = self._watched(self.rows, chosen)
        self._settle(self.rows, self.stepper.slots.tokens[: len(self.rows)])
        return flight

    def _settle(self, rows: Sequence[Served], tokens: Tensor) -> None:
        """Keeps the rows that go on, and gives back what the others held: the device does what it is told in order, so nobody reads it any more."""
        staying = [index for index, row in enumerate(rows) if row.begun < row.limit and not row.has_ended]
        if len(staying) == len(rows) == len(self.rows):
            return
        gone = set(range(len(rows))) - set(staying)
        self.free.give_back(page for index in sorted(gone) for page in rows[index].pages)
        kept = [rows[index] for index in staying]
        self.stepper.slots.fill(tokens[to_device(staying, self.device)], [row.length for row in kept], [row.pages for row in kept])
        self.rows, self.rules = kept, self._rules_of(kept)

    def _rules_of(self, rows: Sequence[Served]) -> Rules:
        rules = Rules.of([row.request for row in rows], device=self.device)
        return rules if rules.is_greedy else rules.at(self._draws(rows))

    def _draws(self, rows: Sequence[Served]) -> Tensor:
        return to_device([float(row.draws[row.begun]) for row in rows], self.device, torch.float64)

    def _watched(self, rows: Sequence[Served], chosen: Tensor) -> Flight:
        if self.device.type != "cuda":
            return Flight(rows, chosen, None)
        tokens = torch.empty(chosen.shape, dtype=chosen.dtype, pin_memory=True)
        tokens.copy_(chosen, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
        return Flight(rows, tokens, arrived)

    def _land(self, flight: Flight, watch: Watch | None) -> Iterator[Row]:
        """Takes down the tokens; rows that end are yielded, and make room. What the device found for a row behind its end is forgotten."""
        ended = False
        for row, token in zip(flight.rows, flight.land(), strict=True):
            if row.is_done:
                continue
            self.scribe.take(row, token)
            if watch:
                watch(row.index, row.tokens)
            if row.has_ended:
                ended = True
                yield row
        if ended:
            self._settle(self.rows, self.stepper.slots.tokens[: len(self.rows)])
