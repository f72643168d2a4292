"""The tool that writes checkpoints of random weights: the 20B release's files to the byte, and small ones for real, read back."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_lite.checkpoint.find import find_checkpoint
from megatron_lite.config.load import load_config
from megatron_lite.inference.generate import generate
from megatron_lite.models.architecture import architecture_named
from megatron_lite.models.memory import parameters
from megatron_lite.models.spec import ModelSpec, spec_of
from megatron_lite.run import open_run
from tests.runs import BYTES, records, write_config
from tools.synthesize_checkpoint import LayerFile, layer_files, main, padded_vocabulary

ROOT = Path(__file__).resolve().parents[1]
TOOL = ROOT / "tools" / "synthesize_checkpoint.py"

# The release's files as they were published: tensor -> shape in the file of one of the two ranks
BLOCK = {
    "input_layernorm.weight": (6144,),
    "input_layernorm.bias": (6144,),
    "post_attention_layernorm.weight": (6144,),
    "post_attention_layernorm.bias": (6144,),
    "attention.query_key_value.weight": (9216, 6144),
    "attention.query_key_value.bias": (9216,),
    "attention.dense.weight": (6144, 3072),
    "attention.dense.bias": (6144,),
    "attention.rotary_emb.inv_freq": (12,),
    "mlp.dense_h_to_4h.weight": (12288, 6144),
    "mlp.dense_h_to_4h.bias": (12288,),
    "mlp.dense_4h_to_h.weight": (6144, 12288),
    "mlp.dense_4h_to_h.bias": (6144,),
}
SHAPES = {
    0: {"word_embeddings.weight": (25216, 6144)},
    **dict.fromkeys(range(2, 46), BLOCK),
    47: {"norm.weight": (6144,), "norm.bias": (6144,)},
    48: {"final_linear.weight": (25216, 6144)},
}
SIZES = {0: 309_854_208, **dict.fromkeys(range(2, 46), 453_101_568 + 24), 47: 24_576, 48: 309_854_208}


def files_of_20b() -> tuple[ModelSpec, list[LayerFile]]:
    config = load_config([ROOT / "configs" / "20B.yml"])
    spec = spec_of(config.model, vocab=50432, dtype="float16")
    return spec, layer_files(architecture_named(config.model.family), spec, config.parallel.model_parallel_size)


def test_20b_has_the_files_tensors_and_bytes_of_the_release() -> None:
    spec, files = files_of_20b()
    assert [(file.number, file.part) for file in files] == [(number, part) for number in SHAPES for part in (0, 1)]
    assert len(files) == 94
    assert all(dict(file.shapes) == SHAPES[file.number] for file in files)
    assert all(2 * file.numbers == SIZES[file.number] for file in files)
    assert sum(2 * file.numbers for file in files) == 41_112_406_080
    assert parameters(spec) == 20_554_567_680


def test_20b_s_vocabulary_is_padded_as_neox_does_it(shared_data: Path) -> None:
    config = load_config([ROOT / "configs" / "20B.yml"], {"vocab_file": str(shared_data / "tokenizers" / "20B_tokenizer.json")})
    assert [padded_vocabulary(config, tp) for tp in (1, 2, 4, 8)] == [50304, 50432, 50688, 51200]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return write_config(tmp_path, BYTES)


def written(config: Path, name: str = "checkpoint", *words: str) -> Path:
    assert main([str(config), str(config.parent / name), "--workers", "2", *words]) == 0
    return config.parent / name


def tensors(folder: Path) -> dict[tuple[int, int], dict[str, Tensor]]:
    layout = find_checkpoint(folder)
    return {(number, part): torch.load(layout.layer_file(number, part)) for number in layout.numbers for part in range(layout.tp)}


def test_what_was_written_is_read_back_and_generates_at_another_cut(config: Path) -> None:
    folder = written(config, "checkpoint", "--model-parallel-size", "2", "--step", "7", "--mp-rank-files")
    assert (folder / "latest").read_text() == "global_step7"
    assert sorted(path.name for path in (folder / "global_step7").iterdir())[0] == "layer_00-model_00-model_states.pt"
    assert find_checkpoint(folder).numbers == (0, 2, 3, 4, 5, 7, 8)
    state = torch.load(folder / "global_step7" / "mp_rank_01_model_states.pt", weights_only=True)
    assert (state["module"], state["iteration"], state["mp_world_size"], state["args"]["model_parallel_size"]) == (None, 7, 2, 2)
    with open_run(load_config([config], {"num_samples": 2, "maximum_tokens": 5})) as run:
        generate(run)
    assert len(records(config.parent / "out.jsonl")) == 2


def test_biases_and_norms_differ_on_every_rank_and_numbers_have_the_size_of_trained_ones(config: Path) -> None:
    found = tensors(written(config, "checkpoint", "--model-parallel-size", "2", "--dtype", "float32"))
    for number in (2, 3, 4, 5):
        first, second = found[number, 0], found[number, 1]
        assert torch.equal(first.pop("attention.rotary_emb.inv_freq"), second.pop("attention.rotary_emb.inv_freq"))
        assert not any(torch.equal(first[name], second[name]) for name in first)
        assert first["input_layernorm.weight"].mean() == pytest.approx(1, abs=0.1)
        assert first["mlp.dense_4h_to_h.weight"].std() == pytest.approx((2 / (5 * 64)) ** 0.5, rel=0.1)
        assert bool(first["attention.dense.bias"].any())


def test_the_frequencies_are_those_of_the_release(config: Path) -> None:
    frequencies = tensors(written(config))[2, 0]["attention.rotary_emb.inv_freq"]
    assert frequencies.dtype == torch.float16
    assert frequencies.tolist() == pytest.approx([1.0, 0.01], rel=1e-3)


def test_a_seed_gives_the_same_numbers_in_every_process_and_another_seed_others(config: Path) -> None:
    first = tensors(written(config, "first"))
    again = [sys.executable, str(TOOL), str(config), str(config.parent / "again"), "--workers", "1"]
    subprocess.run(again, check=True, capture_output=True, env={**os.environ, "PYTHONHASHSEED": "7"}, timeout=120)
    other = tensors(written(config, "other", "--seed", "1"))
    for place, layer in tensors(config.parent / "again").items():
        assert all(torch.equal(tensor, first[place][name]) for name, tensor in layer.items())
        assert not any(torch.equal(tensor, other[place][name]) for name, tensor in layer.items() if not name.endswith("inv_freq"))


def test_a_tied_head_has_no_file(config: Path) -> None:
    assert find_checkpoint(written(config, "tied", "no_weight_tying=false")).numbers == (0, 2, 3, 4, 5, 7)


def refusal(capsys: pytest.CaptureFixture[str], words: Sequence[str | Path]) -> str:
    assert main(list(map(str, words))) == 2
    return capsys.readouterr().err.strip()


def test_no_space_is_told_before_anything_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    huge = [ROOT / "configs" / "20B.yml", tmp_path / "new" / "folder", "--vocab", "10000000000"]
    sentence = refusal(capsys, huge)
    assert sentence.startswith("the checkpoint takes 245799.9 GB; ")
    assert f"; {tmp_path} has " in sentence
    assert sentence.endswith("GB free; choose another folder")
    assert not (tmp_path / "new").exists()


def test_a_checkpoint_that_is_there_is_never_replaced(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = written(config)
    sentence = "is there already, and random weights replace nothing; choose another folder, or delete it first"
    assert refusal(capsys, [config, folder]) == f"{folder / 'latest'} {sentence}"
    assert refusal(capsys, [config, folder, "--step", "3"]) == f"{folder / 'latest'} {sentence}"
    (folder / "latest").unlink()
    assert refusal(capsys, [config, folder]) == f"{folder / 'global_step150000'} {sentence}"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["hidden_sise=64"], "command line: unknown key 'hidden_sise'; did you mean 'hidden_size'?"),
        (["--model-parallel-size", "3"], "model-parallel-size 3 does not divide the 4 attention heads; use one of 1, 2, 4"),
        (["tokenizer_type=HFTokenizer", "vocab_file=/no/file.json"], "or give --vocab N, the rows of the embedding (50432 for 20B)"),
    ],
)
def test_what_is_wrong_with_the_words_is_one_sentence(
    words: list[str], sentence: str, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = refusal(capsys, [config, tmp_path / "new", *words])
    assert found.endswith(sentence)
    assert "\n" not in found


def test_help_tells_every_option_and_the_tool_runs_from_any_folder_without_being_installed(tmp_path: Path) -> None:
    """-S leaves out site-packages' .pth files, and with them an editable installation; PYTHONPATH brings the libraries back."""
    libraries = Path(torch.__file__).resolve().parents[1]
    words = [sys.executable, "-S", str(TOOL), "--help"]
    ended = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(libraries)}, timeout=120, check=False)
    assert ended.returncode == 0, ended.stderr
    for option in ("--model-parallel-size", "--step", "--dtype", "--vocab", "--mp-rank-files", "--workers", "--seed", "key=value"):
        assert option in ended.stdout
