"""Where few labels are learned, and not equally many in every row, each learned token counts alike: at any cut as in a plain loop."""

from dataclasses import replace
from functools import cache

import pytest
import torch

from megatron_lite.parallel.layout import Layout
from megatron_lite.parallel.mesh import Mesh
from megatron_lite.training.recipe import Batching, Recipe
from tests.models import SMALL
from tests.training_models import DATA, SAMPLES, SECTION, Samples, batches_for, engine_for, plain_layers, plain_loop, plain_loss, recipe_for, run_steps
from tests.worlds import forked

STEPS = 4
LEARNED = [0, 0, 1, 30, 5, 0, 17, 2], [32, 0, 0, 0, 3, 0, 0, 0], [0, 0, 0, 0, 0, 7, 0, 0], [4, 4, 0, 32, 0, 9, 25, 1]
"""How many labels at the end of each sample are learned, step by step: of the third step one micro batch's and one replica's only."""

MASK = (torch.arange(SECTION.seq_length) >= SECTION.seq_length - torch.tensor(LEARNED).flatten().unsqueeze(-1)).float()
MASKED = Samples(DATA.rows[: STEPS * SAMPLES], MASK)
expected = cache(lambda: plain_loop(SMALL, MASKED))
slow = pytest.mark.slow


def recipe_of(layout: Layout, micro: int, **changes: object) -> Recipe:
    return replace(recipe_for(layout, **changes), batching=Batching(micro, SAMPLES // (micro * layout.dp), layout.dp))


CUTS = [
    (Layout(), 8, 1, 0),
    (Layout(), 4, 1, 0),
    (Layout(), 2, 1, 0),
    (Layout(), 1, 1, 0),
    (Layout(dp=2), 2, 2, 0),
    (Layout(pp=2), 2, 1, 0),
    (Layout(tp=2), 4, 1, 0),
    (Layout(dp=2), 1, 3, 1),
    pytest.param(Layout(dp=2), 4, 1, 0, marks=slow),
    pytest.param(Layout(dp=2, tp=2), 2, 2, 0, marks=slow),
    pytest.param(Layout(pp=2, dp=2), 1, 1, 1, marks=slow),
    pytest.param(Layout(pp=4), 2, 1, 0, marks=slow),
    pytest.param(Layout(pp=2, tp=2), 4, 1, 0, marks=slow),
]


@pytest.mark.parametrize(("layout", "micro", "zero", "recompute"), CUTS, ids=str)
def test_every_learned_token_counts_alike_at_every_cut(layout: Layout, micro: int, zero: int, recompute: int) -> None:
    def trained(mesh: Mesh) -> tuple[float, float, list[tuple[float, float]]]:
        engine = engine_for(SMALL, mesh, recipe_of(mesh.layout, micro, zero={"stage": zero}, recompute=recompute))
        accumulation = engine.recipe.batching.accumulation
        first, whole = (engine.validate(batches_for(engine, data=MASKED), steps * accumulation) for steps in (1, STEPS))
        return first, whole, run_steps(engine, 0, STEPS, MASKED)

    with torch.no_grad():
        validated = plain_loss(plain_layers(SMALL), MASKED.between(0, STEPS * SAMPLES)).item()
    for first, whole, steps in forked(layout, trained):
        torch.testing.assert_close(steps, expected(), rtol=0, atol=1e-5)
        torch.testing.assert_close([first, whole], [expected()[0][0], validated], rtol=0, atol=1e-5)


@pytest.mark.parametrize("layout", [Layout(dp=2), Layout(pp=2)], ids=str)
def test_a_step_of_which_nothing_is_learned_has_no_loss_and_no_gradient(layout: Layout) -> None:
    nothing = replace(MASKED, learned=torch.zeros_like(MASK))

    def trained(mesh: Mesh) -> tuple[float, list[tuple[float, float]]]:
        engine = engine_for(SMALL, mesh, recipe_of(mesh.layout, 2))
        return engine.validate(batches_for(engine, data=nothing), 2), run_steps(engine, 0, 1, nothing)

    assert forked(layout, trained) == [(0.0, [(0.0, 0.0)])] * layout.size
