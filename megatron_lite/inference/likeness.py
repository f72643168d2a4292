"""A stage without memory, gone through on tensors that lie nowhere: what it would launch for prompts and steps."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from megatron_lite.inference.captured import PROGRAMS, SHARED, CapturedStepper, capacity_of, lays_shares, size_in
from megatron_lite.inference.kernels.exchange import OFFERED, PATIENCE, sum_and_norm
from megatron_lite.inference.kernels.kernel import Launch, watched
from megatron_lite.inference.kernels.packed import LONG
from megatron_lite.inference.kernels.shares import PROVEN, meet, sum_without_norm
from megatron_lite.inference.nowhere import NOWHERE, Shapes, Silent, Unseen
from megatron_lite.inference.paged import FilledPast
from megatron_lite.inference.reading import COUNTS
from megatron_lite.inference.step import Slots
from megatron_lite.models.spec import ModelSpec
from megatron_lite.parallel.layers import LayerNorm
from megatron_lite.parallel.mesh import Axis
from megatron_lite.parallel.peers import Peers, Shares
from megatron_lite.parallel.quantized import quantize
from megatron_lite.parallel.shards import take
from megatron_lite.parallel.stage import Stage
from megatron_lite.run import Run

READINGS = ((37, 1), (64, 1), (64, COUNTS[-1]), (37, 3))
"""Tokens and prompts that are read together: of every kind one. Captured rows are filled up with prompts."""
LONG_READING = LONG, 1
"""This takes longest to compile, and most prompts are shorter."""


def likeness(run: Run) -> Stage:
    """This process's layers without memory, and of its blocks, which are alike, the first two."""
    mesh, spec = run.mesh, run.spec
    tp = Silent(mesh.tp.name, mesh.tp.index, mesh.tp.ranks)
    plan, numbers = run.architecture.plan(spec, tp), mesh.layout.numbers(spec.layers)[mesh.pp.index]
    dtype: torch.dtype = getattr(torch, spec.dtype)
    more = [number for number in numbers if spec.is_block(number)][2:]
    layers: dict[int, nn.Module] = {}
    for number in numbers:
        if number not in more:
            with NOWHERE:
                layers[number] = plan[number]().to(dtype).requires_grad_(False)
            _separate(layers[number], run, number, tp)
            if spec.quantization:
                with Shapes():
                    quantize(layers[number], tp)
    return Stage(layers, replace(mesh, device=NOWHERE, tp=tp), spec.hidden, dtype)


def _separate(layer: nn.Module, run: Run, number: int, tp: Axis) -> None:
    """Norms have as many copies as the checkpoint keeps apart."""
    shards = run.source.shards(number)
    for path, norm in layer.named_modules():
        if isinstance(norm, LayerNorm):
            for kind, parameter in list(norm.named_parameters()):
                found = take(norm.rules[kind], shards[f"{path}.{kind}"], tp.index, tp.size)
                norm.register_parameter(kind, nn.Parameter(parameter.new_empty(found.shape), requires_grad=False))


@torch.inference_mode()
def launches(stage: Stage, spec: ModelSpec, *, words: int, rows: int, context: int) -> list[Launch]:
    """What the likeness of a stage launches for prompts and for steps of up to so many rows: of launches that share their code the first."""
    found: dict[tuple[object, ...], Launch] = {}
    with watched(lambda launch: found.setdefault(kind_of(launch), launch)), Shapes():
        stepper = _stepper(stage, spec, words)
        most = rows if rows == 1 or stage.mesh.pp.size > 1 else max(rows, COUNTS[-1])

        def read(tokens: int, prompts: int) -> None:
            if stepper.stack is not None and prompts <= most:
                stepper._read(_entering(stage, tokens), _pasts(stepper, tokens, prompts), _numbers(prompts))

        for reading in READINGS:
            read(*reading)
        slots = Slots.empty(rows, longest=context, device=NOWHERE)
        for size in dict.fromkeys(size_in(slots, count) for count in range(rows, 0, -1)):
            stepper._rows(slots, size, _entering(stage, size))
        for count in range(1, rows + 1) if stepper.peers is not None and stage.mesh.pp.is_last else ():
            stepper.gathered(torch.empty(count, OFFERED, device=NOWHERE))
        if context >= LONG:
            read(*LONG_READING)
    return list(found.values())


def kind_of(launch: Launch) -> tuple[object, ...]:
    """What Triton compiles for: the kernel, its options, types and alignment of tensors, and whether a number is 1 or a multiple of 16."""

    def kind(value: object) -> object:
        if isinstance(value, Tensor):
            return value.dtype, value.data_ptr() % 16 == 0
        return ("one" if value == 1 else value % 16 == 0) if isinstance(value, int) and not isinstance(value, bool) else type(value)

    return launch.kernel, *map(kind, launch.args), *launch.options.items()


def _stepper(stage: Stage, spec: ModelSpec, words: int) -> CapturedStepper:
    """One for the likeness of a stage; where ranks exchange, as if they reached each other's memory."""
    stepper, tp = CapturedStepper(stage, spec, words=words, pages=2), stage.mesh.tp
    if tp.size == 1 or stepper.stack is None:
        return stepper
    boxes, turns = torch.empty(tp.size, dtype=torch.int64, device=NOWHERE), torch.empty(PROGRAMS, dtype=torch.int32, device=NOWHERE)
    peers = Peers(tp.index, tp.size, capacity_of(spec), boxes, turns, boxes)
    found, out = torch.empty(3, spec.hidden, device=NOWHERE), torch.empty(0, 3, spec.hidden, dtype=stage.dtype, device=NOWHERE)
    sum_and_norm(found, found.unsqueeze(0), None, out[:, 0], out[:, 0], out, peers, eps=0.0, patience=PATIENCE)  # as they are proven
    stepper.peers, stepper.stack = peers, replace(stepper.stack, peers=peers, shares=_shares(stage) if lays_shares(tp.size) else None)
    return stepper


def _shares(stage: Stage) -> Shares:
    """As they are proven."""
    tp, turn = stage.mesh.tp, torch.empty(1, dtype=torch.int32, device=NOWHERE)
    numbers = torch.empty(tp.size, dtype=torch.int64, device=NOWHERE)
    halves = torch.empty(2, SHARED, stage.hidden, dtype=stage.dtype, device=NOWHERE)
    shares = Shares(tp.index, tp.size, halves, numbers, numbers, turn)
    meet(shares, patience=PATIENCE)
    sum_without_norm(torch.empty(PROVEN, stage.hidden, device=NOWHERE), shares, 1)
    return shares


def _pasts(stepper: CapturedStepper, tokens: int, prompts: int) -> dict[int, FilledPast]:
    inner = Unseen(_numbers(tokens).unsqueeze(0), prompts)
    return {number: stepper.cache.fill(number, inner, _numbers(tokens), _numbers(tokens)) for number in stepper.cache.keys}


def _entering(stage: Stage, rows: int) -> Tensor:
    """What comes to the first of a stage's layers."""
    return _numbers(rows) if stage.mesh.pp.is_first else torch.empty(rows, stage.hidden, dtype=stage.dtype, device=NOWHERE)


def _numbers(count: int) -> Tensor:
    return torch.empty(count, dtype=torch.long, device=NOWHERE)
