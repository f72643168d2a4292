"""A checkpoint that is missing, incomplete, damaged or of another model is one sentence that names the file, and never a model of random weights."""

import json
import os
import random
from pathlib import Path

import pytest
import torch

from megatron_lite.config.load import load_config
from megatron_lite.errors import CheckpointError
from megatron_lite.parallel.mesh import single_mesh
from megatron_lite.run import load_stage, prepare
from tests.checkpoints import as_sequential_save, layer, refusal
from tests.models import write_random
from tests.runs import BYTES, write_config


@pytest.fixture
def step(tmp_path: Path) -> Path:
    """The step folder of a checkpoint of four layers cut in two, with config.yml two folders above it."""
    write_random(tmp_path / "checkpoint", BYTES, tp=2)
    write_config(tmp_path)
    return tmp_path / "checkpoint" / "global_step10"


@pytest.fixture
def config(step: Path) -> Path:
    return step.parent.parent / "config.yml"


def test_without_load_there_is_no_model(config: Path) -> None:
    sentence = refusal(config, load="null")
    assert sentence == "load is not set; it names the folder of the checkpoint (nothing is ever made up: without a checkpoint there is no text)"


def test_a_folder_that_is_not_there(config: Path, tmp_path: Path) -> None:
    assert refusal(config, load=str(tmp_path / "no")).startswith(f"there is no checkpoint folder {tmp_path / 'no'}; ")


def test_a_folder_with_nothing_in_it(config: Path, tmp_path: Path) -> None:
    (tmp_path / "no").mkdir()
    assert refusal(config, load=str(tmp_path / "no")) == (
        f"{tmp_path / 'no'} holds no checkpoint: no file `latest`, no folder global_stepN, no weights; name a folder that does, or download them first"
    )


def test_a_missing_latest_names_the_steps_there_are(step: Path, config: Path) -> None:
    (step.parent / "latest").unlink()
    (step.parent / "global_step9").mkdir()
    assert refusal(config) == (
        f"{step.parent} has no file `latest`, which names the step to load; the steps there are: global_step9, global_step10, "
        "or say iteration=N; nothing was loaded"
    )


@pytest.mark.parametrize("content", [b"", b"  \n", b"../elsewhere", b".hidden", b"\xff\xfe"])
def test_a_latest_that_names_nothing(content: bytes, step: Path, config: Path) -> None:
    (step.parent / "latest").write_bytes(content)
    assert refusal(config).startswith(f"{step.parent / 'latest'} ")


def test_a_latest_that_names_a_missing_step(step: Path, config: Path) -> None:
    (step.parent / "latest").write_text("global_step12")
    assert refusal(config) == (
        f"{step.parent / 'latest'} names global_step12, but there is no folder {step.parent / 'global_step12'}; the steps there are: global_step10"
    )


def test_an_iteration_that_does_not_exist(step: Path, config: Path) -> None:
    assert (
        refusal(config, iteration=3) == f"iteration 3 was asked for, but there is no folder {step.parent / 'global_step3'}; the steps there are: global_step10"
    )
    load_stage(prepare(load_config([config], {"iteration": 10}), single_mesh()))


def test_a_step_without_files(step: Path, config: Path) -> None:
    for path in step.iterdir():
        path.unlink()
    assert refusal(config).startswith(f"{step} holds neither layer_*-model_*-model_states.pt nor mp_rank_*_model_states.pt files; ")


def test_a_missing_part_of_a_layer(step: Path, config: Path) -> None:
    layer(step, 3, 1).unlink()
    assert refusal(config) == (
        f"{step} lacks layer_03-model_01-model_states.pt (the other files are cut for model-parallel-size 2); fetch the missing files again"
    )


def test_a_missing_layer(step: Path, config: Path) -> None:
    for part in range(2):
        layer(step, 4, part).unlink()
    assert refusal(config) == f"{step} lacks layer_04-model_00-model_states.pt (num_layers is 4); fetch the missing files again"


