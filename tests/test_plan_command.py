"""./deepy.py plan: memory by part, verdicts and speeds for machines that are named, without a GPU and without torch."""

import subprocess
import sys

import pytest

from launcher.cards import card_named, hardware_named
from launcher.cli import main
from launcher.command import parse_command
from launcher.forecast import Forecast, outlook_of
from megatron_lite.errors import ConfigError
from megatron_lite.parallel.layout import Layout

pytestmark = pytest.mark.usefixtures("at_root")


def printed(capsys: pytest.CaptureFixture[str], *words: str) -> list[str]:
    assert main(["plan", *words]) == 0
    return capsys.readouterr().out.splitlines()


def forecasts(*words: str) -> dict[str, Forecast]:
    return {forecast.work: forecast for forecast in outlook_of(parse_command(["plan", *words])).forecasts}


def test_the_plan_of_20b_on_two_cards_of_24_gb_as_it_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed(capsys, "configs/20B.yml", "gpus=2x24GB")
    assert lines[:2] == [
        "configs/20B.yml: 20.55 billion parameters, 44 layers of 6144, vocabulary 50,432 (neox, float16)",
        "on 2 x 24 GB (as named), 24.0 GB free on each",
    ]
    cells = [line.split("  ") for line in lines]
    rows = {row[0]: [cell.strip() for cell in row[1:] if cell.strip()] for row in cells if row[0]}
    assert rows["memory of a GPU"] == ["generation", "evaluation", "full training", "LoRA"]
    assert rows["weights"] == ["20.6 GB", "20.6 GB", "41.1 GB", "20.6 GB"]
    assert rows["optimizer states"] == ["·", "·", "82.2 GB", "87 MB"]
    assert rows["total"] == ["23.0 GB", "22.3 GB", "252.7 GB", "23.7 GB"]
    assert rows["generation"][-1] == "room for 1 row of up to 2048 tokens, which shorter ones share"
    assert rows["full training"] == [
        "does not fit: 32 such GPUs would do: pipe-parallel-size=1 model-parallel-size=1 train_micro_batch_size_per_gpu=1 zero_optimization.stage=3"
        " (22.3 GB a process)"
    ]
    assert "  tokens/s       not known of GPUs of which only the memory is named; name a card, such as gpus=2xRTX3090" in lines


def test_it_answers_without_torch() -> None:
    words = ["plan", "configs/20B.yml", "gpus=8xH100"]
    code = f"import sys; from launcher.cli import main; code = main({words}); assert 'torch' not in sys.modules; sys.exit(code)"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 0, ended.stderr


def test_a_script_chooses_its_own_kinds_of_work_and_this_machine_is_asked_where_none_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(forecasts("configs/tiny.yml", "configs/finetune.yml", "script=train.py", "gpus=1xL4")) == ["full training", "LoRA"]
    assert list(forecasts("configs/tiny.yml", "script=eval", "gpus=1xL4")) == ["evaluation"]
    assert printed(capsys, "configs/tiny.yml", "configs/finetune.yml")[1].startswith("on ")


def test_settings_of_the_command_line_count_and_adapters_of_the_configuration_are_its_own() -> None:
    found = forecasts("configs/20B.yml", "configs/finetune.yml", "gpus=1xH200", "lora.rank=64", "generation_batch_size=2")
    assert found["generation"].plan.rows == 2
    assert found["LoRA"].plan.work.startswith("LoRA of rank 64: ")
    assert (found["LoRA"].fits, found["full training"].fits) == (True, False)
    assert found["full training"].plan.work.startswith("full training: ")


