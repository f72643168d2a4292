"""configs/20B.yml asks for 8 processes, pipe 4 x model 2: that cut, the others of 8 and their replicas, with a small model on this CPU."""

from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch

from megatron_lite.config.load import load_config
from megatron_lite.inference.continuous import ContinuousDecoder
from megatron_lite.inference.replicas import complete_all
from megatron_lite.inference.step import Stepper
from megatron_lite.parallel.layout import Layout
from megatron_lite.parallel.mesh import Mesh
from megatron_lite.run import layout_of
from megatron_lite.training.recipe import Batching
from tests.models import SMALL, load, write_random
from tests.runs import BYTES, TOKENIZER, complete, random_prompts, requests
from tests.training_models import STEPS, engine_for, plain_loop, recipe_for, run_steps
from tests.worlds import forked, in_world

ROOT = Path(__file__).resolve().parents[1]
SPEC = replace(BYTES, heads=8, kv_heads=8, head_dim=8, rotary_dim=2)
TRAINED = replace(SMALL, heads=8, kv_heads=8, head_dim=8, rotary_dim=2)
expected = cache(plain_loop)


def test_the_published_configuration_asks_for_the_cut_that_is_tried_here() -> None:
    assert layout_of(load_config([ROOT / "configs" / "20B.yml"]), 8) == Layout(pp=4, tp=2)


@pytest.mark.parametrize("layout", [Layout(pp=4, tp=2), Layout(tp=8), Layout(dp=4, tp=2)], ids=str)
def test_eight_processes_write_what_one_writes(layout: Layout, tmp_path: Path) -> None:
    saved = write_random(tmp_path, SPEC, tp=2)
    asked = requests(random_prompts((1, 30, 7, 18, 40)), maximum_tokens=12)

    def texts(mesh: Mesh) -> dict[int, str | None]:
        stepper = Stepper(load(saved, SPEC, mesh), SPEC, words=512, pages=12)
        decoder = ContinuousDecoder(stepper, TOKENIZER, context=SPEC.max_positions, rows=4, tokens=100)
        return {completion.request.id: completion.text for completion in complete_all(decoder, asked, mesh)}

    (alone,) = in_world(Layout(), lambda mesh: {each.request.id: each.text for each in complete(load(saved, SPEC, mesh), asked, spec=SPEC)})
    assert len({*alone.values()}) > 1
    assert in_world(layout, texts)[0] == alone


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "zero"), [(Layout(pp=4, tp=2), 1), (Layout(tp=8), 1), (Layout(pp=2, dp=2, tp=2), 1), (Layout(dp=8), 3)], ids=str)
def test_eight_processes_train_like_a_plain_loop(layout: Layout, zero: int) -> None:
    recipe = replace(recipe_for(Layout(), zero={"stage": zero}), batching=Batching(micro=1, accumulation=8 // layout.dp, replicas=layout.dp))
    for steps in forked(layout, lambda mesh: run_steps(engine_for(TRAINED, mesh, recipe), 0, STEPS)):
        torch.testing.assert_close(steps, expected(TRAINED), rtol=0, atol=1e-5)
