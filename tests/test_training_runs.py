"""Whole trainings: what they report and save, how they end, and that one which was stopped goes on as if it had not been."""

import json
import os
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

import megatron_lite.training.train as loop
from megatron_lite.checkpoint.find import find_checkpoint
from megatron_lite.errors import OutputError
from megatron_lite.metrics.curves import read_runs
from megatron_lite.parallel.layout import Layout
from megatron_lite.parallel.mesh import Mesh
from megatron_lite.training import folders
from megatron_lite.training.engine import Engine
from tests.training_runs import losses, metrics, trained, write_training
from tests.worlds import forked

TRAIN_KEYS = {
    "train/lm_loss",
    "train/learning_rate",
    "train/loss_scale",
    "train/grad_norm",
    "train/skipped_steps",
    "runtime/iteration_time",
    "runtime/steps_per_sec",
    "runtime/samples_per_sec",
    "runtime/tokens_per_sec",
    "runtime/flops_per_sec_per_gpu",
    "runtime/model_flops_utilization",
    "runtime/hardware_flops_utilization",
}


def test_a_training_learns_reports_under_neox_names_and_saves(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert trained(write_training(tmp_path, peak_theoretical_tflops=1.0)) == [None]
    lines = metrics(tmp_path)
    assert {key for line in lines for key in line} == TRAIN_KEYS | {
        *("time", "step", "validation/lm_loss", "validation/lm_loss_ppl", "test/lm_loss", "test/lm_loss_ppl")
    }
    found = losses(tmp_path)
    assert list(found) == [1, 2, 3, 4, 5, 6]
    assert found[6] < found[1] - 1
    assert find_checkpoint(tmp_path / "out").numbers == (0, 2, 3, 5, 6)
    said = capfd.readouterr().err
    assert "new weights: steps 1 to 6 on pipe 1 x model 1, float32, ZeRO 1" in said
    assert "trained 6 steps, 768 tokens, in " in said
    assert f"saved in {tmp_path / 'out'}" in said


@pytest.mark.parametrize(("do_valid", "do_test", "verbs"), [(None, None, ["validate"]), (True, True, ["validate", "test"]), (False, False, [])])
def test_data_that_are_asked_for_and_not_there_are_missed_aloud(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], do_valid: bool | None, do_test: bool | None, verbs: list[str]
) -> None:
    assert trained(write_training(tmp_path, split="1", train_iters=1, do_valid=do_valid, do_test=do_test)) == [None]
    assert re.findall(r"there are no data to (\w+) on: ", capfd.readouterr().err) == verbs


@pytest.mark.parametrize("layout", [Layout(pp=2), pytest.param(Layout(dp=2), marks=pytest.mark.slow), Layout(tp=2)], ids=str)
def test_the_layout_changes_nothing_of_what_is_seen_and_learned(tmp_path: Path, layout: Layout) -> None:
    alone, together = tmp_path / "alone", tmp_path / "together"
    for folder, chosen in ((alone, Layout()), (together, layout)):
        folder.mkdir()
        assert trained(write_training(folder, train_micro_batch_size_per_gpu=2, padded_vocab_size=520), chosen) == [None] * chosen.size
    assert losses(together) == pytest.approx(losses(alone), abs=1e-5)


