"""A block whose attention and MLP read the same input reduces activations once on the way, and their gradients once on the way back."""

from functools import partial
from typing import cast

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from megatron_lite.models.architecture import architecture_named
from megatron_lite.models.spec import ModelSpec
from megatron_lite.parallel.layout import Layout
from megatron_lite.parallel.mesh import Axis, Mesh, single_mesh
from megatron_lite.parallel.shards import Rule, take
from tests.models import SMALL
from tests.worlds import in_world

Found = tuple[dict[str, Tensor], dict[str, int]]


@pytest.mark.parametrize("family", ["neox", "gptj"])
def test_a_parallel_block_reduces_activations_once_each_way(family: str) -> None:
    x = torch.randn(2, 5, SMALL.hidden, generator=torch.Generator().manual_seed(0))
    whole, _ = trained(family, SMALL, x, single_mesh())
    for gradients, reductions in in_world(Layout(tp=2), partial(trained, family, SMALL, x)):
        for name in ("input", "input_layernorm.weight", "input_layernorm.bias"):
            torch.testing.assert_close(gradients[name], whole[name], rtol=1e-5, atol=1e-6)
        assert reductions["activations"] == 2
        assert reductions["scales"] == {"neox": 2, "gptj": 1}[family]


def trained(family: str, spec: ModelSpec, x: Tensor, mesh: Mesh) -> Found:
    """Gradients of a block on this rank, and how many reductions of which size they took."""
    block = architecture_named(family).plan(spec, mesh.tp)[2]()
    fill(block, mesh.tp)
    x = x.clone().requires_grad_()
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as seen:
        block(x).square().mean().backward()
    sizes = [event.input_shapes for event in seen.events() or () if event.name == "gloo:all_reduce"]
    counts = {"activations": sum([list(x.shape)] == shapes for shapes in sizes), "scales": sum([[2, spec.hidden]] == shapes for shapes in sizes)}
    assert sum(counts.values()) == len(sizes)
    assert x.grad is not None
    return {"input": x.grad, **{name: parameter.grad for name, parameter in block.named_parameters() if parameter.grad is not None}}, counts


def fill(block: nn.Module, tp: Axis) -> None:
    """The same weights at every cut."""
    generator = torch.Generator().manual_seed(1)
    for module in block.modules():
        for name, parameter in module.named_parameters(recurse=False):
            rule = cast(dict[str, Rule], module.rules)[name]
            whole = torch.randn(rule.whole(parameter.shape, tp.size), generator=generator) / 4
            parameter.data.copy_(take(rule, [whole], tp.index, tp.size))
