"""GPT-J's own slim checkpoint: read directly, at every cut, as the same model in a Hugging Face folder; converted and looked at by the tools."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from megatron_lite.checkpoint.find import CheckpointLayout, find_checkpoint
from megatron_lite.checkpoint.load import open_source
from megatron_lite.checkpoint.mesh_transformer import layer_count, leaves
from megatron_lite.errors import CheckpointError
from megatron_lite.models.architecture import architecture_named
from megatron_lite.models.spec import ModelSpec
from megatron_lite.parallel.layout import Layout
from megatron_lite.parallel.mesh import Mesh, single_mesh
from tests.models import SMALL, logits
from tests.slim import random_trees, twin, write_slim
from tests.test_families import stage_of, tokens
from tests.worlds import in_world
from tools import convert, inspect_checkpoint

# more than ten layers: in the files layer_10 stands before layer_2
SPEC = replace(SMALL, family="gptj", layers=12, hidden=32, heads=8, kv_heads=8, head_dim=4, ffn=128, rotary_dim=4)
SHARDS = 8
YAML = """
{"architecture": "gptj", "num_layers": 12, "hidden_size": 32, "num_attention_heads": 8, "seq_length": 64, "max_position_embeddings": 64, "pos_emb": "rotary",
 "gpt_j_residual": true, "gpt_j_tied": true, "no_weight_tying": true, "use_bias_in_attn_linear": false, "bias_gelu_fusion": true, "precision": "bfloat16"}
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module]:
    trees = random_trees(SPEC, SHARDS)
    folder = tmp_path_factory.mktemp("slim")
    write_slim(folder / "step_383500", trees)
    return folder, twin(trees, SPEC)


def answer(layout: CheckpointLayout, spec: ModelSpec = SPEC) -> Tensor:
    return logits(stage_of(layout, spec, single_mesh()), tokens(), spec.vocab)


@torch.no_grad()
def expected(model: nn.Module) -> Tensor:
    found = model(tokens()).logits
    assert found.std() > 0.3
    return found


def test_the_folder_is_recognized_with_and_without_its_step(saved: tuple[Path, nn.Module]) -> None:
    folder, _ = saved
    layouts = [find_checkpoint(folder), find_checkpoint(folder / "step_383500"), find_checkpoint(folder, iteration=383500)]
    with pytest.raises(CheckpointError, match="the steps there are: step_383500"):
        find_checkpoint(folder, iteration=5)
    assert {(layout.format, layout.tag, layout.tp) for layout in layouts} == {("mesh-transformer", "step_383500", SHARDS)}


@pytest.mark.parametrize("layout", [Layout(pp=pp, tp=tp) for pp, tp in ((1, 1), (1, 2), (1, 8), (3, 1), (2, 2))], ids=str)
def test_every_cut_agrees_with_the_same_weights_in_transformers(layout: Layout, saved: tuple[Path, nn.Module]) -> None:
    folder, model = saved

    def compute(mesh: Mesh) -> Tensor:
        return logits(stage_of(find_checkpoint(folder), SPEC, mesh), tokens(), SPEC.vocab)

    for found in in_world(layout, compute):
        torch.testing.assert_close(found, expected(model), atol=1e-4, rtol=0)


def test_parameters_are_those_of_the_hugging_face_folder_but_for_the_order_of_sums(saved: tuple[Path, nn.Module], tmp_path: Path) -> None:
    folder, model = saved
    model.save_pretrained(tmp_path / "hf")  # pyright: ignore[reportCallIssue]
    ours, theirs = (stage_of(find_checkpoint(place), SPEC, single_mesh()).layers for place in (folder, tmp_path / "hf"))
    for number, layer in ours.items():
        for name, parameter in layer.named_parameters():
            torch.testing.assert_close(parameter, theirs[number].get_parameter(name), atol=1e-6, rtol=0)


def test_compressed_files_and_an_optimizer_before_the_parameters_change_nothing(saved: tuple[Path, nn.Module], tmp_path: Path) -> None:
    _, model = saved
    full = write_slim(tmp_path / "step_5", random_trees(SPEC, SHARDS), save=np.savez_compressed, optimizer=258)
    torch.testing.assert_close(answer(find_checkpoint(full)), expected(model), atol=1e-4, rtol=0)


def test_gpt_j_has_287_leaves_a_shard_in_alphabetical_order() -> None:
    found = leaves(28)
    assert (len(found) + 1, layer_count(287), layer_count(286)) == (287, 28, 0)
    modules = list(dict.fromkeys(leaf.module for leaf in found))
    assert modules[:6] == ["embedding_shard", "layer_0", "layer_1", "layer_10", "layer_11", "layer_12"]
    assert modules[-3:] == ["layer_8", "layer_9", "projection_shard"]


def refusal(folder: Path, spec: ModelSpec = SPEC) -> str:
    with pytest.raises(CheckpointError) as error:
        open_source(find_checkpoint(folder), architecture_named(spec.family), spec).shards(2)
    return str(error.value)


def test_what_is_missing_or_of_another_model_is_one_sentence(tmp_path: Path) -> None:
    folder = write_slim(tmp_path / "step_1", random_trees(SPEC, SHARDS))
    assert refusal(folder, replace(SPEC, layers=28)) == (
        f"{folder}/shard_0 holds 127 arrays, as in a model of 12 layers; 28 layers (num_layers) have 287:"
        " is it the right configuration, and the download complete?"
    )
    assert refusal(folder, replace(SPEC, family="neox")).endswith("which trained GPT-J; the configuration describes a neox model")
    assert "has 8 shards, which do not divide num_attention_heads 4" in refusal(folder, replace(SPEC, heads=4))
    last = folder / "shard_5" / "15.npz"
    last.write_bytes(last.read_bytes()[:100])
    assert refusal(folder).startswith(f"{last} (100 bytes) is truncated or damaged (")
    last.unlink()
    assert refusal(folder) == f"{folder} lacks shard_5/15.npz (the others are 8 shards of 16 files); fetch the missing files again"


def test_it_is_converted_and_described_by_the_tools(saved: tuple[Path, nn.Module], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, model = saved
    (tmp_path / "model.yml").write_text(YAML)
    for to, words in (("neox", ("--model-parallel-size", "2")), ("huggingface", ())):
        words = (folder, tmp_path / to, "--to", to, "--config", tmp_path / "model.yml", "--dtype", "float32", "--verify", *words)
        assert convert.main([str(word) for word in words]) == 0
        torch.testing.assert_close(answer(find_checkpoint(tmp_path / to)), expected(model), atol=1e-4, rtol=0)
    plain = [folder, tmp_path / "plain", "--to", "neox", "--config", tmp_path / "model.yml"]
    assert convert.main([str(word) for word in plain]) == 0
    layer = torch.load(find_checkpoint(tmp_path / "plain").layer_file(0, 0))
    assert layer["word_embeddings.weight"].dtype == torch.bfloat16
    assert inspect_checkpoint.main([str(folder)]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert f"{folder} step_383500 (mesh-transformer, model-parallel-size 8)" in lines
    assert {"- embedding_shard.linear.w 20 x 32 bfloat16 8", "0-11 linear_4.w 32 x 16 bfloat16 96", "- step scalar int32 8"} <= set(lines)
