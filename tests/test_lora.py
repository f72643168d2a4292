"""Low-rank adapters: one model at every cut, equal to a plain PyTorch loop in which W + alpha / rank * B A is written out."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_lite.models.spec import ModelSpec
from megatron_lite.parallel.layout import Layout
from megatron_lite.parallel.mesh import Mesh
from megatron_lite.training.engine import start_engine
from megatron_lite.training.lora import put_adapters
from megatron_lite.training.stage import TrainedStage
from megatron_lite.training.state import _flat_parameters, _whole
from tests.lora_models import EVERYWHERE, adapted_engine, plain_lora_loop
from tests.models import SMALL, load, logits, write_random
from tests.test_families import GPTJ, LLAMA
from tests.training_models import DATA, STEPS, recipe_for, run_steps
from tests.worlds import forked, in_world

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


def test_bfloat16_stays_near_fp32() -> None:
    layout = Layout(pp=2)
    recipe = recipe_for(layout, dtype=torch.bfloat16, recompute=1)
    steps = forked(layout, lambda mesh: run_steps(adapted_engine(SMALL, mesh, recipe), 0, STEPS))[0]
    torch.testing.assert_close([loss for loss, _ in steps], [loss for loss, _ in plain_lora_loop(SMALL)], rtol=2e-3, atol=0)


@pytest.mark.parametrize(("layout", "zero"), [(Layout(tp=2), 1), pytest.param(Layout(dp=2), 3, marks=slow)], ids=str)
def test_only_adapters_have_gradients_masters_and_states(layout: Layout, zero: int) -> None:
    recipe = recipe_for(layout, dtype=torch.bfloat16, zero={"stage": zero})

    def trained(mesh: Mesh) -> tuple[int, int, int, set[torch.dtype], int, bool]:
        engine = adapted_engine(SMALL, mesh, recipe)
        before = {name: _whole(parameter).clone() for name, parameter in engine.stage.named_parameters() if not parameter.requires_grad}
        run_steps(engine, 0, 2)
        frozen = [parameter for parameter in engine.stage.parameters() if not parameter.requires_grad]
        kept = sum(flat.numel() for flat in _flat_parameters(engine))
        states = sum(value.numel() for state in engine.optimizer.state.values() for value in state.values() if value.dim())
        unchanged = all(torch.equal(before[name], _whole(parameter)) for name, parameter in engine.stage.named_parameters() if name in before)
        gradients = sum(parameter.grad is not None for parameter in frozen)
        return kept, states, gradients, {parameter.dtype for parameter in engine.stage.parameters()}, len(frozen), unchanged

    rank = EVERYWHERE.rank
    factors = 4 * rank * ((64 + 192 // layout.tp) + (64 // layout.tp + 64) + (64 + 256 // layout.tp) + (256 // layout.tp + 64))
    for kept, states, gradients, dtypes, frozen, unchanged in forked(layout, trained):
        assert factors // layout.dp <= kept < 1.01 * factors // layout.dp
        assert states == 2 * kept
        assert (gradients, dtypes, unchanged) == (0, {torch.bfloat16}, True)
        assert frozen == 4 * 12 + 4


@pytest.mark.parametrize("cut", [1, 2])
def test_new_adapters_add_nothing_to_the_bit_also_where_norms_drifted_apart(tmp_path: Path, cut: int) -> None:
    layout, tokens = write_random(tmp_path, SMALL, tp=2), DATA.rows[:2, :-1]

    def both(mesh: Mesh) -> tuple[torch.Tensor, torch.Tensor]:
        stage = load(layout, SMALL, mesh)
        before = logits(stage, tokens, SMALL.vocab)
        put_adapters(stage.layers, EVERYWHERE, None, family="neox", seed=0, tp=mesh.tp)
        return before, logits(stage, tokens, SMALL.vocab)

    for before, after in in_world(Layout(tp=cut), both):
        assert torch.equal(before, after)


def test_norms_that_drifted_apart_stay_so_and_adapters_learn_the_same_at_every_cut(tmp_path: Path) -> None:
    layout = write_random(tmp_path, SMALL, tp=2)

    def trained(mesh: Mesh) -> list[tuple[float, float]]:
        recipe = recipe_for(mesh.layout)
        layers = dict(load(layout, SMALL, mesh).layers)
        put_adapters(layers, EVERYWHERE, None, family="neox", seed=0, tp=mesh.tp)
        engine = start_engine(TrainedStage(layers), mesh, recipe, words=SMALL.vocab, tied_head=None)
        return run_steps(engine, 0, STEPS)

    one, two = (forked(Layout(tp=tp), trained)[0] for tp in (1, 2))
    torch.testing.assert_close(one, two, rtol=0, atol=2e-5)
