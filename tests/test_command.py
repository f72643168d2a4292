"""The words of the command line: any order, any spelling that NeoX's users know, and a sentence where they do not make sense."""

import resource
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.command import Command, parse_command
from megatron_lite.errors import ConfigError

ROOT = Path(__file__).resolve().parents[1]
B20, TEXT, TINY = Path("configs/20B.yml"), Path("configs/text_generation.yml"), Path("configs/tiny.yml")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with configs/ in it, which is where the tests stand."""
    (tmp_path / "configs").mkdir()
    for path in (B20, TEXT, TINY):
        (tmp_path / path).touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def parse(line: str) -> Command:
    return parse_command(line.split())


def refusal(line: str) -> str:
    with pytest.raises(ConfigError) as error:
        parse(line)
    return str(error.value)


def test_a_script_a_configuration_and_settings() -> None:
    command = parse("generate.py configs/20B.yml -i prompts.txt -o out.txt temperature=0.5 top-k=3")
    overrides = {"sample_input_file": Path("prompts.txt"), "sample_output_file": Path("out.txt"), "temperature": "0.5", "top_k": "3"}
    assert command == Command("generate", (B20,), overrides, None, False)


@pytest.mark.parametrize(
    "line",
    [
        "generate configs/20B.yml configs/text_generation.yml top_k=3 -i p.txt",
        "generate.py -d configs 20B text_generation -i p.txt top-k=3",
        "generate.py --conf_dir configs 20B.yml text_generation.yml top_k=3 --sample_input_file p.txt",
        "generate -i p.txt 20B top_k=3 text_generation --conf-dir=configs",
        "generate top_k=3 --sample-input-file=p.txt configs/20B configs/text_generation",
    ],
)
def test_order_suffixes_and_dashes_do_not_matter(line: str) -> None:
    assert parse(line) == Command("generate", (B20, TEXT), {"top_k": "3", "sample_input_file": Path("p.txt")}, None, False)


def test_a_folder_of_configurations_may_be_left_for_a_path() -> None:
    assert parse("generate -d configs 20B ./configs/tiny.yml").configs == (B20, TINY)


def test_evaluation_as_neox_users_write_it() -> None:
    command = parse("evaluate.py configs/20B.yml --eval_tasks lambada piqa --eval_results_prefix run1 --num_fewshot 5 --limit 10 --log_samples")
    assert command.configs == (B20,)
    assert command.overrides == {"eval_tasks": ["lambada", "piqa"], "eval_results_prefix": '"run1"', "num_fewshot": 5, "limit": 10, "log_samples": True}


@pytest.mark.parametrize(
    "line",
    [
        "eval --eval_tasks lambada piqa configs/tiny.yml num_fewshot=2 configs/20B.yml",
        "eval.py configs/tiny.yml --eval-tasks lambada,piqa configs/20B num_fewshot=2",
        "evaluate -d configs num_fewshot=2 --eval_tasks lambada tiny piqa 20B",
    ],
)
def test_tasks_do_not_swallow_configurations_or_settings(line: str) -> None:
    command = parse(line)
    assert command.script == "evaluate"
    assert command.configs == (TINY, B20)
    assert command.overrides == {"eval_tasks": ["lambada", "piqa"], "num_fewshot": "2"}


def test_iteration_hostfile_and_dry_run() -> None:
    command = parse("generate configs/tiny --iteration 150000 -H hosts --dry-run")
    assert (command.overrides, command.hostfile, command.dry_run) == ({"iteration": 150000}, Path("hosts"), True)


def test_what_stands_behind_an_option_is_not_read_as_yaml() -> None:
    overrides = parse_command(["train", "configs/tiny", "--wandb_group", "007", "--wandb_run_name", "a: b", "--wandb_team", "[x"]).overrides
    assert overrides == {"wandb_group": '"007"', "wandb_run_name": '"a: b"', "wandb_team": '"[x"'}


def test_a_value_may_hold_an_equals_sign() -> None:
    assert parse("generate configs/tiny prompt_end===").overrides == {"prompt_end": "=="}


def test_a_path_with_an_equals_sign_in_a_folder_is_a_configuration(folder: Path) -> None:
    (folder / "runs" / "lr=1").mkdir(parents=True)
    (folder / "runs" / "lr=1" / "c.yml").touch()
    assert parse("generate runs/lr=1/c.yml").configs == (Path("runs/lr=1/c.yml"),)


def test_a_script_of_ones_own_is_named_by_its_path(folder: Path) -> None:
    (folder / "mine.py").touch()
    assert parse("./mine configs/tiny").script == "mine.py"
    assert parse(f"{folder}/mine.py configs/tiny").script == f"{folder}/mine.py"


def test_a_running_script_reads_the_same_words_without_its_name() -> None:
    command = parse_command(["configs/tiny.yml", "top_k=3"], script="generate")
    assert command == Command("generate", (TINY,), {"top_k": "3"}, None, False)


def test_a_command_survives_being_written_as_words() -> None:
    command = parse("evaluate -d configs 20B --eval_tasks lambada pi* -o x.txt top-k=[1] --limit 3 --log_samples")
    assert parse_command(command.words(), script="evaluate").configs == command.configs
    assert command.words() == ["configs/20B.yml", "top_k=[1]", "sample_output_file=x.txt", 'eval_tasks=["lambada", "pi*"]', "limit=3", "log_samples=true"]


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("", "no script is named; write for instance ./deepy.py generate.py configs/20B.yml (scripts: generate, evaluate, train)"),
        ("genrate.py configs/20B.yml", "there is no script genrate.py; did you mean generate.py?"),
        ("evalute configs/20B.yml", "there is no script evalute; did you mean evaluate.py or eval.py?"),
        ("nothing configs/20B.yml", "there is no script nothing; did you mean generate.py or evaluate.py or train.py?"),
        ("generate", "no configuration file is named; write for instance ./deepy.py generate.py configs/20B.yml"),
        ("generate configs/20b.yml", "there is no configuration file configs/20b.yml; did you mean configs/20B.yml?"),
        ("generate tinny", "there is no configuration file tinny.yml; did you mean configs/tiny.yml?"),
        ("generate -d configs zzz", "there is no configuration file configs/zzz.yml or zzz.yml; check the path, or name its folder with -d DIR"),
        ("generate configs/20B a-b=1 a_b=2", "a_b is set twice on the command line, to 1 and to 2; leave one of them out"),
        (
            "generate configs/20B -i x sample-input-file=y",
            "sample_input_file is set twice on the command line, by -i and by sample_input_file=; leave one of them out",
        ),
        ("generate configs/20B --iteratoin 3", "unknown option --iteratoin; did you mean --iteration?"),
        ("generate configs/20B --iteration x", "argument --iteration: invalid int value: 'x'; see ./deepy.py --help"),
        ("generate configs/20B -i", "argument -i/--sample_input_file: expected one argument; see ./deepy.py --help"),
        ("evaluate configs/20B --eval_tasks configs/tiny", "--eval_tasks names no task; write for instance --eval_tasks lambada piqa"),
    ],
)
def test_words_that_make_no_sense_get_a_sentence(line: str, sentence: str) -> None:
    assert refusal(line) == sentence


def test_help_answers_at_once_and_names_everything() -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    answer = subprocess.run([sys.executable, str(ROOT / "deepy.py"), "--help"], capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5  # seconds of work, whatever else the machine does
    for word in ("generate.py", "evaluate.py", "train.py", "CONF", "key=value", "--conf_dir", "--hostfile", "--dry-run", "--eval_tasks", "--iteration"):
        assert word in answer.stdout
    assert max(map(len, answer.stdout.splitlines())) <= 150


def test_help_of_a_running_script_does_not_ask_for_a_script() -> None:
    answer = subprocess.run([sys.executable, str(ROOT / "generate.py"), "--help"], capture_output=True, text=True, check=True)
    assert answer.stdout.startswith("usage: generate.py CONF [CONF ...] [options] [key=value ...]")
