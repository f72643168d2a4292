"""deepy from its command line to its exit code: what is checked before anything starts, what --dry-run says, and one job from end to end."""

import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.cli import main
from launcher.command import parse_command
from launcher.hardware import Device, Hardware
from launcher.plan import gigabytes
from launcher.run import Run, settle
from launcher.show import show_run

ROOT = Path(__file__).resolve().parents[1]
CONFIG = """{
  "num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "seq_length": 128, "max_position_embeddings": 128,
  "pos_emb": "rotary", "rotary_pct": 0.25, "no_weight_tying": true, "gpt_j_residual": true,
  "pipe-parallel-size": 1, "model-parallel-size": 2,
  "vocab_file": "tokenizer.json", "tokenizer_type": "HFTokenizer",
  "load": "checkpoint", "sample_input_file": "prompts.txt", "fp16": {"enabled": true},
}
"""
OWN_SCRIPT = f"""
import os, sys
sys.path.append({str(ROOT)!r})
from launcher.worker import work

def main(command):
    print("rank", os.environ["RANK"], *command.words())

work(main, script="mine")
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with everything that a run needs, as far as the launcher looks: the layer files are empty."""
    (tmp_path / "small.yml").write_text(CONFIG)
    (tmp_path / "prompts.txt").write_text("Once upon a time\nThere was a king\n")
    (tmp_path / "tokenizer.json").write_bytes((ROOT / "checkpoints" / "tiny" / "tokenizer.json").read_bytes())
    step = tmp_path / "checkpoint" / "global_step10"
    step.mkdir(parents=True)
    (step.parent / "latest").write_text("global_step10")
    for number in (0, 2, 3, 5, 6):
        for part in (0, 1):
            (step / f"layer_{number:02d}-model_{part:02d}-model_states.pt").touch()
    (tmp_path / "mine.py").write_text(OWN_SCRIPT)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def settled(line: str, machine: Hardware) -> Run:
    return settle(parse_command(line.split()), machine)


def gpus(count: int) -> Hardware:
    return Hardware("GPU", tuple(Device("NVIDIA A100-SXM4-40GB", 40 * 10**9, f"GPU-{number}") for number in range(count)))


def cores(count: int) -> Hardware:
    return Hardware("CPU", (Device("CPU core"),) * count, memory=10**10)


def test_workers_are_told_files_settings_and_the_layout(folder: Path) -> None:
    run = settled("generate.py small top-k=3 -o out.txt", gpus(2))
    assert run.words == ["small.yml", "top_k=3", "sample_output_file=out.txt", "pipe_parallel_size=1", "model_parallel_size=2"]
    assert run.site.hardware.environment() == {}


def test_sizes_of_the_command_line_stand_once_among_the_words(folder: Path) -> None:
    run = settled("generate.py small pipe-parallel-size=2 model-parallel-size=1", gpus(2))
    assert run.words == ["small.yml", "pipe_parallel_size=2", "model_parallel_size=1"]


def test_num_gpus_and_include_choose_among_the_gpus(folder: Path) -> None:
    assert settled("generate small num_gpus=1", gpus(4)).plan.layout.size == 1
    chosen = settled("generate small include=localhost:1,3", gpus(4))
    assert chosen.site.hardware.environment() == {"CUDA_VISIBLE_DEVICES": "GPU-1,GPU-3"}


