"""Which way of decoding serves a run: continuous batching with captured steps on GPUs, the plain path elsewhere."""

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch

from megatron_lite.errors import FitError
from megatron_lite.inference.continuous import ContinuousDecoder, Watch
from megatron_lite.inference.decode import Decoder
from megatron_lite.inference.paged import page_bytes, pages_for
from megatron_lite.inference.request import Codec, Completion, Request
from megatron_lite.inference.score import tokens_at_once
from megatron_lite.inference.step import Slots
from megatron_lite.models.spec import ModelSpec
from megatron_lite.parallel.budget import free_memory
from megatron_lite.parallel.stage import Stage

MOST_ROWS = 128
"""Rows that share a step on a GPU where nobody says otherwise."""
MOST_TOKENS = 8192
"""Prompt tokens that are read at once."""
LEFT_FREE = 0.1
"""Share of the free memory that stays free beside the cache, for what reading prompts takes for a moment."""


class Completer(Protocol):
    def complete(self, requests: Sequence[Request], *, watch: Watch | None = None) -> Iterator[Completion]:
        """Completions as they finish; every rank calls it with the same requests."""
        ...


def plain_decoder(stage: Stage, spec: ModelSpec, tokenizer: Codec, *, context: int, rows: int) -> Completer:
    return Decoder(stage, spec, tokenizer, context=context)


def continuous_decoder(stage: Stage, spec: ModelSpec, tokenizer: Codec, *, context: int, rows: int, tokens: int | None = None) -> ContinuousDecoder:
    """Serves up to `rows` rows at once, as far as their `tokens` tokens (of one prompt with its completion each, or the context) fit in memory."""
    from megatron_lite.inference.captured import CapturedStepper

    device = stage.mesh.device
    slots = Slots.empty(rows, longest=context, device=device)
    pages = 1 + min(rows * pages_for(tokens or context), _pages_that_fit(stage, spec))
    stepper = CapturedStepper(stage, spec, words=tokenizer.vocab_size, slots=slots, pages=pages)
    return ContinuousDecoder(stepper, tokenizer, context=context, tokens=min(MOST_TOKENS, tokens_at_once(spec, stage.mesh.tp.size, device)))


def _pages_that_fit(stage: Stage, spec: ModelSpec) -> int:
    """The same on every rank of a replica: what the fullest GPU has room for."""
    mesh = stage.mesh
    free = free_memory(mesh.device)
    blocks = sum(2 <= number < spec.norm_number for number in stage.layers)
    pages = int(free * (1 - LEFT_FREE)) // page_bytes(spec, blocks=blocks, tp=mesh.tp.size)
    pages = int(-float(mesh.tp.maximum(torch.tensor(-float(pages), device=mesh.device))))
    if pages < pages_for(1) + 1:
        raise FitError(f"beside the weights {free / 1e9:.1f} GB of {mesh.device} are free, too little for a cache; spread the model over more GPUs")
    return pages
