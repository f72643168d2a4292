"""Checkpoints to be broken, and the sentence that reading one ends with."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_lite.checkpoint.find import CheckpointLayout, find_checkpoint
from megatron_lite.config.load import load_config
from megatron_lite.errors import UserError
from megatron_lite.parallel.mesh import single_mesh
from megatron_lite.run import load_stage, prepare

Tensors = dict[str, Tensor]


def refusal(config: Path, **overrides: object) -> str:
    """The sentence that reading this checkpoint ends with."""
    with pytest.raises(UserError) as caught:
        load_stage(prepare(load_config([config], overrides), single_mesh()))
    sentence = str(caught.value)
    assert "\n" not in sentence
    return sentence


def layer(step: Path, number: int, part: int) -> Path:
    return step / f"layer_{number:02d}-model_{part:02d}-model_states.pt"


def edit(path: Path, **tensors: Tensor | None) -> None:
    """Changes, adds or (None) takes out tensors of a layer file; their names are written with __ for dots."""
    content = torch.load(path)
    for name, tensor in tensors.items():
        content.pop(name.replace("__", "."), None)
        if tensor is not None:
            content[name.replace("__", ".")] = tensor
    torch.save(content, path)


def as_sequential_save(step: Path) -> CheckpointLayout:
    """Turns layer files into what gpt-neox saves with pipe-parallel-size 0."""
    layout = find_checkpoint(step.parent)
    for part in range(layout.tp):
        module: Tensors = {}
        for number in layout.numbers:
            module.update({f"sequential.{number}.{name}": tensor for name, tensor in torch.load(layout.layer_file(number, part)).items()})
            layout.layer_file(number, part).unlink()
        torch.save({"module": module}, layout.rank_file(part))
    return find_checkpoint(step.parent)
