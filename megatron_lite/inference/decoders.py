"""Which way of decoding serves a run: continuous batching with captured steps on GPUs, the plain path elsewhere."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal, Protocol

from megatron_lite.errors import FitError
from megatron_lite.inference.continuous import ContinuousDecoder
from megatron_lite.inference.decode import Decoder
from megatron_lite.inference.group import in_a_group
from megatron_lite.inference.paged import page_bytes, pages_for
from megatron_lite.inference.request import Codec, Completion, Request
from megatron_lite.inference.rows import Watch
from megatron_lite.models.memory import generation_footprint
from megatron_lite.models.spec import ModelSpec
from megatron_lite.parallel.budget import CAPTURED, free_memory, least
from megatron_lite.parallel.mesh import Mesh
from megatron_lite.parallel.stage import Stage
from megatron_lite.run import Run

MOST_ROWS = 192
"""Rows that share a step on a GPU where nobody says otherwise."""
MOST_TOKENS = 8192
"""Prompt tokens that are read at once."""
LEFT_FREE, MOST_LEFT_FREE = 0.1, 3 * 2**30
"""Share of the free memory that stays free beside the cache at least, for what reading prompts takes for a moment, and the bytes that are enough for it."""

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

    def at_once(self, stages: int) -> int:
        """Rows that are served at once on GPUs: as many as are wanted, and as steps are captured for."""
        from megatron_lite.inference.captured import SIZES

        return min(self.rows or MOST_ROWS, SIZES[-1] * self.groups(stages))


def captures(mesh: Mesh) -> bool:
    """Whether our kernels serve these devices and steps can be captured: sums that go through the host cannot be."""
    has_kernels = mesh.device.type == "cuda" and find_spec("triton") is not None  # which comes with torch on Linux
    return has_kernels and not (mesh.tp.size > 1 and mesh.tp.through_host)


def prepare_for(run: Run, load: Load) -> None:
    """Begins what the decoder of this run can do before the weights are there."""
    if captures(run.mesh):
        from megatron_lite.inference.warm import warm_up

        stages = run.mesh.pp.size
        warm_up(run, rows=in_a_group(load.at_once(stages), load.groups(stages)), context=load.context)


def decoder_for(stage: Stage, spec: ModelSpec, tokenizer: Codec, load: Load) -> Completer:
    """The fastest decoder for this device."""
    if captures(stage.mesh):
        return continuous_decoder(stage, spec, tokenizer, load)
    return Decoder(stage, spec, tokenizer, context=load.context, rows=load.rows)


def continuous_decoder(stage: Stage, spec: ModelSpec, tokenizer: Codec, load: Load) -> ContinuousDecoder:
    """Serves as many rows at once as are wanted, and as fit in memory."""
    from megatron_lite.inference.captured import CapturedStepper

    stages, longest = stage.mesh.pp.size, load.tokens or load.context
    groups, rows = load.groups(stages), load.at_once(stages)
    pages = min(1 + rows * pages_for(longest), _pages_that_fit(stage, spec, longest))
    stepper = CapturedStepper(stage, spec, words=tokenizer.vocab_size, pages=pages)
    room = max(0, free_memory(stage.mesh.device) - CAPTURED) // 2
    tokens = max(longest, min(MOST_TOKENS, least(stage.mesh, room * longest // _reading(stage, spec, longest))))
    return ContinuousDecoder(stepper, tokenizer, context=load.context, rows=rows, tokens=tokens, groups=groups)


def _pages_that_fit(stage: Stage, spec: ModelSpec, longest: int) -> int:
    """Those for which there is memory beside what reading the longest text takes."""
    from megatron_lite.inference.captured import exchanging

    mesh = stage.mesh
    free = free_memory(mesh.device, outside=exchanging(spec, mesh.tp.size))
    beside = max(min(int(free * LEFT_FREE), MOST_LEFT_FREE), _reading(stage, spec, longest) + CAPTURED)
    pages = least(mesh, max(0, free - beside) // page_bytes(spec, blocks=sum(map(spec.is_block, stage.layers)), tp=mesh.tp.size))
    if pages < pages_for(1) + 1:
        raise FitError(f"beside the weights {free / 1e9:.1f} GB of {mesh.device} are free, too little for a cache; spread the model over more GPUs")
    return pages


def _reading(stage: Stage, spec: ModelSpec, tokens: int) -> int:
    """Bytes that reading so many tokens takes for a moment, as the plan of a run reckons them. The place where matrices of 8 bits are widened is taken."""
    return generation_footprint(spec, stage.mesh.layout, stage.mesh.pp.index, rows=1, context=tokens).activations
