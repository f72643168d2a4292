"""What users get wrong ends in one sentence that names the file, the key or the value, exit code 2, and no traceback; here and in the programs themselves."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_lite.config.load import load_config
from megatron_lite.errors import UserError
from megatron_lite.inference.generate import generate
from megatron_lite.run import open_run
from tests.runs import BYTES, records, write_run

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    (tmp_path / "prompts.txt").write_text("Once\nupon\na time\n")
    return write_run(tmp_path, BYTES, maximum_tokens=4, sample_input_file=str(tmp_path / "prompts.txt"))


def refusal(config: Path, **overrides: object) -> str:
    """The sentence that generating ends with."""
    with pytest.raises(UserError) as caught, open_run(load_config([config], overrides)) as run:
        generate(run)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "cannot be read: No such file or directory; check the path and its permissions"),
        (b"", "holds no prompt; write at least one"),
        (b" \n\n \t\n", "holds no prompt; write at least one"),
        (b"fine\n\xff\xfe\n", "line 2 is not UTF-8; save the file as UTF-8"),
    ],
)
def test_a_prompt_file_that_cannot_be_read(content: bytes | None, sentence: str, config: Path, tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    if content is not None:
        path.write_bytes(content)
    found = refusal(config, sample_input_file=str(path))
    assert found.startswith(str(path))
    assert found.endswith(sentence)


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ('{"text": "a", "temprature": 1}', "line 2 has the unknown key temprature; did you mean temperature?"),
        ('{"text": "a", "top_p": 3}', "line 2: top_p is 3; it must be a number from 0 to 1"),
        ('{"prompt": "a"}', 'line 2 has no "text" that is a string; write {"text": "the prompt"}'),
        ("no json", "line 2 is not JSON: Expecting value at column 1; every line must hold one whole JSON object"),
    ],
)
def test_a_json_line_that_is_not_understood(line: str, sentence: str, config: Path, tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text('{"text": "fine"}\n' + line)
    assert refusal(config, sample_input_file=str(path)) == f"{path} {sentence}"


def test_a_folder_is_no_prompt_file(config: Path, tmp_path: Path) -> None:
    assert refusal(config, sample_input_file=str(tmp_path)).startswith(f"{tmp_path} (sample_input_file) cannot be read: Is a directory")


def test_a_prompt_longer_than_the_model(config: Path, tmp_path: Path) -> None:
    path = tmp_path / "long.txt"
    path.write_text("short\n" + "long " * 20)
    assert refusal(config, sample_input_file=str(path)) == f"prompt 2 of {path} has 99 tokens; the model's context is 64 (seq_length); shorten it"
    assert not (tmp_path / "out.jsonl").exists()


def test_no_prompt_file_where_one_is_asked_for(config: Path) -> None:
    sentence = "text_gen_type is input-file, but no sample_input_file is set; give a file of prompts with -i FILE"
    assert refusal(config, text_gen_type="input-file", sample_input_file=None) == sentence


def test_an_empty_stop_text(config: Path) -> None:
    assert refusal(config, stop=["a", ""]) == "command line: stop holds an empty text, which every text would end with at once; take it out"


@pytest.mark.parametrize(
    ("output", "sentence"),
    [
        ("no/such/out.jsonl", "there is no folder {0}/no/such; create it or choose another output"),
        (".", "it is a folder; name a file in it"),
    ],
)
def test_an_output_that_cannot_be_written(output: str, sentence: str, config: Path, tmp_path: Path) -> None:
    path = tmp_path / output
    assert refusal(config, sample_output_file=str(path)) == f"the output {path} cannot be written: {sentence.format(tmp_path)}"


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write everywhere")
def test_an_output_folder_without_permission(config: Path, tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o555)
    assert "is read-only; choose another output" in refusal(config, sample_output_file=str(tmp_path / "locked" / "out.jsonl"))


def test_the_prompts_are_not_overwritten_by_their_own_output(config: Path, tmp_path: Path) -> None:
    (tmp_path / "link.txt").symlink_to(tmp_path / "prompts.txt")
    for name in ("prompts.txt", "link.txt"):
        sentence = f"the output {tmp_path / name} is also the input, which would be overwritten; choose another output"
        assert refusal(config, sample_output_file=str(tmp_path / name)) == sentence
    assert (tmp_path / "prompts.txt").read_text() == "Once\nupon\na time\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_disk(config: Path) -> None:
    sentence = "/dev/full: No space left on device; 0 records are safe in it; free some space or choose another output"
    assert refusal(config, sample_output_file="/dev/full") == sentence


def test_a_disk_that_fills_up_while_writing_leaves_whole_records(config: Path, tmp_path: Path) -> None:
    """The largest file that this process may write stands for the disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, before[1]))
    try:
        sentence = refusal(config)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    written = records(tmp_path / "out.jsonl")
    assert 0 < len(written) < 3
    assert sentence.startswith(f"{tmp_path / 'out.jsonl'}: File too large; {len(written)} records are safe in it; ")


def program(script: str, *words: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / script), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False)


WRONG = {
    "no checkpoint": (["load=/no/such/folder"], "there is no checkpoint folder /no/such/folder; "),
    "no such step": (["--iteration", "3"], "iteration 3 was asked for, but there is no folder "),
    "another depth": (["num_layers=6"], "num_layers is 6, but layer 8 is the last one in "),
    "no prompts": (["-i", "/no/prompts.txt"], "/no/prompts.txt (sample_input_file) cannot be read: No such file or directory"),
    "no space": (["-o", "/dev/full"], "/dev/full: No space left on device; 0 records are safe in it"),
}


@pytest.mark.parametrize("name", WRONG)
def test_the_program_ends_with_the_sentence_and_exit_code_2(name: str, config: Path) -> None:
    words, sentence = WRONG[name]
    ended = program("generate.py", config, *words)
    assert ended.returncode == 2
    assert sentence in ended.stderr.splitlines()[-1]
    assert "Traceback" not in ended.stderr


def test_deepy_says_all_that_is_wrong_at_once_before_any_process_starts(config: Path, tmp_path: Path) -> None:
    words = [config, "load=/no/such/folder", "-i", "/no/prompts.txt", "-o", tmp_path / "no" / "out.jsonl", "model-parallel-size=2"]
    ended = program("deepy.py", "generate.py", *words)
    assert ended.returncode == 2
    assert "/no/prompts.txt (sample_input_file) cannot be read" in ended.stderr
    assert f"there is no folder {tmp_path / 'no'}; create it" in ended.stderr
    assert "there is no checkpoint folder /no/such/folder" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert not (tmp_path / "logs").exists()


def test_what_only_the_processes_can_find_is_told_by_deepy_once(config: Path, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint" / "global_step10" / "layer_04-model_01-model_states.pt"
    path.write_bytes(path.read_bytes()[:2000])
    ended = program("deepy.py", "generate.py", config, "model-parallel-size=2", f"log_dir={tmp_path / 'logs'}")
    assert ended.returncode == 2
    told = [line for line in ended.stderr.splitlines() if str(path) in line]
    assert len(told) == 1
    assert f"{path} (2,000 bytes) is truncated or damaged" in told[0]
    assert "Traceback" not in ended.stderr
    assert not (tmp_path / "out.jsonl").exists()
