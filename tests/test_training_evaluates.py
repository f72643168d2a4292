"""Tasks of lm-eval on the model in training: the same code, on the live layers, which go on training as if nothing had been."""

from pathlib import Path

import pytest

from megatron_lite.evaluation.evaluate import evaluate
from megatron_lite.parallel.layout import Layout
from megatron_lite.training.live import Uses
from tests.training_runs import losses, metrics, trained, write_training


@pytest.mark.parametrize("layout", [Layout(), Layout(pp=2), Layout(tp=2)], ids=str)
def test_tasks_are_evaluated_at_every_validation_and_change_nothing(layout: Layout, shared_data: Path, tmp_path: Path) -> None:
    plain, evaluated = tmp_path / "plain", tmp_path / "evaluated"
    for folder in (plain, evaluated):
        folder.mkdir()
    assert trained(write_training(plain), layout) == [None] * layout.size
    tasks = {"eval_tasks": ["lambada"], "eval_data_dir": str(shared_data), "limit": 3}
    assert trained(write_training(evaluated, **tasks), layout, Uses(evaluate)) == [None] * layout.size
    found = [line for line in metrics(evaluated) if "eval/lambada_openai_acc" in line]
    assert [line["step"] for line in found] == [3, 6]
    assert all(0 <= line["eval/lambada_openai_acc"] <= 1 for line in found)
    assert losses(evaluated) == losses(plain)


def test_weights_that_zero_3_spreads_are_not_evaluated_and_that_is_said(shared_data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    tasks = {"eval_tasks": ["lambada"], "eval_data_dir": str(shared_data), "limit": 3}
    config = write_training(tmp_path, zero_optimization={"stage": 3}, train_iters=3, **tasks)
    assert trained(config, uses=Uses(evaluate)) == [None]
    assert "eval_tasks are not evaluated while ZeRO 3 spreads the weights" in capfd.readouterr().err
