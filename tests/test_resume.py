"""A training that goes on from a checkpoint: at the same cut bit by bit, at another one on the same curve."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from torch import Tensor

from megatron_lite.checkpoint.find import CheckpointLayout, find_checkpoint
from megatron_lite.checkpoint.load import load_layers, open_source
from megatron_lite.errors import CheckpointError, OutputError
from megatron_lite.models.architecture import architecture_named
from megatron_lite.models.spec import ModelSpec
from megatron_lite.parallel.layout import Layout, stage_numbers
from megatron_lite.parallel.mesh import Mesh
from megatron_lite.training.engine import Engine, start_engine
from megatron_lite.training.folders import recover
from megatron_lite.training.manifest import Entry, write_entries
from megatron_lite.training.recipe import OptimizerRecipe, Recipe
from megatron_lite.training.resume import loss_scaler_of, optimizer_shards, read_progress, restore, restore_loss_scale
from megatron_lite.training.save import Progress, Retention, Saver, WholeModel
from megatron_lite.training.stage import TrainedStage, make_trainable
from megatron_lite.training.state import state_names, updates
from tests.models import SMALL, logits
from tests.models import load as load_for_inference
from tests.training_models import DATA, STEPS, engine_for, plain_loop, recipe_for, run_steps
from tests.worlds import forked

HALF = STEPS // 2
slow = pytest.mark.slow
Steps = list[tuple[float, float]]


def progress_of(engine: Engine, iteration: int) -> Progress:
    words, kind = engine.loss.words, engine.recipe.optimizer.kind
    return Progress(iteration, iteration * 8, updates(engine), 0, words, kind, tuple(state_names(engine)), loss_scaler_of(engine), None, None)


def save(engine: Engine, folder: Path, iteration: int, *, keep: int | None = None, always: tuple[int, ...] = ()) -> None:
    saver = Saver(folder, engine.mesh, Retention(keep, always))
    saver.save(engine, progress_of(engine, iteration))
    saver.wait()
    engine.mesh.wait()


def resumed(checkpoint: CheckpointLayout, spec: ModelSpec, mesh: Mesh, recipe: Recipe) -> Engine:
    numbers = stage_numbers(spec.layers, mesh.layout.pp)[mesh.pp.index]
    architecture = architecture_named(spec.family)
    source = open_source(checkpoint, architecture, spec)
    plan = architecture.plan(spec, mesh.tp)
    layers = load_layers(plan, numbers, source, tp=mesh.tp, dtype=recipe.dtype, device=mesh.device, progress=lambda count: None)
    for layer in layers.values():
        make_trainable(layer, mesh.tp)
    engine = start_engine(TrainedStage(layers), mesh, recipe, words=spec.vocab, tied_head=spec.head_number if spec.tied_head else None)
    restore(engine, checkpoint, read_progress(checkpoint))
    return engine


def train_and_save(folder: Path, layout: Layout, recipe: Recipe, spec: ModelSpec = SMALL) -> Steps:
    """All steps without a break; a checkpoint is left behind at half of them."""

    def trained(mesh: Mesh) -> Steps:
        engine = engine_for(spec, mesh, recipe)
        steps = run_steps(engine, 0, HALF)
        save(engine, folder, HALF)
        return steps + run_steps(engine, HALF, STEPS)

    return forked(layout, trained)[0]


def go_on(folder: Path, layout: Layout, recipe: Recipe, spec: ModelSpec = SMALL) -> Steps:
    checkpoint = find_checkpoint(folder)
    return forked(layout, lambda mesh: run_steps(resumed(checkpoint, spec, mesh, recipe), HALF, STEPS))[0]


@pytest.mark.parametrize(
    ("layout", "zero", "dtype"),
    [
        (Layout(), 1, torch.float32),
        (Layout(dp=2), 3, torch.bfloat16),
        pytest.param(Layout(pp=2), 1, torch.bfloat16, marks=slow),
        pytest.param(Layout(dp=2), 2, torch.float32, marks=slow),
        pytest.param(Layout(dp=2), 1, torch.bfloat16, marks=slow),
        pytest.param(Layout(tp=2), 1, torch.float32, marks=slow),
        pytest.param(Layout(pp=2, dp=2), 1, torch.float32, marks=slow),
    ],
    ids=str,
)
def test_a_run_goes_on_bit_by_bit_at_the_same_cut(tmp_path: Path, layout: Layout, zero: int, dtype: torch.dtype) -> None:
    recipe = recipe_for(layout, zero={"stage": zero}, dtype=dtype)
    whole = train_and_save(tmp_path, layout, recipe)
    assert go_on(tmp_path, layout, recipe) == whole[HALF:]


@pytest.mark.parametrize(
    ("before", "after", "zero"),
    [
        (Layout(tp=2), Layout(pp=2), 1),
        (Layout(dp=2), Layout(tp=2), 2),
        pytest.param(Layout(pp=2, tp=2), Layout(), 1, marks=slow),
        pytest.param(Layout(), Layout(dp=2), 3, marks=slow),
        pytest.param(Layout(pp=4), Layout(pp=2, tp=2), 1, marks=slow),
    ],
    ids=str,
)
def test_a_run_goes_on_along_its_curve_at_another_cut(tmp_path: Path, before: Layout, after: Layout, zero: int) -> None:
    train_and_save(tmp_path, before, recipe_for(before, zero={"stage": zero if before.pp == 1 else 1}))
    steps = go_on(tmp_path, after, recipe_for(after, zero={"stage": zero if after.pp == 1 else 1}))
    torch.testing.assert_close(steps, plain_loop(SMALL)[HALF:], rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(Layout(), Layout(pp=2)), (Layout(pp=2), Layout(tp=2))], ids=str)
def test_a_head_that_shares_the_embedding_goes_on_at_any_cut(tmp_path: Path, before: Layout, after: Layout) -> None:
    tied = replace(SMALL, tied_head=True)
    train_and_save(tmp_path, before, recipe_for(before), tied)
    torch.testing.assert_close(go_on(tmp_path, after, recipe_for(after), tied), plain_loop(tied)[HALF:], rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["lion", "sgd"])
def test_other_optimizers_go_on_bit_by_bit(tmp_path: Path, kind: str) -> None:
    optimizer = OptimizerRecipe(kind, (0.9, 0.99), 1e-8, 0.9, 0.1)  # pyright: ignore[reportArgumentType]
    recipe = recipe_for(Layout(), optimizer=optimizer)
    whole = train_and_save(tmp_path, Layout(), recipe)
    assert go_on(tmp_path, Layout(), recipe) == whole[HALF:]


def test_what_was_trained_at_any_cut_serves_inference_at_one(tmp_path: Path) -> None:
    layout = Layout(tp=2)
    tokens = DATA.rows[:2, :-1]

    def trained(mesh: Mesh) -> float:
        engine = engine_for(SMALL, mesh, recipe_for(layout))
        run_steps(engine, 0, 2)
        save(engine, tmp_path, 2)
        return engine.validate(iter([next(DATA.stream(0, 2))]), 1)

    def served(mesh: Mesh) -> Tensor:
        return logits(load_for_inference(find_checkpoint(tmp_path), SMALL, mesh), tokens, SMALL.vocab)

    expected = forked(layout, trained)[0]
    scores = forked(Layout(), served)[0]
    loss = torch.nn.functional.cross_entropy(scores.flatten(0, 1), DATA.rows[:2, 1:].flatten())
    assert loss.item() == pytest.approx(expected, abs=1e-5)


def _one_save(folder: Path, iterations: tuple[int, ...], keep: int | None = None, always: tuple[int, ...] = ()) -> None:
    def trained(mesh: Mesh) -> None:
        engine = engine_for(SMALL, mesh, recipe_for(Layout()))
        run_steps(engine, 0, 1)
        for iteration in iterations:
            save(engine, folder, iteration, keep=keep, always=always)

    forked(Layout(), trained)


def test_the_last_checkpoints_and_the_chosen_ones_are_kept(tmp_path: Path) -> None:
    _one_save(tmp_path, (1, 2, 3, 4), keep=2, always=(1,))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["global_step1", "global_step3", "global_step4", "latest"]
    assert (tmp_path / "latest").read_text() == "global_step4"


def test_a_step_that_is_saved_again_replaces_the_old_one(tmp_path: Path) -> None:
    _one_save(tmp_path, (1, 1))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["global_step1", "latest"]


def test_drafts_of_a_killed_run_are_finished_or_cleared_away(tmp_path: Path) -> None:
    _one_save(tmp_path, (1, 2))
    (tmp_path / "global_step2").rename(tmp_path / "global_step2.draft")  # killed between the manifest and the name
    (tmp_path / "latest").write_text("global_step1")
    (tmp_path / "global_step3.draft").mkdir()
    (tmp_path / "global_step3.draft" / "layer_00-model_00-model_states.pt").write_bytes(b"half")
    recover(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["global_step1", "global_step2", "latest"]
    assert (tmp_path / "latest").read_text() == "global_step2"


@pytest.mark.parametrize("change", ["missing", "cut", "no manifest that can be read"])
def test_a_draft_whose_files_are_not_those_of_its_manifest_is_cleared_away(tmp_path: Path, change: str) -> None:
    draft = tmp_path / "global_step2.draft"
    draft.mkdir()
    (draft / "layer").write_bytes(b"half")
    write_entries({"layer": Entry(4 if change.startswith("no") else 8, "0")}, draft / "manifest.json")
    if change == "missing":
        (draft / "layer").unlink()
    if change.startswith("no"):
        (draft / "manifest.json").write_text("{")
    recover(tmp_path)
    assert not list(tmp_path.iterdir())


def test_whatever_ends_a_save_ends_the_training(tmp_path: Path) -> None:
    class Broken(WholeModel):
        def complete(self, draft: Path) -> list[Path]:
            raise ValueError("no such thing")

    def trained(mesh: Mesh) -> None:
        engine = engine_for(SMALL, mesh, recipe_for(Layout()))
        saver = Saver(tmp_path, mesh, Retention(None, ()), contents=Broken())
        saver.save(engine, progress_of(engine, 1))
        with pytest.raises(ValueError, match="no such thing"):
            saver.wait()

    forked(Layout(), trained)


def _with_scaler(dtype: torch.dtype, scaler: object) -> Engine:
    """What is asked of an engine about its loss scale; no CPU trains in fp16."""
    optimizer = SimpleNamespace(loss_scaler=scaler)
    return cast(Engine, SimpleNamespace(recipe=recipe_for(Layout(), dtype=dtype), deepspeed=SimpleNamespace(optimizer=optimizer)))


def test_a_loss_scale_goes_on_in_fp16_and_comes_from_nowhere_else() -> None:
    def dynamic(scale: int) -> DynamicLossScaler:
        return DynamicLossScaler(scale, 1000, 1.0, 2, False, dtype=torch.float16)

    half, other = _with_scaler(torch.float16, dynamic(4096)), _with_scaler(torch.bfloat16, LossScaler(1))
    assert loss_scaler_of(other) == {}
    for stored, expected in ((loss_scaler_of(other), 4096.0), ({"cur_scale": 1.0}, 4096.0), (loss_scaler_of(_with_scaler(torch.float16, dynamic(64))), 64.0)):
        restore_loss_scale(half, stored)
        assert half.deepspeed.optimizer.loss_scaler.cur_scale == expected
    restore_loss_scale(other, loss_scaler_of(half))
    assert other.deepspeed.optimizer.loss_scaler.cur_scale == 1.0


def _damaged(folder: Path, change: str) -> str:
    path = next(iter(sorted(folder.glob("global_step1/optimizer-*"))))
    content = bytearray(path.read_bytes())
    if change == "flip":
        content[len(content) // 2] ^= 1
    path.write_bytes(content if change == "flip" else content[:-100])
    with pytest.raises(CheckpointError) as found:
        optimizer_shards(find_checkpoint(folder))(0)
    return str(found.value)


def test_a_corrupt_optimizer_file_is_refused_by_name(tmp_path: Path) -> None:
    _one_save(tmp_path, (1,))
    assert "optimizer-layer_00-model_00.pt is damaged: its checksum is" in _damaged(tmp_path, "flip")
    assert "bytes instead of" in _damaged(tmp_path, "cut")


def test_a_checkpoint_without_a_training_in_it_is_refused_with_the_remedy(tmp_path: Path) -> None:
    _one_save(tmp_path, (1,))
    (tmp_path / "global_step1" / "training.json").unlink()
    with pytest.raises(CheckpointError, match="set finetune: true to start a new training from its weights"):
        read_progress(find_checkpoint(tmp_path))


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")

    def trained(mesh: Mesh) -> str:
        engine = engine_for(SMALL, mesh, recipe_for(Layout()))
        with pytest.raises(OutputError) as found:
            save(engine, tmp_path / "file", 1)
        return str(found.value)

    assert "cannot be made: Not a directory; set save to a folder that can be written" in forked(Layout(), trained)[0]
