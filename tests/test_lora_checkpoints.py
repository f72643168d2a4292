"""Checkpoints of trainings with adapters: small, gone on from bit by bit, served at any cut, merged by tools/convert.py."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_lite.checkpoint.adapters import find_adapters
from megatron_lite.checkpoint.find import find_checkpoint
from megatron_lite.checkpoint.merged import merged_beside
from megatron_lite.config.load import load_config
from megatron_lite.errors import UserError
from megatron_lite.parallel.layout import Layout
from megatron_lite.parallel.mesh import Mesh, single_mesh
from megatron_lite.run import load_stage, prepare
from megatron_lite.training.lora import put_adapters
from tests.models import SMALL, logits, write_random
from tests.training_runs import losses, trained, write_training
from tests.worlds import in_world
from tools.convert import main as convert
from tools.inspect_checkpoint import main as inspect

BASE = replace(SMALL, layers=2, vocab=512, rotary_dim=16, activation="gelu")
LORA = {"rank": 4, "alpha": 8, "targets": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]}
TOKENS = torch.randint(512, (2, 24), generator=torch.Generator().manual_seed(0))
slow = pytest.mark.slow


def write_run(folder: Path, **settings: object) -> Path:
    """A training of adapters on a random checkpoint of two ranks, whose norms differ as 20B's do."""
    write_random(folder / "base", BASE, tp=2)
    out = str(folder / "out")
    stated = {"load": str(folder / "base"), "save": out, "lora_load": out, "lora": LORA, "warmup": 0.0, "eval_interval": None, "checkpoint_factor": 3}
    return write_training(folder, **{**stated, **settings})


