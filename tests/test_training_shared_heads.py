"""Grouped-query attention in training on more ranks than key/value heads: the ranks that hold a head keep one and the same, at any cut as in a plain loop."""

from functools import cache
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from megatron_lite.checkpoint.find import find_checkpoint
from megatron_lite.checkpoint.pickled import open_pickled
from megatron_lite.models.architecture import architecture_named
from megatron_lite.parallel.layout import Layout
from megatron_lite.parallel.mesh import Mesh
from megatron_lite.training.stage import make_trainable
from tests.test_families import SPECS
from tests.test_resume import HALF, go_on, train_and_save
from tests.training_models import STEPS, engine_for, plain_loop, recipe_for, run_steps
from tests.worlds import forked, in_world

HEADS = {1: SPECS["LLaMA, 1 key/value head"], 2: SPECS["LLaMA, 2 key/value heads"]}
expected = cache(plain_loop)
slow = pytest.mark.slow
PATH = "attention.query_key_value.weight"


@pytest.mark.parametrize(
    ("heads", "layout", "zero", "recompute"),
    [
        (1, Layout(tp=2), 1, 0),
        pytest.param(2, Layout(tp=4), 1, 1, marks=slow),
        pytest.param(1, Layout(dp=2, tp=2), 3, 0, marks=slow),
        (1, Layout(pp=2, tp=2), 1, 0),
        pytest.param(2, Layout(tp=2), 1, 0, marks=slow),
        pytest.param(1, Layout(tp=4), 1, 0, marks=slow),
        pytest.param(1, Layout(dp=2, tp=2), 1, 0, marks=slow),
        pytest.param(1, Layout(dp=2, tp=2), 2, 1, marks=slow),
        pytest.param(2, Layout(dp=2, tp=4), 2, 0, marks=slow),
        pytest.param(2, Layout(pp=2, tp=4), 1, 1, marks=slow),
    ],
    ids=str,
)
def test_heads_that_ranks_share_train_as_in_a_plain_loop(heads: int, layout: Layout, zero: int, recompute: int) -> None:
    recipe = recipe_for(layout, zero={"stage": zero}, recompute=recompute)
    for steps in forked(layout, lambda mesh: run_steps(engine_for(HEADS[heads], mesh, recipe), 0, STEPS)):
        torch.testing.assert_close(steps, expected(HEADS[heads]), rtol=0, atol=1e-5)


def _files(folder: Path, kind: str, part: int) -> dict[str, Any]:
    return cast(dict[str, Any], open_pickled(find_checkpoint(folder).folder / kind.format(part)))


@pytest.mark.parametrize(("layout", "dtype"), [(Layout(tp=2), torch.float32), pytest.param(Layout(dp=2, tp=2), torch.bfloat16, marks=slow)], ids=str)
def test_what_ranks_share_is_saved_alike_and_goes_on_bit_by_bit(tmp_path: Path, layout: Layout, dtype: torch.dtype) -> None:
    spec, recipe = HEADS[1], recipe_for(layout, dtype=dtype)
    whole = train_and_save(tmp_path, layout, recipe, spec)
    shared = slice(spec.heads // 2 * spec.head_dim, None)
    first, other = (_files(tmp_path, "layer_02-model_{:02d}-model_states.pt", part)[PATH] for part in range(2))
    assert first.shape == (4 * spec.head_dim, spec.hidden)
    assert torch.equal(first[shared], other[shared])
    assert not torch.equal(first, other)
    states = [_files(tmp_path, "optimizer-layer_02-model_{:02d}.pt", part)[PATH] for part in range(2)]
    assert sorted(states[0]) == ["exp_avg", "exp_avg_sq", "master"]
    assert all(torch.equal(states[0][name][shared], states[1][name][shared]) for name in states[0])
    assert go_on(tmp_path, layout, recipe, spec) == whole[HALF:]


@pytest.mark.parametrize(("before", "after"), [(Layout(tp=2), Layout(pp=2)), pytest.param(Layout(), Layout(tp=4), marks=slow)], ids=str)
def test_a_training_goes_on_along_its_curve_where_heads_are_shared_otherwise(tmp_path: Path, before: Layout, after: Layout) -> None:
    spec = HEADS[1]
    train_and_save(tmp_path, before, recipe_for(before), spec)
    torch.testing.assert_close(go_on(tmp_path, after, recipe_for(after), spec), expected(spec)[HALF:], rtol=0, atol=1e-5)


def test_copies_that_had_drifted_apart_begin_as_the_first_of_them() -> None:
    def begun(mesh: Mesh) -> Tensor:
        layer = architecture_named("llama").plan(HEADS[2], mesh.tp)[2]()
        with torch.no_grad():
            layer.get_parameter(PATH).fill_(1.0 + mesh.tp.index)
        make_trainable(layer, mesh.tp)
        heads = layer.get_submodule("attention.query_key_value")(torch.ones(1, 1, 64)) / 64
        return heads.flatten()[:: HEADS[2].head_dim].detach()

    assert [heads.tolist() for heads in in_world(Layout(tp=4), begun)] == [[1, 1, 1, 1], [2, 2, 1, 1], [3, 3, 3, 3], [4, 4, 3, 3]]
