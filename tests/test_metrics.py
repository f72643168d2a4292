"""Numbers go to metrics.jsonl always, and to Weights & Biases where somebody has set that up."""

import json
import sys
from pathlib import Path

import pytest

from megatron_lite.config.sections import LoggingSection
from megatron_lite.errors import ConfigError, OutputError
from megatron_lite.metrics import wandb as backend
from megatron_lite.metrics.metrics import JsonLines, Several, open_metrics
from megatron_lite.metrics.wandb import Wandb, is_wanted, open_wandb

KEYS = ("WANDB_API_KEY", "WANDB_MODE", "NETRC")


@pytest.fixture(autouse=True)
def nobody_has_a_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for key in KEYS:
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))


def section(**values: object) -> LoggingSection:
    return LoggingSection.model_validate(values)


def test_every_report_is_a_line_with_time_step_and_numbers_and_later_runs_add_to_the_file(tmp_path: Path) -> None:
    for step in (1, 2):
        with open_metrics(section(), {}, folder=tmp_path / "logs", is_writer=True) as metrics:
            metrics.log({"train/lm_loss": 2.5, "train/learning_rate": 1e-4}, step=step)
            metrics.table("eval/samples", ["a"], [["b"]])
    lines = [json.loads(line) for line in (tmp_path / "logs/metrics.jsonl").read_text().splitlines()]
    assert [{key: value for key, value in line.items() if key != "time"} for line in lines] == [
        {"step": 1, "train/lm_loss": 2.5, "train/learning_rate": 1e-4},
        {"step": 2, "train/lm_loss": 2.5, "train/learning_rate": 1e-4},
    ]


def test_only_the_writer_writes(tmp_path: Path) -> None:
    with open_metrics(section(use_wandb=True), {}, folder=tmp_path / "logs", is_writer=False) as metrics:
        metrics.log({"loss": 1.0})
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "logs").write_text("")
    with pytest.raises(OutputError, match=r"logs/metrics.jsonl cannot be written: File exists; set log_dir to a folder that can be written"):
        JsonLines(tmp_path / "logs" / "metrics.jsonl")


def test_wandb_is_used_where_it_is_asked_for_or_somebody_has_set_it_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [is_wanted(section(use_wandb=value)) for value in (None, True, False)] == [False, True, False]
    (tmp_path / "netrc").write_text("machine api.wandb.ai\n  login user\n  password secret\n")
    assert is_wanted(section())
    assert not is_wanted(section(wandb_host="https://elsewhere"))
    (tmp_path / "netrc").unlink()
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert is_wanted(section())  # gpt-neox turns W&B off here, for there is no key
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert not is_wanted(section())


def test_a_run_without_a_key_is_one_sentence() -> None:
    pytest.importorskip("wandb")
    with pytest.raises(ConfigError, match=r"Weights & Biases cannot be used \(.*\); run `wandb login`, set WANDB_MODE=offline, or set use_wandb to false"):
        open_wandb(section(), {})


def test_a_server_that_does_not_answer_leaves_the_run_on_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    monkeypatch.setattr(backend, "PATIENCE", 3.0)
    with open_metrics(section(wandb_host="http://127.0.0.1:9"), {"layers": 2}, folder=tmp_path, is_writer=True) as metrics:
        metrics.log({"eval/piqa_acc": 0.5})
        assert isinstance(metrics, Several)
        [run] = [part for part in metrics.parts if isinstance(part, Wandb)]
        assert Path(run.run.dir).parent.name.startswith("offline-run-")


def test_a_missing_package_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb.errors", None)
    with pytest.raises(ConfigError, match="use_wandb is true, but the package wandb is not installed; run: pip install wandb"):
        open_wandb(section(use_wandb=True), {})