@pytest.mark.parametrize(
    ("config", "settings", "entries", "rows"),
    [
        ("configs/llama/7B.yml", ("vocab_file=nowhere.model",), "32,000 entries of LLaMA's tokenizer", 32000),
        ("configs/gpt-j-6B.yml", ("vocab_file=nowhere.json", "padded_vocab_size=null", "make_vocab_size_divisible_by=144"), "50,257 entries of GPT-2's", 50400),
        ("configs/20B.yml", ("vocab_file=nowhere.json", "model_parallel_size=2"), "50,277 entries of 20B's tokenizer", 50432),
    ],
)
def test_without_its_tokenizer_a_family_is_reckoned_with_its_own_vocabulary_which_is_said(
    config: str, settings: tuple[str, ...], entries: str, rows: int, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = printed(capsys, config, "gpus=8x80GB", "script=generate.py", *settings)
    assert f"vocabulary {rows:,} (" in lines[0]
    assert lines[-1].startswith(f"the tokenizer is not there yet: reckoned with the {entries}")
    assert lines[-1].endswith("padded_vocab_size states another number")
    main(["generate.py", config, "--dry-run", *settings])
    assert f"reckoned with the {entries}" in capsys.readouterr().out


def test_a_stated_vocabulary_needs_no_tokenizer(capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed(capsys, "configs/llama/7B.yml", "gpus=8x80GB", "script=generate.py", "vocab_file=nowhere.model", "padded_vocab_size=32016")
    assert "vocabulary 32,016 (" in lines[0]
    assert not any("tokenizer" in line for line in lines)


def test_evaluation_that_does_not_fit_is_shown_without_a_cache_which_scoring_does_not_keep() -> None:
    found = forecasts("configs/20B.yml", "gpus=1x16GB")
    assert (found["evaluation"].fits, found["generation"].fits) == (False, False)
    assert found["evaluation"].plan.stages[0].cache == 0 < found["generation"].plan.stages[0].cache
    assert "3 such GPUs would do" in found["evaluation"].remark
    assert "4 such GPUs would do" in found["generation"].remark
    enough = forecasts("configs/20B.yml", "gpus=3x16GB")
    assert (enough["evaluation"].fits, enough["generation"].fits) == (True, False)


def test_the_words_of_a_plan_say_what_limits_it(capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed(capsys, "configs/gpt-j-2x10GB.yml", "gpus=8x80GB")
    assert any(line.startswith("full training  does not fit in the 10.0 GB that gpu-memory-limit allows: 32 such GPUs would do") for line in lines)
    assert any("not known of GPUs of which only the memory is named; name a card" in line for line in lines)
    assert "full training  does not fit: not even 256 such GPUs would do" in printed(capsys, "configs/20B.yml", "gpus=1x1GB")
    lines = printed(capsys, "configs/tiny.yml", "gpus=8x80GB", "script=generate.py")
    assert "generation  room for 1,024 rows or more of up to 512 tokens, which shorter ones share" in lines


def test_the_least_change_that_makes_a_training_fit_is_told() -> None:
    found = forecasts("configs/pythia/1.4B.yml", "configs/finetune.yml", "gpus=1xL40S", "checkpoint_activations=false", "train_micro_batch_size_per_gpu=8")
    assert found["full training"].remark == "8 x 2048 tokens at once, ZeRO 1, activations computed again; with checkpoint_activations=true"
    assert found["full training"].fits


def test_speeds_follow_from_bandwidths() -> None:
    """The reference: 9.42 ms a token for the 40.48 GB that 20B reads at the measured 4.3 TB/s, and about a third of it on four GPUs."""
    one = forecasts("configs/20B.yml", "gpus=1xH200", "pipe_parallel_size=1", "model_parallel_size=1")["generation"]
    assert one.plan.layout == Layout()
    assert one.speeds[0].tokens == pytest.approx(103, rel=0.03)
    four = forecasts("configs/20B.yml", "gpus=4xH200")["generation"]
    assert 290 < four.speeds[0].tokens < 330
    assert one.speeds[1].rows == 16
    assert one.speeds[1].tokens > 10 * one.speeds[0].tokens


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA A100-SXM4-40GB", "A100 40GB"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA GeForce RTX 3090", "RTX 3090"),
        ("NVIDIA GeForce RTX 3090 Ti", "RTX 3090 Ti"),
        ("RTX3090", "RTX 3090"),
        ("rtx-4090", "RTX 4090"),
        ("Tesla T4", "T4"),
        ("Tesla V100-SXM2-16GB", "V100 16GB"),
        ("NVIDIA RTX 6000 Ada Generation", "RTX 6000 Ada"),
        ("part of a GPU (MIG)", None),
    ],
)
def test_cards_are_known_by_the_names_that_nvidia_smi_and_people_give_them(name: str, known: str | None) -> None:
    card = card_named(name)
    assert (card.name if card else None) == known


def test_machines_are_named_by_number_and_memory_or_card() -> None:
    named = hardware_named("2 x 24GB")
    assert (len(named), named.devices[0].free) == (2, 24 * 10**9)
    assert hardware_named("10GiB").devices[0].free == 10 * 2**30
    assert len(hardware_named("8xH100")) == 8
    for text, sentence in {
        "0x24GB": "write a number of GPUs and their memory or name, such as gpus=2x24GB or gpus=8xH100",
        "2x0GB": "write a number of GPUs and their memory",
        "2xGTX970": "GTX970 is no card that is known here (B200, ",
        "": "write a number of GPUs",
    }.items():
        with pytest.raises(ConfigError) as error:
            hardware_named(text)
        assert sentence in str(error.value)


def test_without_a_configuration_an_example_is_given(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan"]) == 2
    assert capsys.readouterr().err == "no configuration file is named; write for instance ./deepy.py plan configs/20B.yml\n"


def test_a_script_that_is_none_is_refused_and_a_cut_that_cannot_be_is_told_for_every_kind_of_work(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "configs/tiny.yml", "script=serve.py"]) == 2
    assert capsys.readouterr().err == "script is serve.py; plans are made for generate.py, evaluate.py, train.py\n"
    lines = printed(capsys, "configs/tiny.yml", "configs/finetune.yml", "gpus=2xL4", "model_parallel_size=3", "pipe_parallel_size=1")
    assert lines[3].startswith(
        "generation     not at all: pipe-parallel-size=1 model-parallel-size=3 on the command line: pipe 1 x model 3 needs 3 GPUs; 2 GPUs found"
    )
    assert lines[5] == "full training  not at all: model-parallel-size 3 does not divide the 8 attention heads; use one of 1, 2, 4, 8"