def test_a_missing_second_half_of_everything(step: Path, config: Path) -> None:
    for path in step.glob("*model_01*"):
        path.unlink()
    sentence = refusal(config)
    assert "has 512 entries, but the checkpoint" in sentence
    assert "(neox, model-parallel-size 1) has 260 rows for them; it is not this model's tokenizer, or files of the checkpoint are missing" in sentence


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.9, 0.999])
def test_a_truncated_layer_file(share: float, step: Path, config: Path) -> None:
    path = layer(step, 5, 1)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    sentence = refusal(config)
    assert sentence.startswith(f"{path} ")
    assert sentence.endswith(("truncated or damaged", "fetch it again", "only tensors, numbers, text and their containers are loaded"))


@pytest.mark.parametrize(
    "content", [b"<html>404 Not Found</html>", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", bytes(1000), b"PK\x03\x04 no zip"]
)
def test_a_file_that_is_no_layer_file(content: bytes, step: Path, config: Path) -> None:
    layer(step, 5, 0).write_bytes(content)
    assert refusal(config).startswith(f"{layer(step, 5, 0)} ")


def test_bytes_that_were_damaged_on_the_way_end_in_a_sentence_or_do_not_matter(step: Path, config: Path) -> None:
    path = layer(step, 2, 0)
    whole = path.read_bytes()
    start = whole.index(b"data.pkl")
    chance = random.Random(0)
    sentences: list[str] = []
    for _ in range(60):
        damaged = bytearray(whole)
        damaged[start + chance.randrange(1200)] ^= 1 << chance.randrange(8)
        path.write_bytes(damaged)
        try:
            load_stage(prepare(load_config([config]), single_mesh()))
        except CheckpointError as error:
            sentences.append(str(error))
    assert len(sentences) > 20
    assert all(path.name in sentence for sentence in sentences)


def test_a_file_that_holds_no_names(step: Path, config: Path) -> None:
    torch.save([torch.zeros(3)], layer(step, 3, 0))
    assert refusal(config) == f"{layer(step, 3, 0)} holds a list; a layer file holds tensors by name"


class Trap:
    """Runs a command when it is unpickled by anything that trusts it."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.mark}",)


@pytest.mark.parametrize("name", ["layer_03-model_01-model_states.pt", "mp_rank_01_model_states.pt", "pytorch_model.bin"])
def test_a_pickle_that_asks_for_os_system_is_refused_and_does_not_run(name: str, step: Path, config: Path, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    if name.startswith("mp_rank"):
        as_sequential_save(step)
    if name.endswith(".bin"):
        (step / "config.json").write_text(json.dumps({"model_type": "gpt_neox"}))
        (step.parent / "latest").unlink()
        config = write_config(tmp_path, BYTES, load=str(step), bias_gelu_fusion=False)
        for path in step.glob("layer_*"):
            path.unlink()
    path = step / name
    torch.save({"input_layernorm.weight": torch.ones(64), "module": {"sequential.0.a": Trap(mark)}, "extra": Trap(mark)}, path)
    sentence = refusal(config)
    assert sentence == (
        f"{path} is not opened: its pickle asks for {os.system.__module__}.system, which could run code; "
        "only tensors, numbers, text and their containers are loaded"
    )
    assert not mark.exists()
    torch.load(path, weights_only=False)
    assert mark.exists()  # it would have run


def test_a_missing_rank_file(step: Path, config: Path) -> None:
    as_sequential_save(step).rank_file(0).unlink()
    assert refusal(config) == f"{step} lacks mp_rank_00_model_states.pt (files with higher numbers are there); fetch the missing files again"


def test_rank_files_of_a_pipeline_save_hold_no_weights(step: Path, config: Path) -> None:
    for path in step.iterdir():
        path.unlink()
    torch.save({"module": None, "iteration": 10}, step / "mp_rank_00_model_states.pt")
    assert refusal(config) == (
        f"{step / 'mp_rank_00_model_states.pt'} holds no weights (its `module` is NoneType); the layer_*-model_*.pt files of this save are missing"
    )


def test_rank_files_of_another_program(step: Path, config: Path) -> None:
    for path in step.iterdir():
        path.unlink()
    torch.save({"module": {"language_model.embedding.weight": torch.zeros(3)}}, step / "mp_rank_00_model_states.pt")
    assert refusal(config).endswith(
        "holds no tensor named sequential.N.*, as gpt-neox writes them (it has language_model.embedding.weight); is it of another program?"
    )