def served(config: Path, layout: Layout, **overrides: object) -> Tensor:
    """Logits of the model as generate.py and evaluate.py load it."""
    sizes = {"pipe_parallel_size": layout.pp, "model_parallel_size": layout.tp}

    def run(mesh: Mesh) -> Tensor:
        return logits(load_stage(prepare(load_config([config], {**sizes, **overrides}), mesh)), TOKENS, BASE.vocab)

    return in_world(layout, run)[0]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The configuration of a training that has ended, at pipe 1 x model 2, in fp32."""
    config = write_run(tmp_path_factory.mktemp("lora"))
    assert trained(config, Layout(tp=2)) == [None, None]
    return config


@pytest.mark.parametrize(
    ("before", "after", "settings"),
    [
        (Layout(tp=2), Layout(tp=2), {"precision": "bfloat16"}),
        (Layout(pp=2), Layout(pp=2), {"weight_quantization": "int8"}),
        pytest.param(Layout(pp=2), Layout(pp=2), {}, marks=slow),
        pytest.param(Layout(tp=2), Layout(tp=2), {"weight_quantization": "int8", "precision": "bfloat16"}, marks=slow),
        pytest.param(Layout(dp=2), Layout(dp=2), {"weight_quantization": "int8", "zero_optimization": {"stage": 3}}, marks=slow),
        pytest.param(Layout(dp=2), Layout(dp=2), {"zero_optimization": {"stage": 3}}, marks=slow),
        pytest.param(Layout(dp=2), Layout(dp=2), {"zero_optimization": {"stage": 2}, "precision": "bfloat16"}, marks=slow),
        pytest.param(Layout(tp=2), Layout(pp=2), {}, marks=slow),
        pytest.param(Layout(pp=2), Layout(tp=2), {}, marks=slow),
    ],
    ids=str,
)
def test_the_same_command_goes_on_where_it_was_stopped(tmp_path: Path, before: Layout, after: Layout, settings: dict[str, object]) -> None:
    whole = write_run(tmp_path, **settings)
    assert set(trained(whole, before)) == {None}
    uninterrupted = losses(tmp_path)
    (tmp_path / "out").rename(tmp_path / "whole")
    assert set(trained(whole, before, exit_interval=3)) == {None}
    assert set(trained(whole, after)) == {None}
    assert len(losses(tmp_path)) == 6
    if before == after:
        assert losses(tmp_path) == uninterrupted
    else:
        assert list(losses(tmp_path).values()) == pytest.approx(list(uninterrupted.values()), abs=1e-5)


def test_checkpoints_hold_adapters_and_not_the_model(run: Path) -> None:
    step = run.parent / "out" / "global_step6"
    names = {path.name for path in step.iterdir()} - {"configs"}
    states = {f"optimizer-layer_{number:02d}-model_{part:02d}.pt" for number in (2, 3) for part in (0, 1)}
    assert names == {"adapter_config.json", "adapter_model.safetensors", "manifest.json", "training.json", *states}
    assert set(json.loads((step / "manifest.json").read_text())) == names - {"manifest.json"}
    stored = sum(tensor.numel() for tensor in load_file(step / "adapter_model.safetensors").values())
    assert stored == 2 * 4 * ((64 + 192) + (64 + 64) + (64 + 256) + (256 + 64))  # layers x rank x (inputs + outputs)


def test_what_was_trained_serves_any_cut(run: Path) -> None:
    here = served(run, Layout())
    assert (here - served(run, Layout(), lora_load="null")).abs().max() > 0.1
    torch.testing.assert_close(served(run, Layout(tp=2)), here, rtol=0, atol=1e-5)
    torch.testing.assert_close(served(run, Layout(pp=2)), here, rtol=0, atol=1e-5)


@pytest.mark.parametrize("layout", [Layout(), Layout(tp=2)], ids=str)
def test_what_is_served_is_what_was_trained(run: Path, layout: Layout) -> None:
    """The layers of a training that goes on, with A and B beside the weights, and the weights that they were merged into."""

    def in_training(mesh: Mesh) -> Tensor:
        config = load_config([run], {"model_parallel_size": mesh.tp.size})
        found = prepare(config, mesh)
        stage = load_stage(replace(found, adapters=None))
        lora = config.training.lora
        assert lora is not None
        put_adapters(stage.layers, lora, found.adapters, family="neox", seed=0, tp=mesh.tp)
        return logits(stage, TOKENS, BASE.vocab)

    torch.testing.assert_close(in_world(layout, in_training)[0], served(run, layout), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["neox", "huggingface"])
def test_a_merged_checkpoint_is_the_model_with_its_adapters(run: Path, tmp_path: Path, kind: str) -> None:
    words = [str(run.parent / "base"), str(tmp_path / "merged"), "--to", kind, "--config", str(run), "--lora", str(run.parent / "out")]
    assert convert([*words, "--model-parallel-size", "2" if kind == "neox" else "1"]) == 0
    unmerged = [str(run.parent / "base"), str(tmp_path / "base"), *words[2:6], "--model-parallel-size", "2" if kind == "neox" else "1"]
    assert convert(unmerged) == 0
    expected = served(run, Layout(), load=str(tmp_path / "base"))  # without the norms that a conversion averages
    torch.testing.assert_close(served(run, Layout(), load=str(tmp_path / "merged"), lora_load="null"), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["neox", "huggingface"])
def test_adapters_that_are_merged_already_are_refused_and_others_are_not(run: Path, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    base, out, merged = str(run.parent / "base"), run.parent / "out", str(tmp_path / "merged")
    common = ["--config", str(run), "--dtype", "float16"]
    assert convert([base, merged, "--to", kind, "--lora", str(out), *common]) == 0
    step = find_adapters(out).folder
    said = f"hold the adapters in {step} already (merged from {step}) and would get them twice; leave lora_load (or --lora) out, or load the checkpoint"
    assert said in _refusal(run, load=merged)
    assert convert([merged, str(tmp_path / "twice"), "--to", "neox", "--lora", str(out), *common]) == 2
    assert said in capsys.readouterr().err
    assert convert([merged, str(tmp_path / "on"), "--to", "neox", *common]) == 0, "the record goes along"
    copy = resaved(step, tmp_path / "copy")
    assert f"hold the adapters in {copy} already (merged from {step})" in _refusal(run, load=str(tmp_path / "on"), lora_load=str(copy))
    other = resaved(step, tmp_path / "other", factor=2.0)
    assert convert([str(tmp_path / "on"), str(tmp_path / "both"), "--to", kind, "--lora", str(other), *common]) == 0
    for folder in (out, other):
        assert "already" in _refusal(run, load=str(tmp_path / "both"), lora_load=str(folder))
    assert inspect([str(tmp_path / "both")]) == 0
    assert f"low-rank adapters are merged into them: those of {step}, {other}" in capsys.readouterr().out


def resaved(step: Path, folder: Path, *, factor: float = 1.0) -> Path:
    """The adapters as another program might have written them: the same tensors, times a factor, and other words beside them."""
    folder.mkdir()
    tensors = {name: tensor * factor for name, tensor in load_file(step / "adapter_model.safetensors").items()}
    save_file(tensors, folder / "adapter_model.safetensors")
    config = json.loads((step / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "elsewhere", "inference_mode": False}))
    return folder


def test_a_training_of_all_weights_keeps_the_record_of_merged_adapters_in_every_checkpoint(run: Path, tmp_path: Path) -> None:
    merged, out = tmp_path / "merged", tmp_path / "out"
    assert convert([str(run.parent / "base"), str(merged), "--to", "neox", "--config", str(run), "--lora", str(run.parent / "out")]) == 0
    for step, load in ((1, merged), (2, out)):
        assert trained(run, lora="null", lora_load="null", load=str(load), save=str(out), finetune=step == 1, train_iters=step) == [None]
    (known,) = merged_beside(find_checkpoint(merged).folder)
    assert [merged_beside(out / f"global_step{step}") for step in (1, 2)] == [(known,), (known,)]


def test_a_damaged_record_of_merged_adapters_is_named(run: Path, tmp_path: Path) -> None:
    assert convert([str(run.parent / "base"), str(tmp_path / "new"), "--to", "neox", "--config", str(run), "--lora", str(run.parent / "out")]) == 0
    record = find_checkpoint(tmp_path / "new").folder / "merged-adapters.json"
    for content, said in {"{": "cannot be read as JSON", '{"adapters": ["a"]}': "is not what tools/convert.py --lora wrote"}.items():
        record.write_text(content)
        assert said in _refusal(run, load=str(tmp_path / "new"))


def test_merging_in_half_precision_rounds_once(run: Path, tmp_path: Path) -> None:
    base, out = str(run.parent / "base"), str(run.parent / "out")
    for name, dtype in (("fp32", "float32"), ("bf16", "bfloat16")):
        assert convert([base, str(tmp_path / name), "--to", "neox", "--config", str(run), "--lora", out, "--dtype", dtype]) == 0
    exact, rounded = (torch.load(find_checkpoint(tmp_path / name).layer_file(3, 0)) for name in ("fp32", "bf16"))
    assert all(torch.equal(exact[name].bfloat16(), rounded[name]) for name in exact)


def _refusal(config: Path, **overrides: object) -> str:
    with pytest.raises(UserError) as caught:
        load_stage(prepare(load_config([config], overrides), single_mesh()))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_adapters_of_other_weights_are_refused(run: Path, tmp_path: Path) -> None:
    write_random(tmp_path / "other", BASE, tp=1, seed=1)
    assert "were trained on other weights than those of" in _refusal(run, load=str(tmp_path / "other"))
    write_random(tmp_path / "wide", replace(BASE, ffn=128), tp=1)
    (tmp_path / "foreign").mkdir()
    step = find_adapters(run.parent / "out").folder
    save_file(load_file(step / "adapter_model.safetensors"), tmp_path / "foreign" / "adapter_model.safetensors")  # says nothing of its base
    (tmp_path / "foreign" / "adapter_config.json").write_bytes((step / "adapter_config.json").read_bytes())
    found = _refusal(run, load=str(tmp_path / "wide"), intermediate_size=128, lora_load=str(tmp_path / "foreign"))
    assert "the adapter of gpt_neox.layers.0.mlp.dense_h_to_4h is for a weight [256, 64], the model's is [128, 64]; is it for another model?" in found
    found = _refusal(run, load=str(write_random(tmp_path / "one", replace(BASE, layers=1), tp=1).folder), num_layers=1, lora_load=str(tmp_path / "foreign"))
    assert "holds an adapter of gpt_neox.layers.1." in found
    assert "none of the linear layers in the 1 blocks of this neox model" in found


def test_folders_that_are_taken_for_others_are_named(run: Path, tmp_path: Path) -> None:
    assert "there is no folder of adapters" in _refusal(run, lora_load=str(tmp_path / "nowhere"))
    assert "is a whole checkpoint, which load names" in _refusal(run, lora_load=str(run.parent / "base"))
    for folder in ("out", "out/global_step6"):
        assert "holds low-rank adapters, no model; name them with lora_load" in _refusal(run, load=str(run.parent / folder))


def test_a_training_that_cannot_go_on_says_why(run: Path, tmp_path: Path) -> None:
    def sentence(**overrides: object) -> str:
        return str(trained(run, Layout(), **{"train_iters": 9, **overrides})[0])

    assert "have rank 4, alpha 8, on dense, dense_4h_to_h, dense_h_to_4h, query_key_value of 2 layers; lora asks for rank 8" in sentence(**{"lora.rank": 8})
    assert "lora asks for rank 4, alpha 8, on dense of all" in sentence(**{"lora.targets": ["dense"]})
    assert "so that all weights would train; set lora to train the adapters further" in sentence(lora="null", save=str(tmp_path / "new"))
    assert "load is not set; name the checkpoint" in sentence(load="null", save=str(tmp_path / "new"))
    assert f"to go on from there say lora_load={run.parent / 'out'} finetune=false" in sentence(lora_load="null")
    path = run.parent / "out" / "global_step6" / "adapter_model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert "adapter_model.safetensors is damaged: its checksum is" in sentence()
    path.write_bytes(content)