def test_a_training_that_was_stopped_goes_on_bit_by_bit(tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    trained(write_training(whole))
    config = write_training(parts, load=str(parts / "out"))
    assert trained(config, exit_interval=2) == [None]
    assert losses(parts).keys() == {1, 2}
    assert trained(config, exit_interval=4) == [None]
    assert trained(config) == [None]
    assert losses(parts) == losses(whole)


def test_a_step_that_is_taken_again_stands_once_in_the_metrics_and_in_the_same_curve(tmp_path: Path) -> None:
    whole, again = tmp_path / "whole", tmp_path / "again"
    trained(write_training(whole))
    config = write_training(again, load=str(again / "out"), checkpoint_factor=2)
    assert trained(config, exit_interval=5) == [None]
    shutil.rmtree(again / "out" / "global_step5")  # as after a kill before it was saved
    (again / "out" / "latest").write_text("global_step4")
    assert trained(config) == [None]
    steps = [line["step"] for line in metrics(again) if "train/lm_loss" in line]
    assert steps == [1, 2, 3, 4, 5, 6]
    assert metrics(again)[0]["time"] < metrics(again)[-1]["time"]
    (one, other) = read_runs([whole / "out", again / "out"])
    for name in ("train/lm_loss", "train/grad_norm", "validation/lm_loss", "test/lm_loss"):
        assert one.curves[name] == other.curves[name]


def test_a_training_that_begins_anew_for_want_of_a_checkpoint_begins_its_metrics_anew(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "metrics.jsonl").write_text('{"step": 1, "train/lm_loss": 9.0}\n{"step": 7, "train/lm_loss": 9.0}\n')
    assert trained(write_training(tmp_path, load=str(tmp_path / "out"), train_iters=2)) == [None]
    assert [(line["step"], line["train/lm_loss"] < 9.0) for line in metrics(tmp_path) if "train/lm_loss" in line] == [(1, True), (2, True)]


@pytest.mark.parametrize(
    ("layout", "settings", "sentence"),
    [
        (Layout(), {"checkpoint_factor": 2}, "the last step that is saved is 2, in {out}/global_step2: load={out} finetune=false goes on from there"),
        (
            Layout(pp=2),
            {"checkpoint_factor": 2, "load": "{out}"},
            "the last step that is saved is 2, in {out}/global_step2: the same command goes on from there",
        ),
        (Layout(), {}, "no step is saved in {out} yet, and nothing is left of this training; ended with SIGTERM (kill) it saves first"),
        (Layout(), {"save": None, "log_dir": "{out}"}, "nothing is saved, because save is not set"),
        (Layout(), {"check": True}, "nothing is saved, because this is a check"),
    ],
    ids=str,
)
def test_ctrl_c_leaves_with_the_step_that_is_on_disk(
    tmp_path: Path, layout: Layout, settings: dict[str, object], sentence: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    stated = {key: value.format(out=out) if isinstance(value, str) else value for key, value in settings.items()}
    step, taken = Engine.step, []

    def step_and_signal(self: Engine, *args: object, **named: object) -> object:
        taken.append(step(self, *args, **named))  # pyright: ignore[reportArgumentType]
        if len(taken) == 3 or "checkpoint_factor" not in settings:
            while "checkpoint_factor" in settings and not (out / "latest").exists():
                time.sleep(0.01)
            signal.raise_signal(signal.SIGINT)
        return taken[-1]

    monkeypatch.setattr(Engine, "step", step_and_signal)
    assert trained(write_training(tmp_path, train_iters=200, **stated), layout) == [130] * layout.size
    assert capfd.readouterr().err.splitlines()[-1] == f"stopped; {sentence.format(out=out)}"
    assert not (out / "check").exists()


def test_a_training_goes_on_with_smaller_steps_over_samples_it_has_not_seen(tmp_path: Path) -> None:
    config = write_training(tmp_path, load=str(tmp_path / "out"), train_micro_batch_size_per_gpu=4, train_batch_size=None)
    assert trained(config, exit_interval=5) == [None]
    assert trained(config, train_micro_batch_size_per_gpu=1) == [None]
    assert trained(config, train_micro_batch_size_per_gpu=2, train_iters=8) == [None]
    assert losses(tmp_path).keys() == set(range(1, 9))
    state = json.loads((tmp_path / "out" / "global_step8" / "training.json").read_text())
    assert state["samples"] == 5 * 4 + 1 * 1 + 2 * 2


def test_fine_tuning_starts_from_the_weights_at_step_one(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "base").mkdir()
    trained(write_training(tmp_path / "base"))
    config = write_training(tmp_path, load=str(tmp_path / "base" / "out"), finetune=True)
    assert trained(config, Layout(tp=2)) == [None, None]
    assert losses(tmp_path)[1] < losses(tmp_path / "base")[1] - 1
    assert f"loss before training: {losses(tmp_path)[1]:.4f}" in capfd.readouterr().err


def test_a_training_that_is_done_says_so(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config = write_training(tmp_path, load=str(tmp_path / "out"), train_iters=2)
    trained(config)
    assert trained(config) == [None]
    assert "is at step 2, and train_iters is 2; raise it, or set finetune: true" in capfd.readouterr().err


def test_checkpoints_of_another_training_are_not_overwritten(tmp_path: Path) -> None:
    config = write_training(tmp_path, train_iters=1)
    trained(config)
    (sentence,) = trained(config)
    assert "holds checkpoints already (the last is global_step1); to go on from there say load=" in str(sentence)


@pytest.mark.parametrize("layout", [Layout(), Layout(pp=2)], ids=str)
def test_sigterm_to_one_process_ends_the_step_saves_and_exits_with_75(tmp_path: Path, layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    step = Engine.step

    def step_and_signal(self: Engine, *args: object, **named: object) -> object:
        result = step(self, *args, **named)  # pyright: ignore[reportArgumentType]
        if self.mesh.rank == self.mesh.layout.size - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return result

    monkeypatch.setattr(Engine, "step", step_and_signal)
    assert trained(write_training(tmp_path), layout) == [75] * layout.size
    assert (tmp_path / "out" / "latest").read_text() == "global_step1"
    state = json.loads((tmp_path / "out" / "global_step1" / "training.json").read_text())
    assert (state["iteration"], state["samples"], state["updates"]) == (1, 4, 1)


def test_a_loss_that_stays_nan_ends_the_training_with_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "base").mkdir()
    trained(write_training(tmp_path / "base", train_iters=1))
    path = tmp_path / "base" / "out" / "global_step1" / "layer_02-model_00-model_states.pt"
    weights = torch.load(path)
    weights["input_layernorm.bias"].fill_(torch.nan)
    torch.save(weights, path)
    monkeypatch.setattr(loop, "PATIENCE", 3)
    (sentence,) = trained(write_training(tmp_path, load=str(tmp_path / "base" / "out"), finetune=True))
    assert str(sentence).startswith("TrainingError: 3 steps in a row were not finite, the last of them step 3; the weights are still those of step 0")
    assert "step 2: the loss is nan; the step is skipped (2 so far)" in capfd.readouterr().err


def test_a_check_takes_two_steps_and_leaves_no_checkpoint(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert trained(write_training(tmp_path, check=True)) == [None]
    assert "trained 2 steps" in (said := capfd.readouterr().err)
    assert "the check is passed" in said
    assert not (tmp_path / "out").exists()


def test_a_check_of_a_training_that_goes_on_leaves_everything_as_it_was(tmp_path: Path) -> None:
    board = tmp_path / "board"
    config = write_training(tmp_path, load=str(tmp_path / "out"), tensorboard_dir=str(board))
    assert trained(config, exit_interval=3) == [None]
    before = {path: path.read_bytes() for folder in (tmp_path / "out", board) for path in folder.rglob("*") if path.is_file()}
    assert trained(config, Layout(pp=2), check=True) == [None, None]
    assert {path: path.read_bytes() for folder in (tmp_path / "out", board) for path in folder.rglob("*") if path.is_file()} == before
    assert not (tmp_path / "out" / "check").exists()


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"optimizer": {"type": "OneBitAdam", "params": {"lr": 1.0}}}, "optimizer type OneBitAdam"),
        ({"optimizer": {"type": "Adam"}}, "the optimizer's learning rate is not set"),
        ({"optimizer": {"params": {"lr": -1}}}, "it needs a number of at least 0"),
        ({"optimizer": {"params": {"lr": True}}}, "optimizer.params.lr is True"),
        ({"optimizer": {"params": {"lr": 1e-3, "eps": "small"}}}, "optimizer.params.eps is 'small'"),
        ({"optimizer": {"params": {"lr": 1e-3, "betas": 0.9}}}, "optimizer.params.betas is 0.9"),
        ({"optimizer": {"params": {"lr": 1e-3, "betas": [0.9, 1.5]}}}, "it needs 2 numbers of at least 0 and below 1"),
        ({"optimizer": {"params": {"lr": 1e-3}, "weight_decay": 0.1}}, "optimizer weight_decay"),
        ({"min_lr": 0.1}, "and the optimizer's lr is 0.01"),
        ({"train_batch_size": 5, "train_micro_batch_size_per_gpu": 2}, "train_batch_size 5"),
        ({"train_batch_size": None}, "neither train_batch_size nor train_micro_batch_size_per_gpu is set"),
        ({"train_iters": None}, "neither train_iters nor train_epochs is set"),
        ({"hidden_dropout": 0.1}, "hidden_dropout is 0.1 ("),
        ({"attention_dropout": 0.1}, "but dropout is not built: a step must be the same at every cut and after every resume; set it to 0, as the files of"),
        ({"curriculum_learning": {"enabled": True}}, "curriculum_learning: {enabled: true} is refused: curriculum learning is not built"),
        ({"load": "nowhere", "finetune": True}, "there is no checkpoint folder nowhere"),
        ({"data_path": None}, "no data to train on"),
        ({"zero_optimization": {"stage": 1, "bucket": 3}}, "DeepSpeed refuses its settings: bucket; Extra inputs are not permitted"),
    ],
    ids=lambda value: "",
)
def test_what_cannot_be_trained_is_refused_in_a_sentence(tmp_path: Path, settings: dict[str, object], sentence: str) -> None:
    (found,) = trained(write_training(tmp_path, **settings))
    assert sentence in str(found)


def test_two_trainings_do_not_save_in_one_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folders, "PATIENCE", 0.3)
    folders.hold(tmp_path)

    def other(mesh: Mesh) -> str:
        with pytest.raises(OutputError) as refused:
            folders.hold(tmp_path)
        return str(refused.value)

    assert forked(Layout(), other) == [f"another training saves in {tmp_path} already; wait for its end, or set save to another folder"]
    folders.hold(tmp_path)  # one that holds it may go on there
