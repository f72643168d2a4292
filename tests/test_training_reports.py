"""Where a training's numbers end up: Weights & Biases' own files, and the sentence of a save that failed."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from launcher.cli import main
from megatron_lite.config.load import load_config
from megatron_lite.inference.live import completer
from megatron_lite.models.spec import spec_of
from megatron_lite.training.live import Uses
from megatron_lite.training.report import flops_per_token
from tests.disks import no_file_beyond
from tests.training_runs import losses, trained, write_training

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/training.md"


def documented() -> set[str]:
    """The names in the table of docs/training.md."""
    _, _, rest = PAGE.read_text(encoding="utf-8").partition("| name | what it is |\n|---|---|\n")
    cells = [line.split("|")[1] for line in rest.partition("\n\n")[0].splitlines()]
    return {name for cell in cells for name in re.findall("`([^`]+)`", cell)}


def records(run: Path) -> list[dict[str, Any]]:
    """What wandb's own reader finds in the files of a run."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(run)]
    return [json.loads(line) for line in subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()]


def logged(run: Path) -> set[str]:
    """The names in a run's history, those of wandb itself and the parts of a table left out."""
    names = {name for record in records(run) if record["type"] == "history" for name in record["history"]["item"]}
    return {name.partition(".")[0] for name in names if not name.startswith("_")}


def test_a_run_at_wandb_holds_the_documented_names_and_no_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.delenv("WANDB_RUN_ID", raising=False)
    settings = {"use_wandb": True, "peak_theoretical_tflops": 1.0, "eval_tasks": ["piqa"], "sample_interval": 3, "maximum_tokens": 2}
    config = write_training(tmp_path, load=str(tmp_path / "out"), **settings)
    uses = Uses(evaluate=lambda *model: {"<task>_<metric>": 0.5}, complete=completer(load_config([config])))
    assert trained(config, uses=uses, exit_interval=2) == [None]
    assert trained(config, uses=uses) == [None]
    before, after = sorted(tmp_path.glob("wandb/offline-run-*"))
    assert logged(before) | logged(after) == documented() - {"runtime/peak_memory_gb"}  # of GPUs
    assert {"hidden_size", "optimizer", "train_iters"} <= next(record for record in records(after) if record["type"] == "run")["run"]["config"]["update"].keys()
    assert len({record["run"]["run_id"] for run in (before, after) for record in records(run) if record["type"] == "run"}) == 1


def test_a_full_disk_ends_the_training_with_the_name_of_the_file(tmp_path: Path) -> None:
    config = write_training(tmp_path, checkpoint_factor=1, data_path=None)
    with no_file_beyond(60_000):
        (sentence,) = trained(config, data_path=str(tmp_path / "texts.jsonl"))
    assert str(sentence).startswith("OutputError: ")
    assert "layer_00-model_00-model_states.pt cannot be written" in str(sentence)
    assert not list((tmp_path / "out").glob("latest"))


def test_after_a_full_disk_the_last_checkpoint_goes_on_as_if_nothing_had_been(tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    trained(write_training(whole))
    config = write_training(parts, load=str(parts / "out"), checkpoint_factor=2)
    assert trained(config, exit_interval=2) == [None]
    with no_file_beyond(60_000):
        (sentence,) = trained(config)
    assert "OutputError" in str(sentence)
    assert (parts / "out" / "latest").read_text() == "global_step2"
    assert trained(config) == [None]
    assert losses(parts) == losses(whole)


def test_a_folder_that_cannot_be_written_is_told_before_anything_is_trained(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").write_text("in the way")
    (sentence,) = trained(write_training(tmp_path))
    assert str(sentence).startswith(f"OutputError: {tmp_path}/out")
    assert "can be written" in str(sentence)
    assert "step 1/6" not in capfd.readouterr().err


def test_a_damaged_state_of_the_optimizer_ends_a_resume_with_the_name_of_the_file(tmp_path: Path) -> None:
    config = write_training(tmp_path, load=str(tmp_path / "out"))
    assert trained(config, exit_interval=2) == [None]
    path = tmp_path / "out" / "global_step2" / "optimizer-layer_02-model_00.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    (sentence,) = trained(config)
    assert str(sentence).startswith(f"CheckpointError: {path} is damaged: its checksum is ")
    assert (tmp_path / "out" / "latest").read_text() == "global_step2"


def test_flops_of_20b_are_those_of_the_formula() -> None:
    config = load_config([ROOT / "configs/20B.yml"])
    spec = spec_of(config.model, vocab=50432, dtype="bfloat16")
    assert flops_per_token(spec, 2048, recompute=False) == pytest.approx(128.1e9, rel=0.005)
    assert flops_per_token(spec, 2048, recompute=True) == pytest.approx(4 / 3 * flops_per_token(spec, 2048, recompute=False))


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["data_path=nowhere.jsonl"], "there are no training data nowhere.jsonl: neither a file of texts nor nowhere.jsonl.bin with nowhere.jsonl.idx"),
        ([], "no data to train on: set data_path"),
        (["finetune=true", "load=nowhere"], "there is no checkpoint folder nowhere"),
    ],
    ids=lambda value: "",
)
def test_deepy_knows_before_any_process_starts_what_a_training_lacks(
    tmp_path: Path, words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_training(tmp_path, data_path=None)
    assert main(["train.py", str(config), *words]) == 2
    assert sentence in capsys.readouterr().err
