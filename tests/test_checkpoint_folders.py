"""A Hugging Face folder that is incomplete, damaged, or of another model than the YAML describes is refused in one sentence."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import GPTNeoXConfig

from megatron_lite.config.load import load_config
from megatron_lite.parallel.mesh import single_mesh
from megatron_lite.run import load_stage, prepare
from tests.checkpoints import refusal
from tests.runs import BYTES, write_config
from tests.test_checkpoint_huggingface import hugging_face, save_sharded


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A Hugging Face folder of the erf kind, with config.yml beside it."""
    save_sharded(hugging_face(replace(BYTES, activation="gelu"), tmp_path / "checkpoint"), tmp_path / "checkpoint")
    write_config(tmp_path, replace(BYTES, activation="gelu"))
    return tmp_path / "checkpoint"


def test_the_folder_and_its_configuration_belong_together(folder: Path) -> None:
    load_stage(prepare(load_config([folder.parent / "config.yml"]), single_mesh()))


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        ({"hidden_size": 32}, "hidden_size 64, the configuration gives 32; set hidden_size to what"),
        ({"num_layers": 5}, "num_hidden_layers 4, the configuration gives 5; set num_layers to what"),
        ({"num_attention_heads": 8}, "num_attention_heads 4, the configuration gives 8; set num_attention_heads to what"),
        ({"intermediate_size": 512}, "intermediate_size 256, the configuration gives 512; set intermediate_size to what"),
        ({"rotary_pct": 0.5}, "partial_rotary_factor 0.25, the configuration gives 0.5; set rotary_pct (and pos_emb: rotary) to what"),
        ({"pos_emb": "none"}, "partial_rotary_factor 0.25, the configuration gives 0.0; set rotary_pct (and pos_emb: rotary) to what"),
        ({"rotary_emb_base": 50000}, "rope_theta 10000.0, the configuration gives 50000.0; set rotary_emb_base to what"),
        ({"gpt_j_residual": False}, "use_parallel_residual True, the configuration gives False; set gpt_j_residual to what"),
        ({"no_weight_tying": False}, "tie_word_embeddings False, the configuration gives True; set no_weight_tying (its opposite) to what"),
        ({"layernorm_epsilon": 1e-6}, "layer_norm_eps 1e-05, the configuration gives 1e-06; set layernorm_epsilon to what"),
    ],
)
def test_a_config_json_that_contradicts_the_yaml(overrides: dict[str, object], sentence: str, folder: Path) -> None:
    assert refusal(folder.parent / "config.yml", **overrides) == f"{folder / 'config.json'} says {sentence} the checkpoint was trained with"


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        ({"rotary_pct": 0.5}, "rotary_pct 0.25"),
        ({"rotary_emb_base": 50000}, "rotary_emb_base 10000"),
        ({"gpt_j_residual": False}, "use_parallel_residual True"),
        ({"no_weight_tying": False}, "tie_word_embeddings False"),
    ],
)
def test_older_config_json_that_are_silent_mean_what_transformers_takes_for_granted(overrides: dict[str, object], key: str, folder: Path) -> None:
    stated = json.loads((folder / "config.json").read_text())
    for name in ("rope_parameters", "use_parallel_residual", "tie_word_embeddings"):
        del stated[name]
    (folder / "config.json").write_text(json.dumps(stated))
    defaults = GPTNeoXConfig()
    assert (defaults.use_parallel_residual, defaults.tie_word_embeddings) == (True, False)
    assert f"says {key}, the configuration gives" in refusal(folder.parent / "config.yml", **overrides)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            {"model_type": "llama", "hidden_act": "silu"},
            "is of a llama model; the configuration describes neox (gpt_neox): name the YAML of this model, or its own folder",
        ),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 10000}}, "says rope_type yarn; only plain rotary positions (default) are built"),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": None},
            "says rope_type linear; only plain rotary positions (default) are built",
        ),
        ({"hidden_act": "relu"}, "says hidden_act relu; built are gelu, gelu_new, gelu_fast, gelu_pytorch_tanh, silu"),
        ({"hidden_act": "silu"}, "says hidden_act silu, the configuration gives gelu; set activation to what the checkpoint was trained with"),
        ({"rope_parameters": 3}, "says rope_parameters 3; a JSON object was expected"),
    ],
)
def test_a_config_json_of_what_is_not_built(change: dict[str, object], sentence: str, folder: Path) -> None:
    stated = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**stated, **change}))
    assert refusal(folder.parent / "config.yml") == f"{folder / 'config.json'} {sentence}"


@pytest.mark.parametrize("content", ["", "{", "[1, 2]", "\x00"])
def test_a_config_json_that_is_none(content: str, folder: Path) -> None:
    (folder / "config.json").write_text(content)
    assert refusal(folder.parent / "config.yml").startswith(f"{folder / 'config.json'} ")


def test_a_missing_file_of_a_folder(folder: Path) -> None:
    lost = sorted(folder.glob("model-*.safetensors"))[2]
    lost.unlink()
    assert refusal(folder.parent / "config.yml") == f"{folder} lacks {lost.name}, which its index names (1 missing); fetch the files again"


def test_a_truncated_file_of_a_folder(folder: Path) -> None:
    for lost in folder.glob("model-*.safetensors"):
        lost.write_bytes(lost.read_bytes()[:-100])
    sentence = refusal(folder.parent / "config.yml")
    assert sentence.startswith(f"{folder / 'model-'}")
    assert "bytes) is truncated or damaged (" in sentence


@pytest.mark.parametrize(
    ("index", "sentence"),
    [
        ({}, "has no weight_map from names to files; fetch it again"),
        ({"weight_map": {"gpt_neox.embed_in.weight": 3}}, "has no weight_map from names to files; fetch it again"),
    ],
)
def test_an_index_that_is_none(index: dict[str, object], sentence: str, folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert refusal(folder.parent / "config.yml") == f"{folder / 'model.safetensors.index.json'} {sentence}"


def test_an_index_that_promises_too_much(folder: Path) -> None:
    path = folder / "model.safetensors.index.json"
    names = json.loads(path.read_text())["weight_map"]
    path.write_text(json.dumps({"weight_map": dict.fromkeys(names, names["embed_out.weight"])}))
    assert "lacks gpt_neox.embed_in.weight, which the index of" in refusal(folder.parent / "config.yml")


def test_a_folder_without_a_tensor_of_the_model(folder: Path) -> None:
    path = folder / "model.safetensors.index.json"
    names = json.loads(path.read_text())["weight_map"]
    names.pop("gpt_neox.layers.2.mlp.dense_h_to_4h.bias")
    path.write_text(json.dumps({"weight_map": names}))
    assert refusal(folder.parent / "config.yml").startswith(f"{folder} lacks mlp.dense_h_to_4h.bias (it has ")


def test_a_folder_with_nothing_but_a_config_json(folder: Path) -> None:
    for path in folder.glob("model*"):
        path.unlink()
    assert refusal(folder.parent / "config.yml").startswith(f"{folder} has a config.json but none of model.safetensors.index.json, model.safetensors, ")