def test_a_conversation_needs_its_first_process_here(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (folder / "hosts").write_text("far-away slots=2\n")
    assert main(["generate", "small", "-H", "hosts", "text_gen_type=interactive"]) == 2
    assert capfd.readouterr().err == "a conversation needs its first process on this machine, and far-away is another; name this one first\n"


def test_a_hostfile_that_names_this_machine_means_local_processes(folder: Path) -> None:
    (folder / "hosts").write_text("localhost slots=4\n")
    run = settled("generate small -H hosts model-parallel-size=4", cores(2))
    assert (run.site.is_local, len(run.site.hardware), run.plan.layout.size) == (True, 4, 4)


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("generate small num_layer=3", "command line: unknown key 'num_layer'; did you mean 'num_layers'?"),
        ("generate small temperature=hot", "command line: temperature needs a number of at least 0, found 'hot'"),
        ("generate small -i nowhere.txt", "nowhere.txt (sample_input_file) cannot be read: No such file or directory; check the path and its permissions"),
        ("generate small -o no/out.txt", "the output no/out.txt cannot be written: there is no folder no; create it or choose another output"),
        ("generate small load=nowhere", "there is no checkpoint folder nowhere; set load to the folder that holds `latest`, or download the weights first"),
        ("generate small load=null", "load is not set; it names the folder of the checkpoint to read, write load=FOLDER or set it in a configuration file"),
        ("generate small --iteration 11", "iteration 11 was asked for, but there is no folder checkpoint/global_step11; the steps there are: global_step10"),
        (
            "generate small num_layers=4",
            "num_layers is 4, but ",
        ),
        ("generate small model-parallel-size=3", "model-parallel-size 3 does not divide the 4 attention heads; use one of 1, 2, 4"),
        (
            "generate small text_gen_type=input-file sample_input_file=null",
            "text_gen_type is input-file, but no sample_input_file is set; give a file of prompts with -i FILE",
        ),
        ("generate small -H nowhere", "the hostfile nowhere cannot be read: No such file or directory; check -H, hostfile or DLTS_HOSTFILE"),
        ("generate small log_dir=prompts.txt", "the folder for logs prompts.txt/generate-"),
    ],
)
def test_what_is_wrong_is_told_in_one_sentence_before_anything_starts(line: str, sentence: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(line.split()) == 2
    said = capfd.readouterr().err
    assert said.startswith(sentence)
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        ("gpt_neox", "hf lacks model-2.safetensors, which its index names (1 missing); fetch the files again\n"),
        ("llama", "hf/config.json is of a llama model; the configuration describes neox (gpt_neox): name the YAML of this model, or its own folder\n"),
    ],
)
def test_a_hugging_face_folder_that_is_incomplete_or_of_another_model_starts_nothing(
    kind: str, sentence: str, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (folder / "hf").mkdir()
    (folder / "hf" / "config.json").write_text(json.dumps({"model_type": kind, "hidden_size": 64}))
    (folder / "hf" / "model-1.safetensors").touch()
    there = {"gpt_neox.embed_in.weight": "model-1.safetensors"}
    lost = {"embed_out.weight": "model-2.safetensors"} if kind == "gpt_neox" else {}
    (folder / "hf" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": there | lost}))
    assert main(["generate", "small", "load=hf"]) == 2
    assert capfd.readouterr().err == sentence
    assert not (folder / "logs").exists()


def test_everything_that_is_wrong_is_told_together(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "small", "-i", "nowhere.txt", "-o", "no/out.txt", "load=nothing", "model-parallel-size=3"]) == 2
    said = capfd.readouterr().err.splitlines()
    assert [line.split()[0] for line in said] == ["nowhere.txt", "the", "there", "model-parallel-size"]


def test_a_mismatch_ends_in_about_a_second_without_a_traceback(folder: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    ended = subprocess.run([sys.executable, str(ROOT / "deepy.py"), "generate", "small", "model-parallel-size=3"], capture_output=True, text=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.5  # seconds of work, whatever else the machine does
    assert (ended.returncode, ended.stderr) == (2, "model-parallel-size 3 does not divide the 4 attention heads; use one of 1, 2, 4\n")


def test_a_dry_run_shows_settings_and_where_each_comes_from(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "small", "temperature=0.5", "--dry-run"]) == 0
    shown = capfd.readouterr().out
    rows = {line.split()[0]: line.split(maxsplit=2)[1:] for line in shown.split("\n\n")[0].splitlines()}
    assert rows["hidden_size"] == ["64", "small.yml line 2"]
    assert rows["temperature"] == ["0.5", "command line"]
    assert rows["maximum_tokens"] == ["64", "default"]
    assert not (folder / "logs").exists()


def test_a_dry_run_shows_layout_and_memory_in_a_table(folder: Path) -> None:
    run = settled("generate small pipe-parallel-size=2 num_layers=60 hidden_size=256 load=nowhere --dry-run", gpus(4))
    assert show_run(run.config, run.plan, run.changes).split("\n\n")[1:3] == [
        "pipe 2 x model 2 on 4 GPUs (NVIDIA A100-SXM4-40GB); what every process of a stage takes:",
        "stage  ranks  layers                          weights  KV cache  activations  process   total     free\n"
        "-----  -----  ------------------------------  -------  --------  -----------  -------  ------  -------\n"
        "0      0-1    00 embedding, 02-31 blocks        25 MB      2 MB         1 MB   1.1 GB  1.1 GB  40.0 GB\n"
        "1      2-3    32-61 blocks, 63 norm, 64 head    25 MB      2 MB         1 MB   1.1 GB  1.1 GB  40.0 GB",
    ]


def test_a_dry_run_says_what_was_fitted_to_the_machine(folder: Path) -> None:
    run = settled("generate small pipe-parallel-size=1 --dry-run", cores(1))
    shown = show_run(run.config, run.plan, run.changes)
    row = next(line for line in shown.splitlines() if line.startswith("model_parallel_size"))
    assert row.split(maxsplit=2)[1:] == ["1", "fitted to this machine (2: small.yml line 4)"]
    assert "small.yml asks for 1 x 2 = 2 processes; 1 CPU core found: using pipe 1 x model 1" in shown
    assert f"all processes together take {gigabytes(run.plan.total)} of 10.0 GB of memory that are free" in shown


def test_a_dry_run_needs_no_download(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "small", "load=nowhere", "vocab_file=none.json", "--dry-run"]) == 2
    said = capfd.readouterr()
    assert "pipe 1 x model 2 on 2 CPU processes" in said.out or "pipe 1 x model 1 on 1 CPU process" in said.out
    assert said.err.splitlines()[1:3] == [
        "not ready to run:",
        "there is no checkpoint folder nowhere; set load to the folder that holds `latest`, or download the weights first",
    ]


def test_deepy_runs_a_script_on_every_process(folder: Path) -> None:
    command = [sys.executable, str(ROOT / "deepy.py"), "mine", "small", "top_k=3", "pipe-parallel-size=1", "model-parallel-size=2"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})
    logs = next((folder / "logs").iterdir())
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == "rank 0 small.yml top_k=3 pipe_parallel_size=1 model_parallel_size=2\n"
    assert ended.stderr == f"pipe 1 x model 2 on 2 CPU processes; logs in logs/{logs.name}\n"
    assert (logs / "rank1.log").read_text() == "rank 1 small.yml top_k=3 pipe_parallel_size=1 model_parallel_size=2\n"


