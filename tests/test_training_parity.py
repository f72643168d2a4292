"""One model and one order of the data: losses and gradient norms, with clipping active, are those of a plain PyTorch loop at every cut."""

from dataclasses import replace
from functools import cache

import pytest
import torch

from megatron_lite.models.spec import ModelSpec
from megatron_lite.parallel.layout import Layout
from megatron_lite.parallel.mesh import Mesh
from tests.models import SMALL
from tests.training_models import DATA, RECIPE, STEPS, Samples, batches_for, engine_for, plain_loop, recipe_for, run_steps
from tests.worlds import forked

TIED = replace(SMALL, tied_head=True)
SEQUENTIAL = replace(SMALL, parallel_residual=False)
expected = cache(plain_loop)
slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("layout", "zero", "recompute"),
    [
        (Layout(), 1, 0),
        (Layout(), 1, 3),
        (Layout(tp=2), 1, 1),
        (Layout(pp=2), 1, 0),
        (Layout(dp=2), 2, 0),
        (Layout(dp=2), 3, 1),
        pytest.param(Layout(dp=2), 1, 0, marks=slow),
        pytest.param(Layout(dp=2, tp=2), 3, 0, marks=slow),
        pytest.param(Layout(pp=4), 1, 1, marks=slow),
        pytest.param(Layout(pp=2, dp=2), 1, 1, marks=slow),
        (Layout(pp=2, tp=2), 1, 0),
    ],
    ids=str,
)
def test_every_cut_trains_like_a_plain_loop(layout: Layout, zero: int, recompute: int) -> None:
    _agrees(SMALL, layout, zero, recompute)


@pytest.mark.parametrize("layout", [pytest.param(Layout(), marks=slow), Layout(pp=2), pytest.param(Layout(pp=2, tp=2), marks=slow)], ids=str)
def test_a_head_that_shares_the_embedding_trains_on_any_stage(layout: Layout) -> None:
    _agrees(TIED, layout, 1, 0)


@pytest.mark.slow
def test_sequential_residuals_train_alike_at_every_cut() -> None:
    _agrees(SEQUENTIAL, Layout(tp=2), 1, 0)


def _agrees(spec: ModelSpec, layout: Layout, zero: int, recompute: int) -> None:
    recipe = recipe_for(layout, zero={"stage": zero}, recompute=recompute)
    for steps in forked(layout, lambda mesh: run_steps(engine_for(spec, mesh, recipe), 0, STEPS)):
        torch.testing.assert_close(steps, expected(spec), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("layout", "zero"), [(Layout(pp=2), 1), pytest.param(Layout(), 1, marks=slow), pytest.param(Layout(dp=2), 3, marks=slow)], ids=str)
def test_bfloat16_stays_near_fp32(layout: Layout, zero: int) -> None:
    recipe = recipe_for(layout, dtype=torch.bfloat16, zero={"stage": zero})
    steps = forked(layout, lambda mesh: run_steps(engine_for(SMALL, mesh, recipe), 0, STEPS))[0]
    torch.testing.assert_close([loss for loss, _ in steps], [loss for loss, _ in expected(SMALL)], rtol=2e-3, atol=0)


@pytest.mark.parametrize("layout", [Layout(), Layout(pp=2)], ids=str)
def test_a_step_that_is_not_finite_is_not_applied(layout: Layout) -> None:
    def poisoned(mesh: Mesh) -> tuple[float, bool, float, bool]:
        engine = engine_for(SMALL, mesh, recipe_for(layout))
        before = engine.validate(batches_for(engine), 2)
        weight = next(parameter.data for name, parameter in engine.stage.named_parameters() if name.endswith(".bias"))
        kept = weight.clone()
        weight.fill_(torch.nan)
        step = engine.step(batches_for(engine), rate=1e-2)
        weight.copy_(kept)
        return before, step.applied, engine.validate(batches_for(engine), 2), engine.step(batches_for(engine), rate=1e-2).applied

    for before, applied, after, healthy in forked(layout, poisoned):
        assert (applied, healthy) == (False, True)
        assert after == before


def test_the_validation_loss_is_that_of_all_samples_at_every_cut() -> None:
    data = Samples(DATA.rows[:8])

    def validated(mesh: Mesh) -> float:
        engine = engine_for(SMALL, mesh, recipe_for(mesh.layout))
        return engine.validate(batches_for(engine, data=data), 4 // mesh.dp.size)

    losses = [loss for layout in (Layout(), Layout(dp=2)) for loss in forked(layout, validated)]
    torch.testing.assert_close(losses, [expected(SMALL)[0][0]] * 3, rtol=0, atol=1e-5)
    assert RECIPE.batching.micro * 4 == 8
