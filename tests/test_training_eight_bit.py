"""Adam with averages in 8 bits: it learns like Adam, its checkpoints are Adam's, and it is refused in a sentence where its package is missing."""

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from megatron_lite.checkpoint.find import find_checkpoint
from megatron_lite.parallel.layout import Layout
from megatron_lite.parallel.mesh import Mesh
from megatron_lite.training.resume import optimizer_shards
from tests.models import SMALL
from tests.training_models import RECIPE, engine_for, recipe_for, run_steps
from tests.training_runs import losses, trained, write_training
from tests.worlds import forked

EIGHT_BIT = {"use_bnb_optimizer": True, "hidden_size": 128, "checkpoint_factor": 3}


def needs_bitsandbytes() -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")


@pytest.mark.parametrize("layout", [Layout(), Layout(pp=2)], ids=str)
def test_it_learns_nearly_as_adam_does_with_a_quarter_of_the_memory(layout: Layout) -> None:
    needs_bitsandbytes()

    def steps_and_bytes(mesh: Mesh, eight_bit: bool) -> tuple[list[tuple[float, float]], int]:
        recipe = recipe_for(mesh.layout, optimizer=replace(RECIPE.optimizer, eight_bit=eight_bit))
        engine = engine_for(SMALL, mesh, recipe)
        steps = run_steps(engine, 0, 8)
        tensors = [value for state in engine.optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor) and value.numel() > 256]
        return steps, sum(tensor.nbytes for tensor in tensors)

    (plain, size), (packed, small) = (forked(layout, partial(steps_and_bytes, eight_bit=eight_bit))[0] for eight_bit in (False, True))
    assert [loss for loss, _ in packed] == pytest.approx([loss for loss, _ in plain], rel=0.01)
    assert packed != plain
    assert small < 0.3 * size


def test_a_training_that_was_stopped_goes_on_bit_by_bit_as_the_one_that_saved_then(tmp_path: Path) -> None:
    needs_bitsandbytes()
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert trained(write_training(whole, **EIGHT_BIT)) == [None]
    config = write_training(parts, load=str(parts / "out"), **EIGHT_BIT)
    assert trained(config, exit_interval=3) == [None]
    assert trained(config) == [None]
    assert losses(parts) == losses(whole)


def test_its_checkpoints_are_adams_and_serve_any_cut_and_adam_itself(tmp_path: Path) -> None:
    needs_bitsandbytes()
    config = write_training(tmp_path, load=str(tmp_path / "out"), train_micro_batch_size_per_gpu=2, padded_vocab_size=520, **EIGHT_BIT)
    assert trained(config, exit_interval=3) == [None]
    states = optimizer_shards(find_checkpoint(tmp_path / "out"))(2)["attention.dense.weight"]
    assert {name: (tensor.dtype, tensor.shape) for name, [tensor] in states.items()} == dict.fromkeys(
        ("exp_avg", "exp_avg_sq", "master"), (torch.float32, (128, 128))
    )
    assert trained(config, Layout(tp=2), exit_interval=4) == [None, None]
    assert trained(config, use_bnb_optimizer=False) == [None]
    found = losses(tmp_path)
    assert list(found) == [1, 2, 3, 4, 5, 6]
    assert found[6] < found[3]


def test_without_its_package_or_with_another_optimizer_it_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    [sentence] = trained(write_training(tmp_path, use_bnb_optimizer=True, optimizer={"type": "Lion", "params": {"lr": 1e-3}}))
    assert "use_bnb_optimizer is true (" in str(sentence)
    assert "and optimizer type is Lion (" in str(sentence)
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    monkeypatch.delitem(sys.modules, "megatron_lite.training.eight_bit", raising=False)
    [sentence] = trained(write_training(tmp_path, use_bnb_optimizer=True))
    assert sentence == (
        "ConfigError: use_bnb_optimizer is true, but the package bitsandbytes is not installed; "
        "run `pip install bitsandbytes`, or set use_bnb_optimizer to false"
    )
