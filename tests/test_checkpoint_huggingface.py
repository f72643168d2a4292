"""Every kind of Hugging Face folder gives the logits that transformers computes from it."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedModel

from megatron_lite.config.load import load_config
from megatron_lite.models.spec import ModelSpec
from megatron_lite.parallel.layout import Layout
from megatron_lite.parallel.mesh import Mesh
from megatron_lite.run import load_stage, prepare
from tests.models import in_transformers, logits, write_random
from tests.runs import BYTES, Lines, write_config
from tests.worlds import in_world

TOKENS = torch.randint(160, (2, 21), generator=torch.Generator().manual_seed(1))
ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_fast"}


@pytest.fixture
def lines() -> Iterator[list[str]]:
    with Lines() as said:
        yield said


def hugging_face(spec: ModelSpec, folder: Path, **config: object) -> PreTrainedModel:
    """transformers' own model of this spec with weights of some size, not yet saved."""
    settings = {
        "vocab_size": spec.vocab,
        "hidden_size": spec.hidden,
        "num_hidden_layers": spec.layers,
        "num_attention_heads": spec.heads,
        "intermediate_size": spec.ffn,
        "max_position_embeddings": spec.max_positions,
        "rotary_pct": spec.rotary_dim / spec.head_dim,
        "hidden_act": ACTIVATIONS[spec.activation],
        "use_parallel_residual": spec.parallel_residual,
        "tie_word_embeddings": spec.tied_head,
        "attn_implementation": "eager",
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    torch.manual_seed(0)
    model = GPTNeoXForCausalLM(GPTNeoXConfig(**{**settings, **config})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name and name.endswith("weight") else 0.0, 0.15)
    folder.mkdir(parents=True)
    return model


def save_safetensors(model: PreTrainedModel, folder: Path) -> None:
    model.save_pretrained(folder)
    assert [path.name for path in folder.glob("*.safetensors*")] == ["model.safetensors"]


def save_sharded(model: PreTrainedModel, folder: Path) -> None:
    model.save_pretrained(folder, max_shard_size="200KB")
    assert len(list(folder.glob("model-*-of-*.safetensors"))) > 3


def save_bin(model: PreTrainedModel, folder: Path) -> None:
    """As transformers saved until version 5, tied weights under both names."""
    model.config.save_pretrained(folder)
    torch.save(dict(named(model)), folder / "pytorch_model.bin")


def save_sharded_bin(model: PreTrainedModel, folder: Path) -> None:
    model.config.save_pretrained(folder)
    weights = named(model)
    names = [f"pytorch_model-{number:05d}-of-00003.bin" for number in (1, 2, 3)]
    files = {name: names[position % 3] for position, name in enumerate(weights)}
    for file in names:
        torch.save({name: tensor for name, tensor in weights.items() if files[name] == file}, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))


def named(model: PreTrainedModel) -> Mapping[str, Tensor]:
    """The weights under the names they have on disk, with the buffers that older versions saved too."""
    weights = {("embed_out.weight" if name == "lm_head.weight" else name): tensor for name, tensor in model.state_dict().items()}
    return {
        **weights,
        "gpt_neox.layers.0.attention.bias": torch.ones(1, 1, 64, 64, dtype=torch.bool),
        "gpt_neox.layers.0.attention.masked_bias": torch.tensor(-1e9),
    }


FOLDERS = {"one safetensors file": save_safetensors, "safetensors with an index": save_sharded, "one .bin": save_bin, ".bin with an index": save_sharded_bin}
HUGGING_FACE = {
    "untied": replace(BYTES, activation="gelu"),
    "tied, sequential, tanh": replace(BYTES, tied_head=True, parallel_residual=False),
}


def from_folder(folder: Path, config: Path, mesh: Mesh) -> Tensor:
    run = prepare(load_config([config], {"load": str(folder)}), mesh)
    return logits(load_stage(run), TOKENS, run.spec.vocab)


@pytest.mark.parametrize("kind", FOLDERS)
@pytest.mark.parametrize("name", HUGGING_FACE)
def test_every_kind_of_hugging_face_folder_gives_the_logits_of_transformers(name: str, kind: str, tmp_path: Path) -> None:
    spec = HUGGING_FACE[name]
    model = hugging_face(spec, tmp_path / "folder")
    FOLDERS[kind](model, tmp_path / "folder")
    config = write_config(tmp_path, spec)
    expected = model(TOKENS).logits.detach()
    assert expected.std() > 0.3
    for shape in (Layout(), Layout(pp=2, tp=2)):
        for found in in_world(shape, lambda mesh: from_folder(tmp_path / "folder", config, mesh)):
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_half_precision_folders_are_computed_in_fp32_on_cpu(tmp_path: Path) -> None:
    model = hugging_face(BYTES, tmp_path / "folder").half()
    save_safetensors(model, tmp_path / "folder")
    [found] = in_world(Layout(), lambda mesh: from_folder(tmp_path / "folder", write_config(tmp_path, BYTES, fp16={"enabled": True}), mesh))
    torch.testing.assert_close(found, model.float()(TOKENS).logits.detach(), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("stated", "form", "fused"),
    [
        ("gelu", "the erf form", True),
        ("gelu_new", "the tanh form", False),
        ("gelu_fast", "the tanh form", False),
        ("gelu_pytorch_tanh", "the tanh form", False),
    ],
)
def test_the_folder_decides_about_the_form_of_gelu_and_one_line_says_so(stated: str, form: str, fused: bool, tmp_path: Path, lines: list[str]) -> None:
    model = hugging_face(BYTES, tmp_path / "folder", hidden_act=stated)
    save_safetensors(model, tmp_path / "folder")
    config = write_config(tmp_path, replace(BYTES, activation="gelu_tanh" if fused else "gelu"))
    [found] = in_world(Layout(), lambda mesh: from_folder(tmp_path / "folder", config, mesh))
    torch.testing.assert_close(found, model(TOKENS).logits.detach(), atol=1e-4, rtol=0)
    said = [line for line in lines if "GELU" in line]
    assert said == [f"GELU is computed in {form}, as config.json in {tmp_path / 'folder'} says, whatever bias_gelu_fusion ({config} line 1) is"]


@pytest.mark.parametrize(("stated", "fused"), [("gelu", False), ("gelu_fast", True)])
def test_nothing_is_said_where_folder_and_configuration_agree_on_gelu(stated: str, fused: bool, tmp_path: Path, lines: list[str]) -> None:
    save_safetensors(hugging_face(BYTES, tmp_path / "folder", hidden_act=stated), tmp_path / "folder")
    config = write_config(tmp_path, replace(BYTES, activation="gelu_tanh" if fused else "gelu"))
    in_world(Layout(), lambda mesh: from_folder(tmp_path / "folder", config, mesh))
    assert [line for line in lines if "GELU" in line] == []


def test_a_model_without_positions_is_served(tmp_path: Path) -> None:
    spec = replace(BYTES, rotary_dim=0)
    layout = write_random(tmp_path / "checkpoint", spec, tp=2)
    config = write_config(tmp_path, spec)
    assert '"pos_emb": "none"' in config.read_text()
    expected = in_transformers(layout, spec)(TOKENS).logits.detach()
    for found in in_world(Layout(tp=2), lambda mesh: from_folder(tmp_path / "checkpoint", config, mesh)):
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
