"""Which way of decoding serves a run: continuous batching with captured steps on GPUs, the plain path elsewhere."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal, Protocol

import torch

from megatron_lite.errors import FitError
from megatron_lite.inference.continuous import ContinuousDecoder
from megatron_lite.inference.decode import Decoder
from megatron_lite.inference.paged import page_bytes, pages_for
from megatron_lite.inference.request import Codec, Completion, Request
from megatron_lite.inference.rows import Watch
from megatron_lite.inference.score import tokens_at_once
from megatron_lite.models.spec import ModelSpec
from megatron_lite.parallel.budget import free_memory
from megatron_lite.parallel.stage import Stage
from megatron_lite.run import Run

MOST_ROWS = 192
"""Rows that share a step on a GPU where nobody says otherwise."""
MOST_TOKENS = 8192
"""Prompt tokens that are read at once."""
LEFT_FREE = 0.1
"""Share of the free memory that stays free beside the cache, for what reading prompts takes for a moment."""

Schedule = Literal["in-flight", "naive"]


class Completer(Protocol):
    def complete(self, requests: Sequence[Request], *, watch: Watch | None = None) -> Iterator[Completion]:
        """Completions as they finish; every rank calls it with the same requests."""
        ...

    def close(self) -> None:
        """Lets go of what must not outlive the communicators."""
        ...


@dataclass(frozen=True)
class Load:
    """What is to be served: texts of up to `context` tokens, `rows` of them at once where that is said; the longest of the prompts with its completion has
    `tokens`."""

    context: int
    rows: int | None = None
    tokens: int | None = None
    schedule: Schedule = "in-flight"

    def groups(self, stages: int) -> int:
        """Groups of rows that a pipeline works on: one for every stage, or all rows in one, which one stage after the other works on."""
        return stages if self.schedule == "in-flight" else 1


def prepare_for(run: Run, load: Load) -> None:
    """Begins what the decoder of this run can do before the weights are there."""
    if run.mesh.device.type == "cuda" and find_spec("triton"):
        from megatron_lite.inference.captured import SIZES
        from megatron_lite.inference.warm import warm_up

        groups = load.groups(run.mesh.pp.size)
        rows = min(load.rows or MOST_ROWS, SIZES[-1] * groups)
        warm_up(run, rows=-(-rows // min(rows, groups)), context=load.context)


def decoder_for(stage: Stage, spec: ModelSpec, tokenizer: Codec, load: Load) -> Completer:
    """The fastest decoder for this device."""
    if stage.mesh.device.type == "cuda" and find_spec("triton"):  # which comes with torch on Linux
        return continuous_decoder(stage, spec, tokenizer, load)
    return Decoder(stage, spec, tokenizer, context=load.context, rows=load.rows)


def continuous_decoder(stage: Stage, spec: ModelSpec, tokenizer: Codec, load: Load) -> ContinuousDecoder:
    """Serves as many rows at once as are wanted, and as fit in memory."""
    from megatron_lite.inference.captured import SIZES, CapturedStepper

    groups = load.groups(stage.mesh.pp.size)
    rows = min(load.rows or MOST_ROWS, SIZES[-1] * groups)
    pages = 1 + min(rows * pages_for(load.tokens or load.context), _pages_that_fit(stage, spec))
    stepper = CapturedStepper(stage, spec, words=tokenizer.vocab_size, pages=pages)
    tokens = min(MOST_TOKENS, tokens_at_once(spec, stage.mesh.tp.size, stage.mesh.device))
    return ContinuousDecoder(stepper, tokenizer, context=load.context, rows=rows, tokens=tokens, groups=groups)


def _pages_that_fit(stage: Stage, spec: ModelSpec) -> int:
    """The same on every rank of a replica: what the fullest GPU has room for."""
    mesh = stage.mesh
    free = free_memory(mesh.device)
    blocks = sum(map(spec.is_block, stage.layers))
    pages = int(free * (1 - LEFT_FREE)) // page_bytes(spec, blocks=blocks, tp=mesh.tp.size)
    for axis in (mesh.tp, mesh.pp):
        pages = int(axis.minimum(torch.tensor(float(pages), device=mesh.device)))
    if pages < pages_for(1) + 1:
        raise FitError(f"beside the weights {free / 1e9:.1f} GB of {mesh.device} are free, too little for a cache; spread the model over more GPUs")
    return pages
