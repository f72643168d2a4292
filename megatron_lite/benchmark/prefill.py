"""Reading prompts: how long it takes until the first new token is there, beside the time of the arithmetic at the speed of a large matrix product."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch

from megatron_lite.benchmark.bench import Bench, random_tokens, release, serving
from megatron_lite.benchmark.ceilings import Ceilings
from megatron_lite.benchmark.clock import seconds_of
from megatron_lite.benchmark.counts import prefill_operations
from megatron_lite.benchmark.peer import peers
from megatron_lite.benchmark.table import OURS, Row
from megatron_lite.errors import ConfigError
from megatron_lite.inference.paged import pages_for
from megatron_lite.inference.request import Request, Sampling
from megatron_lite.inference.sample import Rules
from megatron_lite.inference.step import Stepper

REST = 1.0
"""Seconds in which a GPU that lowered its clock to what its power allows has raised it again: a single prompt finds it so, one of many does not."""


@dataclass(frozen=True, kw_only=True)
class PrefillOptions:
    batches: Sequence[int]
    lengths: Sequence[int]
    times: int
    peer: bool
    folder: str | None


def measure_prefill(bench: Bench, options: PrefillOptions) -> Iterator[Row]:
    if not 1 <= min(options.lengths) <= max(options.lengths) <= bench.spec.max_positions:
        raise ConfigError(
            f"prompts of {max(options.lengths)} tokens were asked for, and the model has {bench.spec.max_positions} positions; give other --tokens"
        )
    device, dtype = bench.mesh.device, getattr(torch, bench.spec.dtype)
    ceilings = Ceilings.of(device, dtype)
    yield from ceilings.rows(device, dtype)
    release(device)
    yield from _ours(bench, options, ceilings)
    release(device)
    if options.peer:
        for peer in peers(bench, options.folder):
            for batch, length in _sizes(options):
                prompts = _prompts(bench, batch, length)
                for kind, pause in _pauses(device):
                    seconds = _in_turn(partial(peer.prefill_seconds, prompts), options.times, pause)
                    if any(seconds):
                        yield _row(bench, peer.name, batch, length, median(seconds), ceilings, kind)


def _ours(bench: Bench, options: PrefillOptions, ceilings: Ceilings) -> Iterator[Row]:
    decoder = serving(bench.stage(), bench, rows=max(options.batches), tokens=max(options.lengths))
    for batch, length in _sizes(options):
        for kind, pause in _pauses(bench.mesh.device):
            seconds = read_seconds(decoder.stepper, _prompts(bench, batch, length), times=options.times, pause=pause)
            yield _row(bench, OURS, batch, length, median(seconds), ceilings, kind)
    decoder.close()


def _pauses(device: torch.device) -> list[tuple[str, float]]:
    """What a measurement is called, and the seconds of rest before each of its runs."""
    return [("", 0.0), (", rested", REST)] if device.type == "cuda" else [("", 0.0)]


def _in_turn(run: Callable[[], float], times: int, pause: float) -> list[float]:
    """What so many runs say, after one that does not count."""
    run()
    found = []
    for _ in range(times):
        time.sleep(pause)
        found.append(run())
    return found


def _sizes(options: PrefillOptions) -> list[tuple[int, int]]:
    return [(batch, length) for length in options.lengths for batch in options.batches]


def _prompts(bench: Bench, batch: int, length: int) -> list[list[int]]:
    return [random_tokens(bench.tokenizer.vocab_size, length, length, row) for row in range(batch)]


@torch.inference_mode()
def read_seconds(stepper: Stepper, prompts: Sequence[Sequence[int]], *, times: int, pause: float = 0.0) -> list[float]:
    """Until the first token of every prompt is there; the first run does not count."""
    device, each = stepper.mesh.device, pages_for(len(prompts[0]))
    pages = [list(range(1 + row * each, 1 + (row + 1) * each)) for row in range(len(prompts))]
    if len(prompts) * each >= stepper.pages:
        raise ConfigError(f"{len(prompts)} prompts of {len(prompts[0])} tokens do not fit in the cache of {stepper.pages} pages; use a smaller --batch")
    rules = Rules.of([Request(row, "", (0,), Sampling()) for row in range(len(prompts))], device=device)
    return _in_turn(lambda: seconds_of(lambda: stepper.read(prompts, pages, rules).ready(), device), times, pause)


def _row(bench: Bench, by: str, batch: int, length: int, seconds: float, ceilings: Ceilings, kind: str) -> Row:
    operations = prefill_operations(bench.spec, batch=batch, tokens=length)
    floor = operations / bench.mesh.tp.size / ceilings.product
    rate = operations / seconds / 1e12
    return Row(what=f"prefill of {batch} x {length:,}{kind}", by=by, rate=rate, unit="TFLOP/s", seconds=seconds, floor=floor, batch=batch)
