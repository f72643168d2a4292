"""Models whose activations are as large as is asked: fp16 ends at 65504, and what is added, multiplied or squared on the way must not get there."""

from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor, nn

from megatron_lite.models.architecture import architecture_named
from megatron_lite.models.spec import ModelSpec
from megatron_lite.parallel.layers import LayerNorm, VocabularyEmbedding, VocabularyLinear
from megatron_lite.parallel.mesh import Mesh, single_mesh
from megatron_lite.parallel.shards import Rule, take
from megatron_lite.parallel.stage import Stage

PEAK = 1e3
LAYERS = (nn.Linear, LayerNorm, VocabularyEmbedding, VocabularyLinear)


@torch.no_grad()
def make_loud(stage: Stage, tokens: list[int], peak: float = PEAK, *, head_dim: int | None = None) -> None:
    """Scales every layer so that the largest number that it computes for this text is `peak`. With a head_dim queries and keys peak at 2 instead: between
    those of 1000, of which one key takes all, rounding would decide."""

    def scale(module: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> Tensor:
        for parameter in module.parameters(recurse=False):
            parameter *= peak / out.abs().max()
            if head_dim and module in projections:
                parameter.view(-1, 3, head_dim, *parameter.shape[1:])[:, :2] *= 2 / peak
        return module.forward(*inputs)

    projections = {module for layer in stage.layers.values() for name, module in layer.named_modules() if name.endswith("query_key_value")}
    modules = [module for layer in stage.layers.values() for module in layer.modules() if isinstance(module, LAYERS)]
    hooks = [module.register_forward_hook(scale) for module in modules]
    stage.pass_through(torch.tensor([tokens], device=stage.mesh.device), lambda number, layer, x: layer(x))
    for hook in hooks:
        hook.remove()


def random_stage(spec: ModelSpec, device: torch.device) -> Stage:
    """A whole model of random weights, made where it is."""
    mesh, layers = single_mesh(device), {}
    for number, make in architecture_named(spec.family).plan(spec, mesh.tp).items():
        with device:
            layers[number] = make().requires_grad_(False)
        for parameter in layers[number].parameters():
            parameter.normal_(std=0.02) if parameter.dim() > 1 else parameter.add_(torch.randn_like(parameter) * 0.1)
    return Stage(layers, mesh, spec.hidden, torch.float32)


def cut(stage: Stage, spec: ModelSpec, mesh: Mesh, dtype: torch.dtype) -> Stage:
    """This mesh's part of a whole model, in another format."""
    layers: dict[int, nn.Module] = {}
    plan = architecture_named(spec.family).plan(spec, mesh.tp)
    for number in mesh.layout.numbers(spec.layers)[mesh.pp.index]:
        layers[number] = plan[number]().requires_grad_(False)
        for name, module in layers[number].named_modules():
            whole = stage.layers[number].get_submodule(name)
            for kind, _ in list(module.named_parameters(recurse=False)):
                found = take(cast(dict[str, Rule], module.rules)[kind], [whole.get_parameter(kind)], mesh.tp.index, mesh.tp.size)
                module.register_parameter(kind, nn.Parameter(found.to(mesh.device, dtype, copy=True), requires_grad=False))
    return Stage(layers, mesh, stage.hidden, dtype)


def largest(stage: Stage, tokens: Iterable[int]) -> list[float]:
    """The largest number behind every layer."""
    found: list[float] = []

    def visit(number: int, layer: nn.Module, x: Tensor) -> Tensor:
        out = layer(x)
        found.append(out.abs().max().item())
        return out

    stage.pass_through(torch.tensor([list(tokens)], device=stage.mesh.device), visit)
    return found
