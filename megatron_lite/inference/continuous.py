"""Continuous batching: prompts of any length share every step, and a row that ends makes room for the next prompt at once. The device is always given the
next step before the tokens of the last one are looked at, and every stage of a pipeline has a group of rows of its own to work on."""

import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import islice

import torch
from torch import Tensor

from megatron_lite.errors import FitError
from megatron_lite.inference.finite import first_bad_layer
from megatron_lite.inference.flight import Courier
from megatron_lite.inference.group import Group, Served, in_a_group
from megatron_lite.inference.paged import FreePages
from megatron_lite.inference.request import Codec, Completion, Request
from megatron_lite.inference.rows import Row, Scribe, Watch
from megatron_lite.inference.sample import Rules
from megatron_lite.inference.segments import to_device
from megatron_lite.inference.step import Slots, Stepper

WORTH_A_PASS = 2048
"""Prompt tokens that keep a GPU as busy as it can be."""


class ContinuousDecoder:
    """Continues prompts with one model. Every rank calls it with the same requests and gets the same completions. `rows` prompts with texts of up to `context`
    tokens share the steps, of which `tokens` are read at once; a pipeline works on `groups` of them, or on as many as it has stages."""

    def __init__(self, stepper: Stepper, tokenizer: Codec, *, context: int, rows: int, tokens: int, groups: int | None = None) -> None:
        self.stepper = stepper
        self.scribe = Scribe(tokenizer, stepper.spec.dtype, partial(first_bad_layer, stepper.stage))
        self.context = context
        self.most_tokens = tokens
        self.device = stepper.mesh.device
        self.courier = Courier(self.device)
        self.free = FreePages(stepper.pages)
        count = min(rows, groups or stepper.mesh.pp.size)
        self.most = in_a_group(rows, count)
        self.groups = [Group(Slots.empty(self.most, longest=context, device=self.device), Rules.of([], device=self.device)) for _ in range(count)]

    @torch.inference_mode()
    def complete(self, requests: Sequence[Request], *, watch: Watch | None = None) -> Iterator[Completion]:
        """Completions as they finish. Prompts must not be longer than the context. `watch` sees every row's tokens grow."""
        started = time.monotonic()
        limits = [min(request.sampling.maximum_tokens, self.context - len(request.tokens)) for request in requests]
        rows = [Served(request, limit, index=index) for index, (request, limit) in enumerate(zip(requests, limits, strict=True))]
        try:
            for row in self._serve(rows, watch):
                row.seconds = time.monotonic() - started
                yield self.scribe.completion(row)
        except torch.OutOfMemoryError as error:
            raise FitError(
                f"reading prompts and generating {self.most * len(self.groups)} rows at once does not fit in the memory of {self.device}: "
                f"{str(error).splitlines()[0]}; use a smaller generation_batch_size, or spread the model over more GPUs"
            ) from None
        finally:
            self._clear()

    def close(self) -> None:
        self.stepper.close()

    def _clear(self) -> None:
        """Lets go of rows that did not end, because something else did."""
        for group in self.groups:
            while group.flights:
                group.flights.popleft().land()
            self.free.give_back(page for row in group.rows for page in row.pages)
            group.rows = []
            group.slots.known()

    def _serve(self, rows: Sequence[Served], watch: Watch | None) -> Iterator[Row]:
        yield from (row for row in rows if row.limit <= 0)
        # those that may take longest come first, or the last of them would be continued almost alone
        waiting = deque(sorted((row for row in rows if row.limit > 0), key=lambda row: -row.limit))
        self._check(waiting)
        while waiting or any(group.rows or group.flights for group in self.groups):
            for group in self.groups:
                self._admit(group, waiting)
                if group.rows:
                    self._step(group)
                while group.flights and (len(group.flights) > 1 or not group.rows):
                    yield from self._land(group, watch)

    def _check(self, rows: Sequence[Served]) -> None:
        longest = max(rows, key=lambda row: row.needs, default=None)
        if longest is not None and longest.needs > self.free.count - 1:
            raise FitError(
                f"prompt {longest.request.id + 1} with its completion needs {longest.needs} pages of the cache, and {self.free.count - 1} fit in the memory "
                f"of {self.device}; use a smaller maximum_tokens, or spread the model over more GPUs"
            )

    def _admit(self, group: Group, waiting: deque[Served]) -> None:
        """Reads the prompts for which there is room, if they are worth a pass. Where there are few, every group gets some."""
        share = -(-len(waiting) // len(self.groups))
        coming, is_full = self._next(waiting, min(self.most - len(group.rows), share))
        enough = min(share, max(1, len(group.rows) // 16))
        if coming and (is_full or not group.rows or len(coming) >= enough or sum(len(row.request.tokens) for row in coming) >= WORTH_A_PASS):
            for _ in coming:
                waiting.popleft()
            self._read(group, coming)

    def _next(self, waiting: Iterable[Served], most: int) -> tuple[list[Served], bool]:
        """The first of those who wait, as many as there are pages for and as are read at once; and whether these are so many that the next must wait."""
        coming: list[Served] = []
        tokens = pages = 0
        for row in islice(waiting, most):
            tokens, pages = tokens + len(row.request.tokens), pages + row.needs
            if coming and tokens > self.most_tokens:
                return coming, True
            if pages > len(self.free):
                break
            coming.append(row)
        return coming, False

    def _read(self, group: Group, coming: list[Served]) -> None:
        for row in coming:
            row.pages = self.free.take(row.needs)
        rules = self._drawn(self._rules_of(coming), coming)
        arrival = self.stepper.read([row.request.tokens for row in coming], [row.pages for row in coming], rules)
        for row in coming:
            row.begun = 1
        group.flights.append(self.courier.send(coming, arrival))
        before = group.slots.known()[: len(group.rows)]
        self._settle(group, [*group.rows, *coming], torch.cat([before, arrival.ready().clamp(min=0)]))

    def _step(self, group: Group) -> None:
        """One more token for every row."""
        arrival = self.stepper.advance(group.slots, len(group.rows), self._drawn(group.rules, group.rows))
        for row in group.rows:
            row.begun += 1
        group.flights.append(self.courier.send(group.rows, arrival))
        self._settle(group, group.rows)

    def _settle(self, group: Group, rows: Sequence[Served], tokens: Tensor | None = None) -> None:
        """Keeps the rows that go on, and gives back what the others held: the device does what it is told in order, so nobody reads it any more. `tokens`
        are the last ones of the rows, where they are not those of the group."""
        staying = [index for index, row in enumerate(rows) if row.begun < row.limit and not row.has_ended]
        if len(staying) == len(rows) == len(group.rows):
            return
        # a GPU begins with the first rows: the longest, or the rest of it would wait for one that was begun last
        staying.sort(key=lambda index: -rows[index].length)
        gone = set(range(len(rows))) - set(staying)
        self.free.give_back(page for index in sorted(gone) for page in rows[index].pages)
        kept = [rows[index] for index in staying]
        if kept:
            tokens = group.slots.known() if tokens is None else tokens
            group.slots.fill(tokens[to_device(staying, self.device)], [row.length for row in kept], [row.pages for row in kept])
        group.rows, group.rules = kept, self._rules_of(kept)

    def _rules_of(self, rows: Sequence[Served]) -> Rules:
        return Rules.of([row.request for row in rows], device=self.device)

    def _drawn(self, rules: Rules, rows: Sequence[Served]) -> Rules:
        """The rules with the numbers by which the rows' next tokens are drawn."""
        return rules if rules.is_greedy else rules.at(to_device([float(row.draws[row.begun]) for row in rows], self.device, torch.float64))

    def _land(self, group: Group, watch: Watch | None) -> Iterator[Row]:
        """Takes down the tokens; rows that end are yielded, and make room. What the device found for a row behind its end is forgotten."""
        ended = False
        flight = group.flights.popleft()
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
            self._settle(group, group.rows)
