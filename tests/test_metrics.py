"""Numbers go to metrics.jsonl always, and to Weights & Biases and TensorBoard where somebody has set that up."""

import json
import sys
from pathlib import Path

import pytest

from megatron_lite.config.sections import LoggingSection
from megatron_lite.errors import ConfigError, OutputError
from megatron_lite.metrics import wandb as backend
from megatron_lite.metrics.metrics import JsonLines, Several, forget, open_metrics
from megatron_lite.metrics.tensorboard import open_tensorboard
from megatron_lite.metrics.wandb import Wandb, is_wanted, open_wandb
from tests.disks import no_file_beyond
from tests.runs import Lines

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


@pytest.mark.parametrize("whole", ["", '{"step": 1}\n', '{"step": 1}\n' * 9000])
def test_a_line_that_a_killed_run_left_unfinished_is_taken_away(tmp_path: Path, whole: str) -> None:
    path = tmp_path / "metrics.jsonl"
    for cut in ('{"step": 2, "train/lm_lo', '{"step": 2, "text": "' + "x" * 100_000, ""):
        path.write_text(whole + cut)
        metrics = JsonLines(path)
        metrics.log({}, step=2)
        metrics.close()
        steps = [json.loads(line)["step"] for line in path.read_text().splitlines()]
        assert steps == [1] * whole.count("\n") + [2]


def test_lines_of_steps_that_are_taken_again_are_dropped_and_all_others_kept_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    forget(path, after=0)
    assert not path.exists()
    lines = ['{"step": 1, "a": 1}\n', '{"time": 2.5}\n', "no JSON \udcff\n", "[3]\n", '{"step": 3, "a": 1}\n', '{"step": 2, "a": 1}\n', '{"step": 4']
    path.write_text("".join(lines), encoding="utf-8", errors="surrogateescape")
    file = path.stat().st_ino
    forget(path, after=3)
    assert path.stat().st_ino == file
    with Lines() as said:
        forget(path, after=2)
    assert path.read_text(encoding="utf-8", errors="surrogateescape") == "".join([*lines[:4], *lines[5:]])
    assert said == [f"{path}: 1 line of steps behind 2 dropped, because they are taken again"]
    assert [found.name for found in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_disk_that_is_full_when_lines_are_dropped_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n' * 20 + '{"step": 2}\n')
    with no_file_beyond(80), pytest.raises(OutputError, match="cannot be written anew without its steps behind 1: File too large; free some space"):
        forget(path, after=1)
    assert path.read_text() == '{"step": 1}\n' * 20 + '{"step": 2}\n'
    assert [found.name for found in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_tensorboard_shows_the_same_names_and_of_steps_that_were_taken_twice_the_later(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="tensorboard is not installed")
    board = tmp_path / "board"
    for after, loss in ((None, 1.0), (2, 3.0)):
        with open_metrics(section(tensorboard_dir=board), {}, folder=tmp_path, is_writer=True, after=after) as metrics:
            for step in range((after or 0) + 1, 5):
                metrics.log({"train/lm_loss": loss * step, "runtime/tokens_per_sec": 10.0}, step=step)
            metrics.table("samples", ["text", "length"], [["a|b\nc", 2]], step=4)
    events = accumulator.EventAccumulator(str(board)).Reload()
    assert events.Tags()["scalars"] == ["train/lm_loss", "runtime/tokens_per_sec"]
    assert [(event.step, event.value) for event in events.Scalars("train/lm_loss")] == [(1, 1.0), (2, 2.0), (3, 9.0), (4, 12.0)]
    text = events.Tensors("samples/text_summary")[-1]
    assert text.tensor_proto.string_val[0].decode() == "| text | length |\n| --- | --- |\n| a\\|b<br>c | 2 |"


def test_without_tensorboard_one_line_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with Lines() as said, open_metrics(section(tensorboard_dir=tmp_path / "board"), {}, folder=tmp_path, is_writer=True) as metrics:
        metrics.log({"train/lm_loss": 1.0}, step=1)
    assert said == [
        f"tensorboard_dir is {tmp_path / 'board'}, but the package tensorboard is not installed, and nothing is written there; "
        "run `pip install tensorboard`, or set tensorboard_dir to null"
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl"]


def test_a_folder_of_tensorboard_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    (tmp_path / "board").write_text("")
    with pytest.raises(OutputError, match=r"TensorBoard's files cannot be written to .*board: .*; set tensorboard_dir to another folder"):
        open_tensorboard(tmp_path / "board")


def test_only_the_writer_writes(tmp_path: Path) -> None:
    with open_metrics(section(use_wandb=True), {}, folder=tmp_path / "logs", is_writer=False) as metrics:
        metrics.log({"loss": 1.0})
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "logs").write_text("")
    with pytest.raises(OutputError, match=r"logs/metrics.jsonl cannot be written: File exists; let save \(or else log_dir\) name a folder that can be written"):
        JsonLines(tmp_path / "logs" / "metrics.jsonl")


def test_a_full_disk_is_one_sentence(tmp_path: Path) -> None:
    lines = JsonLines(tmp_path / "metrics.jsonl")
    lines.log({"train/lm_loss": 1.0}, step=1)
    with no_file_beyond(80), pytest.raises(OutputError, match="cannot be written: File too large; free some space, and go on from the last checkpoint"):
        lines.log({"train/lm_loss": 1.0}, step=2)
    lines.close()


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


def test_a_server_that_does_not_answer_leaves_the_run_on_this_machine_with_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_RUN_ID", "thisone1")
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    monkeypatch.setattr(backend, "PATIENCE", 3.0)
    with Lines() as said, open_metrics(section(wandb_host="http://127.0.0.1:9"), {"layers": 2}, folder=tmp_path, is_writer=True) as metrics:
        metrics.log({"eval/piqa_acc": 0.5})
        assert isinstance(metrics, Several)
        [run] = [part for part in metrics.parts if isinstance(part, Wandb)]
        assert Path(run.run.dir).parent.name.startswith("offline-run-")
        assert run.run.id == "thisone1"
    assert [line.partition(" (")[0] for line in said] == ["Weights & Biases does not answer"]


def test_a_missing_package_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb.errors", None)
    with pytest.raises(ConfigError, match="use_wandb is true, but the package wandb is not installed; run: pip install wandb"):
        open_wandb(section(use_wandb=True), {})
