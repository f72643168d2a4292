"""A file of prompts of very different lengths, from the first to the last text: what continuous batching makes of the speed of a full batch."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import log
from statistics import median

import numpy as np
import torch

from megatron_lite.benchmark.bench import Bench, random_tokens, release, serving
from megatron_lite.benchmark.ceilings import Ceilings
from megatron_lite.benchmark.clock import seconds_of
from megatron_lite.benchmark.decode import Span, step_row, step_seconds
from megatron_lite.benchmark.peer import Peer, peers
from megatron_lite.benchmark.table import Row
from megatron_lite.errors import ConfigError
from megatron_lite.inference.continuous import ContinuousDecoder
from megatron_lite.inference.paged import pages_for
from megatron_lite.inference.request import Request, Sampling

FULL = 64
"""Rows of the batch whose speed the file is held against, and that transformers continues at once."""
MIXED = "mixed prompts"


@dataclass(frozen=True)
class Mixture:
    """Prompts whose lengths and numbers of new tokens are spread evenly over their orders of magnitude."""

    count: int
    prompt: tuple[int, int]
    new: tuple[int, int]
    seed: int

    @property
    def longest(self) -> int:
        return self.prompt[1] + self.new[1]

    def requests(self, words: int) -> list[Request]:
        """The same in every process and on every machine."""
        generator = np.random.default_rng(self.seed)
        lengths, limits = (_log_uniform(generator, self.count, *ends) for ends in (self.prompt, self.new))
        return [
            Request(number, "", tuple(random_tokens(words, length, self.seed, number)), Sampling(maximum_tokens=limit))
            for number, (length, limit) in enumerate(zip(lengths, limits, strict=True))
        ]


def _log_uniform(generator: np.random.Generator, count: int, low: int, high: int) -> list[int]:
    """Whole numbers from low to high, both included."""
    return np.exp(generator.uniform(log(low), log(high + 1), count)).astype(int).clip(low, high).tolist()


@dataclass(frozen=True, kw_only=True)
class GenerateOptions:
    mixture: Mixture
    rows: int
    peer_prompts: int
    peer: bool
    folder: str | None


def measure_generation(bench: Bench, options: GenerateOptions) -> Iterator[Row]:
    mixture, positions = options.mixture, bench.spec.max_positions
    if mixture.longest > positions:
        raise ConfigError(f"prompts and their texts have up to {mixture.longest} tokens, and the model {positions} positions; give other --lengths or --new")
    dtype = getattr(torch, bench.spec.dtype)
    ceilings = Ceilings.of(bench.mesh.device, dtype)
    yield from ceilings.rows(bench.mesh.device, dtype)
    release(bench.mesh.device)
    yield from _ours(bench, options, ceilings)
    release(bench.mesh.device)
    if options.peer:
        for peer in peers(bench, options.folder):
            yield from _peer(bench, options, peer)


def _ours(bench: Bench, options: GenerateOptions, ceilings: Ceilings) -> Iterator[Row]:
    mesh = bench.mesh
    decoder = serving(bench.stage(), bench, rows=options.rows, tokens=options.mixture.longest)
    ready = seconds_of(lambda: _warm_up(decoder, options.rows), mesh.device)
    yield Row(what=f"compile and capture up to {options.rows} rows", by=bench.ours, seconds=ready)
    span = _span(options.mixture.longest)
    full = min(FULL, options.rows, (decoder.stepper.pages - 1) // pages_for(span.longest))
    decoding = step_row(bench, bench.ours, full, span, median(step_seconds(decoder, full, span)), ceilings, groups=len(decoder.groups))
    yield decoding
    asked = options.mixture.requests(bench.tokenizer.vocab_size)
    found: list[int] = []
    mesh.wait()

    def work() -> None:
        found.extend(completion.length for completion in decoder.complete(asked[mesh.dp.index :: mesh.dp.size]))
        mesh.wait()

    seconds = seconds_of(work, mesh.device)
    decoder.close()
    tokens = int(mesh.dp.gather(torch.tensor([sum(found)], device=mesh.device)).sum())
    share = tokens / seconds / (decoding.rate or 1)
    note = f"{_told(asked)}; {share:.0%} of decoding {full} rows"
    yield Row(what=MIXED, by=bench.ours, rate=tokens / seconds, unit="tokens/s", seconds=seconds, batch=options.rows, note=note)


def _peer(bench: Bench, options: GenerateOptions, peer: Peer) -> Iterator[Row]:
    asked = options.mixture.requests(bench.tokenizer.vocab_size)[: options.peer_prompts]
    batches = [[(request.tokens, request.sampling.maximum_tokens) for request in asked[first : first + FULL]] for first in range(0, len(asked), FULL)]
    peer.generate_seconds([[(tokens[:4], 2) for tokens, _ in batches[0]]])
    seconds = peer.generate_seconds(batches)
    tokens = sum(request.sampling.maximum_tokens for request in asked)
    if seconds:
        note = f"the first {_told(asked)}, padded, {FULL} at once"
        yield Row(what=MIXED, by=peer.name, rate=tokens / seconds, unit="tokens/s", seconds=seconds, batch=FULL, note=note)


def _told(asked: Sequence[Request]) -> str:
    read, new = sum(len(request.tokens) for request in asked), sum(request.sampling.maximum_tokens for request in asked)
    return f"{len(asked):,} prompts of {read:,} tokens, {new:,} new ones"


def _span(longest: int) -> Span:
    """What the prompts allow, and the cache has room for."""
    context = min(256, longest // 2)
    return Span(context, min(64, context))


def _warm_up(decoder: ContinuousDecoder, rows: int) -> None:
    """Steps of every size of batch."""
    sizes = {min(rows, 1 << power) for power in range(rows.bit_length() + 1)}
    for size in sorted(sizes):
        for _ in decoder.complete([Request(number, "", (1, 2, 3), Sampling(maximum_tokens=3)) for number in range(size)]):
            pass
