"""Every spelling of layer files, and saves without a pipeline, hold the same model."""

import random
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_lite.checkpoint.find import CheckpointLayout, find_checkpoint
from megatron_lite.checkpoint.load import load_layers, open_source
from megatron_lite.checkpoint.neox import RENAMED
from megatron_lite.models.neox import ARCHITECTURE
from megatron_lite.models.spec import ModelSpec
from megatron_lite.parallel.layout import Layout
from megatron_lite.parallel.mesh import Axis
from tests.models import SMALL, in_transformers, load, logits, write_random
from tests.worlds import in_world

ALONE = Layout()
LAYOUTS = [ALONE, Layout(tp=4), Layout(pp=2, tp=2)]
TOKENS = torch.randint(160, (2, 21), generator=torch.Generator().manual_seed(1))
Tensors = dict[str, Tensor]


def answers(layout: CheckpointLayout, spec: ModelSpec, shape: Layout = ALONE) -> Tensor:
    """The logits of every rank, which are the same."""
    first, *others = in_world(shape, lambda mesh: logits(load(layout, spec, mesh), TOKENS, spec.vocab))
    assert all(torch.equal(first, other) for other in others)
    return first


def rewrite(layout: CheckpointLayout, change: Callable[[int, Tensors], Tensors]) -> None:
    for number in layout.numbers:
        for part in range(layout.tp):
            path = layout.layer_file(number, part)
            torch.save(change(number, torch.load(path)), path)


def renamed(tensors: Tensors) -> Tensors:
    """Under the names that gpt-neox has given since September 2024."""
    for new, old in RENAMED:
        tensors = {name.replace(old, new): tensor for name, tensor in tensors.items()}
    return tensors


def with_frequencies(number: int, tensors: Tensors) -> Tensors:
    """As gpt-neox saved them until March 2024, here with frequencies that would be wrong."""
    block = 2 <= number < SMALL.norm_number
    return {**tensors, "attention.rotary_emb.inv_freq": torch.full((2,), 7.0)} if block else tensors


@pytest.mark.parametrize("cut", [1, 2])
def test_new_names_old_buffers_and_foreign_states_change_no_number(cut: int, tmp_path: Path) -> None:
    layout = write_random(tmp_path, SMALL, tp=cut)
    expected = answers(layout, SMALL)
    rewrite(layout, with_frequencies)
    assert torch.equal(answers(layout, SMALL), expected)
    rewrite(layout, lambda number, tensors: renamed(tensors))
    assert torch.equal(answers(layout, SMALL), expected)
    rewrite(layout, lambda number, tensors: {**tensors, "attention._extra_state": torch.zeros(1)})
    assert torch.equal(answers(layout, SMALL), expected)
    for rank in range(4):
        layout.rank_file(rank).write_bytes(b"never opened")
    assert torch.equal(answers(find_checkpoint(tmp_path), SMALL), expected)


def test_layer_numbers_of_three_digits_are_found(tmp_path: Path) -> None:
    deep = replace(SMALL, layers=97, hidden=16, heads=2, kv_heads=2, head_dim=8, ffn=32)
    layout = write_random(tmp_path, deep, tp=1)
    source = open_source(layout, ARCHITECTURE, deep)
    plan = ARCHITECTURE.plan(deep, Axis("tp"))
    layers = load_layers(plan, [98, 100, 101], source, tp=Axis("tp"), dtype=torch.float32, device=torch.device("cpu"), progress=print)
    for number, layer in layers.items():
        stored = torch.load(tmp_path / "global_step10" / f"layer_{number}-model_00-model_states.pt")
        assert all(torch.equal(tensor, stored[name]) for name, tensor in layer.state_dict().items())


@pytest.mark.parametrize(("cut", "wanted"), [(2, 3), (3, 2), (3, 4), (4, 3)])
def test_cuts_that_do_not_divide_each_other_serve_each_other(cut: int, wanted: int, tmp_path: Path) -> None:
    wide = replace(SMALL, hidden=96, heads=12, kv_heads=12, head_dim=8, ffn=192, vocab=180)
    layout = write_random(tmp_path, wide, tp=cut)
    torch.testing.assert_close(answers(layout, wide, Layout(tp=wanted)), in_transformers(layout, wide)(TOKENS).logits.detach(), atol=1e-4, rtol=0)


def random_states(part: int) -> dict[str, object]:
    """What gpt-neox and DeepSpeed keep beside the weights."""
    return {
        "random_rng_state": random.Random(part).getstate(),
        "np_rng_state": np.random.RandomState(part).get_state(),
        "torch_rng_state": torch.get_rng_state(),
        "rng_tracker_states": {"model-parallel-rng": torch.get_rng_state()},
        "lr_scheduler": {"start_lr": np.float64(1e-4), "num_iters": 10, "decay_style": "cosine"},
        "sparse_tensor_module_names": set(),
        "param_shapes": [{"sequential.0.word_embeddings.weight": torch.Size([80, 64])}],
        "optimizer": None,
        "iteration": 10,
        "dp_world_size": 1,
        "mp_world_size": 2,
        "args": {"num_layers": 4, "tokenizer_type": "HFTokenizer"},
        "ds_version": "0.19.8",
    }


def as_rank_files(layout: CheckpointLayout, folder: Path) -> CheckpointLayout:
    """The same weights as gpt-neox saves them with pipe-parallel-size 0, under its newer names."""
    step = folder / "global_step10"
    step.mkdir(parents=True)
    for part in range(layout.tp):
        module: Tensors = {}
        for number in layout.numbers:
            tensors = renamed(with_frequencies(number, torch.load(layout.layer_file(number, part))))
            module.update({f"sequential.{number}.{name}": tensor for name, tensor in tensors.items()})
        torch.save({"module": module, **random_states(part)}, step / f"mp_rank_{part:02d}_model_states.pt")
    (folder / "latest").write_text("global_step10\n")
    return find_checkpoint(folder)


def with_numpy_1(path: Path) -> None:
    """Respells a pickle as numpy 1 would have written it."""
    with zipfile.ZipFile(path) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in content.items():
            archive.writestr(name, data.replace(b"numpy._core.multiarray", b"numpy.core.multiarray") if name.endswith("data.pkl") else data)


@pytest.mark.parametrize(("cut", "spec"), [(1, SMALL), (2, SMALL), (2, replace(SMALL, tied_head=True, parallel_residual=False))], ids=["1", "2", "tied"])
def test_saves_without_a_pipeline_hold_the_model_of_the_layer_files(cut: int, spec: ModelSpec, tmp_path: Path) -> None:
    layer_files = write_random(tmp_path / "layers", spec, tp=cut)
    rank_files = as_rank_files(layer_files, tmp_path / "ranks")
    assert (rank_files.format, rank_files.tp) == ("sequential", cut)
    for shape in LAYOUTS:
        assert torch.equal(answers(rank_files, spec, shape), answers(layer_files, spec, shape)), str(shape)


def test_the_random_state_of_either_numpy_lies_beside_the_weights_unheeded(tmp_path: Path) -> None:
    layer_files = write_random(tmp_path / "layers", SMALL, tp=2)
    rank_files = as_rank_files(layer_files, tmp_path / "ranks")
    pickles = [zipfile.ZipFile(rank_files.rank_file(part)).read(f"mp_rank_0{part}_model_states/data.pkl") for part in range(2)]
    assert all(b"numpy._core.multiarray\n_reconstruct" in pickled for pickled in pickles)
    for part in range(2):
        with_numpy_1(rank_files.rank_file(part))
    assert torch.equal(answers(rank_files, SMALL), answers(layer_files, SMALL))
