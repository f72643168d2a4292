"""A checkpoint of another model than the configuration describes is refused, tensor by tensor and layer by layer."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_lite.config.load import load_config
from megatron_lite.models.spec import ModelSpec
from megatron_lite.parallel.mesh import single_mesh
from megatron_lite.run import load_stage, prepare
from tests.checkpoints import as_sequential_save, edit, layer, refusal
from tests.models import write_random
from tests.runs import BYTES, write_config

TIED = replace(BYTES, tied_head=True)


@pytest.fixture
def step(tmp_path: Path) -> Path:
    """The step folder of a checkpoint of four layers cut in two, with config.yml two folders above it."""
    write_random(tmp_path / "checkpoint", BYTES, tp=2)
    write_config(tmp_path)
    return tmp_path / "checkpoint" / "global_step10"


@pytest.fixture
def config(step: Path) -> Path:
    return step.parent.parent / "config.yml"


def test_a_tensor_of_another_shape(step: Path, config: Path) -> None:
    edit(layer(step, 3, 1), attention__dense__weight=torch.zeros(64, 31))
    assert refusal(config) == (
        f"{layer(step, 3, 0)}: attention.dense.weight is [64, 32] + [64, 31] in the file, which is [64, 64] in all; the configuration needs [64, 64]"
    )


@pytest.mark.parametrize(("setting", "key"), [({"hidden_size": 32}, "word_embeddings.weight"), ({"intermediate_size": 128}, "mlp.dense_h_to_4h.weight")])
def test_a_configuration_of_another_width(setting: dict[str, object], key: str, step: Path, config: Path) -> None:
    sentence = refusal(config, **setting)
    assert f": {key} is [" in sentence
    assert "the configuration needs [" in sentence


@pytest.mark.parametrize(("layers", "found"), [(3, 4), (5, 4), (44, 4)])
def test_a_configuration_of_another_depth(layers: int, found: int, step: Path, config: Path) -> None:
    assert refusal(config, num_layers=layers) == (
        f"num_layers is {layers}, but layer 8 is the last one in {step}, as in a model of {found} layers; "
        "is it the right configuration, and the download complete?"
    )


@pytest.mark.parametrize("layers", [3, 5])
def test_the_depth_of_a_tied_model_is_known_too(layers: int, tmp_path: Path) -> None:
    write_random(tmp_path / "checkpoint", TIED, tp=1)
    assert f"num_layers is {layers}, but layer 7 is the last one in" in refusal(write_config(tmp_path, TIED), num_layers=layers)


def test_a_download_that_broke_off_does_not_pass_for_a_model(step: Path, config: Path) -> None:
    for path in step.iterdir():
        if not path.name.startswith("layer_00"):
            path.unlink()
    assert refusal(config).startswith("num_layers is 4, but layer 0 is the last one in")


def test_an_output_matrix_that_the_configuration_ties_is_not_left_out(step: Path, config: Path) -> None:
    assert refusal(config, no_weight_tying=False) == (
        f"{step} has an output matrix of its own (layer 8), but the configuration ties it; set no_weight_tying: true"
    )


def test_an_output_matrix_that_is_not_there(tmp_path: Path) -> None:
    write_random(tmp_path / "checkpoint", TIED, tp=1)
    assert refusal(write_config(tmp_path, TIED), no_weight_tying=True) == (
        f"{tmp_path / 'checkpoint' / 'global_step10'} has no output matrix (layer 8); fetch it, or set no_weight_tying: false if the model uses its embedding"
    )


def test_a_tensor_too_many(step: Path, config: Path) -> None:
    for part in range(2):
        edit(layer(step, 3, part), attention__rotary__scale=torch.ones(4))
    assert refusal(config) == f"{layer(step, 3, 0)} holds attention.rotary.scale, which layer 3 of this model does not have; is it of another architecture?"


def test_a_tensor_too_few(step: Path, config: Path) -> None:
    for part in range(2):
        edit(layer(step, 3, part), mlp__dense_4h_to_h__bias=None)
    sentence = refusal(config)
    assert sentence.startswith(f"{layer(step, 3, 0)} lacks mlp.dense_4h_to_h.bias (it has ")


def test_parts_that_are_not_of_one_checkpoint(step: Path, config: Path) -> None:
    edit(layer(step, 3, 1), mlp__dense_4h_to_h__bias=None)
    assert refusal(config) == (
        f"layer_03-model_00-model_states.pt and layer_03-model_01-model_states.pt in {step} hold different tensors (mlp.dense_4h_to_h.bias); "
        "are they of one checkpoint?"
    )


def test_weights_that_are_no_floating_point_numbers(step: Path, config: Path) -> None:
    for part in range(2):
        edit(layer(step, 3, part), attention__dense__weight=torch.zeros(64, 32, dtype=torch.int8))
    assert refusal(config).endswith(": attention.dense.weight holds int8 numbers; weights in float16, bfloat16 or float32 are needed")


@pytest.mark.parametrize(
    ("setting", "sentence"), [({"num_layers": 3}, "num_layers is 3, but layer 8 is the last one"), ({"no_weight_tying": False}, "ties it")]
)
def test_saves_without_a_pipeline_are_held_against_the_configuration_too(setting: dict[str, object], sentence: str, step: Path, config: Path) -> None:
    as_sequential_save(step)
    load_stage(prepare(load_config([config]), single_mesh()))
    assert sentence in refusal(config, **setting)


def test_a_tokenizer_with_more_entries_than_the_model_has_rows(tmp_path: Path) -> None:
    small: ModelSpec = replace(BYTES, vocab=500)
    write_random(tmp_path / "checkpoint", small, tp=2)
    assert refusal(write_config(tmp_path, small)) == (
        f"the tokenizer CharLevelTokenizer has 512 entries, but the checkpoint {tmp_path / 'checkpoint'} global_step10 (neox, model-parallel-size 2) "
        "has 500 rows for them; it is not this model's tokenizer, or files of the checkpoint are missing"
    )
