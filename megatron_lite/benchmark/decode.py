"""One more token for every row: how long a step takes around a given context, beside the time in which memory can be read once."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

import torch
from torch import Tensor

from megatron_lite.benchmark.bench import Bench, most_memory, random_tokens, release, serving
from megatron_lite.benchmark.ceilings import Ceilings, all_reduces
from megatron_lite.benchmark.clock import Marks
from megatron_lite.benchmark.counts import step_bytes
from megatron_lite.benchmark.peer import Peer, peers
from megatron_lite.benchmark.table import OURS, Row
from megatron_lite.errors import ConfigError, FitError
from megatron_lite.inference.continuous import ContinuousDecoder
from megatron_lite.inference.decode import Decoder
from megatron_lite.inference.paged import pages_for
from megatron_lite.inference.request import Request, Sampling
from megatron_lite.inference.sample import Rules
from megatron_lite.inference.step import Slots
from megatron_lite.models.spec import ModelSpec
from megatron_lite.parallel.stage import Stage


@dataclass(frozen=True)
class Span:
    """The steps that are timed: as many before the context is reached as after it."""

    context: int
    steps: int

    @property
    def before(self) -> int:
        """Tokens that a row has when the first step begins."""
        return self.context - self.steps // 2

    @property
    def longest(self) -> int:
        return self.before + self.steps + 1

    def check(self, spec: ModelSpec) -> None:
        if self.before < 1 or self.longest > spec.max_positions:
            raise ConfigError(
                f"{self.steps} steps around a context of {self.context} tokens need positions {self.before} to {self.longest}, and the model has 1 to "
                f"{spec.max_positions}; give other --context or --steps"
            )


@dataclass(frozen=True, kw_only=True)
class DecodeOptions:
    batches: Sequence[int]
    span: Span
    peer_span: Span
    plain: bool
    peer: bool
    compiled: Sequence[int]
    folder: str | None


def measure_decoding(bench: Bench, options: DecodeOptions) -> Iterator[Row]:
    for span in (options.span, options.peer_span):
        span.check(bench.spec)
    device, dtype = bench.mesh.device, getattr(torch, bench.spec.dtype)
    ceilings = Ceilings.of(device, dtype)
    yield from ceilings.rows(device, dtype)
    release(device)
    yield from _ours(bench, options, ceilings)
    release(device)
    yield from all_reduces(bench.mesh, bench.spec)
    if options.peer:
        for peer in peers(bench, options.folder):
            yield from _peer(bench, options, ceilings, peer)


def _ours(bench: Bench, options: DecodeOptions, ceilings: Ceilings) -> Iterator[Row]:
    if bench.mesh.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(bench.mesh.device)
    stage = bench.stage()
    decoder = serving(stage, bench, rows=max(options.batches), tokens=options.span.longest)
    for batch in options.batches:
        seconds = median(step_seconds(decoder, batch, options.span))
        yield step_row(bench, bench.ours, batch, options.span, seconds, ceilings, groups=len(decoder.groups))
    yield from most_memory(bench)
    decoder.close()
    del decoder
    release(bench.mesh.device)
    if options.plain:
        for batch in options.batches:
            seconds = median(plain_seconds(bench, stage, batch, options.span))
            yield step_row(bench, f"{OURS}, plain path", batch, options.span, seconds, ceilings, groups=1)


def _peer(bench: Bench, options: DecodeOptions, ceilings: Ceilings, peer: Peer) -> Iterator[Row]:
    kinds = [(f"{peer.name}, eager", batch, False) for batch in options.batches]
    kinds += [(f"{peer.name}, static cache and torch.compile", batch, True) for batch in options.compiled]
    span = options.peer_span
    for name, batch, is_compiled in kinds:
        tokens = [random_tokens(bench.tokenizer.vocab_size, span.before, batch, row) for row in range(batch)]
        started = time.monotonic()
        peer.step_seconds(tokens, steps=span.steps if is_compiled else 3, static=is_compiled)  # what was compiled serves one length of cache
        ready = time.monotonic() - started
        seconds = peer.step_seconds(tokens, steps=span.steps, static=is_compiled)
        if seconds:
            note = f"compiled in {ready:.0f} s" if is_compiled else ""
            yield step_row(bench, name, batch, span, median(seconds), ceilings, groups=bench.mesh.pp.size, note=note)


def step_row(bench: Bench, by: str, batch: int, span: Span, seconds: float, ceilings: Ceilings, *, groups: int, note: str = "") -> Row:
    """`seconds` are of a step of every stage and replica, of which the slowest counts; the stages work on `groups` of the rows at a time."""
    mesh, is_ours = bench.mesh, by.startswith(OURS)
    if is_ours:
        seconds = float(mesh.pp.maximum(mesh.dp.maximum(torch.tensor(seconds, dtype=torch.float64, device=mesh.device))))
    in_turn = -(-batch // groups)  # rows that go through all stages together, while the stages are busy with others
    floor = step_bytes(bench.spec, mesh.tp.size, batch=in_turn, context=span.context) / ceilings.stream
    rate = batch * (mesh.dp.size if is_ours else 1) / seconds
    return Row(what=f"decode, batch {batch}", by=by, rate=rate, unit="tokens/s", seconds=seconds, floor=floor, batch=batch, note=note)


@torch.inference_mode()
def step_seconds(decoder: ContinuousDecoder, batch: int, span: Span) -> list[float]:
    """Of each step of so many rows. What they have behind them was read by the model; the first step, which compiles and captures, does not count."""
    stepper, each = decoder.stepper, pages_for(span.longest)
    if batch > decoder.most * len(decoder.groups):
        raise ConfigError(f"{batch} rows were asked for, and {decoder.most * len(decoder.groups)} share a step at most; use a smaller --batch")
    if batch * each >= stepper.pages:
        raise FitError(f"{batch} rows of {span.longest} tokens need {batch * each} pages of the cache, and {stepper.pages - 1} fit; use a smaller --batch")
    rules = Rules.of([Request(row, "", (0,), Sampling()) for row in range(batch)], device=decoder.device)
    count = min(batch, len(decoder.groups))  # the stages of a pipeline work on one group each
    groups = [Placed.of(decoder, group.slots, range(batch)[index::count], span, rules) for index, group in enumerate(decoder.groups[:count])]
    for group in groups:
        group.place()
        stepper.advance(group.slots, len(group.pages), rules)
    for group in groups:
        group.place()
    marks = Marks(decoder.device)
    marks.mark()
    for _ in range(span.steps):
        for group in groups:
            stepper.advance(group.slots, len(group.pages), rules)
        marks.mark()
    for group in groups:
        group.slots.known()
    return marks.seconds()


@dataclass(frozen=True)
class Placed:
    """Rows of one group, whose prompts were read."""

    slots: Slots
    pages: list[list[int]]
    chosen: Tensor
    before: int

    @classmethod
    def of(cls, decoder: ContinuousDecoder, slots: Slots, rows: range, span: Span, rules: Rules) -> "Placed":
        stepper, each = decoder.stepper, pages_for(span.longest)
        prompts = [random_tokens(stepper.words, span.before, len(rows), row) for row in rows]
        pages = [list(range(1 + row * each, 1 + (row + 1) * each)) for row in rows]
        at_once = max(1, decoder.most_tokens // span.before)
        parts = [stepper.read(prompts[first : first + at_once], pages[first : first + at_once], rules).ready() for first in range(0, len(rows), at_once)]
        return cls(slots, pages, torch.cat(parts).clamp(min=0), span.before)

    def place(self) -> None:
        """Puts the rows where they were when their prompts had been read."""
        self.slots.known()
        self.slots.fill(self.chosen, [self.before] * len(self.pages), self.pages)


def plain_seconds(bench: Bench, stage: Stage, batch: int, span: Span) -> list[float]:
    """The same by the plain path, which waits for every token."""
    sampling = Sampling(maximum_tokens=span.steps + 1)
    asked = [Request(row, "", tuple(random_tokens(bench.tokenizer.vocab_size, span.before, batch, row)), sampling) for row in range(batch)]
    times: list[float] = []

    def watch(row: int, tokens: list[int]) -> None:
        if row == 0:
            times.append(time.perf_counter())

    decoder = Decoder(stage, bench.spec, bench.tokenizer, context=bench.spec.max_positions)
    for _ in decoder.complete(asked, watch=watch):
        pass
    return [end - start for start, end in pairwise(times)]
