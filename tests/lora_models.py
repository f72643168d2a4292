"""Small trainings of low-rank adapters, and the plain PyTorch loop that they must agree with."""

from dataclasses import replace
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from megatron_lite.config.lora import TARGETS, LoraSection
from megatron_lite.models.architecture import architecture_named
from megatron_lite.models.spec import ModelSpec
from megatron_lite.parallel.layout import stage_numbers
from megatron_lite.parallel.mesh import Axis, Mesh, single_mesh
from megatron_lite.parallel.quantized import quantize
from megatron_lite.training.engine import Engine, start_engine
from megatron_lite.training.fresh import draw_layer
from megatron_lite.training.lora import put_adapters, targets
from megatron_lite.training.optimizer import build_optimizer, parameter_groups
from megatron_lite.training.recipe import Recipe
from megatron_lite.training.stage import TrainedStage
from tests.training_models import DATA, RECIPE, SAMPLES, SECTION, STEPS

EVERYWHERE = LoraSection.model_validate({"rank": 4, "alpha": 8.0, "targets": TARGETS})


def base_layers(spec: ModelSpec, mesh: Mesh, numbers: list[int], dtype: torch.dtype = torch.float32) -> dict[int, nn.Module]:
    """New weights, in the place of a checkpoint's; in 8 bits where the spec says so."""
    plan = architecture_named(spec.family).plan(spec, mesh.tp)
    layers = {number: plan[number]() for number in numbers}
    for number, layer in layers.items():
        draw_layer(layer, number, model=SECTION, spec=spec, seed=RECIPE.seed, tp=mesh.tp)
        layer.to(dtype)
        if spec.quantization:
            quantize(layer, mesh.tp)
    return layers


@torch.no_grad()
def round_to_127(layers: dict[int, nn.Module]) -> None:
    """Rounds the matrices of blocks as 8 bits would, and keeps them in fp32: the largest number of each row becomes 127 steps."""
    for layer in layers.values():
        for module in layer.modules():
            if isinstance(module, nn.Linear):
                steps = module.weight.abs().amax(1, keepdim=True) / 127
                module.weight.copy_((module.weight / steps).round() * steps)


def with_new_adapters(layers: dict[int, nn.Module], spec: ModelSpec, mesh: Mesh, lora: LoraSection) -> dict[int, nn.Module]:
    put_adapters(layers, lora, None, family=spec.family, seed=RECIPE.seed, tp=mesh.tp)
    return layers


def adapted_engine(spec: ModelSpec, mesh: Mesh, recipe: Recipe, lora: LoraSection = EVERYWHERE) -> Engine:
    numbers = stage_numbers(spec.layers, mesh.layout.pp)[mesh.pp.index]
    layers = with_new_adapters(base_layers(spec, mesh, numbers, recipe.dtype), spec, mesh, lora)
    return start_engine(TrainedStage(layers, recompute=recipe.recompute), mesh, recipe, words=spec.vocab, tied_head=None)


@cache
def plain_lora_loop(spec: ModelSpec, learning: tuple[str, ...] = TARGETS) -> list[tuple[float, float]]:
    """Losses and gradient norms of eight steps, with W + alpha / rank * B A written out for every target, as PyTorch alone computes them."""
    lora, whole = EVERYWHERE.model_copy(update={"targets": learning}), replace(spec, quantization=None)
    layers = base_layers(whole, single_mesh(), stage_numbers(spec.layers, 1)[0])
    if spec.quantization:
        round_to_127(layers)
    adapters = drawn(whole, lora)
    learned = nn.ParameterList([factor for layer in adapters.values() for pair in layer.values() for factor in pair])
    optimizer = build_optimizer(RECIPE.optimizer, parameter_groups(learned, RECIPE.optimizer.weight_decay), rate=0.0)
    steps = []
    for done in range(STEPS):
        rows = DATA.rows[done * SAMPLES : (done + 1) * SAMPLES]
        x = rows[:, :-1]
        for number, layer in layers.items():
            merged = {
                f"{path}.weight": layer.get_submodule(path).get_parameter("weight").detach() + lora.scale * b @ a for path, (a, b) in adapters[number].items()
            }
            x = functional_call(layer, merged, (x,))
        loss = F.cross_entropy(x.flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(learned, RECIPE.clipping)
        for group in optimizer.param_groups:
            group["lr"] = RECIPE.schedule(done)
        optimizer.step()
        steps.append((loss.item(), norm.item()))
    return steps


def drawn(spec: ModelSpec, lora: LoraSection) -> dict[int, dict[str, tuple[nn.Parameter, nn.Parameter]]]:
    """Layer -> path -> A and B as training begins with them, on one rank."""
    mesh, numbers = single_mesh(), stage_numbers(spec.layers, 1)[0]
    plan = architecture_named(spec.family).plan(spec, Axis("tp"))
    paths = {number: targets(plan[number](), lora, spec.family) for number in numbers}
    layers = with_new_adapters(base_layers(spec, mesh, numbers), spec, mesh, lora)
    return {number: {path: _factors(layers[number].get_submodule(path)) for path in paths[number]} for number in numbers}


def _factors(module: Any) -> tuple[nn.Parameter, nn.Parameter]:
    return module.lora_A, module.lora_B
