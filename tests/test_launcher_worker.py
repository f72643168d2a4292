"""Scripts that deepy did not start: by hand, by torchrun, by srun."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.fit import fit_to_processes
from launcher.spawn import SAFE_PATH
from megatron_lite.config.load import load_config
from megatron_lite.errors import LayoutError

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = f"""
import os, sys
sys.path.append({str(ROOT)!r})
from launcher.worker import work
from megatron_lite.errors import DataError

def main(command):
    if command.overrides.get("stop") == os.environ.get("RANK", "0"):
        raise DataError("prompts.txt is empty; write a prompt")
    if command.overrides.get("stop") == "break":
        raise ValueError("shapes differ")
    print(os.environ.get("RANK"), os.environ.get("WORLD_SIZE"), command.overrides["pipe_parallel_size"], command.overrides["model_parallel_size"])

work(main, script="generate")
"""


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in [
        name for name in os.environ if name.startswith(("SLURM_", "OMPI_", "TORCHELASTIC_", "DEEPY_")) or name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    ]:
        monkeypatch.delenv(name)
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    return path


def run(program: Path, *words: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, *SAFE_PATH, str(program), *words, str(ROOT / "configs" / "tiny.yml")]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, check=False, timeout=60)


def test_a_script_started_by_hand_is_one_process_and_says_so(script: Path) -> None:
    ended = run(script)
    assert (ended.returncode, ended.stdout) == (0, "None None 1 1\n")
    assert ended.stderr == f"{ROOT}/configs/tiny.yml asks for 1 x 2 = 2 processes; 1 was started: using pipe 1 x model 1\n"


def test_a_user_error_of_a_script_started_by_hand_is_one_sentence(script: Path) -> None:
    ended = run(script, "stop=0")
    assert (ended.returncode, ended.stderr.splitlines()[1:]) == (2, ["prompts.txt is empty; write a prompt"])


def test_another_exception_keeps_its_traceback(script: Path) -> None:
    ended = run(script, "stop=break")
    assert ended.returncode == 1
    assert ended.stderr.count("Traceback") == 1
    assert ended.stderr.endswith("ValueError: shapes differ\n")


def test_a_setting_that_is_wrong_is_a_sentence_too(script: Path) -> None:
    ended = run(script, "num_layer=3")
    assert (ended.returncode, ended.stderr) == (2, "command line: unknown key 'num_layer'; did you mean 'num_layers'?\n")


def test_what_only_deepy_can_do_is_refused_by_a_script(script: Path) -> None:
    ended = run(script, "--dry-run")
    assert (ended.returncode, ended.stderr) == (2, "--dry-run and -H are for deepy: ./deepy.py generate.py ...\n")


def test_under_torchrun_every_rank_knows_its_place_and_the_layout_is_fitted(script: Path) -> None:
    words = ["pipe_parallel_size=1", "model_parallel_size=2"]
    outputs = [run(script, *words, RANK=rank, WORLD_SIZE="2", LOCAL_RANK=rank, TORCHELASTIC_RUN_ID="x") for rank in "01"]
    assert [ended.stdout for ended in outputs] == ["0 2 1 2\n", "1 2 1 2\n"]
    outputs = [run(script, "num_layers=8", RANK=rank, WORLD_SIZE="1", LOCAL_RANK=rank) for rank in "01"]
    assert ["using pipe 1 x model 1" in ended.stderr for ended in outputs] == [True, False]


def test_under_torchrun_a_failure_is_written_where_torchrun_looks_for_it(script: Path, tmp_path: Path) -> None:
    file = tmp_path / "error.json"
    ended = run(script, "stop=1", RANK="1", WORLD_SIZE="2", LOCAL_RANK="1", TORCHELASTIC_RUN_ID="x", TORCHELASTIC_ERROR_FILE=str(file))
    assert (ended.returncode, ended.stderr) == (2, "rank 1: prompts.txt is empty; write a prompt\n")
    message = json.loads(file.read_text())["message"]
    assert message["message"] == message["extraInfo"]["py_callstack"] == "prompts.txt is empty; write a prompt"


def torchrun(script: Path, *words: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script), str(ROOT / "configs" / "tiny.yml")]
    return subprocess.run([*command, *words], capture_output=True, text=True, check=False, timeout=120)


def test_torchrun_itself_starts_a_script(script: Path) -> None:
    assert sorted(torchrun(script).stdout.splitlines()) == ["0 2 1 2", "1 2 1 2"]


def test_a_user_error_has_no_traceback_under_torchrun(script: Path) -> None:
    ended = torchrun(script, "top_k=-1")
    sentence = "command line: top_k needs a whole number of at least 0, found -1"
    assert ended.stderr.startswith(sentence) or f"\n{sentence}\n" in ended.stderr
    assert f"traceback : {sentence}" in ended.stderr  # torchrun's own report repeats what it calls one
    assert f"rank 1: {sentence}" not in ended.stderr


def test_deepy_itself_is_not_to_be_started_by_torchrun(script: Path) -> None:
    ended = run(ROOT / "deepy.py", "generate.py", RANK="0", WORLD_SIZE="2")
    assert (ended.returncode, ended.stderr) == (
        2,
        "deepy.py starts one process per device itself; start it once, or let torchrun, mpirun or srun start generate.py with the same words\n",
    )


def test_a_layout_is_fitted_to_the_processes_that_were_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    config = load_config([Path("configs/20B.yml")])
    assert fit_to_processes(config, 8, training=False) == ({"pipe_parallel_size": 4, "model_parallel_size": 2}, None)
    assert fit_to_processes(config, 16, training=False) == ({"pipe_parallel_size": 4, "model_parallel_size": 2}, None)
    assert fit_to_processes(config, 2, training=False) == (
        {"pipe_parallel_size": 1, "model_parallel_size": 2},
        "configs/20B.yml asks for 4 x 2 = 8 processes; 2 were started: using pipe 1 x model 2",
    )
    with pytest.raises(LayoutError, match=r"pipe 4 x model 2 needs 8 processes; 12 were started; start a multiple of 8"):
        fit_to_processes(config, 12, training=False)
    with pytest.raises(LayoutError, match=r"pipe 4 x model 2 needs 8 processes; 2 were started; start a multiple of 8"):
        fit_to_processes(config, 2, training=True)


def test_sizes_of_the_command_line_are_not_changed_for_processes_that_were_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    config = load_config([Path("configs/20B.yml")], {"model_parallel_size": "4", "pipe_parallel_size": "1"})
    with pytest.raises(LayoutError, match="model-parallel-size=4 on the command line: pipe 1 x model 4 needs 4 processes; 2 were started"):
        fit_to_processes(config, 2, training=False)
