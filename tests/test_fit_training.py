"""Whether a training fits is told before a process starts, with what would make it fit; on machines that are handed in as values."""

from pathlib import Path

import pytest

from launcher.command import Command
from launcher.hardware import Device, Hardware
from launcher.plan import Plan
from launcher.run import settle
from launcher.train_plan import plan_training
from megatron_lite.config.load import load_config
from megatron_lite.errors import FitError, UserError
from megatron_lite.parallel.layout import Layout
from tests.machines import GB, TOKENS, gpus

pytestmark = pytest.mark.usefixtures("at_root")


def plan(hardware: Hardware, name: str = "20B", *settings: str, pp: int = 1, tp: int = 1) -> Plan:
    overrides = {"pipe_parallel_size": str(pp), "model_parallel_size": str(tp), **dict(word.split("=") for word in settings)}
    return plan_training(load_config([Path(f"configs/{name}.yml"), Path("configs/finetune.yml")], overrides), hardware, TOKENS)


def refusal(hardware: Hardware, name: str = "20B", *settings: str, pp: int = 1, tp: int = 1) -> str:
    with pytest.raises(FitError) as error:
        plan(hardware, name, *settings, pp=pp, tp=tp)
    return str(error.value)


@pytest.mark.parametrize(("pp", "tp", "stage", "gigabytes"), [(1, 4, 1, 104), (2, 2, 1, 104), (1, 2, 2, 106), (1, 1, 3, 98)])
def test_20b_is_tuned_whole_on_four_gpus_of_140_gb(pp: int, tp: int, stage: int, gigabytes: float) -> None:
    fitted = plan(gpus(4, 140), "20B", f"zero_optimization={{stage: {stage}}}", pp=pp, tp=tp)
    assert fitted.layout == Layout(pp=pp, dp=4 // (pp * tp), tp=tp)
    assert fitted.largest / GB == pytest.approx(gigabytes, rel=0.02)


def test_adapters_of_20b_fit_on_one_gpu_of_48_gb() -> None:
    assert plan(gpus(1, 48), "20B", "lora.rank=16").work == "LoRA of rank 16: 1 x 2048 tokens at once, ZeRO 1, activations computed again"


def test_what_does_not_fit_is_refused_by_part_with_settings_and_layouts_that_would() -> None:
    assert refusal(gpus(4, 140), tp=2) == (
        "configs/20B.yml with data 2 x pipe 1 x model 2 (full training: 1 x 2048 tokens at once, ZeRO 1, activations computed again) needs 147.0 GB on GPU 0"
        " (weights 20.6 GB, gradients 61.7 GB, fp32 masters 20.6 GB, optimizer states 41.1 GB, activations 1.2 GB, logits 723 MB, buffers 119 MB,"
        " CUDA itself 1.1 GB); 140.0 GB are free there; here would fit: zero_optimization.stage=2 (105.9 GB a process);"
        " pipe-parallel-size=1 model-parallel-size=1 zero_optimization.stage=2 (127.0 GB a process);"
        " pipe-parallel-size=1 model-parallel-size=4 (104.1 GB a process); pipe-parallel-size=2 model-parallel-size=2 (104.2 GB a process)"
    )


def test_keeping_fewer_activations_and_smaller_micro_batches_are_named_first() -> None:
    words = ("train_micro_batch_size_per_gpu=8", "checkpoint_activations=false")
    assert "here would fit: checkpoint_activations=true (" in refusal(gpus(1, 48), "pythia/1.4B", *words)
    assert "here would fit: checkpoint_activations=true train_micro_batch_size_per_gpu=1 (" in refusal(gpus(1, 30), "pythia/1.4B", *words)


def test_where_only_adapters_fit_they_are_what_is_named() -> None:
    assert refusal(gpus(1, 140)).endswith("140.0 GB are free there; here would fit: lora.rank=16 (45.1 GB a process)")


def test_where_nothing_fits_the_number_of_gpus_that_would_is_told() -> None:
    assert refusal(gpus(1, 16)).endswith(
        "no setting makes it fit on what is here (1 GPU found); 32 such GPUs would do: pipe-parallel-size=1"
        " model-parallel-size=16 zero_optimization.stage=2 (15.9 GB a process)"
    )


def test_cpu_processes_share_memory_in_the_format_that_is_trained() -> None:
    cores = Hardware("CPU", (Device("CPU core"),) * 2, memory=24 * GB)
    assert "needs 28.8 GB on CPU (weights 2.8 GB, " in refusal(cores, "pythia/1.4B")
    assert plan(cores, "tiny", tp=2).layout == Layout(tp=2)


def settled(*, dry_run: bool, tmp_path: Path) -> Plan:
    (tmp_path / "mine.txt").write_text("Once upon a time")
    settings = {"data_path": str(tmp_path / "mine.txt"), "finetune": "false", "load": "null", "vocab_file": "checkpoints/tiny/tokenizer.json"}
    words = Command("train", (Path("configs/pythia/6.9B.yml"), Path("configs/finetune.yml")), settings, None, dry_run)
    run = settle(words, Hardware("GPU", (Device("NVIDIA RTX 4090", 24 * GB),) * 2))
    assert [type(problem) for problem in run.problems] == [FitError]
    return run.plan


def test_deepy_refuses_before_a_process_starts_and_a_dry_run_shows_the_plan_all_the_same(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"needs .* on GPU 0 .*here would fit"):
        settled(dry_run=False, tmp_path=tmp_path)
    assert settled(dry_run=True, tmp_path=tmp_path).largest > 24 * GB