@pytest.mark.parametrize("module", ["argparse", "pydantic", "torch"])
def test_ctrl_c_ends_deepy_while_it_still_imports_whatever_the_import_makes_of_it(folder: Path, module: str) -> None:
    asked = "try:\n    os.kill(os.getpid(), signal.SIGINT)\n    time.sleep(5)\nexcept KeyboardInterrupt:\n    raise ImportError('half a module')"
    Path(f"{module}.py").write_text(f"import os, signal, time\n{asked}\n")
    command = [sys.executable, str(ROOT / "deepy.py"), "mine", "small", "pipe-parallel-size=1", "model-parallel-size=2"]
    environment = {**os.environ, "PYTHONPATH": str(folder), "CUDA_VISIBLE_DEVICES": ""}
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, env=environment)
    assert (ended.returncode, ended.stdout) == (-signal.SIGINT, "")
    assert "Traceback" not in ended.stderr


def test_a_dry_run_shows_the_numbers_of_what_does_not_fit(folder: Path) -> None:
    run = settled("generate small num_layers=60 hidden_size=8192 num_attention_heads=64 load=nowhere --dry-run", gpus(1))
    assert run.plan.stages[0].weights > 40e9
    assert any("no layout fits on what is here" in str(problem) for problem in run.problems)


def test_memory_is_reckoned_for_the_prompts_that_are_there(folder: Path) -> None:
    Path("long.txt").write_text("word " * 20 + "\nshort\n")
    run = settled("generate small -i long.txt maximum_tokens=7 load=nowhere --dry-run", gpus(1))
    assert (run.plan.rows, run.plan.context) == (2, 21 + 7 + 1)  # "word" and " word" are different tokens: w-ord, then one each
