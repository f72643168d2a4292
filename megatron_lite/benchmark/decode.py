"""One more token for every row: how long a step takes around a given context, beside the time in which memory can be read once."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

import torch

from megatron_lite.benchmark.bench import Bench, random_tokens, release, serving
from megatron_lite.benchmark.ceilings import Ceilings, all_reduces
from megatron_lite.benchmark.clock import Marks
from megatron_lite.benchmark.counts import step_bytes
from megatron_lite.benchmark.peer import Peer, peers
from megatron_lite.benchmark.table import OURS, Row
from megatron_lite.errors import ConfigError, FitError
from megatron_lite.inference.decode import Decoder
from megatron_lite.inference.decoders import MOST_ROWS, MOST_TOKENS
from megatron_lite.inference.paged import pages_for
from megatron_lite.inference.request import Request, Sampling
from megatron_lite.inference.sample import Rules
from megatron_lite.inference.step import Stepper
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
    plain: bool
    peer: bool
    compiled: Sequence[int]
    folder: str | None


def measure_decoding(bench: Bench, options: DecodeOptions) -> Iterator[Row]:
    options.span.check(bench.spec)
    if not 1 <= min(options.batches) <= max(options.batches) <= MOST_ROWS:
        raise ConfigError(f"batches of {', '.join(map(str, options.batches))} rows were asked for; give --batch between 1 and {MOST_ROWS}")
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
    stage = bench.stage()
    stepper = serving(stage, bench, rows=max(options.batches), tokens=options.span.longest, context=bench.spec.max_positions).stepper
    for batch in options.batches:
        yield step_row(bench, OURS, batch, options.span, median(step_seconds(stepper, batch, options.span)), ceilings)
    if options.plain:
        del stepper
        release(bench.mesh.device)
        for batch in options.batches:
            yield step_row(bench, f"{OURS}, plain path", batch, options.span, median(plain_seconds(bench, stage, batch, options.span)), ceilings)


def _peer(bench: Bench, options: DecodeOptions, ceilings: Ceilings, peer: Peer) -> Iterator[Row]:
    kinds = [(f"{peer.name}, eager", batch, False) for batch in options.batches]
    kinds += [(f"{peer.name}, static cache and torch.compile", batch, True) for batch in options.compiled]
    for name, batch, is_compiled in kinds:
        tokens = [random_tokens(bench.tokenizer.vocab_size, options.span.before, batch, row) for row in range(batch)]
        started = time.monotonic()
        peer.step_seconds(tokens, steps=options.span.steps if is_compiled else 3, static=is_compiled)  # what was compiled serves one length of cache
        ready = time.monotonic() - started
        seconds = peer.step_seconds(tokens, steps=options.span.steps, static=is_compiled)
        if seconds:
            yield step_row(bench, name, batch, options.span, median(seconds), ceilings, note=f"compiled in {ready:.0f} s" if is_compiled else "")


def step_row(bench: Bench, by: str, batch: int, span: Span, seconds: float, ceilings: Ceilings, *, note: str = "") -> Row:
    """`seconds` are of a step of every replica, of which the slowest counts."""
    mesh, is_ours = bench.mesh, by.startswith(OURS)
    if is_ours:
        seconds = float(mesh.dp.maximum(torch.tensor(seconds, dtype=torch.float64, device=mesh.device)))
    floor = step_bytes(bench.spec, mesh.tp.size, batch=batch, context=span.context) / ceilings.stream
    rate = batch * (mesh.dp.size if is_ours else 1) / seconds
    return Row(what=f"decode, batch {batch}", by=by, rate=rate, unit="tokens/s", seconds=seconds, floor=floor, batch=batch, note=note)


@torch.inference_mode()
def step_seconds(stepper: Stepper, batch: int, span: Span) -> list[float]:
    """Of each step of so many rows. What they have behind them was read by the model; the first step, which compiles and captures, does not count."""
    each, device = pages_for(span.longest), stepper.stage.mesh.device
    if batch * each >= stepper.pages:
        raise FitError(f"{batch} rows of {span.longest} tokens need {batch * each} pages of the cache, and {stepper.pages - 1} fit; use a smaller --batch")
    pages = [list(range(1 + row * each, 1 + (row + 1) * each)) for row in range(batch)]
    rules = Rules.of([Request(row, "", (0,), Sampling()) for row in range(batch)], device=device)
    prompts = [random_tokens(stepper.words, span.before, batch, row) for row in range(batch)]
    at_once = max(1, MOST_TOKENS // span.before)
    parts = [stepper.read(prompts[first : first + at_once], pages[first : first + at_once], rules) for first in range(0, batch, at_once)]
    chosen = torch.cat(parts).clamp(min=0)
    stepper.slots.fill(chosen, [span.before] * batch, pages)
    stepper.advance(batch, rules)
    stepper.slots.fill(chosen, [span.before] * batch, pages)
    marks = Marks(device)
    marks.mark()
    for _ in range(span.steps):
        stepper.advance(batch, rules)
        marks.mark()
    return marks.seconds()


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
