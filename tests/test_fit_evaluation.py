"""Evaluation takes the smallest cut that memory allows, as often as the devices hold it."""

from pathlib import Path

import pytest

from launcher.checks import CHECKS, check_tasks_of_training
from launcher.command import Command
from launcher.hardware import Hardware
from launcher.plan import Plan
from launcher.planner import plan_settings
from launcher.replicas import plan_evaluation
from launcher.run import settle
from megatron_lite.config.load import load_config
from megatron_lite.errors import DataError, FitError, LayoutError, UserError
from megatron_lite.parallel.layout import Layout
from tests.machines import TOKENS, cores, gpus

pytestmark = pytest.mark.usefixtures("at_root")


def plan(name: str, hardware: Hardware, **overrides: str) -> Plan:
    return plan_evaluation(load_config([Path(f"configs/{name}.yml")], overrides), hardware, TOKENS)


@pytest.mark.parametrize(
    ("count", "free", "layout"),
    [
        (1, 140, Layout()),
        (4, 140, Layout(dp=4)),
        (8, 80, Layout(dp=8)),
        (8, 40, Layout(pp=2, dp=4)),
        (3, 40, Layout(pp=3)),
        (8, 16, Layout(pp=4, dp=2)),
        (8, 8, Layout(pp=8)),
    ],
)
def test_20b_is_cut_no_further_than_memory_demands_and_stands_as_often_as_it_fits(count: int, free: float, layout: Layout) -> None:
    fitted = plan("20B", gpus(count, free))
    assert fitted.layout == layout
    assert plan_settings(fitted, load_config([Path("configs/20B.yml")])) == {"pipe_parallel_size": layout.pp, "model_parallel_size": layout.tp}


def test_one_line_says_what_is_used_instead() -> None:
    assert plan("20B", gpus(4, 140)).notes == ("configs/20B.yml asks for pipe 4 x model 2; 4 GPUs found: using data 4 x pipe 1 x model 1",)
    assert plan("tiny", cores(2)).notes == ("configs/tiny.yml asks for pipe 1 x model 2; 2 CPU cores found: using data 2 x pipe 1 x model 1",)


def test_cpus_run_as_many_processes_as_the_configuration_asks_for() -> None:
    assert plan("tiny", cores(1)).layout == Layout()
    assert plan("tiny", cores(64)).layout == Layout(dp=2)


def test_sizes_on_the_command_line_are_honoured_and_replicated() -> None:
    sizes = {"pipe_parallel_size": "1", "model_parallel_size": "2"}
    assert plan("20B", gpus(4, 140), **sizes).layout == Layout(dp=2, tp=2)
    assert plan("tiny", cores(2), **sizes).layout == Layout(tp=2)
    assert plan("20B", gpus(8, 40), model_parallel_size="2").layout == Layout(dp=4, tp=2)


def test_what_cannot_run_is_refused_with_the_numbers() -> None:
    with pytest.raises(LayoutError, match=r"pipe 1 x model 4 needs 4 GPUs; 2 GPUs found"):
        plan("20B", gpus(2, 140), pipe_parallel_size="1", model_parallel_size="4")
    with pytest.raises(FitError, match=r"no layout fits on what is here \(2 GPUs found\); weight_quantization=int8 would \(.*\); \d+ such GPUs would do"):
        plan("20B", gpus(2, 16))


def settled(tmp_path: Path, **overrides: object) -> Plan:
    return settle(Command("evaluate", (Path("configs/tiny.yml"),), {"eval_results_prefix": str(tmp_path / "run"), **overrides}, None, False), cores(2)).plan


def test_deepy_plans_evaluations_so(tmp_path: Path) -> None:
    for name in ("lambada/lambada_test.jsonl", "piqa/valid.jsonl", "piqa/valid-labels.lst"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert settled(tmp_path, eval_tasks=["lambada", "piqa"], eval_data_dir=str(tmp_path)).layout == Layout(dp=2)


@pytest.mark.usefixtures("no_network")
def test_tasks_of_a_training_are_looked_for_before_it_starts(tmp_path: Path) -> None:
    settings = {"eval_tasks": ["lambada"], "eval_data_dir": str(tmp_path)}
    with pytest.raises(DataError, match=r"there is no .*/lambada/lambada_test.jsonl for the task lambada_openai, and https://127.0.0.1:9 cannot be reached"):
        check_tasks_of_training(load_config([Path("configs/tiny.yml")], settings))
    check_tasks_of_training(load_config([Path("configs/tiny.yml")]))
    assert check_tasks_of_training in CHECKS["train"]


@pytest.mark.usefixtures("no_network")
def test_missing_data_a_missing_network_and_a_folder_that_is_not_there_are_told_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        settled(tmp_path, eval_tasks=["lambada"], eval_data_dir=str(tmp_path), eval_results_prefix=str(tmp_path / "gone" / "run"))
    data, results = str(error.value).splitlines()
    assert data == (
        f"there is no {tmp_path}/lambada/lambada_test.jsonl for the task lambada_openai, and https://127.0.0.1:9 cannot be reached; `tools/download.py"
        f" eval-data lambada --folder {tmp_path}` fetches it where there is a network, or set eval_data_dir to the folder that has lambada/lambada_test.jsonl"
    )
    assert results.startswith(f"the output {tmp_path}/gone/run_eval_results_")
    assert results.endswith(f"cannot be written: there is no folder {tmp_path}/gone; create it or choose another output")
