"""Low-rank adapters: one model at every cut, equal to a plain PyTorch loop in which W + alpha / rank * B A is written out."""

from dataclasses import replace

import pytest
import torch

from megatron_lite.models.spec import ModelSpec
from megatron_lite.parallel.layout import Layout
from tests.lora_models import adapted_engine, plain_lora_loop
from tests.models import SMALL
from tests.test_families import GPTJ, LLAMA
from tests.training_models import STEPS, recipe_for, run_steps
from tests.worlds import forked

slow = pytest.mark.slow
SEQUENTIAL = replace(SMALL, parallel_residual=False)
GROUPED = replace(LLAMA, heads=8, head_dim=8, rotary_dim=8, kv_heads=2)


@pytest.mark.parametrize(
    ("layout", "zero", "recompute"),
    [
        (Layout(), 1, 0),
        (Layout(tp=2), 1, 1),
        (Layout(pp=2), 1, 1),
        (Layout(dp=2), 1, 0),
        (Layout(dp=2), 3, 1),
        (Layout(pp=2, tp=2), 1, 0),
        pytest.param(Layout(), 1, 3, marks=slow),
        pytest.param(Layout(tp=2), 1, 0, marks=slow),
        pytest.param(Layout(pp=2), 1, 0, marks=slow),
        pytest.param(Layout(dp=2), 2, 0, marks=slow),
        pytest.param(Layout(dp=2, tp=2), 2, 1, marks=slow),
        pytest.param(Layout(dp=2, tp=2), 3, 0, marks=slow),
        pytest.param(Layout(pp=2, dp=2), 1, 1, marks=slow),
    ],
    ids=str,
)
def test_adapters_train_at_every_cut_like_a_plain_loop(layout: Layout, zero: int, recompute: int) -> None:
    _agrees(SMALL, layout, zero, recompute)


@pytest.mark.parametrize(
    ("spec", "layout"),
    [
        (GROUPED, Layout(tp=2)),
        pytest.param(LLAMA, Layout(tp=2), marks=slow),
        pytest.param(GPTJ, Layout(tp=2), marks=slow),
        pytest.param(SEQUENTIAL, Layout(tp=2), marks=slow),
        pytest.param(replace(SMALL, tied_head=True), Layout(pp=2), marks=slow),
    ],
    ids=["LLaMA, grouped", "LLaMA", "GPT-J", "sequential", "tied head"],
)
def test_adapters_of_every_family_train_alike(spec: ModelSpec, layout: Layout) -> None:
    _agrees(spec, layout, 1, 0)


def _agrees(spec: ModelSpec, layout: Layout, zero: int, recompute: int) -> None:
    recipe = recipe_for(layout, zero={"stage": zero}, recompute=recompute)
    for steps in forked(layout, lambda mesh: run_steps(adapted_engine(spec, mesh, recipe), 0, STEPS)):
        torch.testing.assert_close(steps, plain_lora_loop(spec), rtol=0, atol=1e-5)
